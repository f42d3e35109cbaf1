"""Masked tokens predicted from visible ones: the loss of a step, and scores of a trained model.

Paper Section 4.2; method Section 4.
"""

import functools

import jax
import jax.numpy as jnp

from enat_jax.models import losses


def step_loss(
    model,
    params,
    ema_params,
    batch,
    counts,
    windows,
    *,
    smoothing,
    dropout_key=None,
    exact=False,
):
    """Loss of one training step over windows of the reveal order; pure.

    Args:
        model: ``enat.ENAT`` or ``nat.NAT``.
        params: parameters that are trained; ema_params: of the pass that fills the cache.
        batch: dict of "ids" and "positions", int32 [b, l] in reveal order, and "labels", int32
            [b], ``num_classes`` for no class.
        counts: ``(num_cached, num_visible)``, real sizes, traced or not.
        windows: ``reveal.Windows`` that hold them; ``num_cached`` 0: no reuse, no EMA pass.
        smoothing: label smoothing.
        dropout_key: None: no dropout.
        exact: the windows are the counts themselves: no masks.

    Returns:
        ``(loss, metrics)``, float32 scalars: mean over masked tokens.
    """
    ids, positions, labels = batch["ids"], batch["positions"], batch["labels"]
    num_cached, num_visible = counts
    count = (lambda x: None) if exact else (lambda x: x)
    apply = functools.partial(model.apply, {"params": params})
    deterministic = dropout_key is None
    keys = (None, None) if deterministic else jax.random.split(dropout_key)
    rngs = [None if deterministic else {"dropout": key} for key in keys]

    cache = None
    if windows.num_cached:
        ema_apply = functools.partial(model.apply, {"params": jax.lax.stop_gradient(ema_params)})
        cache = ema_apply(
            ids[:, : windows.num_cached],
            positions[:, : windows.num_cached],
            ema_apply(labels, encoder_only=True, method="condition"),
            num_new=count(num_cached),
            method="encode",
        )
        cache = jax.lax.stop_gradient(cache)
    modulation = apply(labels, method="condition")
    # Spare slots at the end: the slice never clamps, wherever it starts.
    spare = ((0, 0), (0, windows.num_new))
    new_ids, new_positions = (
        jax.lax.dynamic_slice_in_dim(jnp.pad(x, spare), num_cached, windows.num_new, axis=1)
        for x in (ids, positions)
    )
    cache = apply(
        new_ids,
        new_positions,
        modulation,
        cache,
        num_new=count(num_visible - num_cached),
        num_cached=count(num_cached),
        deterministic=deterministic,
        rngs=rngs[0],
        method="encode",
    )
    first = ids.shape[1] - windows.num_masked
    num_masked = ids.shape[1] - num_visible
    logits = apply(
        positions[:, first:],
        modulation,
        cache[:, : windows.num_visible],
        num_masked=count(num_masked),
        num_visible=count(num_visible),
        deterministic=deterministic,
        rngs=rngs[1],
        method="decode",
    )
    targets = ids[:, first:]
    real = None if exact else jnp.arange(windows.num_masked) >= windows.num_masked - num_masked
    cross_entropy = losses.smoothed_cross_entropy(logits, targets, smoothing)
    loss = losses.masked_mean(cross_entropy, real, num_masked)
    hits = (logits.argmax(axis=-1) == targets).astype(jnp.float32)
    return loss, {"loss": loss, "accuracy": losses.masked_mean(hits, real, num_masked)}
