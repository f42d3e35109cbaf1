"""What it costs that features are reused, by sampling step, and of what the cost is made.

Training encodes all tokens of its cache together and projects their features by f once. Sampling
encodes them reveal after reveal, each beside features of the earlier ones, and by the last step the
first have passed through f many times. The loss of masked tokens is measured of the same tokens, in
the same random order and in the numbers that the sampler's steps reveal, with the visible tokens

- *recomputed*: all encoded together in the step, and nothing reused;
- *together, f once*: as a training step has them, the cached ones together;
- *in steps, f once*: as the sampler has them, but projected at their first reuse alone;
- *in steps, f every step*: as the paper's sampler has them.

The steps before the third reuse nothing, and all of these are the same. The distance of drawn
images, if it is measured, is that of the sampler with the features of the first, third and last.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from enat_jax.data import records
from enat_jax.evaluation import means, settings_search
from enat_jax.inference import generator, masked_scores, windows
from enat_jax.models import enat, losses
from enat_jax.runtime import numerics, sharding
from enat_jax.runtime.markdown import table as markdown_table
from enat_jax.schedules import reveal

RECOMPUTED, TOGETHER = "recomputed", "together, f once"
ONCE, EVERY_STEP = "in steps, f once", "in steps, f every step"
KINDS = RECOMPUTED, TOGETHER, ONCE, EVERY_STEP
BATCH_SIZE = 50  # images per call of the network


def measure(
    model: generator.Generator,
    codes: Int[np.ndarray, "n l"],
    labels: Int[np.ndarray, " n"],
    *,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Measures the loss of masked tokens with each kind of features, by step.

    Args:
        model: an ENAT of classes that reuses features.
        codes: in raster order, best of images that it was not trained on.
        labels: of the images.
        seed: of the random orders, the same for all kinds.
        batch_size: images at a time.
        progress: called with the number of batches done.

    Returns:
        The "steps" that reuse features, from 0, the share "visible" in each, and by kind the "loss"
        (nats) and its "increase" over that of recomputed features: the mean and the standard error
        over images, of each step and, as "all", of their mean.

    Raises:
        ValueError: the model is another, or there are fewer than two images, or no step reuses.
    """
    network, settings = model.model, model.settings
    if not isinstance(network, enat.ENAT) or not network.reuse or network.takes_text:
        raise ValueError("what is analysed is an ENAT of classes that reuses features")
    if len(codes) < 2:
        raise ValueError(f"{len(codes)} images: a standard error needs two")
    counts = reveal.sampling_steps(network.num_tokens, settings.num_steps, revealed=settings.counts)
    if not counts.num_cached.any():
        raise ValueError(f"{settings.num_steps} steps reuse no features: take three at least")
    num_cached, num_visible, num_projected = (
        x.astype(np.int32) for x in (counts.num_cached, counts.num_visible, counts.num_projected)
    )
    mesh, params = model.placed
    batches = []
    batched = records.equal_batches(len(codes), batch_size)
    for done, (part, known) in enumerate(batched, start=1):
        rows = codes[part].astype(np.int32)
        order = masked_scores.random_order(numerics.key(seed + part.start), rows.shape)
        placed = [
            sharding.place(np.asarray(x), mesh)
            for x in (rows, labels[part].astype(np.int32), order)
        ]
        most_new = int(counts.num_new.max())
        steps = num_cached, num_visible, num_projected
        found = _losses(network, params, *placed, steps, most_new)
        batches.append(np.asarray(found, np.float64)[..., known : len(rows)])
        progress(done)
    reusing = np.flatnonzero(num_cached)
    of_kinds = np.concatenate(batches, axis=-1)[:, reusing]
    result: dict[str, Any] = {
        "steps": reusing.tolist(),
        "visible": (num_visible[reusing] / network.num_tokens).tolist(),
    }
    for name, values in zip(KINDS, of_kinds, strict=True):
        parts = {"loss": values, "increase": values - of_kinds[0]}
        result[name] = {key: means.mean_and_error(x.T) for key, x in parts.items()}
        result[name]["all"] = {
            key: means.mean_and_error(x.mean(axis=0)) for key, x in parts.items()
        }
    return result


