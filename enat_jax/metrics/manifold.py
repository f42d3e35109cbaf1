"""Precision, recall, density and coverage: how far two sets of feature vectors overlap.

A set's manifold is the union of balls, one around each of its vectors, which reach to that vector's
k-th nearest neighbour within the set (another vector of the same place counts, the vector itself
does not). A vector is inside a ball also on its surface.

    precision   share of generated vectors inside the manifold of the real ones
    recall      share of real vectors inside the manifold of the generated ones
    density     mean over generated vectors of the number of real balls around them, over k
    coverage    share of real vectors whose ball holds a generated one

Precision and recall: Kynkäänniemi et al. 2019, arXiv 1904.06991, k = 3 as in ADM's evaluation.
Density, which may exceed 1, and coverage: Naeem et al. 2020, arXiv 2002.09797, k = 5. All of them
depend on the numbers of vectors: only compare results of the same two numbers.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from enat_jax.metrics import neighbours

ROWS = 2048  # of one block of distances; a block is ROWS * ROWS * 8 bytes = 32 MiB


@dataclasses.dataclass(frozen=True, eq=False)
class Overlap:
    """What was found of each vector, and the four means of it.

    Attributes:
        inside_real: whether the generated vector is inside the real manifold.
        inside_generated: whether the real vector is inside the generated manifold.
        balls: number of real balls, of ``density_neighbours``, around the generated vector.
        covered: whether the real vector's ball, of ``density_neighbours``, holds a generated one.
        density_neighbours: the k of ``balls`` and ``covered``.
    """

    inside_real: Bool[np.ndarray, " m"]
    inside_generated: Bool[np.ndarray, " n"]
    balls: Int[np.ndarray, " m"]
    covered: Bool[np.ndarray, " n"]
    density_neighbours: int

    @property
    def precision(self) -> float:
        """Share of generated vectors inside the real manifold."""
        return float(self.inside_real.mean())

    @property
    def recall(self) -> float:
        """Share of real vectors inside the generated manifold."""
        return float(self.inside_generated.mean())

    @property
    def density(self) -> float:
        """Mean number of real balls over k, from 0; about 1 for two samples of one distribution."""
        return float(self.balls.mean() / self.density_neighbours)

    @property
    def coverage(self) -> float:
        """Share of real vectors whose ball holds a generated one.

        About 1 - 2**-k for two equally large samples of one distribution.
        """
        return float(self.covered.mean())


def overlap(
    real: Float[np.ndarray, "n d"],
    generated: Float[np.ndarray, "m d"],
    *,
    precision_neighbours: int = 3,
    density_neighbours: int = 5,
) -> Overlap:
    """Compares two sets of vectors.

    Distances are float64, of vectors less the real mean. Those whose squares differ by less than
    rounding count as equal, so that copies of a vector lie on the surface of its ball. Memory
    beyond the features in float64 does not grow with the numbers of vectors; time does with
    ``n * n / 2 + m * m / 2 + n * m``.

    Args:
        real: finite; n > both numbers of neighbours.
        generated: finite; m > ``precision_neighbours``.
        precision_neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.

    Raises:
        ValueError: if shapes do not fit, vectors are too few, or one holds NaN or infinity.
    """
    real, generated = _copy(real, "real"), _copy(generated, "generated")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"real vectors have {real.shape[1]} values, generated {generated.shape[1]}"
        )
    if min(precision_neighbours, density_neighbours) < 1:
        raise ValueError(f"{precision_neighbours=} and {density_neighbours=} must be at least 1")
    # Far from zero, the products would take the digits that distances need.
    centre = real.mean(axis=0)
    real -= centre
    generated -= centre
    of_real = neighbour_squares(real, max(precision_neighbours, density_neighbours), "real")
    real_ball = of_real[:, precision_neighbours - 1]
    density_ball = of_real[:, density_neighbours - 1]
    generated_ball = neighbour_squares(generated, precision_neighbours, "generated")[:, -1]
    inside_real = np.zeros(len(generated), bool)
    inside_generated = np.zeros(len(real), bool)
    balls = np.zeros(len(generated), np.int64)
    covered = np.zeros(len(real), bool)
    for rows in _blocks(len(real)):
        for columns in _blocks(len(generated)):
            squares = _squares_less_rounding(real[rows], generated[columns])
            inside_real[columns] |= (squares <= real_ball[rows, None]).any(axis=0)
            inside_generated[rows] |= (squares <= generated_ball[columns]).any(axis=1)
            in_ball = squares <= density_ball[rows, None]
            balls[columns] += in_ball.sum(axis=0)
            covered[rows] |= in_ball.any(axis=1)
    return Overlap(inside_real, inside_generated, balls, covered, density_neighbours)


def _copy(features: np.ndarray, name: str) -> Float[np.ndarray, "n d"]:
    """Returns a copy in float64; raises ValueError if it is no matrix of finite numbers."""
    features = np.array(features, np.float64)
    if features.ndim != 2 or not features.size:
        raise ValueError(f"{name}: shape {features.shape} is not [n, d] with n and d from 1")
    if not np.isfinite(features).all():
        raise ValueError(f"{name}: vectors hold NaN or infinity")
    return features


def _blocks(number: int) -> Iterator[slice]:
    """Yields runs of ``ROWS`` numbers or less."""
    return (slice(start, min(start + ROWS, number)) for start in range(0, number, ROWS))


def neighbour_squares(
    features: Float[np.ndarray, "n d"], number: int, name: str = "features"
) -> Float[np.ndarray, "n number"]:
    """Returns the squared distances of each vector to its nearest others, ascending.

    Args:
        features: float64, finite, with a mean near zero.
        number: how many others, from 1 to n - 1.
        name: of the vectors, for the error.

    Raises:
        ValueError: if there are too few vectors.
    """
    count = len(features)
    if not 1 <= number < count:
        raise ValueError(f"{name}: {count} vectors do not have {number} neighbours each")
    return neighbours.nearest(features, features, number, own=np.arange(count))[0]


def _squares_less_rounding(
    first: Float[np.ndarray, "a d"], second: Float[np.ndarray, "b d"]
) -> Float[np.ndarray, "a b"]:
    """Returns the least that the squared distances can be, given how they were rounded."""
    rounding = first.shape[1] * np.finfo(np.float64).eps
    squares = neighbours.squared_distances(first, second)
    squares -= rounding * _norms(first)[:, None]
    squares -= rounding * _norms(second)
    return squares


def _norms(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Returns the squares of the vectors' lengths."""
    return np.einsum("nd,nd->n", features, features)
