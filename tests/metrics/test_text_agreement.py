"""CLIP scores and R-precision against numbers computed by hand."""

import numpy as np
import pytest

from enat_jax.metrics import bootstrap, text_agreement


def test_scores_are_a_hundred_cosines_cut_off_at_zero():
    images = np.array([[3.0, 4.0], [0.5, 0.0], [1.0, 1.0]])
    texts = np.array([[1.0, 0.0], [-2.0, 0.0]])
    found = text_agreement.scores(images, texts, np.array([0, 1, 0]))
    np.testing.assert_allclose(found, [60.0, 0.0, 100 / np.sqrt(2)])
    assert text_agreement.scores(np.zeros((1, 2)), texts, np.array([0])).tolist() == [0.0]


def test_a_text_is_found_if_no_other_one_is_as_near():
    texts = np.eye(3)
    images = np.array([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.1, 5.0]])
    found = text_agreement.retrieved(images, texts, np.array([0, 1, 0, 2]))
    assert found.tolist() == [True, False, False, True]  # the third is as near to both
    assert text_agreement.others_of(3) == 2 and text_agreement.others_of(5000) == 99


def test_others_are_99_different_ones_and_chance_is_a_hundredth():
    drawn = [text_agreement._drawn(150, own, 99, (0, own)) for own in range(150)]
    for own, row in enumerate(drawn):
        assert row[0] == own and len(set(row.tolist())) == 100 and row.max() < 150
    assert len({tuple(row) for row in drawn}) == 150
    assert set(np.concatenate(drawn)) == set(range(150))
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(3000, 8)), rng.normal(size=(400, 8))
    share = text_agreement.retrieved(images, texts, rng.integers(0, 400, 3000)).mean()
    assert 0.004 < share < 0.018


def test_what_is_found_does_not_depend_on_the_other_images():
    rng = np.random.default_rng(1)
    texts = rng.normal(size=(130, 6))
    images, own = texts[:100] + rng.normal(0, 0.7, (100, 6)), np.arange(100)
    whole = text_agreement.retrieved(images, texts, own)
    np.testing.assert_array_equal(
        text_agreement.retrieved(images[:70], texts, own[:70]), whole[:70]
    )
    assert 0.1 < whole.mean() < 0.9


def test_the_error_is_over_texts():
    values = np.random.default_rng(2).normal(size=40)
    alone = text_agreement.error_of_mean(values, np.arange(40))
    assert alone == pytest.approx(bootstrap.of_mean(values))
    # Ten copies of each image are no more evidence than one.
    copies = text_agreement.error_of_mean(np.repeat(values, 10), np.repeat(np.arange(40), 10))
    assert copies == pytest.approx(alone)
