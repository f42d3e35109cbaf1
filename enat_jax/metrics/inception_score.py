"""Inception score: exp of the mean divergence of each image's class probabilities from their mean.

Salimans et al. 2016, arXiv 1606.03498; from 1, where all images look the same to the classifier, to
the number of classes, where it is certain of each and all classes are equally frequent. Reported is
the mean over 10 splits, as each split's score grows with its number of images.

The literature splits images in the order in which they were drawn, which was random. Where images
come ordered by class, such a split holds few classes and its score is far too low. So images are
split by a permutation that depends on their number and a seed alone.
"""

import dataclasses
from typing import Self

import numpy as np
from jaxtyping import Float, Int


def assign_splits(
    num_images: int, num_splits: int = 10, seed: int = 0
) -> Int[np.ndarray, " num_images"]:
    """Returns the split of each image by its number, int64, 0 to num_splits - 1.

    Splits are equally large to one image. The same with every version of NumPy, whose
    ``RandomState`` never changes.

    Raises:
        ValueError: if a split would have no image.
    """
    if not 1 <= num_splits <= num_images:
        raise ValueError(f"{num_images} images cannot be divided into {num_splits} splits")
    splits = np.empty(num_images, np.int64)
    order = np.random.RandomState(seed).permutation(num_images)
    splits[order] = np.arange(num_images) % num_splits
    return splits


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """All that the score needs of the images so far. Never changes: ``add`` gives anew.

    Attributes:
        counts: images of each split, int64.
        probabilities: their sum, float64.
        negative_entropies: sum over images and classes of p log p, float64.
    """

    counts: Int[np.ndarray, " s"]
    probabilities: Float[np.ndarray, "s c"]
    negative_entropies: Float[np.ndarray, " s"]

    @classmethod
    def empty(cls, num_splits: int, num_classes: int) -> Self:
        """Returns the sums of no images."""
        return cls(
            np.zeros(num_splits, np.int64),
            np.zeros((num_splits, num_classes)),
            np.zeros(num_splits),
        )

    def add(self, probabilities: Float[np.ndarray, "b c"], splits: Int[np.ndarray, " b"]) -> Self:
        """Returns the sums with more images.

        Args:
            probabilities: each row of sum 1 to rounding of float32.
            splits: see ``assign_splits``.

        Raises:
            ValueError: if shapes do not fit or rows are no probabilities.
        """
        probabilities = _checked(probabilities)
        num_splits, num_classes = self.probabilities.shape
        if probabilities.shape[1] != num_classes or splits.shape != probabilities.shape[:1]:
            raise ValueError(
                f"{probabilities.shape=} and {splits.shape=}: need [b, {num_classes}] and [b]"
            )
        member = splits == np.arange(num_splits)[:, None]
        return type(self)(
            self.counts + member.sum(axis=1),
            self.probabilities + member @ probabilities,
            self.negative_entropies + member @ p_log_p(probabilities).sum(axis=1),
        )

    def split_scores(self) -> Float[np.ndarray, " s"]:
        """Returns the score of each split, float64.

        Raises:
            ValueError: if a split has no image.
        """
        if not self.counts.all():
            raise ValueError(f"a split has no image: {self.counts.tolist()}")
        return scores_of_sums(self.counts, self.probabilities, self.negative_entropies)

    def score(self) -> tuple[float, float]:
        """Returns mean and standard deviation (of the population) of the splits' scores."""
        scores = self.split_scores()
        return float(scores.mean()), float(scores.std())


def scores(
    probabilities: Float[np.ndarray, "n c"], num_splits: int = 10, seed: int = 0
) -> tuple[float, float]:
    """Returns mean and standard deviation (of the population) of the splits' scores.

    Args:
        probabilities: in any order, each row of sum 1 to rounding of float32.
        num_splits: from 1 to n.
        seed: see ``assign_splits``.

    Raises:
        ValueError: if rows are no probabilities, or are fewer than the splits.
    """
    probabilities = np.asarray(probabilities)
    splits = assign_splits(len(probabilities), num_splits, seed)
    return Sums.empty(num_splits, probabilities.shape[-1]).add(probabilities, splits).score()


def scores_of_sums(
    counts: Int[np.ndarray, "..."],
    probabilities: Float[np.ndarray, "... c"],
    negative_entropies: Float[np.ndarray, "..."],
) -> Float[np.ndarray, "..."]:
    """Returns scores from sums that are as ``Sums`` describes them."""
    mean = probabilities / counts[..., None]
    return np.exp(negative_entropies / counts - p_log_p(mean).sum(axis=-1))


def p_log_p(p: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Returns p log p elementwise; of probability 0 it is 0, the limit."""
    return p * np.log(np.where(p > 0, p, 1))


def _checked(probabilities: np.ndarray) -> Float[np.ndarray, "b c"]:
    """Returns probabilities in float64; raises ValueError if they are none."""
    probabilities = np.asarray(probabilities, np.float64)
    if probabilities.ndim != 2:
        raise ValueError(f"{probabilities.shape=}: need [b, c]")
    wrong = ~(np.abs(probabilities.sum(axis=1) - 1) < 1e-3) | (probabilities < 0).any(axis=1)
    if wrong.any():
        raise ValueError(
            f"row {int(wrong.argmax())} is no distribution: it must be from 0, of sum 1"
        )
    return probabilities
