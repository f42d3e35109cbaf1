"""The paper's analyses."""

import json

import numpy as np
import pytest
import tiny

from enat_jax import analyze
from enat_jax.evaluation import paper_costs
from enat_jax.inference import generator


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator()


def test_the_program_writes_table_numbers_and_plots(model, tmp_path, capsys):
    model.save(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--num", "2", "--maps", "1"]
    analyze.main(["similarity", *arguments, "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "similarity.json",
        "similarity.md",
        "similarity.png",
        "maps.png",
    }
    assert (tmp_path / "out" / "similarity.md").read_text() in capsys.readouterr().out


def test_a_tokenizer_is_no_model(tmp_path):
    tiny.make_tokenizer().save(tmp_path)
    with pytest.raises(ValueError, match="is a tokenizer: name the `model` directory"):
        analyze.main(["similarity", "--model", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_no_samples_are_a_mistake_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        analyze.main(["similarity", "--model", "a", "--out", "b", "--num", "0"])
    assert "'0' is not a whole number from 1" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "4294967296"])  # JAX would take that for 0
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed={seed} must be a whole number from 0 to"):
        analyze.main(["similarity", "--model", "a", "--out", "b", "--seed", seed])


def test_a_plot_has_room_for_few_maps(tmp_path):
    with pytest.raises(ValueError, match="--maps 17: one plot has room for 16 samples"):
        analyze.main(
            ["similarity", "--model", str(tmp_path), "--out", str(tmp_path), "--maps", "17"]
        )


def test_tokens_of_another_tokenizer_are_refused(model, tmp_path, monkeypatch):
    made = tiny.token_set(
        np.zeros((2, 16), int),
        np.zeros(2, int),
        codebook_size=tiny.CODES,
        class_names=tiny.CLASSES,
        tokenizer="another",
    )
    tiny.write_tokens(tmp_path / "tokens", made)
    monkeypatch.setattr(generator.Generator, "load", lambda directory: model)
    arguments = ["--model", str(tmp_path), "--tokens", str(tmp_path / "tokens")]
    with pytest.raises(ValueError, match="another tokenizer than the model's"):
        analyze.main(["quadrants", *arguments, "--out", str(tmp_path / "out")])


def test_the_costs_are_written_as_numbers_table_and_plot(tmp_path, capsys):
    analyze.main(["costs", "--out", str(tmp_path)])
    rows = paper_costs.rows()
    assert json.loads((tmp_path / "costs.json").read_text()) == rows
    assert (tmp_path / "costs.md").read_text() == paper_costs.markdown(rows)
    assert paper_costs.markdown(rows) in capsys.readouterr().out
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")


def test_where_nothing_can_be_written_nothing_is_computed(tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(NotADirectoryError, match="out"):
        analyze.main(["similarity", "--model", "nowhere", "--out", str(tmp_path / "out")])
