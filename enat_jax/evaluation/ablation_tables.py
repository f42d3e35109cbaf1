"""The tables of the ablations, from ``ablation``'s result."""

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from enat_jax.evaluation import ablation, reuse_gap
from enat_jax.evaluation.ablation_claims import (
    CLAIMS,
    NUM_OF_PAPER,
    RULE,
    SHOWN,
    Of,
    Pair,
    Summary,
    context,
    difference,
    loss,
    measured,
    of_model,
    sampled_loss,
    summary,
    verdict,
)
from enat_jax.runtime.markdown import table as markdown_table

MARKERS = "<!-- ablation.md begins -->\n", "<!-- ablation.md ends -->\n"


def markdown(result: ablation.Result) -> str:
    """Returns all tables of a result."""
    parts = [
        "### Models",
        _models(result),
        "### Held-out loss",
        _losses(result),
        "### Held-out loss at equal training compute",
        _equal_compute(result),
        "### Held-out loss on the way",
        _on_the_way(result),
        "### Quality of samples",
        _quality(result),
        "### Claims",
        _claims(result),
        "### What reuse costs in sampling",
        _reuse(result),
        "### Where the change is (Figure 5)",
        _change(result),
        "### The larger size",
        _larger(result),
        "### How",
        _how(result),
    ]
    return "\n\n".join(parts) + "\n"


def of_page(page: str) -> str:
    """Returns what stands between the ``MARKERS`` of a page, which ``markdown`` gave.

    Raises:
        ValueError: the page has not each of them once, in this order.
    """
    before, begins, rest = page.partition(MARKERS[0])
    text, ends, after = rest.partition(MARKERS[1])
    if not (begins and ends) or any(x in f"{before}{text}{after}" for x in MARKERS):
        raise ValueError(f"the page needs these two lines once: {' '.join(MARKERS)}")
    return text


def _models(result: ablation.Result) -> str:
    rows = []
    for name, model in result["models"].items():
        seeds = list(model["seeds"].values())
        rate = summary([[x["images"] / x["seconds"], 0.0] for x in seeds if "seconds" in x])
        speed = next((x["speed"] for x in seeds if "speed" in x), None)
        rows.append(
            [
                *(name, " + ".join(map(str, model["layers"])), model["width"]),
                f"{model['parameters']:,}",
                *(_millions(model["multiply_adds"][str(t)]) for t in ablation.STEPS),
                _millions(model["training_multiply_adds"]),
                f"{rate.mean:.0f}" if rate.num else "",
                "" if speed is None else f"{speed[0]:.2f} ({speed[1]:.2f} to {speed[2]:.2f})",
            ]
        )
    titles = ["model", "layers", "width", "parameters"]
    titles += [f"sampling, {t} steps (M)" for t in ablation.STEPS]
    titles += ["training (M)", "training, images/s", f"sampling, {SHOWN} steps (ms)"]
    return (
        f"{markdown_table(titles, rows, 'lr' + 'r' * 8)}\n\n"
        "Layers: of the encoder and the decoder, or of the one stack. M: exact multiply-adds in "
        "millions, of drawing the tokens of an image with guidance, by the cosine schedule and "
        "without the image decoder, and of an image of a training step, forward, backward and its "
        "cache, mean of the steps of a run with seed 0. Images a second are without compiling and "
        "evaluating, mean of the runs. Milliseconds are those of an image's tokens: "
        "median of all timings, the least and the most."
    )


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def _losses(result: ablation.Result) -> str:
    shares = result["common"].get("visible_shares", [])
    rows = []
    for name, model in result["models"].items():
        num = len(model["seeds"])
        found = [of_model(result, name, loss(i)) for i in (*range(len(shares)), None)]
        rows.append([name, num, *(x.text(expected=num) for x in found)])
    titles = ["model", "trainings", *(f"{share:.4g} visible" for share in shares), "mean"]
    return (
        f"{markdown_table(titles, rows, 'lr' + 'r' * (len(titles) - 2))}\n\n"
        f"Loss (nats) of masked tokens of {result['common'].get('held_out_images', 0):,} held-out "
        "images by the share that is visible, in the same random orders for all models. " + ERRORS
    )


