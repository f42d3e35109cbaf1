"""Whether pictures of digits in cells show what they ought to: which digits, and where.

A ``Reader`` that knows real digits alone says which digit each cell shows. What it says is compared
with what was asked for. Pictures of one request are no independent evidence of how well requests
are met in general, so standard errors are over requests, each with all of its pictures.
"""

import dataclasses
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from enat_jax.metrics import digit_quality

BLANK = -1  # in place of a digit
SIDE = 2  # cells along a side of a picture
FEATURE_SIZE = 8  # pixels along a side of a cell, when cells are compared
NUM_NEIGHBOURS = 3


class Reading(NamedTuple):
    """What cells show, in raster order.

    Attributes:
        digits: of each cell, or ``BLANK``.
        features: of each cell, see ``digit_quality.pixel_features``.
    """

    digits: Int[np.ndarray, "n cells"]
    features: Float[np.ndarray, "n cells d"]


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """Tells digits by their nearest real ones.

    Attributes:
        features: of real digits, see ``digit_quality.pixel_features``.
        labels: their classes.
        least_ink: mean brightness in [0, 1] below which a cell is blank: half that of the real
            digit that has least ink.
    """

    features: Float[np.ndarray, "r d"]
    labels: Int[np.ndarray, " r"]
    least_ink: float

    @classmethod
    def of(cls, digits: UInt8[np.ndarray, "r h w c"], labels: Int[np.ndarray, " r"]) -> Self:
        """Returns a reader that knows these digits, which are as large as a cell.

        Raises:
            ValueError: they are no pictures, or ``FEATURE_SIZE`` does not divide their sides.
        """
        features = digit_quality.pixel_features(digits, FEATURE_SIZE)
        return cls(features, np.asarray(labels), float(features.mean(axis=1).min() / 2))

    def read(self, images: UInt8[np.ndarray, "n h w c"]) -> Reading:
        """Returns what the cells of pictures show; raises ValueError as ``of`` does."""
        features = digit_quality.pixel_features(images, SIDE * FEATURE_SIZE)
        blocks = features.reshape(len(images), SIDE, FEATURE_SIZE, SIDE, FEATURE_SIZE, -1)
        features = blocks.swapaxes(2, 3).reshape(len(images), SIDE * SIDE, -1)
        digits = np.full(features.shape[:2], BLANK)
        inked = features.mean(axis=2) >= self.least_ink
        if inked.any():
            digits[inked] = digit_quality.knn_classify(
                features[inked], self.features, self.labels, NUM_NEIGHBOURS
            )
        return Reading(digits, features)


class Verdicts(NamedTuple):
    """What is right about each picture.

    Attributes:
        layout: there are digits in the cells of one of the places asked for, and in no others.
        set: the digits are those asked for and no others, wherever they are.
        in_place: each digit is where it was asked for, which implies the other two.
    """

    layout: Bool[np.ndarray, " n"]
    set: Bool[np.ndarray, " n"]
    in_place: Bool[np.ndarray, " n"]


def judge(shown: Int[np.ndarray, "n cells"], wanted: Int[np.ndarray, "n places cells"]) -> Verdicts:
    """Compares what pictures show with what they ought to.

    Args:
        shown: of each cell the digit, or ``BLANK``.
        wanted: likewise, for each of the places at which the digits may be.

    Raises:
        ValueError: the shapes do not fit.
    """
    shown, wanted = np.asarray(shown), np.asarray(wanted)
    if wanted.ndim != 3 or shown.shape != (len(wanted), wanted.shape[2]):
        raise ValueError(f"{shown.shape=} and {wanted.shape=}: need [n, cells], [n, places, cells]")
    in_cells = shown[:, None]
    return Verdicts(
        layout=((in_cells == BLANK) == (wanted == BLANK)).all(axis=2).any(axis=1),
        set=(np.sort(in_cells, axis=2) == np.sort(wanted, axis=2)).all(axis=2).any(axis=1),
        in_place=(in_cells == wanted).all(axis=2).any(axis=1),
    )


@dataclasses.dataclass(frozen=True)
class Share:
    """A share in [0, 1], or a difference of two, with its standard error; None: not known."""

    mean: float | None
    standard_error: float | None

    def minus(self, other: "Share") -> "Share":
        """Returns the difference of two shares of independent pictures."""
        if self.mean is None or other.mean is None:
            return Share(None, None)
        error = None
        if self.standard_error is not None and other.standard_error is not None:
            error = float(np.hypot(self.standard_error, other.standard_error))
        return Share(self.mean - other.mean, error)


def share(
    hits: Bool[np.ndarray, " n"],
    requests: Int[np.ndarray, " n"],
    among: Bool[np.ndarray, " n"] | None = None,
) -> Share:
    """Returns the share of pictures that are hits.

    Args:
        hits: of the pictures.
        requests: the number of what each was asked to show. The error is over requests, of which
            the same one may have any number of pictures.
        among: the pictures that count; None: all.

    Returns:
        No mean where no picture counts, and no error where those of one request alone do.
    """
    counts = np.ones(len(hits), bool) if among is None else np.asarray(among)
    if not counts.any():
        return Share(None, None)
    mean = float(np.asarray(hits)[counts].mean())
    different, which = np.unique(np.asarray(requests)[counts], return_inverse=True)
    n = len(different)
    if n == 1:
        return Share(mean, None)
    # The linearised error of a ratio of sums over requests.
    deviations = np.bincount(which, np.asarray(hits)[counts] - mean)
    squares = np.square(deviations).sum() * n / (n - 1)
    return Share(mean, float(np.sqrt(squares) / counts.sum()))
