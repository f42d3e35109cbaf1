import numpy as np
import pytest
import scipy.linalg

from enat_jax import fid


def random_covariance(seed, dimensions, rank):
    factor = np.random.default_rng(seed).normal(size=(dimensions, rank))
    return factor @ factor.T / rank


def test_statistics_of_a_literal_matrix():
    mean, covariance = fid.gaussian_statistics(np.array([[1, 0], [3, 0], [5, 6]], np.uint8))
    np.testing.assert_allclose(mean, [3, 2])
    np.testing.assert_allclose(covariance, [[4, 6], [6, 12]])
    assert covariance.dtype == np.float64


def test_float32_features_far_from_zero_keep_their_covariance():
    values = (1000 + np.random.default_rng(0).normal(size=(500, 3))).astype(np.float32)
    _, covariance = fid.gaussian_statistics(values)
    np.testing.assert_allclose(covariance, np.cov(values.astype(np.float64).T), rtol=1e-12)


def test_equal_gaussians_have_distance_zero():
    covariance = random_covariance(0, 50, 60)
    mean = np.arange(50.0)
    assert fid.frechet_distance(mean, covariance, mean, covariance) < 1e-10


def test_shifted_mean_adds_its_square():
    covariance = random_covariance(0, 5, 10)
    distance = fid.frechet_distance(np.zeros(5), covariance, np.full(5, 2.0), covariance)
    assert distance == pytest.approx(20)


def test_diagonal_covariances_have_a_closed_form():
    rng = np.random.default_rng(1)
    first, second = rng.uniform(0, 3, 20), rng.uniform(0, 3, 20)
    first[:4] = 0
    mean = rng.normal(size=20)
    expected = mean @ mean + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    distance = fid.frechet_distance(mean, np.diag(first), np.zeros(20), np.diag(second))
    assert distance == pytest.approx(expected, rel=1e-12)


def test_disjoint_subspaces_overlap_nowhere():
    first, second = np.diag([1.0, 2.0, 0.0, 0.0]), np.diag([0.0, 0.0, 3.0, 4.0])
    assert fid.frechet_distance(np.zeros(4), first, np.zeros(4), second) == pytest.approx(10)


def test_full_rank_agrees_with_the_general_matrix_root():
    first, second = random_covariance(2, 40, 100), random_covariance(3, 40, 100)
    root = scipy.linalg.sqrtm(first @ second)
    expected = np.trace(first) + np.trace(second) - 2 * np.trace(root).real
    distance = fid.frechet_distance(np.zeros(40), first, np.zeros(40), second)
    assert distance == pytest.approx(expected, rel=1e-10)


def test_rank_deficient_is_the_limit_of_full_rank():
    """A common rotation changes nothing, so a rank-deficient pair has a closed form too."""
    rng = np.random.default_rng(4)
    rotation, _ = np.linalg.qr(rng.normal(size=(300, 300)))
    first = np.where(np.arange(300) < 20, rng.uniform(1, 2, 300), 0)
    second = np.where(np.arange(300) < 30, rng.uniform(1, 2, 300), 0)
    distance = fid.frechet_distance(
        np.zeros(300),
        (rotation * first) @ rotation.T,
        np.zeros(300),
        (rotation * second) @ rotation.T,
    )
    expected = ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert distance == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_dimensions_of_one_set_against_itself():
    features = np.random.default_rng(5).normal(size=(20, 400))
    mean, covariance = fid.gaussian_statistics(features)
    assert fid.frechet_distance(mean, covariance, mean, covariance) < 1e-9 * np.trace(covariance)


def test_scale_does_not_matter():
    first, second = random_covariance(6, 10, 30), random_covariance(7, 10, 30)
    one = fid.frechet_distance(np.zeros(10), first, np.ones(10), second)
    tiny = fid.frechet_distance(np.zeros(10), 1e-12 * first, np.full(10, 1e-6), 1e-12 * second)
    assert tiny == pytest.approx(1e-12 * one, rel=1e-9)


def test_constant_features_are_allowed():
    zero = np.zeros((3, 3))
    assert fid.frechet_distance(np.zeros(3), zero, np.ones(3), zero) == 3


@pytest.mark.parametrize("features", [np.zeros((1, 4)), np.zeros(4), np.full((3, 2), np.nan)])
def test_bad_features_are_refused(features):
    with pytest.raises(ValueError, match="features"):
        fid.gaussian_statistics(features)


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (np.eye(3), "shape"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (np.diag([1.0, -0.5]), "negative eigenvalue"),
        (np.array([[np.nan, 0], [0, 1]]), "NaN"),
    ],
)
def test_bad_covariances_are_refused(covariance, message):
    with pytest.raises(ValueError, match=message):
        fid.frechet_distance(np.zeros(2), covariance, np.zeros(2), np.eye(2))
