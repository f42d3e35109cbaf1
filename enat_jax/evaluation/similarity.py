"""How much token features change from one sampling step to the next (paper Figure 5).

The paper's reason for reusing features: between two steps hardly anything changes but the tokens
that have just been revealed. Here a step's features are those of a pass that reuses nothing, so
that what is compared is what the step would compute anew:

- ENAT, also the disentangled model: of a visible token the encoder's output, with all visible
  tokens encoded together and no cache; of a masked token the decoder's output before the head.
- NAT: of any token the output of its one stack before the head.

The pass sees the label; of the guidance branches it is the conditional one. Passes are numbered
from 0, as the sampler's steps; pass s sees what the steps before s revealed. Compared are, by the
cosine, the features of the same place in passes s - 1 and s, in three groups:

    already visible   visible in both passes
    newly revealed    masked in pass s - 1, visible in pass s: in an ENAT from the decoder's output
                      to the encoder's, two networks that share no layer
    masked            masked in both passes

A model that reuses features is also run as the sampler runs it, and its features of pass s compared
with the recomputed ones of the same pass: what reuse costs.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from enat_jax.inference import sampling, windows
from enat_jax.models import nat
from enat_jax.schedules import reveal

GROUPS = ("already visible", "newly revealed", "masked")


class Similarities(NamedTuple):
    """Of passes 1 to t - 1, [b, t - 1, l] each, in raster order.

    Attributes:
        group: int8, index into ``GROUPS``.
        adjacent: float32 in [-1, 1], features of this place in the pass before and in this one.
        elsewhere: float32, features in this pass and those in the pass before of another place of
            the same group and image: how alike tokens are anyhow. nan where the group has no other.
        reused: float32, features with reuse and recomputed ones of this pass; None for a model
            that reuses nothing.
        overlap: float32 in [0, 1], share of the predicted probabilities that both have in common
            (1 minus their total variation distance); of masked places, nan elsewhere. None as
            ``reused``.
        same_code: float32, 1 where the most probable code is the same and 0 where not; of masked
            places, nan elsewhere. None as ``reused``.
    """

    group: np.ndarray
    adjacent: np.ndarray
    elsewhere: np.ndarray
    reused: np.ndarray | None
    overlap: np.ndarray | None
    same_code: np.ndarray | None


def draw(model, params, settings, labels, image_index, seed):
    """Images from the sampler, and when it revealed which of their tokens.

    Args:
        model, params: the transformer; settings: ``sampling.Settings``.
        labels, image_index: int32 [b]; seed: int.

    Returns:
        ``(tokens, step)``, int32 [b, l] in raster order: the sampler's tokens, and the step (from
        0) that revealed each.
    """
    static, inputs = sampling.make_schedule(settings, model)
    trace = sampling.trace_tokens(
        model, static, inputs, params, labels, image_index, jax.random.key(seed)
    )
    return np.asarray(trace.tokens[-1]), np.asarray(trace.visible).argmax(axis=0).astype(np.int32)


def step_similarity(model, params, tokens, step, labels, num_steps):
    """Similarities of the passes of ``num_steps`` sampling steps.

    Args:
        model, params: the transformer.
        tokens, step: int [b, l] from ``draw``; labels: int [b].
        num_steps: t, at least 2.

    Returns:
        ``Similarities`` of numpy arrays.

    Raises:
        ValueError: there are no two steps, or ``step`` is not of so many.
    """
    if num_steps < 2:
        raise ValueError(f"{num_steps=}: a similarity of adjacent steps needs two of them")
    order = np.argsort(step, axis=1, kind="stable").astype(np.int32)
    steps = reveal.sampling_steps(model.num_tokens, num_steps)
    revealed = np.repeat(np.arange(num_steps), steps.num_masked - steps.num_left)
    if np.any(np.take_along_axis(np.asarray(step), order, axis=1) != revealed):
        raise ValueError(f"these tokens were not revealed in {num_steps} steps")
    ids = np.take_along_axis(np.asarray(tokens, np.int32), order, axis=1)
    counts = np.stack([steps.num_cached, steps.num_visible], axis=1).astype(np.int32)
    found = _measure(
        model, int(steps.num_new.max()), params, ids, order, np.asarray(labels, np.int32), counts
    )
    # A pass each: [t, b, l] in reveal order. Pass 0 has none before it.
    rank = np.argsort(order, axis=1)[:, None]
    raster = lambda x: np.take_along_axis(np.swapaxes(np.asarray(x)[1:], 0, 1), rank, axis=2)  # noqa: E731
    slot = np.arange(model.num_tokens)
    group = np.int8(slot >= steps.num_cached[:, None]) + (slot >= steps.num_visible[:, None])
    group = np.broadcast_to(group[:, None], (num_steps, *order.shape)).astype(np.int8)
    return Similarities(*(None if x is None else raster(x) for x in (group, *found)))


@functools.partial(jax.jit, static_argnames=("model", "most_new"))
def _measure(model, most_new, params, ids, order, labels, counts):
    """What ``Similarities`` has but the group, [t, b, l] in reveal order.

    Every window has room for all tokens and says how many are real: one compiled pass for all.
    ``most_new``: static, the most tokens that a step encodes. counts: int32 [t, 2], tokens visible
    in the pass before and in this one.
    """
    apply = functools.partial(model.apply, {"params": params})
    modulation = apply(labels, method="condition")
    l = model.num_tokens  # noqa: E741
    sizes = reveal.Windows(l, most_new, l, l)
    slot = jnp.arange(l)
    features = functools.partial(_features, apply, model, order, modulation)

    def compare(carry, count):
        before, cache = carry
        num_cached, num_visible = count
        fresh = apply(ids, order, modulation, num_new=num_visible, method="encode")
        now = features(fresh, num_visible)
        neighbour = _next_of_group(slot, num_cached, num_visible)
        elsewhere = _cosine(before[:, neighbour], now)
        similar = _cosine(before, now), jnp.where(neighbour == slot, jnp.nan, elsewhere)
        if not model.reuse:
            return (now, None), (*similar, None, None, None)
        step = windows.cut(ids, order, num_cached, num_visible, sizes)
        cache = apply(
            step.new.ids,
            step.new.positions,
            modulation,
            cache,
            num_new=step.num_new,
            num_cached=step.num_cached,
            method="encode",
        )[:, :l]
        reused = _cosine(features(cache, num_visible), now)
        decode = functools.partial(
            apply,
            order,
            modulation,
            num_masked=step.num_masked,
            num_visible=step.num_visible,
            method="decode",
        )
        logits = [decode(cache=x) for x in (cache, fresh)]
        overlap = jnp.minimum(*(jax.nn.softmax(x, axis=-1) for x in logits)).sum(axis=-1)
        codes = [x.argmax(axis=-1) for x in logits]
        predicted = (overlap, (codes[0] == codes[1]).astype(jnp.float32))
        of_masked = (jnp.where(slot >= num_visible, x, jnp.nan) for x in predicted)
        return (now, cache), (*similar, reused, *of_masked)

    empty = jnp.zeros((*ids.shape, model.width), jnp.dtype(model.dtype))
    _, found = jax.lax.scan(compare, (empty, empty if model.reuse else None), tuple(counts.T))
    return found


def _features(apply, model, order, modulation, cache, num_visible):
    """Features of all tokens in reveal order, [b, l, d], the first ``num_visible`` from ``cache``.

    In a NAT ``cache`` holds embeddings only, and the features of visible tokens come out of the
    same stack as those of the masked ones.
    """
    l = model.num_tokens  # noqa: E741
    masked = apply(
        order,
        modulation,
        cache,
        num_masked=l - num_visible,
        num_visible=num_visible,
        method="features",
    )
    if isinstance(model, nat.NAT):
        cache, masked = masked[:, :l], masked[:, l:]
    return jnp.where((jnp.arange(l) < num_visible)[:, None], cache, masked)


def _next_of_group(slot, num_cached, num_visible):
    """For each slot of the reveal order the next one of its group, for the last the first."""
    start = jnp.where(slot < num_cached, 0, jnp.where(slot < num_visible, num_cached, num_visible))
    stop = jnp.where(
        slot < num_cached, num_cached, jnp.where(slot < num_visible, num_visible, slot.size)
    )
    return jnp.where(slot + 1 < stop, slot + 1, start)


def _cosine(x, y):
    """Of the last axis, in float32; 0 where a vector is 0."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return (x * y).sum(axis=-1) / jnp.where(norms > 0, norms, 1)


