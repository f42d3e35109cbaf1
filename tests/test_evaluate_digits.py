import dataclasses
import json

import numpy as np
import pytest
import tiny

from enat_jax import evaluate_digits
from enat_jax.data.digits import Digits
from enat_jax.metrics import digit_quality

GRID = 8
CODES = 16


class Tokenizer:
    """One token for each 4x4 block: its brightness in 16 levels."""

    fingerprint = "levels of brightness"

    def encode(self, pictures):
        blocks = np.asarray(pictures).reshape(-1, GRID, 4, GRID, 4).mean(axis=(2, 4))
        return (blocks // 16).astype(np.int32).reshape(-1, GRID * GRID)

    def decode(self, token_ids):
        levels = (np.asarray(token_ids) * 16 + 8).astype(np.uint8).reshape(-1, GRID, GRID)
        return levels.repeat(4, axis=1).repeat(4, axis=2)[..., None]


class Model:
    """Draws images as it is told, and predicts tokens better the more it sees."""

    tokenizer = Tokenizer()
    class_names = ("0", "1")

    def __init__(self, draw):
        self.draw = draw

    def sample(self, labels, seed=0):
        return self.draw(np.asarray(labels), np.random.default_rng(seed + 100))

    def masked_scores(self, token_ids, labels, num_visible, seed):
        assert token_ids.shape == (len(labels), GRID * GRID)
        rng = np.random.default_rng([seed, num_visible])
        scores = rng.uniform(size=(len(labels), GRID * GRID - num_visible))
        return 2 - scores - num_visible / 64, scores < 0.4 + num_visible / 256


def real(labels, rng):
    """Class 0 is a bar from left to right, class 1 from top to bottom; the bar's place varies.

    All its pixels move together, which independent tokens cannot imitate.
    """
    pictures = np.zeros((len(labels), 32, 32, 1), np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        at = 4 * int(rng.integers(1, 6))
        bar = (slice(at, at + 4), slice(None)) if label == 0 else (slice(None), slice(at, at + 4))
        picture[bar] = rng.integers(150, 250)
    noise = rng.integers(0, 20, pictures.shape)
    return (pictures // 2 + noise).astype(np.uint8)


def encoded(digits):
    return tiny.token_set(
        Tokenizer().encode(digits[0]),
        digits[1],
        codebook_size=CODES,
        class_names=("0", "1"),
        tokenizer=Tokenizer.fingerprint,
    )


@pytest.fixture(scope="module")
def digits():
    rng = np.random.default_rng(0)
    training_labels, held_out_labels = np.arange(300) % 2, np.arange(100) % 2
    training = real(training_labels, rng), training_labels
    held_out = real(held_out_labels, rng), held_out_labels
    token_set = encoded(training)
    return training, held_out, token_set


def rows_by_name(evaluation):
    return {row.name: row for row in evaluation.quality}


def test_each_row_says_what_it_should(digits):
    training, held_out, token_set = digits
    models = {
        "ours": Model(real),
        "copier": Model(lambda labels, rng: training[0][: len(labels)]),
        "one picture": Model(lambda labels, rng: held_out[0][labels]),
        "wrong class": Model(lambda labels, rng: real(1 - labels, rng)),
    }
    evaluation = evaluate_digits.evaluate(models, training, held_out, token_set, num=200)
    rows = rows_by_name(evaluation)
    assert list(rows)[:4] == [
        "real, held out",
        "real, training",
        "held out, reconstructed",
        "control",
    ]
    floor = rows["real, training"]
    assert floor.num_images == 200
    assert floor.class_accuracy == 1 and 0.9 < floor.diversity < 1.1 and floor.copies < 0.1
    # As good as real where the images are real, and told from the control.
    assert rows["ours"].frechet_distance < 3 * floor.frechet_distance
    assert rows["ours"].frechet_distance < 0.5 * rows["control"].frechet_distance
    assert 0.9 < rows["ours"].diversity < 1.1
    assert rows["ours"].copies < 0.1
    # Every vice shows in its own column.
    assert rows["copier"].copies == 1
    assert rows["one picture"].diversity < 0.01
    assert rows["wrong class"].class_accuracy < 0.1


def test_held_out_row_marks_what_holds_by_definition(digits):
    training, held_out, token_set = digits
    evaluation = evaluate_digits.evaluate(
        {"ours": Model(real)}, training, held_out, token_set, num=100
    )
    row = rows_by_name(evaluation)["real, held out"]
    assert row.by_definition == ("diversity", "frechet_distance", "copies")
    line = next(x for x in evaluation.markdown().splitlines() if x.startswith("| real, held out"))
    assert line == "| real, held out | 100 | 100.0% | 1.00 * | 0.000 * | 1.0% * |"


def test_the_control_has_the_marginals_and_only_those(digits):
    """Its mean image is right, though no single image is."""
    training, held_out, token_set = digits
    model = Tokenizer()
    labels = digit_quality.balanced_labels(400, 2)
    drawn = digit_quality.independent_tokens(
        token_set.rows["tokens"], token_set.rows["label"], labels, CODES, np.random.default_rng(0)
    )
    control, training_rebuilt = model.decode(drawn), model.decode(token_set.rows["tokens"])
    np.testing.assert_allclose(control.mean(axis=0), training_rebuilt.mean(axis=0), atol=8)
    row_sums = training_rebuilt[training[1] == 0].mean(axis=(2, 3)).max(axis=1)
    control_sums = control[labels == 0].mean(axis=(2, 3)).max(axis=1)
    assert np.median(control_sums) < 0.7 * np.median(row_sums)


def test_everything_follows_from_the_seed(digits):
    runs = [
        evaluate_digits.evaluate({"ours": Model(real)}, *digits, num=100, seed=seed).markdown()
        for seed in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


def scores_of(*means, spread=0.1, pairs=0.01):
    """Accuracy and loss `[4, 400]` with these mean accuracies.

    `spread` is what one image differs from another, `pairs` what it differs from itself.
    """
    rng = np.random.default_rng(0)
    images = spread * rng.normal(size=400)
    noise = pairs * rng.normal(size=(4, 400))
    accuracy = np.array(means)[:, None] + images - images.mean() + noise
    accuracy += np.array(means)[:, None] - accuracy.mean(axis=1, keepdims=True)
    return accuracy, 2 - accuracy


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ((0.40, 0.43, 0.46, 0.50), "improves with context at every step"),
        ((0.40, 0.43, 0.43, 0.50), "on the whole, but not at 1/4 to 1/2"),
        ((0.43, 0.43, 0.43, 0.43), "does NOT improve"),
        ((0.50, 0.46, 0.43, 0.40), "does NOT improve"),
    ],
)
def test_verdict(accuracies, words):
    assert words in evaluate_digits.verdict(*scores_of(*accuracies))


def test_verdict_compares_within_images():
    """Images differ much more than the gain, but each of them gains."""
    means = (0.40, 0.41, 0.42, 0.43)
    assert "every step" in evaluate_digits.verdict(*scores_of(*means, spread=0.3))
    assert "NOT" in evaluate_digits.verdict(*scores_of(*means, spread=0.3, pairs=0.5))


def test_verdict_needs_the_loss_to_fall_as_well():
    accuracy, loss = scores_of(0.40, 0.43, 0.46, 0.50)
    assert "NOT" in evaluate_digits.verdict(accuracy, loss[::-1])


def test_masked_scores_average_tokens_and_orders():
    class Known:
        def masked_scores(self, token_ids, labels, num_visible, seed):
            hits = np.array([[True, False], [True, True]])
            return np.full((2, 2), seed + 1.0), hits

    accuracy, loss = evaluate_digits.masked_scores(
        Known(), np.zeros((2, 16), int), np.zeros(2, int), 3, 0
    )
    np.testing.assert_allclose(accuracy, [[0.5, 1.0]] * 4)
    np.testing.assert_allclose(loss, [[2.0, 2.0]] * 4)
    rows = evaluate_digits.context(accuracy, loss, num_tokens=16)
    assert [(row.visible, row.num_visible) for row in rows] == [
        ("1/16", 1),
        ("1/4", 4),
        ("1/2", 8),
        ("3/4", 12),
    ]
    assert rows[0].accuracy == 0.75 and rows[0].accuracy_error == pytest.approx(0.25)
    assert rows[0].loss == 2 and rows[0].loss_error == 0
    with pytest.raises(ValueError, match="num_draws=0"):
        evaluate_digits.masked_scores(Known(), np.zeros((2, 16), int), np.zeros(2, int), 0, 0)


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
            return Model(real)

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


def test_program_takes_held_out_tokens_of_the_held_out_digits_only(program, digits, tmp_path):
    _, held_out, _ = digits
    tiny.write_tokens(tmp_path / "held_out", encoded(held_out))
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
