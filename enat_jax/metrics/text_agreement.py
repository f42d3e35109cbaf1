"""How well images show their texts, by vectors of both in one space, such as CLIP's.

The CLIP score is that of torchmetrics, the mean of max(100 cos, 0); Hessel et al.
(arXiv:2104.08718) have 2.5 in place of 100 and "A photo depicts" before each text. R-precision (Xu
et al., arXiv:1711.10485) is the share of images whose own text is nearer than all of 99 others.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

SCALE = 100.0
OTHERS = 99
_BLOCK = 64  # images at a time: each has up to ``OTHERS`` + 1 texts in memory


def scores(
    images: Float[np.ndarray, "n d"],
    texts: Float[np.ndarray, "m d"],
    own: Int[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """Returns the CLIP score of each image, in [0, ``SCALE``].

    Args:
        images: vectors of any length.
        texts: likewise.
        own: the text of each image.
    """
    cosines = (_unit(images) * _unit(texts)[own]).sum(axis=1)
    return np.maximum(SCALE * cosines, 0.0)


def retrieved(
    images: Float[np.ndarray, "n d"],
    texts: Float[np.ndarray, "m d"],
    own: Int[np.ndarray, " n"],
    seed: int = 0,
) -> Bool[np.ndarray, " n"]:
    """Says of which images the own text is nearer than all of the others, by the cosine.

    Args:
        images: vectors of any length.
        texts: of different texts, at least two. An image is compared with ``others_of(m)`` others,
            drawn for each anew.
        own: the text of each image.
        seed: decides which others, together with the number of the image.
    """
    images, texts = _unit(images), _unit(texts)
    others = others_of(len(texts))
    found = np.empty(len(images), bool)
    for start in range(0, len(images), _BLOCK):
        part = range(start, min(start + _BLOCK, len(images)))
        drawn = np.stack([_drawn(len(texts), int(own[i]), others, (seed, i)) for i in part])
        cosines = np.einsum("nd,nkd->nk", images[start : part.stop], texts[drawn])
        found[start : part.stop] = (cosines[:, :1] > cosines[:, 1:]).all(axis=1)
    return found


def others_of(texts: int) -> int:
    """Returns how many others the own text is compared with where there are so many texts."""
    return min(OTHERS, texts - 1)


def error_of_mean(values: Float[np.ndarray, " n"], own: Int[np.ndarray, " n"]) -> float:
    """Returns the standard error of a mean over images.

    Images of one text are no independent evidence, so that texts are drawn, with all their images.
    Of images that have a text each it is ``bootstrap.of_mean``.

    Args:
        values: of each image.
        own: the text of each image.
    """
    values = np.asarray(values, np.float64)
    sums = np.bincount(own, weights=values - values.mean())
    return float(np.sqrt(np.square(sums).sum()) / len(values))


def _drawn(texts: int, own: int, others: int, seed: tuple[int, int]) -> Int[np.ndarray, " k"]:
    """Returns the own text and different others."""
    found = np.random.default_rng(seed).choice(texts - 1, others, replace=False)
    return np.concatenate([[own], found + (found >= own)])


def _unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    vectors = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float64).tiny)