# --- numbers --------------------------------------------------------------------------------


def image_means(values, group):
    """Means of each image over the places of a group, by the group's name.

    Args:
        values: [b, t - 1, l], nan where there is none; group: as ``Similarities.group``.

    Returns:
        dict of float64 [b, t - 1], nan where the group has no values.
    """
    found = {}
    for index, name in enumerate(GROUPS):
        inside = (group == index) & ~np.isnan(values)
        count = inside.sum(axis=-1)
        total = np.where(inside, values, 0).sum(axis=-1, dtype=np.float64)
        found[name] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return found


def change_share(adjacent, group):
    """Share that newly revealed tokens have in all change, the sum of ``1 - adjacent``.

    Returns:
        float64 [b, t - 1], nan where nothing is revealed.
    """
    change = 1 - adjacent.astype(np.float64)
    newly = group == GROUPS.index("newly revealed")
    total = change.sum(axis=-1)
    there = newly.any(axis=-1) & (total > 0)
    return np.where(
        there, np.where(newly, change, 0).sum(axis=-1) / np.where(there, total, 1), np.nan
    )


def mean_and_error(values):
    """Mean and its standard error over the images, for JSON.

    Args:
        values: float64 [b, ...]; nan where an image has none.

    Returns:
        dict of "mean" and "standard_error", nested lists [...]; None where there is no number, and
        for the error where there are fewer than two images.
    """
    values = np.asarray(values, np.float64)
    there = ~np.isnan(values)
    count = there.sum(axis=0)
    mean = np.where(there, values, 0).sum(axis=0) / np.maximum(count, 1)
    squares = np.where(there, values - mean, 0) ** 2
    error = np.sqrt(squares.sum(axis=0) / np.maximum(count - 1, 1) / np.maximum(count, 1))
    plain = lambda x, real: np.where(real, x.astype(object), None).tolist()  # noqa: E731
    return {"mean": plain(mean, count > 0), "standard_error": plain(error, count > 1)}