def _equal_compute(result: ablation.Result) -> str:
    """Returns losses where every training has spent what the cheapest one spends in all."""
    spent = {
        name: model["training_multiply_adds"] * seed["images"]
        for name, model in result["models"].items()
        if not ablation.end_of(name)
        for seed in model["seeds"].values()
        if "curve" in seed
    }
    least = min(spent.values(), default=0)
    rows = []
    for name, whole in spent.items():
        of = _loss_after(least / whole)
        found = of_model(result, name, of)
        if found.num > 1:
            less = difference(result, [name], "nat", of)
            rows.append([name, found.num, f"{whole / 1e12:.3g}", found.text(), less.text("+")])
    titles = ["model", "trainings", "multiply-adds (T)", "loss", "difference to nat"]
    return (
        f"{markdown_table(titles, rows, 'lrrrr')}\n\n"
        "Multiply-adds (10^12): exact ones of a whole training. Loss: mean over shares visible, by "
        "the evaluations during training (line between two), where "
        f"{least / 1e12:.3g} T are spent. The learning rate of a training "
        "that goes on has not fallen to its end there. "
        "Mean ± standard error over trainings, and that of differences paired by seed."
    )


def _loss_after(share: float) -> Of:
    """Returns what reads the loss of a training after a share of its steps."""

    def of(seed: Mapping[str, Any]) -> Pair | None:
        if "curve" not in seed:
            return None
        steps, losses = zip(*seed["curve"], strict=True)
        return [float(np.interp(share * seed["steps"], steps, losses)), 0.0]

    return of


def _on_the_way(result: ablation.Result) -> str:
    """Returns losses at every evaluation during training, also of trainings that are not over."""
    seeds = {name: dict(model["seeds"]) for name, model in result["models"].items()}
    for name, begun in result["unfinished"].items():
        seeds[name] = seeds.get(name, {}) | begun
    view = {"models": {name: {"seeds": x} for name, x in seeds.items()}}
    rows = []
    for size in ablation.SIZES:
        nat, *others = (f"{x}{size}" for x in ablation.COMPARED)
        found = [x for name in (nat, *others) for x in seeds.get(name, {}).values()]
        images = {
            step: x["images"] * step // x["steps"] for x in found for step, _ in x.get("curve", ())
        }
        for step in sorted(images):
            at = _loss_at(step)
            cells = [_mean_alone(of_model(view, nat, at))]
            cells += [_mean_alone(difference(view, [x], nat, at), "+") for x in others]
            rows.append([_size(nat), step, f"{images[step]:,}", *cells])
    titles = ["size", "steps", "images", "nat"]
    titles += [f"{x}, difference to nat" for x in ablation.COMPARED[1:]]
    return (
        f"{markdown_table(titles, rows, 'lrr' + 'r' * len(ablation.COMPARED))}\n\n"
        "Loss (nats) of the moving average, mean over shares visible, by the evaluations during "
        "training. Mean ± standard error over trainings, differences paired by seed; * one "
        "training. Those that were stopped before their end have rows as far as they came."
    )


def _loss_at(step: int) -> Of:
    """Returns what reads the loss of the evaluation at a step."""

    def of(seed: Mapping[str, Any]) -> Pair | None:
        found = dict(map(tuple, seed.get("curve", ())))
        return [found[step], 0.0] if step in found else None

    return of


def _mean_alone(found: Summary, sign: str = "") -> str:
    """Returns mean ± error, of one training without an error: that over images is not known."""
    return f"{found.mean:{sign}.4f} *" if found.num == 1 else found.text(sign)


ERRORS = (
    "Mean ± standard error over trainings; * one training, with the standard error over images; "
    "in brackets the number of trainings where it is another."
)


def _quality(result: ablation.Result) -> str:
    rows = []
    for name, model in result["models"].items():
        num = len(model["seeds"])
        found = [
            of_model(result, name, measured(measure, str(t)))
            for measure in ablation.MEASURES
            for t in ablation.STEPS
        ]
        drawn = _millions(model["multiply_adds_as_drawn"][SHOWN])
        rows.append([name, num, *(x.text(expected=num) for x in found), drawn])
    names = "distance", "precision", "recall"
    titles = ["model", "trainings", *(f"{x}, {t} steps" for x in names for t in ablation.STEPS)]
    titles.append(f"as drawn, {SHOWN} steps (M)")
    common = result["common"]
    about = ""
    if "images" in common:
        about = (
            f"{common['features']} (no FID) of {common['images']:,} samples to "
            f"{common['reference_images']:,} pictures of the split {common['reference_split']}. "
        )
    if "search_trials" in common:
        about += (
            f"The settings of the sampler are those that a search of {common['search_trials']} "
            f"trials of {common['search_images']} images found for the model of seed 0; as drawn: "
            "exact multiply-adds with them. "
        )
    return f"{markdown_table(titles, rows, 'lr' + 'r' * (len(titles) - 2))}\n\n{about}{ERRORS}"


