"""What the benchmark found, in tables for people: text, and Markdown of ``benchmark profile``."""

import itertools
import operator
import pathlib
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from enat_jax.profiling import collectives, timing
from enat_jax.profiling.accelerators import Assumptions, Hardware
from enat_jax.profiling.loader_timing import LoaderMeasurement
from enat_jax.profiling.scaling import Layout
from enat_jax.profiling.timing import Measurement, TrainingMeasurement
from enat_jax.runtime import markdown

GB = 1e9
GIB = 2**30
# The title of a column, and the text of its cell in a row.
Column = tuple[str, Callable[[Any], str]]


def table(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """Returns a table as right-aligned text."""
    cells = [[title for title, _ in columns], *([text(row) for _, text in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


# --- the sampler and the training step ------------------------------------------------------

TIMED_COLUMNS: tuple[Column, ...] = (
    ("compile s", lambda x: f"{x.compile_seconds:.2f}"),
    ("s/call", lambda x: f"{x.call_seconds:.4g}"),
    ("images/s (min-max)", lambda x: "{:.4g} ({:.4g}-{:.4g})".format(*x.images_per_second)),
    ("exact GMA", lambda x: f"{x.exact / 1e9:.4g}"),
    ("padded GMA", lambda x: f"{x.padded / 1e9:.4g}"),
    ("padding", lambda x: f"{x.padding:+.1%}"),
    ("exact GMA/s", lambda x: f"{x.exact_rate / 1e9:.4g}"),
    ("matmul GMA/s", lambda x: f"{x.matmul_rate / 1e9:.4g}"),
    ("of matmul", lambda x: f"{x.fraction:.1%}"),
    ("peak MiB", lambda x: f"{x.peak_bytes / 2**20:.0f}"),
)
TIMED_LEGEND = """\
GMA: 10^9 multiply-adds a call, two flops each.
exact: what the method needs; padded: what the compiled windows compute; padding: the difference.
of matmul: exact GMA/s over that of {matmul} in {dtype} at jax's
  default precision, timed in turns with the calls; medians of {repeats}.
compile s: tracing, lowering and compiling. peak: {peak}, the largest so far."""


def sampler_text(found: Sequence[Measurement]) -> str:
    """Returns the table of the sampler, a row for each number of segments."""
    return table([("segments", lambda x: str(x.label["segments"])), *TIMED_COLUMNS], found)


def training_text(found: TrainingMeasurement) -> str:
    """Returns the table of the training step, a row for each shape, and its expectations."""

    def cached(label: dict[str, Any]) -> str:
        return "{}-{}".format(*label["cached"]) if label["reuse"] else "no reuse"

    # A row is (probability, measurement).
    columns: list[Column] = [
        ("visible", lambda x: "{}-{}".format(*x[1].label["visible"])),
        ("cached", lambda x: cached(x[1].label)),
        ("of steps", lambda x: f"{x[0]:.1%}"),
        *((title, lambda x, text=text: text(x[1])) for title, text in TIMED_COLUMNS),
    ]
    lines = table(columns, zip(found.probabilities, found.timed, strict=True))
    return (
        f"{lines}\n\n{found.shapes} shapes; expected padded work {found.padding:+.1%} over exact "
        f"(over all splits).\nTimed: the {len(found.timed)} most probable, {found.share:.1%} of "
        f"all steps. Expected over these: {found.images_per_second:.4g} images/s, "
        f"{found.fraction:.1%} of matmul."
    )


def timed_legend(dtype: str, repeats: int, peak_of: str) -> str:
    """Returns what the columns of both tables mean; ``peak_of`` as in ``Measurement``."""
    matmul = "[{0}, {1}] x [{1}, {2}]".format(*timing.MATMUL_SHAPE)
    return TIMED_LEGEND.format(matmul=matmul, dtype=dtype, repeats=repeats, peak=peak_of)


# --- the loader -----------------------------------------------------------------------------

LOADER_COLUMNS: tuple[Column, ...] = (
    ("records", lambda x: f"{x.num_records:,}"),
    ("on disk MiB", lambda x: f"{x.num_bytes / 2**20:.0f}"),
    ("examples/s (min-max)", lambda x: "{:,.0f} ({:,.0f}-{:,.0f})".format(*x.examples_per_second)),
    ("peak MiB", lambda x: f"{x.memory:.0f}"),
)


def loader_text(found: Sequence[LoaderMeasurement], formats: dict[str, tuple[float, ...]]) -> str:
    """Returns the table of token sets, and a line for each other format that was timed."""
    lines = [
        f"random batches, {name}: {statistics.median(rates):,.0f} records/s"
        for name, rates in formats.items()
    ]
    return "\n".join([table(LOADER_COLUMNS, found), *lines])


# --- profile --------------------------------------------------------------------------------

TASK_NAMES = {"train": "training", "sampler": "sampling, decoded to images"}
PROFILE_COLUMNS: tuple[Column, ...] = (
    ("setting", lambda x: x["setting"]),
    ("batch", lambda x: str(x["batch"])),
    ("images/s (min-max)", lambda x: "{:.4g} ({:.4g}-{:.4g})".format(*x["images_per_second"])),
    ("exact GMA/s", lambda x: f"{x['exact_rate'] / 1e9:.4g}"),
    ("of matmul", lambda x: f"{x['fraction']:.1%}"),
    ("padded work", lambda x: f"{x['padding']:+.1%}"),
    ("peak GiB", lambda x: f"{x['peak_bytes'] / GIB:.3g}"),
    ("compile s", lambda x: f"{x['compile_seconds']:.1f}"),
    ("next larger batch", lambda x: _next_larger(x)),
)
PROFILE_LEGEND = """\
Random parameters, tokens and labels; one device; medians, least and largest of the repeats. Each
row is a process of its own. batch: the largest that fits within a factor of two; "fits" is decided
by what the compiled program allocates, and by running it. Of training it is the largest that fits
in the shape with the most padded work. GMA: 10^9 multiply-adds, two flops each, that the method
needs; of matmul: over the rate of a plain matrix product, timed in turns with it. Training: the
expectation over the most probable shapes; compile s: the mean of a shape. peak: {peaks}."""
ProfileRow = dict[str, Any]  # as ``profile.json`` has it


def groups(rows: Iterable[ProfileRow]) -> dict[tuple[str, str], list[ProfileRow]]:
    """Returns the rows of each config and task, fastest first, failed ones last."""

    def place(row: ProfileRow) -> tuple[bool, float, str]:
        return "failed" in row, -row.get("images_per_second", [0])[0], row["setting"]

    key = operator.itemgetter("config", "task")
    return {k: sorted(x, key=place) for k, x in itertools.groupby(sorted(rows, key=key), key)}


def best(rows: Iterable[ProfileRow]) -> list[ProfileRow]:
    """Returns the fastest row of each config and task that has one that worked."""
    return [x[0] for x in groups(rows).values() if "failed" not in x[0]]


def profile_markdown(saved: dict[str, Any]) -> str:
    """Returns the text of ``profile.md`` for what ``profile.json`` holds."""
    parts = [f"# Profile of {saved['machine']['device']}", markdown.table(("", ""), _header(saved))]
    for (config, task), rows in groups(saved["rows"]).items():
        parts.append(f"## {pathlib.Path(config).stem}: {TASK_NAMES[task]}")
        winner = rows[0]
        if "failed" in winner:
            parts.append("No row worked.")
        else:
            parts.append(
                f"Best: **{winner['setting']}**, {winner['images_per_second'][0]:.4g} images/s at "
                f"batch {winner['batch']}, {winner['dtype']}."
            )
        parts.append(markdown.table([x for x, _ in PROFILE_COLUMNS], map(_profile_cells, rows)))
    for config, trace in saved["traces"].items():
        name = pathlib.Path(config).stem
        text = f"failed: {trace['failed']}" if "failed" in trace else trace["directory"]
        parts.append(f"Trace of {name}, {trace['setting']}, batch {trace['batch']}: {text}")
    peaks = dict.fromkeys(x["peak_of"] for x in saved["rows"] if "failed" not in x)
    if peaks:
        parts.append(PROFILE_LEGEND.format(peaks=", ".join(peaks)))
    return "\n\n".join(parts) + "\n"


def _header(saved: dict[str, Any]) -> list[tuple[str, str]]:
    machine, rate = saved["machine"], saved["matrix_rate"]
    memory = machine["memory_bytes"]
    return [
        ("date", saved["date"]),
        ("device", f"{machine['backend']}, {machine['device']}, {machine['cpus']} CPUs"),
        ("driver", machine["driver"] or "unknown"),
        ("jax", f"{machine['jax']}, {machine['platform_version']}"),
        ("memory for arrays", "unknown" if memory is None else f"{memory / GIB:.4g} GiB"),
        (
            "matrix rate",
            f"{rate / 1e9:.4g} GMA/s in {saved['dtype']} ({2 * rate / 1e12:.4g} TFLOP/s)",
        ),
        ("rows", f"{len(saved['rows'])}; {saved['left']} left for another call"),
    ]


def _profile_cells(row: ProfileRow) -> list[str]:
    if "failed" in row:
        rest = ["-"] * (len(PROFILE_COLUMNS) - 3)
        return [row["setting"], "-", f"failed: {row['failed']}", *rest]
    return [text(row) for _, text in PROFILE_COLUMNS]


def _next_larger(row: ProfileRow) -> str:
    """Returns why no larger batch was taken."""
    failed = [x for x in row["fit"]["tries"] if not x["fits"] and x["batch"] > row["batch"]]
    if not failed:
        return "not tried"
    least = min(failed, key=lambda x: x["batch"])
    return f"{least['batch']} {least['reason']}"


# --- scaling --------------------------------------------------------------------------------

ASSUMED = """\
Predictions, not measurements. The step was compiled for CPU devices; per device and step:
params, state: bytes on the device with the most; state: parameters, moving average and optimizer.
temp: XLA's temporary arrays in the CPU's schedule, the shape with the most. Rather too much for an
  accelerator: the CPU widens bfloat16 to float32 and does not fuse attention.
exact, padded: multiply-adds by this package's count, divided by the devices; compiled: those of all
  matrix products in the program, with what is recomputed or done on several devices.
  XLA's own count is no cross-check: it takes the body of each loop once.
collectives: instructions that run, and bytes that a device sends if all of them are rings. Counted
  in the dtype that the values have, where the CPU widens them; an all-reduce of which each device
  keeps its own part counts as a reduce-scatter, as accelerators do it.
seconds: products at {of_flops:.0%} of the stated peak for bfloat16, collectives at
  {of_bandwidth:.0%} of the stated bandwidth, without their latency; nothing for the rest.
Expectations are over the compiled shapes, {share:.1%} of all steps."""


def scaling_text(
    layouts: Sequence[Layout], hardware: Sequence[Hardware], assumptions: Assumptions
) -> str:
    """Returns a table of what was compiled, one of predictions for each device, and their grounds.

    Args:
        layouts: at least one.
        hardware: the devices to predict for.
        assumptions: fractions of their peaks.
    """
    parts = [table(_program_columns(layouts), layouts)]
    parts += [
        f"{device.name} (prediction)\n" + table(_time_columns(device, assumptions), layouts)
        for device in hardware
    ]
    share = min(layout.share for layout in layouts)
    notes = [ASSUMED.format(share=share, **vars(assumptions))]
    sources = [f"{device.name}: {device.source}." for device in hardware]
    notes += [textwrap.fill(source, 98, subsequent_indent="  ") for source in sources]
    warnings = [
        f"{layout.name}: {line}"
        for layout in layouts
        for shape in layout.shapes
        for line in shape.rematerialized
    ]
    return "\n\n".join(filter(None, [*parts, "\n".join(notes), "\n".join(warnings)]))


def _program_columns(layouts: Sequence[Layout]) -> list[Column]:
    used = {kind for layout in layouts for shape in layout.shapes for kind in shape.traffic}
    return [
        ("layout", lambda x: x.name),
        ("params GB", lambda x: f"{x.parameter_bytes / GB:.3g}"),
        ("state GB", lambda x: f"{x.state_bytes / GB:.3g}"),
        ("temp GB", lambda x: f"{max(s.temp_bytes for s in x.shapes) / GB:.3g}"),
        ("exact TMA", lambda x: f"{x.mean(lambda s: s.exact) / 1e12:.4g}"),
        ("padded TMA", lambda x: f"{x.mean(lambda s: s.padded) / 1e12:.4g}"),
        ("compiled TMA", lambda x: f"{x.mean(lambda s: s.compiled) / 1e12:.4g}"),
        *(
            (kind, lambda x, kind=kind: _traffic(x, kind))
            for kind in collectives.KINDS
            if kind in used
        ),
    ]


def _traffic(layout: Layout, kind: str) -> str:
    """Returns such as "31 x, 1.25 GB"; "-" where there is none."""
    if not any(kind in shape.traffic for shape in layout.shapes):
        return "-"

    def mean(name: str) -> float:
        return layout.mean(lambda s: getattr(s.traffic[kind], name) if kind in s.traffic else 0)

    return f"{mean('launches'):.0f} x, {mean('moved_bytes') / GB:.3g} GB"


def _time_columns(device: Hardware, assumptions: Assumptions) -> list[Column]:
    def seconds(layout: Layout, combine: Callable[[tuple[float, float]], float]) -> float:
        return layout.mean(lambda s: combine(s.seconds(device, assumptions)))

    return [
        ("layout", lambda x: x.name),
        ("products ms", lambda x: f"{1e3 * seconds(x, lambda parts: parts[0]):.3g}"),
        ("collectives ms", lambda x: f"{1e3 * seconds(x, lambda parts: parts[1]):.3g}"),
        ("all overlap ms", lambda x: f"{1e3 * seconds(x, max):.3g}"),
        ("no overlap ms", lambda x: f"{1e3 * seconds(x, sum):.3g}"),
        (
            "images/s",
            lambda x: (
                f"{x.batch_size / seconds(x, sum):.4g} to {x.batch_size / seconds(x, max):.4g}"
            ),
        ),
        ("state fits", lambda x: _fits(x.state_bytes, device)),
        ("with temp", lambda x: _fits(x.memory_bytes, device)),
    ]


def _fits(num_bytes: float, device: Hardware) -> str:
    share = num_bytes / device.memory_bytes
    return f"{'yes' if share <= 1 else 'no'}, {share:.0%}"
