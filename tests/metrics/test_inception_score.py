import math

import numpy as np
import pytest

from enat_jax.metrics import inception_score
from enat_jax.metrics.inception_score import Sums


def one_hot(labels, num_classes):
    return np.eye(num_classes, dtype=np.float32)[labels]


def test_a_classifier_without_a_clue_scores_one():
    found = inception_score.scores(np.full((50, 4), 0.25), num_splits=5)
    assert found == pytest.approx((1, 0), abs=1e-12)


def test_certain_and_balanced_scores_the_number_of_classes():
    mean, std = inception_score.scores(one_hot(np.arange(12) % 6, 6), num_splits=1)
    assert (mean, std) == (pytest.approx(6), 0)


def test_certain_of_one_class_scores_one():
    assert inception_score.scores(one_hot(np.zeros(20, int), 3), num_splits=2)[0] == 1


def test_two_images_by_hand():
    """Rows (3/4, 1/4) and (1/4, 3/4): mean (1/2, 1/2); log 2 less an entropy of 0.5623 nats."""
    mean, _ = inception_score.scores(np.array([[0.75, 0.25], [0.25, 0.75]]), num_splits=1)
    assert mean == pytest.approx(2 * 0.75**0.75 * 0.25**0.25)


def test_mean_and_deviation_over_splits():
    """One split of one class, one of two: scores 1 and 2."""
    sums = Sums.empty(2, 2).add(one_hot([0, 0, 0, 1], 2), np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(sums.split_scores(), [1, 2])
    assert sums.score() == (pytest.approx(1.5), pytest.approx(0.5))


def test_images_ordered_by_class_score_as_well_as_mixed_ones():
    ordered = one_hot(np.repeat(np.arange(10), 100), 10)
    assert inception_score.scores(ordered)[0] > 9
    in_order = Sums.empty(10, 10).add(ordered, np.repeat(np.arange(10), 100))
    assert in_order.score()[0] == pytest.approx(1)


def test_splits_are_fixed_and_equally_large():
    splits = inception_score.assign_splits(13, 4)
    assert splits.tolist() == inception_score.assign_splits(13, 4, seed=0).tolist()
    assert sorted(np.bincount(splits).tolist()) == [3, 3, 3, 4]
    assert splits.tolist() != inception_score.assign_splits(13, 4, seed=1).tolist()


def test_a_stream_in_parts_is_the_same():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(7, 0.3), 90).astype(np.float32)
    splits = inception_score.assign_splits(90, 3)
    first = Sums.empty(3, 7).add(probabilities[:20], splits[:20])
    assert first.add(probabilities[20:], splits[20:]).score() == pytest.approx(
        inception_score.scores(probabilities, num_splits=3), rel=1e-12
    )


def test_the_definition():
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(5), 40)
    divergences = [
        sum(a * math.log(a / b) for a, b in zip(row, p.mean(0), strict=True)) for row in p
    ]
    found, _ = inception_score.scores(p, num_splits=1)
    assert found == pytest.approx(math.exp(np.mean(divergences)), rel=1e-12)


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (np.full((3, 2), 0.4), "row 0 is no distribution"),
        (np.array([[0.5, 0.5], [1.5, -0.5]]), "row 1 is no distribution"),
        (np.array([[0.5, 0.5], [np.nan, 0.5]]), "row 1 is no distribution"),
        (np.zeros(3), "need"),
        (np.zeros((0, 3)), "0 images cannot be divided into 1"),
    ],
)
def test_what_are_no_probabilities_are_refused(probabilities, message):
    with pytest.raises(ValueError, match=message):
        inception_score.scores(probabilities, num_splits=1)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="9 images cannot be divided into 10 splits"):
        inception_score.scores(np.full((9, 2), 0.5))
    with pytest.raises(ValueError, match="a split has no image"):
        Sums.empty(2, 2).add(np.full((1, 2), 0.5), np.zeros(1, int)).score()
    with pytest.raises(ValueError, match=r"need \[b, 3\]"):
        Sums.empty(2, 3).add(np.full((1, 2), 0.5), np.zeros(1, int))
