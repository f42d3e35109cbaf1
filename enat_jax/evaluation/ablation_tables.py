"""The tables of the ablations, and what becomes of the paper's claims, from ``ablation``'s result.

Errors are rounded up and values to the last digit of their error; nothing else is done to a number.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from enat_jax.evaluation import ablation, reuse_gap
from enat_jax.runtime.markdown import table as markdown_table

Pair = Sequence[float]  # a value and its standard error
Of = Callable[[Mapping[str, Any]], Pair | None]  # of one training; None: not measured

MARKERS = "<!-- ablation.md begins -->\n", "<!-- ablation.md ends -->\n"
MARGIN = 0.05  # of the distance, within which quality is called kept
SHOWN = "8"  # steps of the claims, as in the paper
ENOUGH = 3  # trainings of both models, below which nothing is decided
CUT = "nat_without_"


class Summary(NamedTuple):
    """Number of trainings, their mean, and its standard error.

    The error is that over trainings, of one training that over its images.
    """

    num: int
    mean: float
    error: float

    def text(self, sign: str = "", expected: int | None = None) -> str:
        """Returns mean ± error, blank where nothing was measured.

        An asterisk marks one training, and a number in brackets another one than is ``expected``.
        """
        if not self.num:
            return ""
        number = "" if expected in (None, self.num) else f" ({self.num})"
        return rounded(self.mean, self.error, sign) + " *" * (self.num == 1) + number


class Claim(NamedTuple):
    """That ``lower`` has a lower distance and loss than ``higher``, or within ``margin`` of it.

    Of several models the worst of each seed counts. ``paper``: what the paper says of it.
    """

    text: str
    paper: str
    lower: tuple[str, ...]
    higher: str
    margin: float = 0.0


CLAIMS = (
    Claim(
        "Visible tokens encoded apart from masked ones help at equal cost",
        "FID 6.54 to 4.78",
        ("disentangled_7_1",),
        "nat",
    ),
    Claim("The same with an even split of the layers", "", ("disentangled_4_4",), "nat"),
    Claim(
        "A deep encoder and a shallow decoder beat an even split",
        "yes (Table 1)",
        ("disentangled_7_1",),
        "disentangled_4_4",
    ),
    Claim(
        "Reused features keep the quality, within 5%",
        "FID 4.78 to 4.97, 39.8 to 22.6 G",
        ("enat",),
        "disentangled_7_1",
        MARGIN,
    ),
    Claim(
        "The projection f is needed",
        "FID 4.97 with it, 5.96 without",
        ("enat",),
        "enat_without_f",
    ),
    Claim(
        "Masked tokens must see visible ones",
        "yes (Figure 2)",
        ("nat",),
        f"{CUT}masked_from_visible",
    ),
    Claim(
        "Of the four cuts this one hurts most",
        "yes (Figure 2)",
        tuple(
            f"{CUT}{x}"
            for x in ("visible_from_visible", "visible_from_masked", "masked_from_masked")
        ),
        f"{CUT}masked_from_visible",
    ),
    Claim(
        "Visible tokens need not see masked ones, within 5%",
        "yes (Figure 2)",
        (f"{CUT}visible_from_masked",),
        "nat",
        MARGIN,
    ),
    Claim("f once for each token is better", "not asked", ("enat_project_once",), "enat"),
    Claim("A cache made in up to 4 reveals is better", "not asked", ("enat_reveals_4",), "enat"),
)
NUM_OF_PAPER = 4  # claims that are measured in both sizes, the first ones

RULE = (
    "Differences are paired by seed: the same splits, batches and noise. One rule decides: a claim "
    "*holds here* if the 95% interval of the mean difference over seeds (Student's t, so 4.3 "
    "standard errors of three seeds) lies below 0, or below 5% of the compared value where the "
    "claim says so; it *fails here* if the interval lies above; else, and always with fewer than "
    "three seeds, it is *undecided*. Losses are of features that are computed anew in one pass; "
    "what reuse adds in sampling is in the next table. Of losses the rule has no margin."
)


# --- numbers --------------------------------------------------------------------------------


def rounded(value: float, error: float, sign: str = "") -> str:
    """Returns ``value ± error``, the error rounded up to one digit, or to two below 3."""
    if error < 1e-9 * max(1, abs(value)):  # what floats make of 0
        return f"{value:{sign}z.4g} ± 0"
    place = math.floor(math.log10(error))
    place -= round(error / 10.0**place, 6) < 3
    unit = 10.0**place
    decimals = max(0, -place)
    error = math.ceil(error / unit - 1e-9) * unit
    return f"{round(value / unit) * unit:{sign}z.{decimals}f} ± {error:.{decimals}f}"


def loss(share: int | None) -> Of:
    """Returns what reads the loss of a training at a share visible; None: the mean of shares."""

    def of(seed: Mapping[str, Any]) -> Pair | None:
        if "loss" not in seed:
            return None
        of_shares, overall = seed["loss"]
        return overall if share is None else [of_shares[0][share], of_shares[1][share]]

    return of


def measured(name: str, num_steps: str) -> Of:
    """Returns what reads a measure of a training's card of so many steps."""
    return lambda seed: seed.get("cards", {}).get(num_steps, {}).get(name)


