"""Standard errors of measures: how far they would change with other images of the same source.

Images are drawn anew from those that were measured, with replacement (Efron 1979). References are
taken as given. Replicates of the Fréchet distance lie above it, because a drawn set has fewer
different images; so intervals are the measured value plus and minus 1.96 standard errors
(``interval``), and not percentiles of replicates.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from enat_jax.metrics import fid, inception_score, manifold


def interval(value: float, standard_error: float) -> tuple[float, float]:
    """Returns the limits of the 95% interval around a value of about normal error."""
    return value - 1.96 * standard_error, value + 1.96 * standard_error


def of_mean(values: Float[np.ndarray, " n"]) -> float:
    """Returns the standard error of the mean of ``values``, one of each image.

    Infinitely many replicates would give exactly this, so none is drawn.

    Raises:
        ValueError: if there are no values.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"{values.shape=}: need [n], n from 1")
    return float(values.std() / np.sqrt(values.size))


def of_overlap(overlap: manifold.Overlap) -> dict[str, float]:
    """Returns the standard errors of precision, recall, density and coverage, by name.

    Manifolds stay as they are: among images drawn with replacement, copies would be each other's
    nearest neighbours. For precision and density this is the error with the reference as given. For
    recall and coverage, which depend on all generated images together, it is too small: by up to a
    third in simulations of 600 images.
    """
    return {
        "precision": of_mean(overlap.inside_real),
        "recall": of_mean(overlap.inside_generated),
        "density": of_mean(overlap.balls / overlap.density_neighbours),
        "coverage": of_mean(overlap.covered),
    }


def of_frechet_distance(
    features: Float[np.ndarray, "n d"],
    mean: Float[np.ndarray, " d"],
    covariance: Float[np.ndarray, "d d"],
    *,
    num_replicates: int = 100,
    seed: int = 0,
) -> float:
    """Returns the standard error of the Fréchet distance of features to a reference, by replicates.

    Each replicate costs the eigenvalues of a matrix of the images or of the dimensions, whichever
    are fewer. ``of_frechet_distance_linear`` needs none. Both are too large where dimensions are
    many for the images: of normal vectors, n = 16 d, by 40% and the linear one by 20%.

    Args:
        features: of n images, n from 2.
        mean: of the reference.
        covariance: of the reference.
        num_replicates: from 2.
        seed: of the draws.

    Raises:
        ValueError: as ``fid`` does, or if there are too few replicates.
    """
    features = np.asarray(features, np.float64)
    own_mean, _ = fid.gaussian_statistics(features)
    centred = features - own_mean
    # The trace of (C1 C2)^(1/2) is the sum of the singular values of A C2^(1/2), if A'A = C1. This
    # A has a row an image: few images cost little, and the reference's root is taken once.
    rotated = centred @ fid.symmetric_root(covariance)
    constant = np.trace(covariance)
    distances = []
    for weights in _draws(len(features), num_replicates, seed):
        scale = np.sqrt(weights / (len(features) - 1))[:, None]
        shift = weights @ centred / len(features)
        spread = np.square(scale * (centred - shift)).sum()
        overlap = _nuclear_norm(scale * (rotated - weights @ rotated / len(features)))
        difference = own_mean + shift - mean
        distances.append(difference @ difference + spread + constant - 2 * overlap)
    return float(np.std(distances, ddof=1))


def _nuclear_norm(matrix: Float[np.ndarray, "n d"]) -> float:
    """Returns the sum of the singular values, by the smaller of the two Gram matrices.

    Squares lose half of the digits, which leaves enough for a standard error.
    """
    small = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
    values = np.linalg.eigvalsh(small)
    values = values[values > values.size * np.finfo(np.float64).eps * values.max(initial=0.0)]
    return float(np.sqrt(values).sum())


def of_frechet_distance_linear(
    features: Float[np.ndarray, "n d"],
    mean: Float[np.ndarray, " d"],
    covariance: Float[np.ndarray, "d d"],
) -> float:
    """Returns the standard error of ``of_frechet_distance`` to first order, without replicates.

    It takes the time of about two distances.

    The distance changes with one image's share of the features' distribution by

        2 (x - m1)·(m1 - m2) + (x - m1)·(1 - T)(x - m1) + a constant,

    where T = C2^(1/2) (C2^(1/2) C1 C2^(1/2))^(-1/2) C2^(1/2) moves one Gaussian to the other; the
    standard error is the deviation of this over images, by the root of their number.

    Args:
        features: of n images, n from 2.
        mean: of the reference.
        covariance: of the reference.

    Raises:
        ValueError: as ``fid`` does.
    """
    own_mean, own_covariance = fid.gaussian_statistics(features)
    transport = fid.optimal_transport(own_covariance, covariance)
    centred = np.asarray(features, np.float64) - own_mean
    influences = 2 * centred @ (own_mean - mean)
    influences += np.einsum("nd,nd->n", centred - centred @ transport, centred)
    return of_mean(influences)


def of_inception_score(
    probabilities: Float[np.ndarray, "n c"],
    splits: Int[np.ndarray, " n"],
    *,
    num_replicates: int = 200,
    seed: int = 0,
) -> float:
    """Returns the standard error of the Inception score, the mean over its splits.

    Images are drawn within their split.

    Args:
        probabilities: rows of sum 1.
        splits: as ``inception_score.assign_splits`` gives.
        num_replicates: from 2.
        seed: of the draws.

    Raises:
        ValueError: if there are too few replicates.
    """
    scores = np.zeros(num_replicates)
    num_splits = int(splits.max()) + 1
    for split in range(num_splits):
        p = np.asarray(probabilities[splits == split], np.float64)
        # A seed of its own: no split repeats the draws of another.
        weights = np.stack(list(_draws(len(p), num_replicates, [seed, split])))
        entropies = weights @ inception_score.p_log_p(p).sum(axis=1)
        scores += inception_score.scores_of_sums(weights.sum(axis=1), weights @ p, entropies)
    return float(np.std(scores / num_splits, ddof=1))


def _draws(
    number: int, num_replicates: int, seed: int | list[int]
) -> Iterator[Float[np.ndarray, " number"]]:
    """Yields how often each image is drawn in each replicate, float64 of the sum ``number``."""
    if num_replicates < 2:
        raise ValueError(f"{num_replicates=} must be at least 2")
    rng = np.random.RandomState(seed)  # whose numbers are the same with every version of NumPy
    for _ in range(num_replicates):
        yield np.bincount(rng.randint(0, number, number), minlength=number).astype(np.float64)
