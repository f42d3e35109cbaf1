"""Measures of generated images that need no network and work on a few hundred of them.

All take feature vectors ``[n, d]``, for instance ``pixel_features``, and Euclidean distances in
float64. No single number means much alone: independent tokens (``independent_tokens``, the control)
can reach a high class accuracy, copies of the training set a perfect distance. Read them together.
"""

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy.spatial import distance

from enat_jax.metrics import neighbours


def pixel_features(images: UInt8[np.ndarray, "n h w c"], size: int) -> Float[np.ndarray, "n d"]:
    """Averages images over blocks to ``size`` x ``size`` pixels and flattens them.

    Small ``size`` keeps the covariances regular: a few hundred images span 8 * 8 = 64 dimensions
    but not 32 * 32 = 1024.

    Args:
        images: whose sides ``size`` divides.
        size: pixels a side of the result.

    Returns:
        float64 in [0, 1], d = size * size * c.

    Raises:
        ValueError: if the images are not uint8 ``[n, h, w, c]``, or ``size`` does not divide their
            sides.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"{images.dtype=}, {images.shape=}: need uint8 [n, h, w, c]")
    n, height, width, channels = images.shape
    if size < 1 or height % size or width % size:
        raise ValueError(f"{size=} does not divide the images of {height} x {width} pixels")
    blocks = images.reshape(n, size, height // size, size, width // size, channels)
    return blocks.mean(axis=(2, 4), dtype=np.float64).reshape(n, size * size * channels) / 255


def nearest_distances(
    features: Float[np.ndarray, "n d"],
    references: Float[np.ndarray, "r d"],
    own: Int[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, " n"]:
    """Returns the distance from each row of ``features`` to its nearest reference, float64.

    Args:
        features: the rows.
        references: what they are compared with.
        own: the index of the reference that is the row itself and does not count, where the rows
            are taken from the references.
    """
    return np.sqrt(_nearest(features, references, 1, own)[0][:, 0])


def knn_classify(
    features: Float[np.ndarray, "n d"],
    references: Float[np.ndarray, "r d"],
    reference_labels: Int[np.ndarray, " r"],
    k: int = 3,
    own: Int[np.ndarray, " n"] | None = None,
) -> Int[np.ndarray, " n"]:
    """Returns the class that most of the ``k`` nearest references have.

    Among classes with equally many votes the one with the nearest member wins.

    Args:
        features: the rows.
        references: what they are compared with.
        reference_labels: their classes, not negative.
        k: number of neighbours, at most r (r - 1 with ``own``).
        own: as in ``nearest_distances``; gives leave-one-out predictions.
    """
    reference_labels = _labels(reference_labels, references)
    available = len(references) - int(own is not None)
    if not 1 <= k <= available:
        raise ValueError(f"{k=} must lie between 1 and the number of references, {available}")
    labels = reference_labels[_nearest(features, references, k, own)[1]]
    votes = np.zeros((len(labels), int(reference_labels.max()) + 1))
    for rank in range(k):
        # One vote each; the geometric extra decides ties for the class met first.
        votes[np.arange(len(labels)), labels[:, rank]] += 1 + 0.5 ** (rank + 1) / k
    return votes.argmax(axis=1)


def class_accuracy(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    references: Float[np.ndarray, "r d"],
    reference_labels: Int[np.ndarray, " r"],
    k: int = 3,
    own: Int[np.ndarray, " n"] | None = None,
) -> float:
    """Returns the share of rows that ``knn_classify`` gives their label."""
    labels = _labels(labels, features)
    predictions = knn_classify(features, references, reference_labels, k, own)
    return float(np.mean(predictions == labels))


def class_spread(features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> float:
    """Returns the mean distance between two different rows of a class, averaged over the classes.

    Args:
        features: the rows.
        labels: their classes; every class that occurs needs two rows or more.
    """
    labels = _labels(labels, features)
    spreads = []
    for label in np.unique(labels):
        members = np.asarray(features, np.float64)[labels == label]
        if len(members) < 2:
            raise ValueError(f"class {label} has one row: a distance within the class needs two")
        spreads.append(distance.pdist(members).mean())
    return float(np.mean(spreads))


def relative_diversity(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    real: Float[np.ndarray, "r d"],
    real_labels: Int[np.ndarray, " r"],
) -> float:
    """Returns the ``class_spread`` of the rows over that of real ones: 1 is as diverse as real.

    More is not better: noise is diverse.

    Raises:
        ValueError: if the two sets do not hold the same classes, or the real rows of each are
            equal.
    """
    classes, real_classes = np.unique(labels), np.unique(real_labels)
    if not np.array_equal(classes, real_classes):
        raise ValueError(f"classes differ: {classes.tolist()} and {real_classes.tolist()} (real)")
    spread = class_spread(real, real_labels)
    if spread == 0:
        raise ValueError("the real rows of every class are all equal: no diversity to compare with")
    return class_spread(features, labels) / spread


def copy_share(
    features: Float[np.ndarray, "n d"],
    training: Float[np.ndarray, "r d"],
    held_out: Float[np.ndarray, "s d"],
    percentile: float = 1.0,
    own: Int[np.ndarray, " n"] | None = None,
) -> float:
    """Returns the share of rows suspiciously close to a training row.

    Close means nearer than the given percentile of the distances from held-out real rows to their
    nearest training rows. Real data that was never trained on thus scores ``percentile`` / 100.

    Args:
        features: the rows.
        training: the training rows.
        held_out: real rows that were not trained on.
        percentile: of the held-out distances, in [0, 100].
        own: as in ``nearest_distances``, where the rows are training rows.
    """
    threshold = copy_distance(training, held_out, percentile)
    return float(np.mean(nearest_distances(features, training, own) < threshold))


def copy_distance(
    training: Float[np.ndarray, "r d"],
    held_out: Float[np.ndarray, "s d"],
    percentile: float = 1.0,
) -> float:
    """Returns the distance to a training row below which ``copy_share`` takes a row for a copy."""
    return float(np.percentile(nearest_distances(held_out, training), percentile))


def independent_tokens(
    training_tokens: Int[np.ndarray, "n l"],
    training_labels: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " m"],
    codebook_size: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, "m l"]:
    """Draws the control: every token independently, from its class's frequencies at its position.

    What a generator scores beyond this it has learned about how tokens go together. The token of a
    random training image of the class, chosen anew for each position, has just these frequencies.

    Args:
        training_tokens: in [0, codebook_size).
        training_labels: their classes.
        labels: the classes to draw; each must occur in ``training_labels``.
        codebook_size: number of codes; checked against the tokens.
        rng: source of randomness.
    """
    training_tokens = np.asarray(training_tokens)
    if training_tokens.ndim != 2 or training_tokens.size == 0:
        raise ValueError(f"{training_tokens.shape=}: need tokens [n, l]")
    if training_tokens.min() < 0 or training_tokens.max() >= codebook_size:
        raise ValueError(
            f"tokens {training_tokens.min()} to {training_tokens.max()} do not fit {codebook_size=}"
        )
    training_labels = _labels(training_labels, training_tokens)
    labels = np.asarray(labels)
    positions = np.arange(training_tokens.shape[1])
    drawn = np.empty((len(labels), len(positions)), np.int32)
    for label in np.unique(labels):
        pool = training_tokens[training_labels == label]
        if not len(pool):
            raise ValueError(f"class {label} does not occur in the training tokens")
        rows = np.flatnonzero(labels == label)
        donors = rng.integers(0, len(pool), size=(len(rows), len(positions)))
        drawn[rows] = pool[donors, positions]
    return drawn


def balanced_subset(
    labels: Int[np.ndarray, " n"], num: int, rng: np.random.Generator
) -> Int[np.ndarray, " m"]:
    """Returns the indices of a random draw with equally many of each class, about ``num`` in all.

    Fewer where a class has not enough members.
    """
    classes, counts = np.unique(labels, return_counts=True)
    each = min(num // len(classes), int(counts.min()))
    return np.concatenate(
        [rng.choice(np.flatnonzero(labels == label), each, replace=False) for label in classes]
    )


def balanced_labels(num: int, num_classes: int) -> Int[np.ndarray, " num"]:
    """Returns int32 labels, equally many of each class.

    Raises:
        ValueError: if that is impossible, or makes fewer than two a class.
    """
    if num % num_classes or num < 2 * num_classes:
        raise ValueError(
            f"{num=} images cannot be shared out among {num_classes} classes: "
            f"give a multiple of {num_classes}, at least {2 * num_classes}"
        )
    return np.arange(num, dtype=np.int32) % num_classes


def _nearest(
    features: Float[np.ndarray, "n d"],
    references: Float[np.ndarray, "r d"],
    number: int,
    own: Int[np.ndarray, " n"] | None,
) -> tuple[Float[np.ndarray, "n number"], Int[np.ndarray, "n number"]]:
    """Returns what ``neighbours.nearest`` does.

    Raises:
        ValueError: if the shapes do not fit, or there are no vectors.
    """
    features, references = np.asarray(features, np.float64), np.asarray(references, np.float64)
    if features.ndim != 2 or references.ndim != 2 or features.shape[1] != references.shape[1]:
        raise ValueError(f"{features.shape=} and {references.shape=} must be [n, d] and [r, d]")
    if own is not None and np.shape(own) != (len(features),):
        raise ValueError(f"{np.shape(own)=}: need the index of one reference for each row")
    if not len(features) or not len(references):
        raise ValueError(f"{len(features)=} and {len(references)=} must not be empty")
    return neighbours.nearest(features, references, number, own)


def _labels(labels: np.ndarray, features: np.ndarray) -> Int[np.ndarray, " n"]:
    """Returns labels; raises ValueError unless they are classes, one of each row."""
    labels = np.asarray(labels)
    if labels.shape != (len(features),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{labels.dtype=}, {labels.shape=}: need {len(features)} integers, one a row"
        )
    if labels.size and labels.min() < 0:
        raise ValueError(f"{labels.min()=} is negative")
    return labels