def _claims(result: ablation.Result) -> str:
    rows = []
    for claim in CLAIMS:
        what = (claim.lower, claim.higher)
        distance, losses = measured("frechet_distance", SHOWN), sampled_loss
        first, second = (difference(result, *what, of) for of in (distance, losses))
        tested = first, second
        if claim.margin:
            tested = (
                difference(result, *what, distance, (claim.margin, distance)),
                difference(result, *what, losses, (claim.margin, context)),
            )
        text = claim.text
        if claim.higher == "disentangled_7_1" and (times := _times(result, *what)):
            text += ", at {:.2f} times less cost ({:.2f} as drawn)".format(*times)
        names = claim.lower[0] if len(claim.lower) == 1 else "the worst of the other three"
        rows.append(
            [
                *(text, claim.paper, f"{names} less {claim.higher}"),
                max(first.num, second.num),
                *(first.text("+"), verdict(tested[0])),
                *(second.text("+"), verdict(tested[1])),
            ]
        )
    titles = ["claim", "the paper", "difference", "seeds", f"distance, {SHOWN} steps", "verdict"]
    titles += ["loss in sampling (nats)", "verdict"]
    return f"{markdown_table(titles, rows, 'lllrrlrl')}\n\n{RULE} * one seed: {ONE_SEED}"


ONE_SEED = "the error is that over images, as if the two were independent."


def _times(result: ablation.Result, lower: Sequence[str], higher: str) -> list[float]:
    """Returns how many times less the first model costs to sample, rounded down.

    By the cosine schedule, and with the settings of its samples; empty where a model is missing.
    """
    models = result["models"]
    if lower[0] not in models or higher not in models:
        return []
    kinds = "multiply_adds", "multiply_adds_as_drawn"
    pairs = [(models[higher][kind][SHOWN], models[lower[0]][kind][SHOWN]) for kind in kinds]
    return [math.floor(100 * theirs / ours) / 100 for theirs, ours in pairs]


def _reuse(result: ablation.Result) -> str:
    def of(kind: str, key: str, step: int | None = None) -> Of:
        def found(seed: Mapping[str, Any]) -> Pair | None:
            pair = seed.get("reuse", {}).get(kind, {}).get(key)
            return pair if step is None or pair is None else [x[step] for x in pair]

        return found

    steps = [s + 1 for s in result["common"].get("reuse_steps", [])]
    visible = result["common"].get("reuse_visible", [])
    rows = []
    for name in result["models"]:
        for kind in reuse_gap.KINDS[1:]:
            columns = [of(kind, "by_step", i) for i in range(len(steps))]
            columns += [of(kind, "loss"), of(kind, "distance")]
            found = [of_model(result, name, x) for x in columns]
            if num := max(x.num for x in found):
                rows.append([name, kind, num, *(x.text("+", num) for x in found)])
    titles = ["model", "features of visible tokens", "trainings"]
    titles += [f"step {s}, {share:.0%} visible" for s, share in zip(steps, visible, strict=True)]
    titles += ["mean of steps", "distance"]
    return (
        f"{markdown_table(titles, rows, 'llr' + 'r' * (len(titles) - 3))}\n\n"
        "Increase of the loss (nats) and of the distance over features that are recomputed at "
        "every step, by `analyze reuse`. Together: all cached tokens are encoded at once, as in "
        "training; in steps: as in sampling, of which f every step is the paper's. "
        f"{ERRORS} Of one training the error of the distance is that over seeds of its samples."
    )


def _change(result: ablation.Result) -> str:
    """Returns the table of Figure 5; the claim is that more than half of the change is theirs."""
    rows = []
    for name, model in result["models"].items():
        found = [x["similarity"] for x in model["seeds"].values() if "similarity" in x]
        if not found:
            continue
        pairs = []
        for one in found:
            means, errors = (np.array(x, float) for x in one["change"])
            known = ~np.isnan(means)
            pairs.append([means[known].mean(), float(np.linalg.norm(errors[known]) / known.sum())])
        share, tokens = summary(pairs), found[0]["tokens"]
        less = share._replace(mean=0.5 - share.mean)
        rows.append(
            [
                *(
                    name,
                    share.num,
                    f"{min(tokens):.3f} to {max(tokens):.3f}",
                    f"{np.mean(tokens):.3f}",
                ),
                *(share.text(), verdict(less)),
            ]
        )
    titles = ["model", "trainings", "newly revealed, by step", "mean"]
    titles += ["their share of the change, mean of steps", "verdict"]
    return (
        f"{markdown_table(titles, rows, 'lrrrrl')}\n\n"
        "Newly revealed tokens as a share of all, and their share of the change of features from "
        "step to step. The claim: it is more than half; decided by the same rule."
    )


