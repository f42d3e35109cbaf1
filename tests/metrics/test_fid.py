import numpy as np
import pytest
import scipy.linalg

from enat_jax.metrics import fid
from enat_jax.metrics.moments import Moments


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


def with_moments_of(mean, covariance_root, count, seed):
    """Vectors whose sample mean and covariance are these, to rounding: whitened, then coloured."""
    features = np.random.default_rng(seed).normal(size=(count, mean.size))
    features -= features.mean(axis=0)
    orthogonal, _ = np.linalg.qr(features)  # columns of the span: still of mean 0
    return orthogonal * np.sqrt(count - 1) @ covariance_root.T + mean


def streamed(features, size):
    state = Moments.empty(features.shape[1])
    for start in range(0, len(features), size):
        state = state.add(features[start : start + size])
    return state.mean, state.covariance()


@pytest.mark.parametrize("count", [300, 101])
def test_features_of_two_gaussians_have_the_distance_of_the_gaussians(count):
    """From features through streamed moments to the distance; both covariances share their axes."""
    rng = np.random.default_rng(8)
    rotation, _ = np.linalg.qr(rng.normal(size=(100, 100)))
    first, second = rng.uniform(0.1, 2, 100), 10 ** rng.uniform(-6, 0.3, 100)
    means = rng.normal(size=(2, 100))
    expected = ((means[0] - means[1]) ** 2).sum()
    expected += ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    moments = [
        streamed(with_moments_of(mean, rotation * np.sqrt(values), count, seed), 64)
        for seed, (mean, values) in enumerate(zip(means, (first, second), strict=True))
    ]
    found = fid.frechet_distance(*moments[0], *moments[1])
    assert found == pytest.approx(expected, rel=1e-10)


def test_near_singular_with_eigenvalues_over_eighteen_orders():
    """As those of Inception's features; the closed form holds to 1e-6, whichever is paired."""
    rng = np.random.default_rng(9)
    rotation, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    first = np.logspace(-18, 0, 60)
    for second in (first[::-1], 1.21 * first, np.ones(60)):
        expected = ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
        pair = [(rotation * values) @ rotation.T for values in (first, second)]
        found = fid.frechet_distance(np.zeros(60), pair[0], np.zeros(60), pair[1])
        assert found == pytest.approx(expected, rel=1e-6)


def test_near_singular_without_common_axes():
    """Of two by two the root has the trace (trace M + 2 det(M)^(1/2))^(1/2), M = C1 C2."""
    rng = np.random.default_rng(10)
    rotation, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    pair, expected = np.zeros((2, 60, 60)), 0.0
    for start in range(0, 60, 2):
        small = 10.0 ** -rng.uniform(0, 18, 2)
        blocks = []
        for value, angle in zip(small, rng.uniform(0, np.pi, 2), strict=True):
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            blocks.append((turn * [1, value]) @ turn.T)
        pair[:, start : start + 2, start : start + 2] = blocks
        product = np.trace(blocks[0] @ blocks[1])
        expected += 2 + small.sum() - 2 * np.sqrt(product + 2 * np.sqrt(small.prod()))
    turned = [rotation @ covariance @ rotation.T for covariance in pair]
    turned = [(covariance + covariance.T) / 2 for covariance in turned]
    found = fid.frechet_distance(np.zeros(60), turned[0], np.zeros(60), turned[1])
    assert found == pytest.approx(expected, rel=1e-6)


def test_one_covariance_of_zero():
    covariance = random_covariance(11, 8, 3)
    found = fid.frechet_distance(np.ones(8), covariance, np.zeros(8), np.zeros((8, 8)))
    assert found == pytest.approx(8 + np.trace(covariance), rel=1e-12)


def test_transport_moves_one_gaussian_to_the_other():
    first, second = random_covariance(12, 9, 30), random_covariance(13, 9, 30)
    transport = fid.optimal_transport(first, second)
    np.testing.assert_allclose(transport @ first @ transport, second, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(transport, transport.T, atol=1e-12)
    scaled = fid.optimal_transport(np.diag([4.0, 0.0]), np.diag([9.0, 0.0]))
    np.testing.assert_allclose(scaled, np.diag([1.5, 0.0]), atol=1e-12)
