"""The loss of a step: masked tokens predicted from visible ones (the paper, Section 4.2)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from enat_jax.inference import guidance, windows
from enat_jax.models import losses
from enat_jax.models.blocks import Prompt
from enat_jax.models.transformers import Transformer
from enat_jax.schedules import reveal


def step_loss(
    model: Transformer,
    params: PyTree,
    ema_params: PyTree,
    batch: Mapping[str, Any],
    counts: tuple[windows.Count, windows.Count],
    sizes: reveal.Windows,
    *,
    smoothing: float,
    dropout_key: Key[Array, ""] | None = None,
    earlier: Int[Array, " reveals"] | Sequence[int] = (),
    exact: bool = False,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the loss of one training step over windows of the reveal order; pure.

    Args:
        model: the transformer.
        params: parameters that are trained; ema_params: of the pass that fills the cache.
        batch: "ids" and "positions", int32 [b, l] in reveal order, "labels", int32 [b],
            ``num_classes`` for no class, and for a model of text "prompt", a ``Prompt``.
        counts: ``(num_cached, num_visible)``, see ``windows.cut``.
        sizes: of the windows that hold them; ``num_cached`` 0: no reuse, no EMA pass.
        smoothing: label smoothing, in [0, 1).
        dropout_key: None: no dropout.
        earlier: where the reveals end that fill the cache before its last, see ``reveal.Split``.
        exact: the sizes are the counts themselves: no masks.

    Returns:
        ``(loss, metrics)``, float32: means over masked tokens.
    """
    labels, prompt = batch["labels"], batch.get("prompt")
    cut = windows.cut(batch["ids"], batch["positions"], *counts, sizes, exact=exact)
    apply: Callable[..., Any] = functools.partial(model.apply, {"params": params})
    deterministic = dropout_key is None
    keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    rngs = [None if key is None else {"dropout": key} for key in keys]

    cache = None
    if sizes.num_cached:
        cache = _cached_features(model, ema_params, cut, labels, prompt, earlier)
    modulation = apply(labels, method="condition")
    text = None if prompt is None else apply(prompt, modulation, method="read")
    cache = apply(
        cut.new.ids,
        cut.new.positions,
        modulation,
        cache,
        num_new=cut.num_new,
        num_cached=cut.num_cached,
        deterministic=deterministic,
        rngs=rngs[0],
        method="encode",
        **guidance.of_text(text),
    )
    if text is not None:
        cache, text = cache
    logits = apply(
        cut.masked.positions,
        modulation,
        cache[:, : sizes.num_visible],
        num_masked=cut.num_masked,
        num_visible=cut.num_visible,
        deterministic=deterministic,
        rngs=rngs[1],
        method="decode",
        **guidance.of_text(text),
    )
    targets, real = cut.masked.ids, cut.masked_is_real
    num_masked = sizes.num_masked if cut.num_masked is None else cut.num_masked
    cross_entropy = losses.smoothed_cross_entropy(logits, targets, smoothing)
    loss = losses.masked_mean(cross_entropy, real, num_masked)
    hits = (logits.argmax(axis=-1) == targets).astype(jnp.float32)
    return loss, {"loss": loss, "accuracy": losses.masked_mean(hits, real, num_masked)}


def _cached_features(
    model: Transformer,
    ema_params: PyTree,
    cut: windows.Cut,
    labels: Array,
    prompt: Prompt | None,
    earlier: Int[Array, " reveals"] | Sequence[int],
) -> Float[Array, "b p d"]:
    """Features of the cached window by the moving average, without gradient or dropout.

    They are encoded together, or reveal after reveal as the sampler does, of which each is computed
    in windows that hold all of them.
    """
    apply: Callable[..., Any] = functools.partial(
        model.apply, {"params": jax.lax.stop_gradient(ema_params)}
    )
    modulation = apply(labels, encoder_only=True, method="condition")
    # The text of the step is read by the parameters that are trained, this one for the cache alone.
    text = None if prompt is None else apply(prompt, modulation, method="read")
    encode = functools.partial(apply, method="encode", **guidance.of_text(text))
    size = cut.sizes.num_cached
    if not len(earlier):
        found = encode(cut.cached.ids, cut.cached.positions, modulation, num_new=cut.num_cached)
        return jax.lax.stop_gradient(found if text is None else found[0])
    last = size if cut.num_cached is None else cut.num_cached
    sizes = reveal.Windows(size, size, size, 0)
    cache: Any = None
    before, projected = 0, 0
    for end in [*earlier, last]:
        part = windows.cut(*cut.cached, before, end, sizes)
        counts = {"num_new": part.num_new, "num_cached": part.num_cached}
        if model.project_once:
            counts["num_projected"] = projected
        found = encode(*part.new, modulation, cache, **counts)
        cache = (found if text is None else found[0])[:, :size]
        projected, before = before, end
    return jax.lax.stop_gradient(cache)