def _larger(result: ablation.Result) -> str:
    there = {"", *map(ablation.end_of, result["models"])}
    sizes = [size for size in ablation.SIZES if size in there]
    rows = []
    for claim in CLAIMS[:NUM_OF_PAPER]:
        cells = []
        for size in sizes:
            names = [f"{x}{size}" for x in claim.lower], f"{claim.higher}{size}"
            for of in (measured("frechet_distance", SHOWN), sampled_loss):
                found = difference(result, *names, of)
                cells.append(found.text("+") + (f" ({found.num})" if found.num > 1 else ""))
        rows.append([f"{claim.lower[0]} less {claim.higher}", *cells])
    kinds = [f"distance, {SHOWN} steps", "loss in sampling (nats)"]
    titles = ["difference", *(f"{ablation.SIZES[size]}: {x}" for size in sizes for x in kinds)]
    align = "l" + "r" * (len(titles) - 1)
    return f"{markdown_table(titles, rows, align)}\n\nIn brackets: seeds. * one: {ONE_SEED}"


# --- how ------------------------------------------------------------------------------------

MODEL = "--model DIR/NAME/seed_S/run/model"
COMMANDS = {  # numbers that files record stand there in their place
    "training": "train --config configs/cifar10_ablation.py:NAME --workdir DIR/NAME/seed_S/run "
    "--config.seed=S --config.data.tokens=DIR/tokens --config.data.held_out_tokens="
    "DIR/tokens_held_out --config.data.tokenizer=TOKENIZER",
    "weights of NAME_project_once": f"export {MODEL} --project-once --out "
    "DIR/NAME_project_once/seed_S/run/model",
    "settings": "search --model DIR/NAME/seed_0/run/model --reference DIR/reference.npz --features "
    "FEATURES --num {search_images} --trials {search_trials} --repeats {search_repeats} --steps T "
    "--out DIR/NAME/steps_T",
    "distance, precision, recall": f"evaluate {MODEL} --reference DIR/reference.npz --features "
    "FEATURES --num {images} --seed {seed} --settings DIR/NAME/steps_T/settings.json --out "
    "DIR/NAME/seed_S/steps_T",
    "held-out loss": f"analyze loss {MODEL} --tokens DIR/tokens_held_out --num {{held_out_images}} "
    "--out DIR/NAME/seed_S",
    "what reuse costs": f"analyze reuse {MODEL} --tokens DIR/tokens_held_out --reference "
    "DIR/reference.npz --features FEATURES --out DIR/NAME/seed_S/reuse",
    "Figure 5": f"analyze similarity {MODEL} --out DIR/NAME/seed_S/similarity",
    "sampling (ms)": "benchmark sampler --config configs/cifar10_ablation.py:NAME --batch 64 "
    "--steps 8 --segments 2 --json DIR/NAME/seed_0/speed.json",
    "machine of a training": "benchmark machine --dtype float32 --json "
    "DIR/NAME/seed_S/machine.json",
    "all else": "analyze ablation --runs DIR --out DIR/report",
}


def _how(result: ablation.Result) -> str:
    known = collections.defaultdict(lambda: "N", result["common"])
    commands = [
        [what, f"`python -m enat_jax.{x.format_map(known)}`"] for what, x in COMMANDS.items()
    ]
    places: dict[tuple[str, str], list[str]] = {}
    for what, machine, date in _made(result):
        places.setdefault((what, machine), []).append(date)
    rows = [
        [what, len(dates), machine, " to ".join(dict.fromkeys([min(dates), max(dates)]))]
        for (what, machine), dates in sorted(places.items())
    ]
    return "\n\n".join(
        [
            "Each cell is made by the command of its kind, of its model NAME, seed S and steps T; "
            "launch/ablation.sh calls them with all that they need.",
            markdown_table(["cells", "command"], commands),
            markdown_table(["what", "number", "machine", "date (UTC)"], rows, "lrll"),
        ]
    )


def _made(result: ablation.Result) -> Iterator[tuple[str, str, str]]:
    """Yields kind, machine and date of every training, card and loss."""
    for name, seeds in result["unfinished"].items():
        for seed in seeds.values():
            about = f"trainings, {_size(name)}, stopped, jax {seed.get('jax', 'not recorded')}"
            yield about, seed.get("machine", "not recorded"), seed["date"]
    for name, model in result["models"].items():
        for seed in model["seeds"].values():
            if "date" in seed:  # else it has the weights of another model's training
                about = f"trainings, {_size(name)}, {seed['steps']:,} steps, jax {seed['jax']}"
                yield about, seed.get("machine", "not recorded"), seed["date"]
            for card in seed.get("cards", {}).values():
                yield "cards", card["machine"], card["date"]
            if "loss_made" in seed:
                yield "losses", *seed["loss_made"]


def _size(name: str) -> str:
    return ablation.SIZES[ablation.end_of(name)]