BATCH_SIZE = 50  # images per call of the network


MAPS = 4  # images whose maps are shown


def similarities(model, num, *, seed=0, num_maps=MAPS, batch_size=BATCH_SIZE, progress=None):
    """Similarity of token features in adjacent sampling steps, averaged over samples.

    Args:
        model: ``Generator``; its settings are the sampler's.
        num: images, at least 2; as many of each class as the number allows.
        seed: of the samples.
        num_maps: images whose similarities are returned place by place, the first ones.
        batch_size: images at a time; results depend on it by rounding alone.
        progress: called with the number of images done, after each batch.

    Returns:
        ``(result, maps)``. result: JSON values, see ``json``: by pass 1 to t - 1 the
        numbers of tokens, and mean and standard error over images of

        - adjacent, elsewhere, reused: by group, see ``Similarities``;
        - change_share: share of the newly revealed tokens in all change;
        - overlap: of the predictions of masked tokens with and without reuse; same_code: share of
          masked tokens for which both have the same most probable code;
        - overall: of ``adjacent`` over all passes, each place of each pass counting once.

        maps: dict of adjacent float32 and group int8 [n, t - 1, l] and tokens int32 [n, l].

    Raises:
        ValueError: there are too few images or steps.
    """
    settings, network = model.settings, model.model
    if num < 2 or batch_size < 1:
        raise ValueError(f"{num=} must be at least 2, for an error, and {batch_size=} at least 1")
    if settings.num_steps < 2:
        raise ValueError(f"{settings.num_steps} step: there are no adjacent steps to compare")
    classes = network.num_classes
    index = np.arange(num, dtype=np.int32)
    labels = (index % classes if num >= classes else index * classes // num).astype(np.int32)
    parts, shown = [], []
    for start in range(0, num, batch_size):
        # One batch size, one compilation: the last batch is filled up.
        size = min(batch_size, num)
        part = np.resize(labels[start : start + batch_size], size)
        tokens, step = draw(
            network, model.params, settings, part, start + np.arange(size, dtype=np.int32), seed
        )
        found = step_similarity(network, model.params, tokens, step, part, settings.num_steps)
        kept = slice(0, min(size, num - start))
        found = Similarities(*(x if x is None else x[kept] for x in found))
        parts.append(_of_images(found))
        room = max(0, num_maps - start)
        shown.append((found.adjacent[:room], found.group[:room], tokens[kept][:room]))
        if progress is not None:
            progress(start + len(found.group))
    result = _describe(model, labels, seed) | _summary(parts)
    maps = [np.concatenate(x) for x in zip(*shown, strict=True)]
    return result, dict(zip(("adjacent", "group", "tokens"), maps, strict=True))


def _of_images(found):
    """Nested dict of numbers of each image, float64 [b, t - 1]."""
    means = lambda values: None if values is None else image_means(values, found.group)  # noqa: E731
    masked = lambda values: None if values is None else means(values)["masked"]  # noqa: E731
    flat = lambda x: x.reshape(len(x), 1, -1)  # noqa: E731
    overall = image_means(flat(found.adjacent), flat(found.group))
    return {
        "adjacent": means(found.adjacent),
        "elsewhere": means(found.elsewhere),
        "change_share": change_share(found.adjacent, found.group),
        "reused": means(found.reused),
        "overlap": masked(found.overlap),
        "same_code": masked(found.same_code),
        "overall": {name: x[:, 0] for name, x in overall.items()},
    }


def _summary(parts):
    """Mean and standard error of what ``_of_images`` gives of each batch."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: _summary([part[name] for part in parts]) for name in first}
    return mean_and_error(np.concatenate(parts))


def _describe(model, labels, seed):
    """What a reader must know to judge or repeat the numbers."""
    steps = reveal.sampling_steps(model.model.num_tokens, model.settings.num_steps)
    counts = (steps.num_cached, steps.num_new, steps.num_masked)
    return {
        "transformer": model.fingerprint,
        "tokenizer": model.tokenizer.fingerprint,
        "kind": type(model.model).__name__,
        "sampler": dataclasses.asdict(model.settings),
        "num_images": len(labels),
        "num_labels": len(set(labels.tolist())),
        "seed": seed,
        "num_steps": model.settings.num_steps,
        "num_tokens": model.model.num_tokens,
        "tokens": {name: count[1:].tolist() for name, count in zip(GROUPS, counts, strict=True)},
    }


def similarity_markdown(result):
    """The table of a result of ``similarities``."""
    head = ["step", *(f"{name} (tokens)" for name in GROUPS), "newly revealed: share of"]
    head[-1] += " change (of tokens)"
    columns = [result["adjacent"][name] for name in GROUPS]
    if result["reused"] is not None:
        head += ["reused: already visible", "masked", "overlap", "same code"]
        columns += [result["reused"][name] for name in ("already visible", "masked")]
        columns += [result["overlap"], result["same_code"]]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for s in range(result["num_steps"] - 1):
        cells = [cell(column, s) for column in columns]
        for i, name in enumerate(GROUPS):
            cells[i] += f" ({result['tokens'][name][s]})"
        share = result["tokens"]["newly revealed"][s] / result["num_tokens"]
        cells.insert(3, f"{cell(result['change_share'], s)} ({share:.3f})")
        lines.append(f"| {s + 1} | {' | '.join(cells)} |")
    overall = (f"{name} {cell(result['overall'][name])}" for name in GROUPS)
    lines += [
        "",
        f"Cosine similarity of a place's features in a step and in the one before, mean ± standard "
        f"error over {result['num_images']} samples of {result['num_labels']} classes. Over all "
        f"steps: {', '.join(overall)}.",
    ]
    if result["reused"] is not None:
        lines[-1] += (
            " Reused: cosine of the sampler's features and those computed anew. Of masked tokens "
            "also the overlap of the codes' probabilities with both, and the share whose most "
            "probable code is the same."
        )
    return "\n".join(lines) + "\n"


def cell(values, s=None, sign=""):
    """``mean ± standard error``, at entry s of several; a dash where there is none."""
    mean, error = (x if s is None else x[s] for x in (values["mean"], values["standard_error"]))
    return (
        "-" if mean is None else f"{mean:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
    )
