"""TODO."""

import functools

import jax
import jax.numpy as jnp

from enat_jax.models import losses

VISIBLE_SHARES = (1 / 16, 1 / 4, 1 / 2, 3 / 4)  # of the tokens, at which models are compared


def random_order(key, shape):
    """A uniformly random permutation of 0..l-1 in every row; int32 [b, l]."""
    return jnp.argsort(jax.random.uniform(key, shape), axis=1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "num_visible"))
def scores(model, params, ids, labels, order, num_visible):
    """How well masked tokens are predicted when the first ``num_visible`` of ``order`` are seen.

    Args:
        model, params: the transformer.
        ids: int32 [b, l], raster order; labels: int32 [b]; order: int32 [b, l] reveal order.
        num_visible: static, 0 <= num_visible < l.

    Returns:
        float32 [b, m] cross-entropy (nats, no smoothing) and bool [b, m] argmax hits.
    """
    ids = jnp.take_along_axis(ids, order, axis=1)
    apply = functools.partial(model.apply, {"params": params})
    modulation = apply(labels, method="condition")
    visible = slice(None), slice(None, num_visible)
    masked = slice(None), slice(num_visible, None)
    cache = apply(ids[visible], order[visible], modulation, method="encode")
    logits = apply(order[masked], modulation, cache, method="decode")
    targets = ids[masked]
    loss = losses.smoothed_cross_entropy(logits, targets, 0.0)
    return loss, logits.argmax(axis=-1) == targets
