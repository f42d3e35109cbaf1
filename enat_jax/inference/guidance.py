"""Classifier-free guidance: its schedules, and the arithmetic of its two branches.

A guided batch has two rows for each image, side by side: c0 u0 c1 u1 ..., with its label and text
and without them. Side by side, not one branch after the other, so that a sharded batch stays where
it is.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from enat_jax.inference.windows import Cut
from enat_jax.models.blocks import Count, Text

# The weight of step s = 0 ... t - 1 as a share of the guidance scale, from ``s / t`` [t] and the
# interval (low, high). A new schedule is one more entry.
SCHEDULES: dict[str, Callable[[Any, tuple[float, float]], Any]] = {
    "linear": lambda share, interval: share,
    "constant": lambda share, interval: np.ones_like(share),
    "cosine": lambda share, interval: (1 - np.cos(np.pi * share)) / 2,
    "interval": lambda share, interval: (interval[0] <= share) & (share < interval[1]),
}


def weights(
    schedule: str, scale: float, interval: tuple[float, float], num_steps: int
) -> Float[np.ndarray, " t"]:
    """Weight of (conditional - unconditional) at each step, float64.

    Args:
        schedule: a key of ``SCHEDULES``.
        scale: the guidance scale, at least 0.
        interval: (low, high), for the schedule that has a use for it.
        num_steps: t.
    """
    return SCHEDULES[schedule](np.arange(num_steps) / num_steps, interval) * scale


def pair(
    conditional: Float[Array, "k b ..."], unconditional: Float[Array, "k b ..."]
) -> Float[Array, "k 2*b ..."]:
    """Puts the rows of the two branches side by side, along axis 1."""
    both = jnp.stack([conditional, unconditional], axis=2)
    return both.reshape(both.shape[0], -1, *both.shape[3:])


def pair_texts(conditional: Text, unconditional: Text) -> Text:
    """Puts the texts of the two branches side by side, padded to the longer of them.

    Args:
        conditional: of b images.
        unconditional: of b images, or one for all.
    """
    b = conditional.features.shape[0]
    texts = conditional, unconditional
    sizes = [text.features.shape[1] for text in texts]

    def both(arrays: Iterable[Float[Array, "k rows p ..."]]) -> Float[Array, "k 2*b p ..."]:
        found = []
        for x in arrays:
            rest = [(0, 0)] * (x.ndim - 3)
            x = jnp.pad(x, [(0, 0), (0, 0), (0, max(sizes) - x.shape[2]), *rest])
            found.append(jnp.broadcast_to(x, (len(x), b, *x.shape[2:])))
        return pair(*found)

    (features,) = both(text.features[None] for text in texts)
    kept = None
    if conditional.kept is not None and unconditional.kept is not None:
        kept = tuple(map(both, zip(conditional.kept, unconditional.kept, strict=True)))
    if sizes[0] == sizes[1] and all(text.length is None for text in texts):
        return Text(features, None, kept)
    lengths = [
        jnp.broadcast_to(size if text.length is None else text.length, (b,))
        for text, size in zip(texts, sizes, strict=True)
    ]
    return Text(features, jnp.stack(lengths, axis=1).reshape(-1), kept)


def of_text(text: Text | None) -> dict[str, Text]:
    """Returns the argument of ``encode`` and ``decode``; a NAT, which takes no text, has none."""
    return {} if text is None else {"text": text}


def _every(text: Text | None, skip: int) -> Text | None:
    """Returns the text of every ``skip``-th row."""
    if text is None or skip == 1:
        return text
    length = None if text.length is None else jnp.asarray(text.length)
    if length is not None and length.ndim:
        length = length[::skip]
    kept = text.kept and tuple(x[:, ::skip] for x in text.kept)
    return Text(text.features[::skip], length, kept)


def conditional_only(
    modulation: Float[Array, "k 2*b ..."], cache: Float[Array, "2*b p d"], text: Text | None = None
) -> tuple[Float[Array, "k b ..."], Float[Array, "b p d"], Text | None]:
    """Drops the unconditional rows, for steps after which no other one is guided."""
    return modulation[:, ::2], cache[::2], _every(text, 2)


def _each(count: Count | None, times: int) -> Count | None:
    """Returns the counts of as many rows; a count of all images is that of all rows."""
    if count is None or jnp.ndim(count) == 0:
        return count
    return jnp.repeat(jnp.asarray(count), times)


def guided_logits(
    apply: Callable[..., Any],
    windows: Cut,
    modulation: Float[Array, "k rows c d"],
    cache: Float[Array, "rows p d"],
    weight: Float[Array | np.ndarray, ""],
    guided: bool,
    text: Text | None = None,
) -> tuple[Float[Array, "b m v"], Float[Array, "rows q d"]]:
    """Encodes the new tokens and predicts the masked ones, with guidance.

    Args:
        apply: ``model.apply`` with its parameters.
        windows: of the step, [b, ...]: both branches of an image see the same tokens.
        modulation, cache: of as many rows as images, or of two rows an image, see ``pair``. The
            unconditional rows are always encoded: later steps reuse their features.
        weight: of (conditional - unconditional).
        guided: static, whether the unconditional rows are decoded; without them the logits are
            the conditional ones.
        text: of as many rows, from the model's ``read``; None: no text.

    Returns:
        Float32 logits of the masked window and the new cache.
    """
    branches = modulation.shape[1] // windows.masked.ids.shape[0]
    rows = lambda x, times: jnp.repeat(x, times, axis=0)  # noqa: E731
    projected = _each(windows.num_projected, branches)
    cache = apply(
        rows(windows.new.ids, branches),
        rows(windows.new.positions, branches),
        modulation,
        cache[:, : windows.sizes.num_cached],
        num_new=_each(windows.num_new, branches),
        num_cached=_each(windows.num_cached, branches),
        method="encode",
        **({} if projected is None else {"num_projected": projected}),  # which a NAT does not take
        **of_text(text),
    )
    if text is not None:
        cache, text = cache
    decoded = 2 if guided else 1
    skip = branches // decoded  # 2: of two rows an image the conditional one alone
    logits = apply(
        rows(windows.masked.positions, decoded),
        modulation[:, ::skip],
        cache[::skip, : windows.sizes.num_visible],
        num_masked=_each(windows.num_masked, decoded),
        num_visible=_each(windows.num_visible, decoded),
        method="decode",
        **of_text(_every(text, skip)),
    )
    if guided:
        conditional, unconditional = logits[0::2], logits[1::2]
        logits = conditional + weight * (conditional - unconditional)
    return logits, cache