def summary(found: Sequence[Pair]) -> Summary:
    """Summarises the pairs of some trainings."""
    if not found:
        return Summary(0, math.nan, math.nan)
    values = np.array([x[0] for x in found], float)
    if len(found) == 1:
        return Summary(1, float(values[0]), float(found[0][1]))
    return Summary(
        len(found), float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(found)))
    )


def of_model(result: ablation.Result, name: str, of: Of) -> Summary:
    """Summarises a measure over the trainings of a model."""
    return summary(list(_by_seed(result, name, of).values()))


def _by_seed(result: ablation.Result, name: str, of: Of) -> dict[str, Pair]:
    seeds = result["models"].get(name, {}).get("seeds", {})
    return {seed: found for seed, x in seeds.items() if (found := of(x)) is not None}


def difference(
    result: ablation.Result, lower: Sequence[str], higher: str, of: Of, margin: float = 0.0
) -> Summary:
    """Summarises the worst of ``lower`` less ``(1 + margin)`` times ``higher``, paired by seed.

    The error of one seed adds those of its two values, as if they were independent.
    """
    ours, theirs = ([_by_seed(result, x, of) for x in names] for names in (lower, [higher]))
    seeds = set.intersection(*(set(x) for x in [*ours, *theirs]))
    pairs = []
    for seed in sorted(seeds, key=int):
        worst = max((x[seed] for x in ours), key=lambda pair: pair[0])
        other = theirs[0][seed]
        pairs.append([worst[0] - (1 + margin) * other[0], math.hypot(worst[1], other[1])])
    return summary(pairs)


def verdict(found: Summary) -> str:
    """Says what becomes of the claim that a difference is below 0, see ``RULE``."""
    if not found.num:
        return ""
    if found.num < ENOUGH:
        return "undecided"
    half = float(special.stdtrit(found.num - 1, 0.975)) * found.error
    if found.mean + half < 0:
        return "**holds here**"
    return "**fails here**" if found.mean - half > 0 else "undecided"


# --- tables ---------------------------------------------------------------------------------


