import numpy as np
import pytest

from enat_jax.metrics import manifold

# On a line, k = 1: the real balls are [-1, 1], [0, 2], [1, 3] and [2, 18].
REAL = np.array([[0.0], [1.0], [2.0], [10.0]])


def overlap_of(real, generated, k=1):
    return manifold.overlap(real, generated, precision_neighbours=k, density_neighbours=k)


def nearest_distances(features, number):
    """Distances of each vector to its nearest others, ascending, [n, number]."""
    centred = np.asarray(features, np.float64)
    return np.sqrt(manifold.neighbour_squares(centred - centred.mean(axis=0), number))


def by_the_definitions(real, generated, k_precision, k_density):
    """All distances at once, from differences."""

    def distances(first, second):
        return np.sqrt(((first[:, None] - second[None]) ** 2).sum(axis=-1))

    def radii(features, k):
        return np.sort(distances(features, features), axis=1)[:, k]  # the first is itself

    between = distances(real, generated)
    in_ball = between <= radii(real, k_density)[:, None]
    return {
        "precision": (between <= radii(real, k_precision)[:, None]).any(axis=0).mean(),
        "recall": (between <= radii(generated, k_precision)).any(axis=1).mean(),
        "density": in_ball.sum() / k_density / len(generated),
        "coverage": in_ball.any(axis=1).mean(),
    }


def test_a_line_by_hand():
    found = nearest_distances(REAL, 2)
    np.testing.assert_allclose(found, [[1, 2], [1, 1], [1, 2], [8, 9]])
    result = overlap_of(REAL, np.array([[0.5], [1.5], [-9.5]]))
    # Balls of the generated: [-0.5, 1.5], [0.5, 2.5], [-19.5, 0.5].
    assert result.inside_real.tolist() == [True, True, False]
    assert result.inside_generated.tolist() == [True, True, True, False]
    assert result.balls.tolist() == [2, 2, 0]
    assert result.covered.tolist() == [True, True, True, False]
    assert result.precision == pytest.approx(2 / 3)
    assert result.density == pytest.approx(4 / 3)
    assert (result.recall, result.coverage) == (0.75, 0.75)


@pytest.mark.parametrize("origin", [0, 1e8])
def test_the_surface_is_inside(origin):
    """Also far from zero, where squares of the coordinates are rounded to multiples of two."""
    result = overlap_of(origin + REAL, origin + np.array([[-1.0], [18.0], [-1.25], [18.25]]))
    assert result.inside_real.tolist() == [True, True, False, False]


def test_density_divides_by_its_k():
    result = manifold.overlap(
        REAL, np.array([[1.0], [1.0]]), precision_neighbours=1, density_neighbours=2
    )
    # Balls for k = 2: [-2, 2], [0, 2], [0, 4], [1, 19]: 1 is in all of them.
    assert result.balls.tolist() == [4, 4]
    assert result.density == 2


def test_duplicates_are_neighbours_of_each_other():
    twice = np.repeat([[0.0], [7.0]], 2, axis=0)
    assert nearest_distances(twice, 1).tolist() == [[0], [0], [0], [0]]
    result = overlap_of(twice, np.array([[7.0], [7.001], [0.0]]))
    assert result.inside_real.tolist() == [True, False, True]
    assert result.covered.all()


def test_copies_of_neighbours_lie_on_the_surface_whatever_the_rounding():
    """Each copy is at its neighbour's radius, in other blocks and products than the radius was."""
    rng = np.random.default_rng(0)
    real = (1000 + rng.normal(size=(60, 33))).astype(np.float32)
    nearest = ((real[:, None].astype(np.float64) - real) ** 2).sum(axis=-1)
    np.fill_diagonal(nearest, np.inf)
    copies = real[nearest.argmin(axis=1)]
    assert all(
        overlap_of(real, np.stack([copy, copy + 500])).covered[i] for i, copy in enumerate(copies)
    )


@pytest.mark.parametrize("rows", [7, 64, 2048])
def test_blocks_agree_with_the_definitions(rows, monkeypatch):
    monkeypatch.setattr(manifold, "ROWS", rows)
    rng = np.random.default_rng(1)
    real = rng.normal(50, 1, (130, 6)).astype(np.float32)
    generated = rng.normal(50.5, 0.8, (97, 6)).astype(np.float32)
    result = manifold.overlap(real, generated, precision_neighbours=3, density_neighbours=5)
    expected = by_the_definitions(real.astype(np.float64), generated.astype(np.float64), 3, 5)
    assert expected == {name: pytest.approx(getattr(result, name)) for name in expected}
    assert all(0.05 < value < 1.5 for value in expected.values())


def test_close_points_far_from_zero_keep_their_distance():
    """In float32 the products about the origin give no digit of such distances."""
    rng = np.random.default_rng(2)
    points = (10_000 + rng.normal(size=(5, 512))).astype(np.float32)
    near = points + np.float32(1e-2) * rng.normal(size=points.shape).astype(np.float32)
    expected = np.sqrt(((points.astype(np.float64) - near) ** 2).sum(axis=1))
    found = nearest_distances(np.concatenate([points, near]), 1)[:5, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    norms = (points * points).sum(axis=1) + (near * near).sum(axis=1)
    single = np.sqrt(np.maximum(norms - 2 * np.diagonal(points @ near.T), 0))
    assert (np.abs(single / expected - 1) > 0.1).any()


def test_samples_of_one_distribution_overlap():
    rng = np.random.default_rng(3)
    result = manifold.overlap(rng.normal(size=(800, 4)), rng.normal(size=(800, 4)))
    assert 0.9 < result.density < 1.1
    assert result.coverage == pytest.approx(1 - 2**-5, abs=0.02)
    apart = manifold.overlap(rng.normal(size=(50, 4)), rng.normal(100, 1, size=(50, 4)))
    assert (apart.precision, apart.recall, apart.density, apart.coverage) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (np.zeros((5, 2)), np.zeros((9, 2)), "real: 5 vectors do not have 5 neighbours"),
        (np.zeros((6, 2)), np.zeros((3, 2)), "generated: 3 vectors do not have 3 neighbours"),
        (np.zeros((6, 2)), np.zeros((6, 3)), "have 2 values, generated 3"),
        (np.zeros(6), np.zeros((6, 3)), "real: shape"),
        (np.zeros((6, 2)), np.full((6, 2), np.nan), "generated: vectors hold NaN"),
    ],
)
def test_bad_vectors_are_refused(real, generated, message):
    with pytest.raises(ValueError, match=message):
        manifold.overlap(real, generated)


def test_no_neighbours_are_refused():
    with pytest.raises(ValueError, match="density_neighbours=0 must be at least 1"):
        manifold.overlap(REAL, REAL, precision_neighbours=1, density_neighbours=0)
    with pytest.raises(ValueError, match="0 neighbours"):
        nearest_distances(REAL, 0)
