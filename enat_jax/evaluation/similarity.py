"""The analysis of feature similarity (paper Figure 5): averages over samples, and their table.

``step_similarity`` says what is compared, and compares it place by place.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int8

from enat_jax.evaluation import means, step_similarity
from enat_jax.evaluation.step_similarity import GROUPS
from enat_jax.inference import generator
from enat_jax.runtime.markdown import table as markdown_table
from enat_jax.schedules import reveal

BATCH_SIZE = 50  # images per call of the network
NUM_MAPS = 4  # images whose maps are shown


def similarities(
    model: generator.Generator,
    num: int,
    *,
    seed: int = 0,
    num_maps: int = NUM_MAPS,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Averages the similarity of token features in adjacent sampling steps over samples.

    Args:
        model: what is analysed; its settings are the sampler's.
        num: images, at least 2; as many of each class as the number allows.
        seed: of the samples.
        num_maps: images whose similarities are returned place by place, the first ones.
        batch_size: images at a time; results depend on it by rounding alone.
        progress: called with the number of images done, after each batch.

    Returns:
        The result, JSON values: by pass 1 to t - 1 the numbers of tokens, and mean and standard
        error over images of

        - adjacent, elsewhere, reused: by group, see ``step_similarity.Similarities``;
        - change_share: share of the newly revealed tokens in all change;
        - overlap: of the predictions of masked tokens with and without reuse; same_code: share of
          masked tokens for which both have the same most probable code;
        - overall: of ``adjacent`` over all passes, each place of each pass counting once.

        And the maps of the first images: "adjacent" and "group" ``[n, t - 1, l]``, "tokens"
        ``[n, l]``.

    Raises:
        ValueError: if there are too few images or steps.
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
        tokens, step = step_similarity.draw(
            *(network, model.params, settings, part, start + np.arange(size, dtype=np.int32), seed),
            model.tokenizer.grid,
        )
        found = step_similarity.similarities_of_passes(
            *(network, model.params, tokens, step, part, settings.num_steps), settings.counts
        )
        kept = slice(0, min(size, num - start))
        found = found.select(kept)
        parts.append(_of_images(found))
        room = max(0, num_maps - start)
        shown.append((found.adjacent[:room], found.group[:room], tokens[kept][:room]))
        progress(start + len(found.group))
    result = _describe(model, labels, seed) | _summary(parts)
    maps = [np.concatenate(x) for x in zip(*shown, strict=True)]
    return result, dict(zip(("adjacent", "group", "tokens"), maps, strict=True))


def image_means(
    values: Float[np.ndarray, "b t-1 l"], group: Int8[np.ndarray, "b t-1 l"]
) -> dict[str, Float[np.ndarray, "b t-1"]]:
    """Returns the means of each image over the places of a group, by the group's name.

    Args:
        values: nan where there is none.
        group: of each place, index into ``GROUPS``.

    Returns:
        float64, nan where the group has no values.
    """
    found = {}
    for index, name in enumerate(GROUPS):
        inside = (group == index) & ~np.isnan(values)
        count = inside.sum(axis=-1)
        total = np.where(inside, values, 0).sum(axis=-1, dtype=np.float64)
        found[name] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return found


def change_share(
    adjacent: Float[np.ndarray, "b t-1 l"], group: Int8[np.ndarray, "b t-1 l"]
) -> Float[np.ndarray, "b t-1"]:
    """Returns the share that newly revealed tokens have in all change, the sum of ``1 - adjacent``.

    It is float64, and nan where nothing is revealed.
    """
    change = 1 - adjacent.astype(np.float64)
    newly = group == GROUPS.index("newly revealed")
    total = change.sum(axis=-1)
    there = newly.any(axis=-1) & (total > 0)
    return np.where(
        there, np.where(newly, change, 0).sum(axis=-1) / np.where(there, total, 1), np.nan
    )


def _of_images(found: step_similarity.Similarities) -> dict[str, Any]:
    """Returns the numbers of each image, a nested dict of float64 ``[b, t - 1]``."""

    def by_group(values: np.ndarray | None) -> dict[str, np.ndarray] | None:
        return None if values is None else image_means(values, found.group)

    def of_masked(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else image_means(values, found.group)["masked"]

    def of_one_pass(values: np.ndarray) -> np.ndarray:
        return values.reshape(len(values), 1, -1)

    overall = image_means(of_one_pass(found.adjacent), of_one_pass(found.group))
    return {
        "adjacent": by_group(found.adjacent),
        "elsewhere": by_group(found.elsewhere),
        "change_share": change_share(found.adjacent, found.group),
        "reused": by_group(found.reused),
        "overlap": of_masked(found.overlap),
        "same_code": of_masked(found.same_code),
        "overall": {name: x[:, 0] for name, x in overall.items()},
    }


def _summary(parts: list[Any]) -> Any:
    """Returns mean and standard error of what ``_of_images`` gives of each batch."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: _summary([part[name] for part in parts]) for name in first}
    return means.mean_and_error(np.concatenate(parts))


def _describe(
    model: generator.Generator, labels: Int[np.ndarray, " b"], seed: int
) -> dict[str, Any]:
    """Returns what a reader must know to judge or repeat the numbers."""
    settings = model.settings
    steps = reveal.sampling_steps(
        model.model.num_tokens, settings.num_steps, revealed=settings.counts
    )
    counts = (steps.num_cached, steps.num_new, steps.num_masked)
    return {
        "transformer": model.fingerprint,
        "tokenizer": model.tokenizer.fingerprint,
        "kind": type(model.model).__name__,
        "sampler": model.settings.described(),
        "num_images": len(labels),
        "num_labels": len(set(labels.tolist())),
        "seed": seed,
        "num_steps": model.settings.num_steps,
        "num_tokens": model.model.num_tokens,
        "tokens": {name: count[1:].tolist() for name, count in zip(GROUPS, counts, strict=True)},
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the table of a result of ``similarities``."""
    titles = ["step", *(f"{name} (tokens)" for name in GROUPS)]
    titles.append("newly revealed: share of change (of tokens)")
    columns = [result["adjacent"][name] for name in GROUPS]
    if result["reused"] is not None:
        titles += ["reused: already visible", "masked", "overlap", "same code"]
        columns += [result["reused"][name] for name in ("already visible", "masked")]
        columns += [result["overlap"], result["same_code"]]
    rows = []
    for s in range(result["num_steps"] - 1):
        cells = [means.text(column, s) for column in columns]
        for i, name in enumerate(GROUPS):
            cells[i] += f" ({result['tokens'][name][s]})"
        share = result["tokens"]["newly revealed"][s] / result["num_tokens"]
        cells.insert(3, f"{means.text(result['change_share'], s)} ({share:.3f})")
        rows.append([s + 1, *cells])
    overall = (f"{name} {means.text(result['overall'][name])}" for name in GROUPS)
    about = (
        "Cosine similarity of a place's features in a step and in the one before, mean ± standard "
        f"error over {result['num_images']} samples of {result['num_labels']} classes. Over all "
        f"steps: {', '.join(overall)}."
    )
    if result["reused"] is not None:
        about += (
            " Reused: cosine of the sampler's features and those computed anew. Of masked tokens "
            "also the overlap of the codes' probabilities with both, and the share whose most "
            "probable code is the same."
        )
    return f"{markdown_table(titles, rows)}\n\n{about}\n"
