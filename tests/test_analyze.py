"""The paper's analyses."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from enat_jax import analyze
from enat_jax.evaluation import quadrants, similarity
from enat_jax.inference import generator, masked_scores
from enat_jax.models import nat
from enat_jax.schedules import paper_costs


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator()


@pytest.fixture(scope="module")
def measured(model):
    """Five samples in batches of two: the last is filled up with samples that do not count."""
    done = []
    found = similarity.similarities(
        model, 5, seed=3, num_maps=3, batch_size=2, progress=done.append
    )
    assert done == [2, 4, 5]
    return found


def by_hand(model, labels, first):
    """Tokens and similarities of two samples."""
    index = first + np.arange(2)
    args = model.model, model.params
    tokens, step = similarity.draw(*args, model.settings, labels, index, seed=3)
    return tokens, similarity.step_similarity(*args, tokens, step, labels, 3)


def test_numbers_are_of_all_samples_and_classes_take_turns(model, measured):
    result, maps = measured
    pairs = [by_hand(model, np.array(x), i) for x, i in (([0, 1], 0), ([2, 0], 2), ([1, 1], 4))]
    tokens = np.concatenate([tokens for tokens, _ in pairs])[:5]
    found = zip(*(of_pair for _, of_pair in pairs), strict=True)
    found = similarity.Similarities(*(np.concatenate(x)[:5] for x in found))
    np.testing.assert_array_equal(maps["tokens"], tokens[:3])
    np.testing.assert_array_equal(maps["group"], found.group[:3])
    np.testing.assert_allclose(maps["adjacent"], found.adjacent[:3], atol=1e-5)
    newly = np.where(found.group == 1, found.adjacent, 0).sum(-1) / (found.group == 1).sum(-1)
    np.testing.assert_allclose(
        result["adjacent"]["newly revealed"]["mean"], newly.mean(0), atol=1e-5
    )
    np.testing.assert_allclose(
        result["adjacent"]["newly revealed"]["standard_error"],
        newly.std(0, ddof=1) / np.sqrt(5),
        atol=1e-5,
    )
    for name in ("overlap", "same_code"):
        expected = np.nansum(getattr(found, name), axis=-1) / (found.group == 2).sum(-1)
        np.testing.assert_allclose(result[name]["mean"], expected.mean(0), atol=1e-5)
    masked = found.adjacent[found.group == 2].reshape(5, -1).mean()
    assert result["overall"]["masked"]["mean"] == pytest.approx(masked, abs=1e-5)


def test_the_result_says_what_it_is_of(model, measured):
    """16 tokens in 3 steps: 13 are masked after the first, 8 after the second."""
    result = json.loads(json.dumps(measured[0]))
    assert result["tokens"] == {
        "already visible": [0, 3],
        "newly revealed": [3, 5],
        "masked": [13, 8],
    }
    assert (result["num_images"], result["num_labels"], result["kind"]) == (5, 3, "ENAT")
    assert result["transformer"] == model.fingerprint and result["sampler"]["num_steps"] == 3
    assert result["adjacent"]["already visible"]["mean"][0] is None


def test_the_table_has_a_row_a_step(measured):
    lines = similarity.similarity_markdown(measured[0]).splitlines()
    assert lines[2].startswith("| 1 | - (0) | ") and "(0.188)" in lines[2]
    assert lines[3].startswith("| 2 | ")
    assert {line.count("|") for line in lines[:4]} == {lines[0].count("|")}


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


def test_too_few_samples_or_steps_are_refused(model):
    with pytest.raises(ValueError, match="num=1 must be at least 2"):
        similarity.similarities(model, 1)
    with pytest.raises(ValueError, match="1 step: there are no adjacent steps"):
        similarity.similarities(model.with_settings(num_steps=1), 4)


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


@pytest.fixture(scope="module")
def of_nat():
    """A model of all four quadrants, and three images of it."""
    network = nat.NAT(
        num_tokens=16, codebook_size=tiny.CODES, num_classes=3, width=8, num_heads=1, num_layers=1
    )
    params = tiny.random_params(network.init, np.zeros((1, 16), int), np.zeros(1, int), seed=0)
    model = generator.Generator(network, params, tiny.make_tokenizer(), tiny.CLASSES, tiny.SETTINGS)
    codes = np.random.default_rng(0).integers(0, tiny.CODES, (3, 16))
    return model, codes, np.array([0, 1, 2])


def test_losses_without_a_quadrant_are_compared_image_by_image(of_nat, monkeypatch):
    """In batches of two, of which the last reaches back."""
    model, codes, labels = of_nat
    monkeypatch.setattr(masked_scores, "VISIBLE_SHARES", (1 / 4,))
    done = []
    found = quadrants.quadrant_losses(model, codes, labels, batch_size=2, progress=done.append)
    assert done == list(range(1, 11))

    def losses(disabled):
        cut = dataclasses.replace(model, model=model.model.clone(disabled_attention=disabled))
        scores = [
            cut.masked_scores(codes[i : i + 2], labels[i : i + 2], 4, seed=i)[0] for i in (0, 1)
        ]
        return np.concatenate([scores[0], scores[1][1:]]).mean(axis=1)

    whole, cut = losses("none"), losses("masked_from_visible")
    assert found["none"]["loss"]["mean"] == pytest.approx([whole.mean()], abs=1e-5)
    assert found["none"]["increase"]["mean"] == [0]
    increase = found["masked_from_visible"]["increase"]
    assert increase["mean"] == pytest.approx([(cut - whole).mean()], abs=1e-5)
    assert increase["standard_error"] == pytest.approx(
        [(cut - whole).std(ddof=1) / 3**0.5], abs=1e-5
    )
    table = quadrants.quadrants_markdown({"num_images": 3, "quadrants": found}).splitlines()
    assert table[0] == "| without | 0.25 visible |" and table[2].startswith("| nothing | ")
    assert table[5].startswith(f"| masked_from_visible | {(cut - whole).mean():+.4f} ± ")


def test_quadrants_are_a_nats(model, of_nat):
    with pytest.raises(ValueError, match="those of a NAT that has all four"):
        quadrants.quadrant_losses(model, np.zeros((2, 16), int), np.zeros(2, int))
    with pytest.raises(ValueError, match="1 images: a standard error needs two"):
        quadrants.quadrant_losses(of_nat[0], np.zeros((1, 16), int), np.zeros(1, int))


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
