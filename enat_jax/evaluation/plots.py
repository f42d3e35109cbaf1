"""Plots of the analyses, as PNG files. Needs matplotlib, which is imported when a plot is made."""

import io
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from enat_jax.evaluation import ablation_claims
from enat_jax.evaluation.ablation import CUT, end_of
from enat_jax.evaluation.step_similarity import GROUPS
from enat_jax.runtime import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue, orange and grey are told apart with any colour vision.
COLOURS = {"already visible": "#0072b2", "newly revealed": "#d55e00", "masked": "#7f7f7f"}
GREY = 128  # of cells that are masked
MAX_STEPS = 10  # steps that are shown of an image, evenly spread
COUNTS = (
    ("paper", "paper, as rounded", "#7f7f7f"),
    ("recount", "recounted", "#0072b2"),
    ("exact", "exact, here", "#009e73"),
)
# Of the ablations, colour and marker; those without one quadrant have a panel of their own.
MODELS = {
    "nat": ("#7f7f7f", "s"),
    "disentangled_4_4": ("#e69f00", "v"),
    "disentangled_7_1": ("#d55e00", "^"),
    "enat": ("#0072b2", "o"),
    "enat_without_f": ("#56b4e9", "X"),
    "enat_project_once": ("#009e73", "D"),
    "enat_reveals_4": ("#cc79a7", "P"),
    "enat_reveals_4_project_once": ("#aa4499", "d"),
    "nat_without_visible_from_visible": ("#332288", "<"),
    "nat_without_visible_from_masked": ("#117733", ">"),
    "nat_without_masked_from_visible": ("#882255", "*"),
    "nat_without_masked_from_masked": ("#999933", "h"),
}


def require() -> Any:
    """Returns ``matplotlib.figure``; programs call this before a long run.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ValueError(
            "plots need matplotlib, which is not installed: pip install 'enat_jax[analyze]'"
        ) from error
    return matplotlib.figure


def _figure(width: float, height: float) -> "Figure":
    """Returns a figure of so many inches that belongs to no window and no global state."""
    return require().Figure(figsize=(width, height), layout="constrained")


def _write(path: str | os.PathLike, figure: "Figure") -> None:
    """Writes a PNG, whole or not at all; the same plot gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, content.getvalue())


def _curve(
    axes: "Axes",
    steps: Int[np.ndarray, " s"],
    values: Mapping[str, Any],
    label: str | None,
    **style: Any,
) -> None:
    """Draws means with bars of two standard errors; gaps where there is none."""
    mean, error = (
        np.array([np.nan if x is None else x for x in values[name]], float)
        for name in ("mean", "standard_error")
    )
    axes.errorbar(steps, mean, yerr=2 * np.nan_to_num(error), label=label, capsize=2, **style)