@numerics.jit(static_argnames=("model", "most_new"))
def _losses(
    model: enat.ENAT,
    params: PyTree,
    ids: Int[Array, "b l"],
    labels: Int[Array, " b"],
    order: Int[Array, "b l"],
    counts: tuple[Int[Array, " t"], Int[Array, " t"], Int[Array, " t"]],
    most_new: int,
) -> Float[Array, "k t b"]:
    """Returns the mean loss of an image's masked tokens by kind and step.

    Every window has room for all tokens and says how many are real: one compiled step for all.
    """

    def apply(*arguments: Any, **more: Any) -> Any:
        return model.apply({"params": params}, *arguments, **more)

    l = model.num_tokens  # noqa: E741
    modulation = apply(labels, method="condition")
    revealed = jnp.take_along_axis(ids, order, axis=1)
    sizes = reveal.Windows(l, most_new, l, l)

    def encode(step: windows.Cut, cache: Array, **more: Any) -> Array:
        counts = {"num_new": step.num_new, "num_cached": step.num_cached}
        return apply(*step.new, modulation, cache, **counts, **more, method="encode")[:, :l]

    def together(count: Array) -> Array:
        return apply(revealed, order, modulation, num_new=count, method="encode")

    def loss(step: windows.Cut, cache: Array) -> Float[Array, " b"]:
        counts = {"num_masked": step.num_masked, "num_visible": step.num_visible}
        logits = apply(order, modulation, cache, **counts, method="decode")
        of_tokens = losses.smoothed_cross_entropy(logits, revealed, 0.0)
        real = step.masked_is_real
        return jnp.mean(of_tokens, axis=1, where=real)

    def body(caches: tuple[Array, Array], count: tuple[Array, ...]) -> tuple[Any, Array]:
        once, every_step = caches
        num_cached, num_visible, num_projected = count
        step = windows.cut(revealed, order, num_cached, num_visible, sizes)
        once = encode(step, once, num_projected=num_projected)
        every_step = encode(step, every_step)
        trained = encode(step, together(num_cached))
        kinds = together(num_visible), trained, once, every_step
        return (once, every_step), jnp.stack([loss(step, cache) for cache in kinds])

    empty = jnp.zeros((*ids.shape, model.width), jnp.dtype(model.dtype))
    _, found = jax.lax.scan(body, (empty, empty), counts)
    return found.swapaxes(0, 1)


def distances(
    model: generator.Generator,
    quality: settings_search.Measure,
    seeds: Sequence[int],
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures images that are drawn with each kind of features that a sampler can have.

    Args:
        model: as for ``measure``.
        quality: draws and measures the images.
        seeds: of the images, at least two.
        say: called with a sentence about each measurement.

    Returns:
        By kind the values of ``quality`` and their "increase" over those of recomputed features:
        means and standard errors over seeds.
    """
    network = model.model
    kinds = {
        RECOMPUTED: network.clone(reuse=False, project_once=False),
        ONCE: network.clone(project_once=True),
        EVERY_STEP: network.clone(project_once=False),
    }
    values: dict[str, Float[np.ndarray, "seeds names"]] = {}
    for kind, other in kinds.items():
        drawing, rows = dataclasses.replace(model, model=other), []
        for seed in seeds:
            found = quality(drawing, seed, True)
            say(f"{kind}, seed {seed}: {', '.join(f'{k} {v:.4g}' for k, v in found.items())}")
            rows.append([found[name] for name in quality.names])
        values[kind] = np.array(rows)
    return {
        "names": list(quality.names),
        "seeds": list(seeds),
        **{
            kind: {
                "values": means.mean_and_error(x),
                "increase": means.mean_and_error(x - values[RECOMPUTED]),
            }
            for kind, x in values.items()
        },
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the tables of a result: ``measure`` as "losses", ``distances``, "num_images"."""
    found = result["losses"]
    steps = [
        f"step {step + 1}, {visible:.0%} visible"
        for step, visible in zip(found["steps"], found["visible"], strict=True)
    ]
    rows = []
    for kind in KINDS:
        key, sign = ("loss", "") if kind == RECOMPUTED else ("increase", "+")
        cells = [means.text(found[kind][key], i, sign) for i in range(len(steps))]
        rows.append([kind, *cells, means.text(found[kind]["all"][key], None, sign)])
    text = (
        f"{markdown_table(['features of visible tokens', *steps, 'mean'], rows)}\n\n"
        f"Loss (nats) of masked tokens of {result['num_images']} images, and its increase over "
        "that of recomputed features; mean ± standard error over images.\n"
    )
    if (drawn := result.get("distances")) is None:
        return text
    names, rows = drawn["names"], []
    for kind in (RECOMPUTED, ONCE, EVERY_STEP):
        cells = [means.text(drawn[kind]["values"], i) for i in range(len(names))]
        change = "" if kind == RECOMPUTED else means.text(drawn[kind]["increase"], 0, "+")
        rows.append([kind, *cells, change])
    titles = ["features of visible tokens", *names, f"{names[0]} more than recomputed"]
    return (
        f"{text}\n{markdown_table(titles, rows)}\n\n"
        f"Of {result['num_drawn']} images of each of {len(drawn['seeds'])} seeds; mean ± standard "
        "error over seeds, and paired by seed in the last column.\n"
    )