def markdown(result: ablation.Result) -> str:
    """Returns all tables of a result."""
    parts = [
        "### Models",
        _models(result),
        "### Held-out loss",
        _losses(result),
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
        rate = summary([[x["images"] / x["seconds"], math.nan] for x in seeds])
        speed = next((x["speed"] for x in seeds if "speed" in x), None)
        rows.append(
            [
                *(name, " + ".join(map(str, model["layers"])), model["width"]),
                f"{model['parameters']:,}",
                *(_millions(model["multiply_adds"][str(t)]) for t in ablation.STEPS),
                _millions(model["training_multiply_adds"]),
                f"{rate.mean:.0f}",
                "" if speed is None else f"{speed[0]:.2f} ({speed[1]:.2f} to {speed[2]:.2f})",
            ]
        )
    titles = ["model", "layers", "width", "parameters"]
    titles += [f"M, {t} steps" for t in ablation.STEPS]
    titles += ["M, training", "images/s, training", "ms an image, 8 steps"]
    return (
        f"{markdown_table(titles, rows, 'lr' + 'r' * 8)}\n\n"
        "M: millions of multiply-adds, exact: of drawing the tokens of an image with guidance, by "
        "the cosine schedule and without the image decoder; and of an image in a training step, "
        "forward and backward and the cache, mean of the steps of a run. Layers: of the encoder "
        "and the decoder, or of the one stack. Images a second in training are without compiling "
        "and evaluating, mean of the runs. Milliseconds an image: median of all timings, with the "
        "least and the most."
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
        rows.append([name, num, *(x.text(expected=num) for x in found)])
    names = "distance", "precision", "recall"
    titles = ["model", "trainings", *(f"{x}, {t} steps" for x in names for t in ablation.STEPS)]
    common = result["common"]
    about = ""
    if "images" in common:
        about = (
            f"{common['features']} (no FID) of {common['images']:,} samples to "
            f"{common['reference_images']:,} pictures of the split {common['reference_split']}, "
            "with the settings that a search of equal budget found for the model of seed 0. "
        )
    return f"{markdown_table(titles, rows, 'lr' + 'r' * (len(titles) - 2))}\n\n{about}{ERRORS}"


def _claims(result: ablation.Result) -> str:
    rows = []
    for claim in CLAIMS:
        what = (claim.lower, claim.higher)
        distance, losses = measured("frechet_distance", SHOWN), loss(None)
        first, second = (difference(result, *what, of) for of in (distance, losses))
        tested = difference(result, *what, distance, claim.margin)
        text = claim.text
        if claim.higher == "disentangled_7_1" and (times := _times(result, *what)):
            text += f", at {times:.2f} times less cost"
        names = claim.lower[0] if len(claim.lower) == 1 else "the worst of the other three"
        rows.append(
            [
                *(text, claim.paper, f"{names} less {claim.higher}"),
                max(first.num, second.num),
                *(first.text("+"), verdict(tested), second.text("+")),
                "" if claim.margin else verdict(second),
            ]
        )
    titles = ["claim", "the paper", "difference", "seeds", f"distance, {SHOWN} steps", "verdict"]
    titles += ["loss (nats)", "verdict"]
    return f"{markdown_table(titles, rows, 'lllrrlrl')}\n\n{RULE} * one seed: {ONE_SEED}"


ONE_SEED = "the error is that over images, as if the two were independent."


def _times(result: ablation.Result, lower: Sequence[str], higher: str) -> float | None:
    """Returns how many times less the first model costs to sample, rounded down."""
    models = result["models"]
    if lower[0] not in models or higher not in models:
        return None
    ours, theirs = (models[x]["multiply_adds"][SHOWN] for x in (lower[0], higher))
    return math.floor(100 * theirs / ours) / 100


def _reuse(result: ablation.Result) -> str:
    def of(kind: str, key: str) -> Of:
        return lambda seed: seed.get("reuse", {}).get(kind, {}).get(key)

    columns = [
        *((kind, "loss") for kind in reuse_gap.KINDS[1:]),
        (reuse_gap.EVERY_STEP, "last"),
        *((kind, "distance") for kind in (reuse_gap.ONCE, reuse_gap.EVERY_STEP)),
    ]
    rows = []
    for name in result["models"]:
        found = [of_model(result, name, of(*column)) for column in columns]
        if num := max(x.num for x in found):
            rows.append([name, num, *(x.text("+", num) for x in found)])
    what = {"loss": "loss, mean of steps", "last": "loss, last step", "distance": "distance"}
    titles = ["model", "trainings", *(f"{kind}: {what[key]}" for kind, key in columns)]
    return (
        f"{markdown_table(titles, rows, 'lr' + 'r' * len(columns))}\n\n"
        "Increase over features that are recomputed at every step, by `analyze reuse` (the kinds "
        f"of features are in its description). {ERRORS} Of one training the error of the distance "
        "is that over seeds of its samples."
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
        least, most = np.nanmin(np.array(found[0]["change"][0], float)), max(tokens)
        rows.append(
            [
                *(name, share.num, f"{min(tokens):.3f} to {most:.3f}", f"{np.mean(tokens):.3f}"),
                *(share.text(), f"{least:.3f}", verdict(less)),
            ]
        )
    titles = ["model", "trainings", "newly revealed, by step", "mean"]
    titles += ["their share of the change, mean of steps", "least, of the first seed", "verdict"]
    return (
        f"{markdown_table(titles, rows, 'lrrrrrl')}\n\n"
        "Newly revealed tokens as a share of all, and their share of the change of features from "
        "step to step. The claim: it is more than half; decided by the same rule."
    )


def _larger(result: ablation.Result) -> str:
    rows = []
    for claim in CLAIMS[:NUM_OF_PAPER]:
        cells = []
        for size in ("", ablation.LARGE):
            names = [f"{x}{size}" for x in claim.lower], f"{claim.higher}{size}"
            for of in (measured("frechet_distance", SHOWN), loss(None)):
                found = difference(result, *names, of)
                cells.append(found.text("+") + (f" ({found.num})" if found.num > 1 else ""))
        rows.append([f"{claim.lower[0]} less {claim.higher}", *cells])
    kinds = [f"distance, {SHOWN} steps", "loss (nats)"]
    titles = ["difference", *(f"{size}: {x}" for size in ("small", "large") for x in kinds)]
    return f"{markdown_table(titles, rows, 'lrrrr')}\n\nIn brackets: seeds. * one: {ONE_SEED}"


# --- how ------------------------------------------------------------------------------------

COMMANDS = {
    "training": "train --config configs/cifar10_ablation.py:NAME --workdir DIR/NAME/seed_S/run "
    "--config.seed=S",
    "settings": "search --model DIR/NAME/seed_0/run/model --steps T --out DIR/NAME/steps_T",
    "distance, precision, recall": "evaluate --model DIR/NAME/seed_S/run/model --settings "
    "DIR/NAME/steps_T/settings.json --out DIR/NAME/seed_S/steps_T",
    "held-out loss": "analyze loss --model DIR/NAME/seed_S/run/model --tokens DIR/tokens_held_out "
    "--out DIR/NAME/seed_S",
    "what reuse costs": "analyze reuse --model DIR/NAME/seed_S/run/model --tokens "
    "DIR/tokens_held_out --out DIR/NAME/seed_S/reuse",
    "Figure 5": "analyze similarity --model DIR/NAME/seed_S/run/model --out "
    "DIR/NAME/seed_S/similarity",
    "ms an image": "benchmark sampler --config configs/cifar10_ablation.py:NAME --steps 8 --json "
    "DIR/NAME/seed_0/speed.json",
    "all else": "analyze ablation --runs DIR --out DIR",
}


def _how(result: ablation.Result) -> str:
    commands = [[what, f"`python -m enat_jax.{x}`"] for what, x in COMMANDS.items()]
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
    for name, model in result["models"].items():
        size = "large" if name.endswith(ablation.LARGE) else "small"
        for seed in model["seeds"].values():
            about = f"trainings, {size}, {seed['steps']:,} steps, jax {seed['jax']}"
            yield about, seed.get("machine", "not recorded"), seed["date"]
            for card in seed.get("cards", {}).values():
                yield "cards", card["machine"], card["date"]
            if "loss_made" in seed:
                yield "losses", *seed["loss_made"]
