"""How well a trained transformer predicts masked tokens from visible ones."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from enat_jax.inference import guidance, windows
from enat_jax.models import losses
from enat_jax.models.blocks import Prompt
from enat_jax.models.transformers import Transformer
from enat_jax.runtime import numerics
from enat_jax.schedules import reveal

VISIBLE_SHARES = (1 / 16, 1 / 4, 1 / 2, 3 / 4)  # of the tokens, at which models are compared


@numerics.jit(static_argnames="shape")
def random_order(key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "b l"]:
    """Draws a uniformly random permutation of 0..l-1 for every row; ``shape``: (b, l)."""
    return jnp.argsort(jax.random.uniform(key, shape), axis=1).astype(jnp.int32)


@numerics.jit(static_argnames=("model", "num_visible"))
def scores(
    model: Transformer,
    params: PyTree,
    ids: Int[Array, "b l"],
    labels: Int[Array, " b"],
    order: Int[Array, "b l"],
    num_visible: int,
    prompt: Prompt | None = None,
) -> tuple[Float[Array, "b m"], Bool[Array, "b m"]]:
    """Predicts the masked tokens when the first ``num_visible`` of ``order`` are seen.

    Args:
        model, params: the transformer.
        ids: codes in raster order.
        labels: ``num_classes`` for no class.
        order: raster positions in reveal order.
        num_visible: static, 0 <= num_visible < l.
        prompt: texts of the images, for a model that takes them.

    Returns:
        Cross-entropy (nats, without smoothing), and whether the most probable code is right.
    """
    sizes = reveal.Windows(0, num_visible, num_visible, ids.shape[1] - num_visible)
    revealed = jnp.take_along_axis(ids, order, axis=1)
    cut = windows.cut(revealed, order, 0, num_visible, sizes, exact=True)
    apply: Callable[..., Any] = functools.partial(model.apply, {"params": params})
    modulation = apply(labels, method="condition")
    text = None if prompt is None else apply(prompt, modulation, method="read")
    new = cut.new.ids, cut.new.positions
    cache = apply(*new, modulation, method="encode", **guidance.of_text(text))
    if text is not None:
        cache, text = cache
    masked = cut.masked.positions
    logits = apply(masked, modulation, cache, method="decode", **guidance.of_text(text))
    loss = losses.smoothed_cross_entropy(logits, cut.masked.ids, 0.0)
    return loss, logits.argmax(axis=-1) == cut.masked.ids
