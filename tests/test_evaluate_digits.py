import dataclasses
import json

import fake_digits
import numpy as np
import pytest
import tiny

from enat_jax import evaluate_digits
from enat_jax.data.digits import Digits
from enat_jax.evaluation import filled_centres


@pytest.fixture(scope="module")
def digits():
    return fake_digits.make()


@pytest.fixture
def program(digits, tmp_path, monkeypatch):
    """Runs `main` on the made-up digits; returns the files it wrote."""
    training, held_out, token_set = digits
    tiny.write_tokens(tmp_path / "tokens", token_set)
    loaded = []

    class Loader:
        @staticmethod
        def load(path):
            loaded.append(str(path))
            return fake_digits.Model(fake_digits.real)

    monkeypatch.setattr(evaluate_digits.generator, "Generator", Loader)
    monkeypatch.setattr(
        evaluate_digits,
        "_digits",
        lambda split, token_set: {"train": training, "test": held_out}[split],
    )

    def run(*extra):
        out = tmp_path / "deep" / "out"
        arguments = ["--model", "m", "--tokens", str(tmp_path / "tokens"), "--out", str(out)]
        evaluate_digits.main([*arguments, "--num", "100", *extra])
        return out, loaded

    return run


def test_program_writes_and_prints_the_tables(program, capsys):
    out, loaded = program("--compare", "NAT=other/dir")
    assert loaded == ["m", "other/dir"]
    printed = capsys.readouterr().out
    assert printed.strip() == (out / "evaluation.md").read_text().strip()
    assert "| ours | 100 |" in printed and "| NAT | 100 |" in printed
    stored = json.loads((out / "evaluation.json").read_text())
    assert set(stored["context"]) == {"ours", "NAT"}
    assert [row["num_visible"] for row in stored["context"]["ours"]] == [4, 16, 32, 48]
    assert [row["name"] for row in stored["quality"]][-2:] == ["ours", "NAT"]
    assert "improves" in stored["verdicts"]["ours"]
    assert 0 <= stored["found_copies"] <= 1


def test_an_evaluation_of_other_settings_is_left_alone(program, monkeypatch):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_digits.digit_table, "evaluate", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            program()
    with pytest.raises(ValueError, match="seed is 0, now it would be 1: name another --out"):
        program("--seed", "1")


def test_program_takes_held_out_tokens_of_the_held_out_digits_only(program, digits, tmp_path):
    _, held_out, _ = digits
    tiny.write_tokens(tmp_path / "held_out", fake_digits.encoded(held_out))
    program("--heldout-tokens", str(tmp_path / "held_out"))
    with pytest.raises(ValueError, match="not of the held-out digits"):
        program("--heldout-tokens", str(tmp_path / "tokens"))


def test_program_refuses_tokens_of_another_tokenizer(program, digits, tmp_path):
    tiny.write_tokens(tmp_path / "foreign", dataclasses.replace(digits[2], tokenizer="another"))
    with pytest.raises(ValueError, match="another tokenizer"):
        program("--tokens", str(tmp_path / "foreign"))


@pytest.mark.parametrize("entry", ["NAT", "=dir", "NAT=", "ours=dir"])
def test_program_explains_compare(program, entry):
    with pytest.raises(ValueError, match="NAME=DIR"):
        program("--compare", entry)


def test_real_digits_are_prepared_as_the_training_tokens_were(digits):
    identity = Digits(split="train", size=16, rotation=10.0).identity()
    token_set = dataclasses.replace(digits[2], preprocessing={"source": identity})
    pictures, labels = evaluate_digits._digits("test", token_set)
    source = Digits(split="test", size=16)
    np.testing.assert_array_equal(labels, source.labels)
    plain = source.gather(np.arange(len(source)))["images"]  # no rotation: not augmented
    np.testing.assert_array_equal(pictures, plain)


@pytest.mark.parametrize(
    "source", [None, {"source": "digits", "split": "test"}, {"source": "files", "split": "train"}]
)
def test_only_training_tokens_of_digits_will_do(digits, source):
    token_set = dataclasses.replace(digits[2], preprocessing={"source": source})
    with pytest.raises(ValueError, match="--split train"):
        evaluate_digits._digits("test", token_set)


@pytest.mark.slow
def test_hidden_centres_are_filled_and_measured_against_two_controls():
    """With a model of random weights: what the rows say, not how good they are."""
    model = dataclasses.replace(
        tiny.make_generator(),
        model=tiny.TRANSFORMER.clone(num_classes=10),
        params=tiny.random_params(
            tiny.TRANSFORMER.clone(num_classes=10).init,
            np.zeros((1, tiny.NUM_TOKENS), np.int32),
            np.zeros((1,), np.int32),
            seed=3,
        ),
        class_names=tuple("0123456789"),
    )
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 10
    training = rng.integers(0, 256, (30, *tiny.IMAGE_SIZE, 1)).astype(np.uint8), labels
    held_out = training[0][:10], labels[:10]
    codes = model.tokenizer.encode(training[0])
    token_set = tiny.token_set(
        codes, labels, codebook_size=tiny.CODES, class_names=model.class_names, tokenizer="x"
    )
    judge = filled_centres.ClassAccuracy(*training)
    rows = {
        row.name: row for row in filled_centres.evaluate(model, judge, held_out, token_set, grow=0)
    }
    assert list(rows) == ["reconstructed", "marginals", "ignoring what is kept", "filled"]
    # Of each class there are three training digits, and the held-out one is among them.
    assert 0 < rows["marginals"].loss < np.log(3.5)
    assert rows["filled"].loss != rows["ignoring what is kept"].loss
    assert rows["reconstructed"].loss is None
    table = filled_centres.markdown(list(rows.values()), judge, "digits")
    assert f"| filled | {rows['filled'].loss:.3f} ± " in table

    masks = filled_centres.centres((1, 8, 8))
    assert masks.sum() == 16 and masks[0, 2:6, 2:6].all()
