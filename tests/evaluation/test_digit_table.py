import fake_digits
import numpy as np
import pytest

from enat_jax.evaluation import digit_table
from enat_jax.metrics import digit_quality


@pytest.fixture(scope="module")
def digits():
    return fake_digits.make()


def rows_by_name(evaluation):
    return {row.name: row for row in evaluation.quality}


def test_each_row_says_what_it_should(digits):
    training, held_out, token_set = digits
    models = {
        "ours": fake_digits.Model(fake_digits.real),
        "copier": fake_digits.Model(lambda labels, rng: training[0][: len(labels)]),
        "one picture": fake_digits.Model(lambda labels, rng: held_out[0][labels]),
        "wrong class": fake_digits.Model(lambda labels, rng: fake_digits.real(1 - labels, rng)),
    }
    evaluation = digit_table.evaluate(models, training, held_out, token_set, num=200)
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
    evaluation = digit_table.evaluate(
        {"ours": fake_digits.Model(fake_digits.real)}, training, held_out, token_set, num=100
    )
    row = rows_by_name(evaluation)["real, held out"]
    assert row.by_definition == ("diversity", "frechet_distance", "copies")
    line = next(x for x in evaluation.markdown().splitlines() if x.startswith("| real, held out"))
    assert line == "| real, held out | 100 | 100.0% | 1.00 * | 0.000 * | 1.0% * |"


def test_the_control_has_the_marginals_and_only_those(digits):
    """Its mean image is right, though no single image is."""
    training, held_out, token_set = digits
    model = fake_digits.Tokenizer()
    labels = digit_quality.balanced_labels(400, 2)
    drawn = digit_quality.independent_tokens(
        token_set.rows["tokens"],
        token_set.rows["label"],
        labels,
        fake_digits.CODES,
        np.random.default_rng(0),
    )
    control, training_rebuilt = model.decode(drawn), model.decode(token_set.rows["tokens"])
    np.testing.assert_allclose(control.mean(axis=0), training_rebuilt.mean(axis=0), atol=8)
    row_sums = training_rebuilt[training[1] == 0].mean(axis=(2, 3)).max(axis=1)
    control_sums = control[labels == 0].mean(axis=(2, 3)).max(axis=1)
    assert np.median(control_sums) < 0.7 * np.median(row_sums)


def test_everything_follows_from_the_seed(digits):
    runs = [
        digit_table.evaluate(
            {"ours": fake_digits.Model(fake_digits.real)}, *digits, num=100, seed=seed
        ).markdown()
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
    assert words in digit_table.verdict(*scores_of(*accuracies))


def test_verdict_compares_within_images():
    """Images differ much more than the gain, but each of them gains."""
    means = (0.40, 0.41, 0.42, 0.43)
    assert "every step" in digit_table.verdict(*scores_of(*means, spread=0.3))
    assert "NOT" in digit_table.verdict(*scores_of(*means, spread=0.3, pairs=0.5))


def test_verdict_needs_the_loss_to_fall_as_well():
    accuracy, loss = scores_of(0.40, 0.43, 0.46, 0.50)
    assert "NOT" in digit_table.verdict(accuracy, loss[::-1])


def test_masked_scores_average_tokens_and_orders():
    class Known:
        def masked_scores(self, token_ids, labels, num_visible, seed):
            hits = np.array([[True, False], [True, True]])
            return np.full((2, 2), seed + 1.0), hits

    accuracy, loss = digit_table.masked_scores(
        Known(), np.zeros((2, 16), int), np.zeros(2, int), 3, 0
    )
    np.testing.assert_allclose(accuracy, [[0.5, 1.0]] * 4)
    np.testing.assert_allclose(loss, [[2.0, 2.0]] * 4)
    rows = digit_table.context(accuracy, loss, num_tokens=16)
    assert [(row.visible, row.num_visible) for row in rows] == [
        ("1/16", 1),
        ("1/4", 4),
        ("1/2", 8),
        ("3/4", 12),
    ]
    assert rows[0].accuracy == 0.75 and rows[0].accuracy_error == pytest.approx(0.25)
    assert rows[0].loss == 2 and rows[0].loss_error == 0
    with pytest.raises(ValueError, match="num_draws=0"):
        digit_table.masked_scores(Known(), np.zeros((2, 16), int), np.zeros(2, int), 0, 0)
