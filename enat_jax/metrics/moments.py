"""Mean and covariance of a stream of feature vectors: one pass, float64, resumable, mergeable.

The sum of outer products about the origin loses all digits once the mean is large against the
spread. Here every block is centred on its own mean, and blocks are joined by the update of Chan,
Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing sample variances",
1979), which subtracts nothing large.

The same blocks in the same order give the same bits, on one machine with one number of BLAS
threads, wherever the stream was saved and continued in between. Other blocks, or another order of
merging, give the same numbers to rounding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Self

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """A mean and covariance that are known without the number of vectors behind them.

    Attributes:
        mean: float64.
        matrix: the covariance, float64.
    """

    mean: Float[np.ndarray, " d"]
    matrix: Float[np.ndarray, "d d"]

    @property
    def count(self) -> None:
        """Not known."""
        return None

    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Returns the covariance."""
        return self.matrix


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """How many vectors there were, their mean and their scatter. Never changes: ``add`` gives anew.

    Attributes:
        count: number of vectors.
        mean: float64; zeros where ``count`` is 0.
        scatter: sum of the outer products of the vectors less their mean, float64.
    """

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def empty(cls, dimensions: int) -> Self:
        """Returns the moments of no vectors of length ``dimensions``."""
        if dimensions < 1:
            raise ValueError(f"{dimensions=} must be at least 1")
        return cls(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)))

    def add(self, features: Float[np.ndarray, "n d"]) -> Self:
        """Returns the moments of these vectors and those of ``features``, which may be none.

        Raises:
            ValueError: if ``features`` is not a matrix of d columns, or holds NaN or infinity.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] != self.mean.size:
            raise ValueError(f"{features.shape=}: need [n, {self.mean.size}]")
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise ValueError(f"features hold NaN or infinity, first in row {row} of this block")
        if not features.shape[0]:
            return self
        mean = features.mean(axis=0)
        # Sums of large numbers round; the mean of what is left corrects it.
        mean = mean + (features - mean).mean(axis=0)
        centred = features - mean
        return self.merge(type(self)(features.shape[0], mean, centred.T @ centred))

    def merge(self, other: Self) -> Self:
        """Returns the moments of both sets of vectors.

        Raises:
            ValueError: if their lengths differ.
        """
        if other.mean.size != self.mean.size:
            raise ValueError(f"moments of {self.mean.size} and of {other.mean.size} dimensions")
        # Not by the formula: merging with nothing must not change a bit.
        if not other.count:
            return self
        if not self.count:
            return other
        count = self.count + other.count
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        between = np.outer(step, step) * (self.count * (other.count / count))
        return type(self)(count, mean, self.scatter + other.scatter + between)

    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Returns the unbiased covariance, float64.

        Raises:
            ValueError: if there are fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, there are {self.count}")
        return self.scatter / (self.count - 1)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns ``count``, ``mean`` and ``scatter`` as arrays that ``from_arrays`` takes."""
        return {
            "count": np.asarray(self.count, np.int64),
            "mean": self.mean,
            "scatter": self.scatter,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Returns the moments that ``arrays`` gave, bit for bit.

        Raises:
            ValueError: if an array is missing or its shape, type or values cannot be.
        """
        missing = {"count", "mean", "scatter"} - set(arrays)
        if missing:
            raise ValueError(f"moments without {', '.join(sorted(missing))}")
        count, mean, scatter = (np.asarray(arrays[name]) for name in ("count", "mean", "scatter"))
        if count.shape != () or count.dtype.kind not in "iu" or count < 0:
            raise ValueError("the count of moments is not one whole number")
        if mean.dtype != np.float64 or scatter.dtype != np.float64:
            raise ValueError(f"moments must be float64, not {mean.dtype} and {scatter.dtype}")
        if mean.ndim != 1 or not mean.size or scatter.shape != (mean.size, mean.size):
            raise ValueError(f"{mean.shape=} and {scatter.shape=} must be [d] and [d, d]")
        if not (np.isfinite(mean).all() and np.isfinite(scatter).all()):
            raise ValueError("moments hold NaN or infinity")
        return cls(int(count), mean, scatter)
