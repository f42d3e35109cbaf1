import fractions
import math

import numpy as np
import pytest

from enat_jax.metrics import fid, moments
from enat_jax.metrics.moments import Moments


def blocks(features, *ends):
    return np.split(features, ends)


def streamed(parts, start=None):
    state = Moments.empty(parts[0].shape[1]) if start is None else start
    for part in parts:
        state = state.add(part)
    return state


def same_bits(first, second):
    pairs = zip(first.arrays().values(), second.arrays().values(), strict=True)
    return all(one.tobytes() == two.tobytes() for one, two in pairs)


def test_a_literal_stream():
    state = Moments.empty(2).add(np.array([[1, 0], [3, 0]], np.float32)).add(np.array([[5, 6]]))
    assert state.count == 3
    assert state.mean.tolist() == [3, 2]
    np.testing.assert_allclose(state.scatter, [[8, 12], [12, 24]])
    np.testing.assert_allclose(state.covariance(), [[4, 6], [6, 12]])
    assert state.mean.dtype == state.scatter.dtype == np.float64


def test_float32_far_from_zero_against_exact_arithmetic():
    """Mean a million times the spread, where the sum about the origin keeps four digits."""
    rng = np.random.default_rng(0)
    features = (2.0**20 + rng.normal(size=(300, 2)) * [1, 4]).astype(np.float32)
    state = streamed(blocks(features, 1, 50, 51, 180))
    exact = [[fractions.Fraction(float(value)) for value in row] for row in features]
    mean = [sum(row[i] for row in exact) / 300 for i in range(2)]
    np.testing.assert_allclose(state.mean, [float(value) for value in mean], rtol=1e-15)
    for i in range(2):
        for j in range(2):
            expected = sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in exact)
            # One float64 of a mean near 2**20 is 1e-10 of the spread, and no result is closer.
            assert abs(state.scatter[i, j] - float(expected)) < 1e-10 * 300


def test_the_mean_of_a_long_block_is_correctly_rounded():
    values = np.random.default_rng(6).uniform(1e6, 1e6 + 1, 20_000)
    mean = Moments.empty(2).add(np.stack([values, -values], axis=1)).mean
    expected = math.fsum(values) / 20_000
    np.testing.assert_allclose(mean, [expected, -expected], rtol=2.3e-16)


def test_the_same_as_all_at_once():
    features = np.random.default_rng(1).gamma(1.0, size=(400, 9)).astype(np.float32)
    state = streamed(blocks(features, 7, 100, 250))
    mean, covariance = fid.gaussian_statistics(features)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(state.covariance(), covariance, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(state.scatter, state.scatter.T)


def test_merging_is_associative_and_commutative_to_rounding():
    rng = np.random.default_rng(2)
    a, b, c = (Moments.empty(4).add(rng.normal(i * 100, 1, (20 * i + 1, 4))) for i in range(3))
    for other in (a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert other.count == 1 + 21 + 41
        np.testing.assert_allclose(other.mean, a.merge(b).merge(c).mean, rtol=1e-14)
        np.testing.assert_allclose(other.scatter, a.merge(b).merge(c).scatter, rtol=1e-13)


def test_saved_and_continued_is_the_same_bits(tmp_path):
    parts = blocks(np.random.default_rng(3).normal(5, 1, (90, 6)).astype(np.float32), 30, 60)
    np.savez(tmp_path / "state.npz", **streamed(parts[:2]).arrays())
    with np.load(tmp_path / "state.npz") as arrays:
        state = Moments.from_arrays(arrays)
    assert same_bits(streamed(parts[2:], state), streamed(parts))


def test_nothing_changes_nothing():
    state = Moments.empty(3).add(np.random.default_rng(4).normal(size=(5, 3)))
    empty = Moments.empty(3).add(np.zeros((0, 3)))
    assert empty.count == 0
    for other in (state.merge(empty), empty.merge(state), state.add(np.zeros((0, 3)))):
        assert same_bits(other, state)


def test_a_gaussian_of_unknown_number_has_the_same_face():
    known = moments.Gaussian(np.zeros(2), np.eye(2))
    assert known.count is None
    np.testing.assert_array_equal(known.covariance(), np.eye(2))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((4, 2)), r"need \[n, 3\]"),
        (np.zeros(3), r"need \[n, 3\]"),
        (np.array([[0, 0, 0], [0, np.nan, 0]]), "row 1"),
    ],
)
def test_bad_features_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        Moments.empty(3).add(features)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Moments.empty(0)
    with pytest.raises(ValueError, match="2 and of 3 dimensions"):
        Moments.empty(2).merge(Moments.empty(3))
    with pytest.raises(ValueError, match="there are 1"):
        Moments.empty(2).add(np.ones((1, 2))).covariance()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": np.float64(3)}, "whole number"),
        ({"count": np.int64(-1)}, "whole number"),
        ({"mean": np.zeros(2, np.float32)}, "float64"),
        ({"mean": np.zeros(3)}, r"\[d\]"),
        ({"scatter": np.full((2, 2), np.inf)}, "infinity"),
    ],
)
def test_damaged_arrays_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Moments.from_arrays(Moments.empty(2).arrays() | change)


def test_incomplete_arrays_are_refused():
    with pytest.raises(ValueError, match="without count, scatter"):
        Moments.from_arrays({"mean": np.zeros(2)})
