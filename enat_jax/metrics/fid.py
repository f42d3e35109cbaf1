"""Fréchet distance between two sets of feature vectors, each taken for a Gaussian.

``|mu1 - mu2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2))`` (Heusel et al. 2017, arXiv 1706.08500), in
float64 numpy. The features may come from anywhere: Inception gives the usual FID.
"""

import numpy as np
from jaxtyping import Float


def gaussian_statistics(
    features: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Returns the mean and the unbiased covariance of features, float64.

    Raises:
        ValueError: if ``features`` is not a matrix of at least two rows of finite numbers.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"{features.shape=}: need a matrix [n, d] with n >= 2")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity")
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (features.shape[0] - 1)


def frechet_distance(
    mean1: Float[np.ndarray, " d"],
    covariance1: Float[np.ndarray, "d d"],
    mean2: Float[np.ndarray, " d"],
    covariance2: Float[np.ndarray, "d d"],
) -> float:
    """Returns the squared Fréchet (Wasserstein-2) distance of two Gaussians; never negative.

    The trace of ``(C1 C2)^(1/2)`` is the sum of the roots of the eigenvalues of the symmetric
    ``C1^(1/2) C2 C1^(1/2)``. These roots are taken as the singular values of ``C2^(1/2) C1^(1/2)``:
    they are real whatever the rank, and no square root magnifies the rounding, while the general
    matrix root of ``C1 C2`` grows complex parts where a covariance is near-singular.

    Args:
        mean1: of the one.
        covariance1: symmetric and positive semi-definite up to rounding; any rank.
        mean2: of the other.
        covariance2: as ``covariance1``.

    Raises:
        ValueError: if shapes do not match, or a covariance is not symmetric and semi-definite.
    """
    mean1, mean2 = np.asarray(mean1, np.float64), np.asarray(mean2, np.float64)
    covariance1 = np.asarray(covariance1, np.float64)
    covariance2 = np.asarray(covariance2, np.float64)
    if mean1.ndim != 1 or mean1.shape != mean2.shape:
        raise ValueError(f"{mean1.shape=} and {mean2.shape=} must both be the same [d]")
    square = (mean1.size, mean1.size)
    if covariance1.shape != square or covariance2.shape != square:
        raise ValueError(f"{covariance1.shape=} and {covariance2.shape=} must both be {square}")
    roots = symmetric_root(covariance2) @ symmetric_root(covariance1)
    overlap = np.linalg.svd(roots, compute_uv=False).sum()
    difference = mean1 - mean2
    distance = difference @ difference + np.trace(covariance1) + np.trace(covariance2) - 2 * overlap
    return max(float(distance), 0.0)


def optimal_transport(
    covariance1: Float[np.ndarray, "d d"], covariance2: Float[np.ndarray, "d d"]
) -> Float[np.ndarray, "d d"]:
    """Returns the symmetric ``T`` with ``T C1 T = C2``: it moves one Gaussian to the other.

    ``T = C2^(1/2) (C2^(1/2) C1 C2^(1/2))^(-1/2) C2^(1/2)``. Where they have directions without any
    overlap, T is 0 there, and ``T C1 T`` lacks that part of ``C2``.

    Raises:
        ValueError: as ``frechet_distance`` does.
    """
    root = symmetric_root(np.asarray(covariance2, np.float64))
    _, values, rows = np.linalg.svd(symmetric_root(np.asarray(covariance1, np.float64)) @ root)
    kept = values > values.size * np.finfo(np.float64).eps * values.max(initial=0.0)
    half = root @ rows[kept].T / np.sqrt(values[kept])
    return half @ half.T


def symmetric_root(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """Returns the positive semi-definite root; eigenvalues below rounding count 0."""
    scale = np.abs(covariance).max(initial=0.0)
    if not np.isfinite(scale):
        raise ValueError("a covariance holds NaN or infinity")
    if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-8 * scale:
        raise ValueError("a covariance is not symmetric")
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    largest = values.max(initial=0.0)
    if values.min(initial=0.0) < -1e-6 * max(largest, scale):
        raise ValueError(f"a covariance has a negative eigenvalue: {values.min():.3g}")
    # Without the cut, rounding of size eps * largest would enter as its much larger root.
    values = np.where(values > values.size * np.finfo(np.float64).eps * largest, values, 0.0)
    return (vectors * np.sqrt(values)) @ vectors.T