def similarities(path: str | os.PathLike, result: Mapping[str, Any]) -> None:
    """Draws curves of similarity over the steps.

    Args:
        path: of the PNG file.
        result: as ``similarity.json``, see ``similarity.similarities``.
    """
    reuse = result["reused"] is not None
    figure = _figure(4 * (2 + reuse), 4.2)
    axes = figure.subplots(1, 2 + reuse)
    steps = np.arange(1, result["num_steps"])
    for name, colour in COLOURS.items():
        style = {"color": colour, "marker": "o"}
        _curve(axes[0], steps, result["adjacent"][name], name, **style)
        _curve(axes[0], steps, result["elsewhere"][name], None, color=colour, linestyle=":")
        if reuse:
            _curve(axes[2], steps, result["reused"][name], None, **style)
    nothing = {"mean": [None] * len(steps), "standard_error": [None] * len(steps)}
    _curve(axes[0], steps, nothing, "with another token", color="black", linestyle=":")
    axes[0].set(title="Features: this step and the one before", ylabel="cosine similarity")
    newly = np.array(result["tokens"]["newly revealed"]) / result["num_tokens"]
    axes[1].bar(steps, newly, color="#cccccc", label="of the tokens")
    style = {"color": COLOURS["newly revealed"], "marker": "s", "linestyle": "--"}
    _curve(axes[1], steps, result["change_share"], "of the change", **style)
    axes[1].set(title="Share of newly revealed tokens", ylim=(0, 1.02))
    if reuse:
        style = {"color": "black", "linestyle": "--"}
        _curve(axes[2], steps, result["overlap"], "overlap of predictions", marker="^", **style)
        _curve(axes[2], steps, result["same_code"], "same best code", marker="x", **style)
        axes[2].set(title="Features: reused and recomputed", ylabel="cosine similarity, share")
    for each in axes:
        each.set_xlabel("step")
        each.set_xticks(steps[:: -(-len(steps) // 12)])
        each.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    figure.suptitle(
        f"{result['kind']}, {result['num_images']} samples; bars: two standard errors", fontsize=9
    )
    _write(path, figure)


def maps(
    path: str | os.PathLike,
    adjacent: Float[np.ndarray, "n t-1 l"],
    group: Int[np.ndarray, "n t-1 l"],
    pictures: UInt8[np.ndarray, "n h w c"],
    grid: tuple[int, int],
) -> None:
    """Draws pictures as they come into view, and below each the similarity to the step before.

    Args:
        path: of the PNG file.
        adjacent: see ``step_similarity.Similarities``.
        group: see there.
        pictures: the finished ones.
        grid: rows and columns of tokens.
    """
    n, num_passes, _ = adjacent.shape
    passes = np.linspace(0, num_passes - 1, min(num_passes, MAX_STEPS)).round().astype(int)
    # Of the few places below it nothing more is to be seen than that they are.
    low = min(0.99, float(np.quantile(adjacent, 0.02)))
    figure = _figure(0.9 * (len(passes) + 1) + 0.8, 1.8 * n + 0.5)
    axes = figure.subplots(2 * n, len(passes) + 1, squeeze=False)
    for each in axes.ravel():
        each.set_axis_off()
    for i, picture in enumerate(pictures):
        above, below = axes[2 * i : 2 * i + 2]
        above[-1].imshow(_grey_or_rgb(picture), cmap="gray", vmin=0, vmax=255)
        for upper, lower, s in zip(above, below, passes, strict=False):
            of_place = group[i, s].reshape(grid)
            visible = of_place != GROUPS.index("masked")
            upper.imshow(_grey_or_rgb(_cover(picture, visible)), cmap="gray", vmin=0, vmax=255)
            values = adjacent[i, s].reshape(grid)
            image = lower.imshow(values, cmap="viridis", vmin=low, vmax=1)
            _frame(lower, of_place == GROUPS.index("newly revealed"))
    for each, s in zip(axes[0], passes, strict=False):
        each.set_title(f"step {s + 1}", fontsize=8)
    axes[0, -1].set_title("finished", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 1.5 / n), extend="min")
    bar.set_label("cosine similarity to the step before", fontsize=8)
    figure.supxlabel("red frames: newly revealed tokens; grey in the pictures: masked", fontsize=8)
    _write(path, figure)


def _grey_or_rgb(picture: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w ..."]:
    """Returns the picture as matplotlib takes it."""
    return picture[..., 0] if picture.shape[-1] == 1 else picture


def _cover(
    picture: UInt8[np.ndarray, "h w c"], visible: Bool[np.ndarray, "rows columns"]
) -> UInt8[np.ndarray, "h w c"]:
    """Returns the picture with all cells of the grid grey that are not visible."""
    rows, columns = (
        size // cells for size, cells in zip(picture.shape, visible.shape, strict=False)
    )
    pixels = np.repeat(np.repeat(visible, rows, axis=0), columns, axis=1)
    return np.where(pixels[..., None], picture, np.uint8(GREY))


def _frame(axes: "Axes", inside: Bool[np.ndarray, "rows columns"]) -> None:
    """Draws red lines around the cells that are ``inside``."""
    padded = np.pad(inside, 1)
    lines = []
    for row, column in zip(*np.nonzero(inside), strict=True):
        corners = [(-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5), (-0.5, -0.5)]
        # Left, lower, right and upper neighbour, in the order of the sides.
        sides = [(0, -1), (1, 0), (0, 1), (-1, 0)]
        for (down, right), ends in zip(sides, itertools.pairwise(corners), strict=True):
            if not padded[1 + row + down, 1 + column + right]:
                lines.append([(column + x, row + y) for x, y in ends])
    for line in lines:
        axes.plot(*zip(*line, strict=True), color="red", linewidth=0.9)


def costs(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws bars of the paper's count, its recount, and the exact one.

    Args:
        path: of the PNG file.
        rows: see ``paper_costs.rows``.
    """
    figure = _figure(10, 4)
    for axes, systems in zip(figure.subplots(1, 2), (False, True), strict=True):
        chosen = [row for row in rows if row["image_decoder"] == systems]
        place = np.arange(len(chosen))
        for i, (key, label, colour) in enumerate(COUNTS):
            heights = [row[key] / 1e9 for row in chosen]
            rounding = [row["last_digit"] / 2e9 for row in chosen] if key == "paper" else None
            style = {"label": label, "color": colour, "capsize": 2}
            axes.bar(place + 0.27 * (i - 1), heights, 0.27, yerr=rounding, **style)
        names = [f"{row['model']}\n{row['num_steps']} steps".replace(", ", "\n") for row in chosen]
        axes.set_xticks(place, names, fontsize=8)
        axes.set_title(f"{'with' if systems else 'without'} the image decoder", fontsize=10)
        axes.set_ylabel("multiply-adds an image, billions")
        axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")  # the last, which has room
    _write(path, figure)


def ablation(path: str | os.PathLike, result: dict[str, Any]) -> None:
    """Draws distance against multiply-adds, and losses by share visible, less those of the NAT.

    Each size has its NAT. Those without one quadrant of attention have axes of their own, if there
    are any.

    Args:
        path: of the PNG file.
        result: see ``ablation_runs.gather``.
    """
    columns = 2 + any(name.startswith(CUT) for name in result["models"])
    figure = _figure(5 * columns, 5.6)
    left, middle, *right = figure.subplots(1, columns)
    drawn: set[int] = set()  # numbers of steps
    for name, model in result["models"].items():
        if name.startswith(CUT):
            continue
        points = []
        for t, count in model["multiply_adds_as_drawn"].items():
            of = ablation_claims.measured("frechet_distance", t)
            if (found := ablation_claims.of_model(result, name, of)).num:
                points.append((count / 1e6, found))
                drawn.add(int(t))
        _summaries(left, points, name)
    left.set(xlabel="multiply-adds of an image, millions", ylabel="Fréchet distance")
    steps = ", ".join(map(str, sorted(drawn)))
    left.set_title(f"Samples in {steps} steps, from left to right", fontsize=11)
    _log_scale(left)
    shares = result["common"].get("visible_shares", [])
    for name in result["models"]:
        nat = f"nat{end_of(name)}"
        if name != nat:
            points = []
            for i, share in enumerate(shares):
                of = ablation_claims.loss(i)
                if (found := ablation_claims.difference(result, [name], nat, of)).num:
                    points.append((share, found))
            _summaries(right[0] if name.startswith(CUT) else middle, points, name)
    middle.set_title("Held-out loss, less that of nat of the same size", fontsize=11)
    for axes in right:
        axes.set_title("The same, nat without one quadrant of attention", fontsize=11)
    for axes in (middle, *right):
        axes.axhline(0, color=MODELS["nat"][0], linewidth=1)
        axes.set(xlabel="share of tokens visible", ylabel="nats")
    shown: dict[str, Any] = {}
    for axes in (left, middle, *right):
        axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    if shown:
        style: dict[str, Any] = {"ncols": 5, "fontsize": 8, "frameon": False}
        figure.legend(list(shown.values()), list(shown), loc="outside lower center", **style)
    text = "bars: two standard errors, over trainings or, of one training, over images"
    figure.suptitle(text, fontsize=9)
    _write(path, figure)


def _log_scale(axes: "Axes") -> None:
    """Gives the x axis a logarithmic scale with few, whole numbers."""
    from matplotlib import ticker

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def _style(name: str) -> dict[str, Any]:
    """Returns how a model of the ablations is drawn: larger ones in the same colour, not solid."""
    end = end_of(name)
    colour, marker = MODELS.get(name.removesuffix(end), ("black", "."))
    line = {"": "-", "_large": "--"}.get(end, ":")
    filling = "white" if end else colour
    return {"color": colour, "marker": marker, "linestyle": line, "markerfacecolor": filling}


def _summaries(axes: "Axes", points: Sequence[tuple[float, Any]], name: str) -> None:
    """Draws a line of ``ablation_claims.Summary`` with bars of two standard errors."""
    if points:
        x, found = zip(*points, strict=True)
        errors = [2 * one.error for one in found]
        means = [one.mean for one in found]
        axes.errorbar(x, means, yerr=errors, label=name, capsize=2, **_style(name))
