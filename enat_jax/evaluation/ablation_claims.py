"""What becomes of the paper's claims in the ablations, from ``ablation``'s result.

Errors are rounded up and values to the last digit of their error; nothing else is done to a number.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from enat_jax.evaluation import ablation

Pair = Sequence[float]  # a value and its standard error
Of = Callable[[Mapping[str, Any]], Pair | None]  # of one training; None: not measured

MARGIN = 0.05  # within which quality is called kept, see ``RULE``
SHOWN = "8"  # steps of the claims, as in the paper
ENOUGH = 3  # trainings of both models, below which nothing is decided


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
        f"{ablation.CUT}masked_from_visible",
    ),
    Claim(
        "Of the four cuts this one hurts most",
        "yes (Figure 2)",
        tuple(
            f"{ablation.CUT}{x}"
            for x in ("visible_from_visible", "visible_from_masked", "masked_from_masked")
        ),
        f"{ablation.CUT}masked_from_visible",
    ),
    Claim(
        "Visible tokens need not see masked ones, within 5%",
        "yes (Figure 2)",
        (f"{ablation.CUT}visible_from_masked",),
        "nat",
        MARGIN,
    ),
    Claim("f once for each token is better", "not asked", ("enat_project_once",), "enat"),
    Claim("A cache made in up to 4 reveals is better", "not asked", ("enat_reveals_4",), "enat"),
    Claim("Both together are better", "not asked", ("enat_reveals_4_project_once",), "enat"),
)
NUM_OF_PAPER = 4  # claims that are measured in both sizes, the first ones

RULE = (
    "Differences are paired by seed, which sets batches, visible tokens and noise. One rule "
    "decides: a claim *holds here* if the 95% interval of the mean difference over seeds "
    "(Student's t, so 4.3 standard errors of three seeds) lies below 0, or where the claim says so "
    "below 5% of the other model's distance, and of what its loss falls from the least visible to "
    "the most; it *fails here* if the interval lies above; else, and always with fewer than three "
    "seeds, it is *undecided*. Losses are those of sampling: the held-out loss above, whose "
    "features are computed anew in one pass, and of models that reuse features what that adds, "
    "mean of steps, in the next table."
)


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


def sampled_loss(seed: Mapping[str, Any]) -> Pair | None:
    """Returns the loss of a training, mean of shares, and what reuse adds to it in sampling."""
    found = loss(None)(seed)
    if found is None or "reused" not in seed:
        return found
    if "reuse" not in seed:
        return None
    more, error = seed["reuse"][seed["reused"]]["loss"]
    return [found[0] + more, math.hypot(found[1], error)]


def context(seed: Mapping[str, Any]) -> Pair | None:
    """Returns by how much the loss of a training falls from the least visible share to the most."""
    if "loss" not in seed:
        return None
    means, _ = seed["loss"][0]
    return [means[0] - means[-1], 0.0]


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
    result: ablation.Result,
    lower: Sequence[str],
    higher: str,
    of: Of,
    margin: tuple[float, Of] | None = None,
) -> Summary:
    """Summarises the worst of ``lower`` less ``higher``, paired by seed.

    Args:
        result: of ``ablation_runs.gather``.
        lower: models.
        higher: model that they are compared with.
        of: what is compared. The error of one seed adds those of its two values, as if they were
            independent.
        margin: a share, and of what measure of ``higher``: is subtracted, too.
    """
    ours, theirs = ([_by_seed(result, x, of) for x in names] for names in (lower, [higher]))
    seeds = set.intersection(*(set(x) for x in [*ours, *theirs]))
    pairs = []
    for seed in sorted(seeds, key=int):
        worst = max((x[seed] for x in ours), key=lambda pair: pair[0])
        less = worst[0] - theirs[0][seed][0]
        if margin is not None:
            less -= margin[0] * _by_seed(result, higher, margin[1])[seed][0]
        pairs.append([less, math.hypot(worst[1], theirs[0][seed][1])])
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
