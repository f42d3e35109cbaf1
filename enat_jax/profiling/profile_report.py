"""Markdown of what ``benchmark profile`` measured."""

import pathlib

GIB = 2**30
NAMES = {"train": "training", "sampler": "sampling, decoded to images"}
COLUMNS = (
    ("setting", lambda x: x["setting"]),
    ("batch", lambda x: str(x["batch"])),
    ("images/s (min-max)", lambda x: "{:.4g} ({:.4g}-{:.4g})".format(*x["images_per_second"])),
    ("exact GMA/s", lambda x: f"{x['exact_rate'] / 1e9:.4g}"),
    ("of matmul", lambda x: f"{x['fraction']:.1%}"),
    ("padded work", lambda x: f"{x['padding']:+.1%}"),
    ("peak GiB", lambda x: f"{x['peak_bytes'] / GIB:.3g}"),
    ("compile s", lambda x: f"{x['compile_seconds']:.1f}"),
    ("next larger batch", lambda x: _beyond(x)),
)
LEGEND = """\
Random parameters, tokens and labels; one device; medians, least and largest of the repeats. Each
row is a process of its own. batch: the largest that fits within a factor of two; "fits" is decided
by what the compiled program allocates, and by running it. Of training it is the largest that fits
in the shape with the most padded work. GMA: 10^9 multiply-adds, two flops each, that the method
needs; of matmul: over the rate of a plain matrix product, timed in turns with it. Training: the
expectation over the most probable shapes; compile s: the mean of a shape. peak: {peaks}."""


def fastest(rows):
    """The row with the most images per second; None if all failed."""
    worked = [x for x in rows if "failed" not in x]
    return max(worked, key=lambda x: x["images_per_second"][0], default=None)


def groups(rows):
    """{(config, task): its rows, fastest first, failed ones last}, in the order of the first."""
    found = {}
    for row in rows:
        found.setdefault((row["config"], row["task"]), []).append(row)

    def place(row):
        failed = "failed" in row
        return failed, 0 if failed else -row["images_per_second"][0], row["setting"]

    return {key: sorted(found[key], key=place) for key in sorted(found)}


def best(rows):
    """The fastest row of each config and task that has one that worked."""
    return [x for x in map(fastest, groups(rows).values()) if x is not None]


def markdown(saved):
    """Text of what ``profile.json`` holds."""
    parts = [f"# Profile of {saved['machine']['device']}", _table(("", ""), _header(saved))]
    for (config, task), rows in groups(saved["rows"]).items():
        parts.append(f"## {pathlib.Path(config).stem}: {NAMES[task]}")
        winner = fastest(rows)
        if winner is None:
            parts.append("No row worked.")
        else:
            parts.append(
                f"Best: **{winner['setting']}**, {winner['images_per_second'][0]:.4g} images/s at "
                f"batch {winner['batch']}, {winner['dtype']}."
            )
        parts.append(_table([title for title, _ in COLUMNS], [_cells(x) for x in rows]))
    for config, trace in saved["traces"].items():
        name = pathlib.Path(config).stem
        text = f"failed: {trace['failed']}" if "failed" in trace else trace["directory"]
        parts.append(f"Trace of {name}, {trace['setting']}, batch {trace['batch']}: {text}")
    peaks = {x["peak_of"]: None for x in saved["rows"] if "failed" not in x}
    if peaks:
        parts.append(LEGEND.format(peaks=", ".join(peaks)))
    return "\n\n".join(parts) + "\n"


def _header(saved):
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


def _cells(row):
    if "failed" in row:
        return [row["setting"], "-", f"failed: {row['failed']}", *["-"] * (len(COLUMNS) - 3)]
    return [text(row) for _, text in COLUMNS]


def _beyond(row):
    """Why no larger batch was taken."""
    failed = [x for x in row["fit"]["tries"] if not x["fits"] and x["batch"] > row["batch"]]
    if not failed:
        return "not tried"
    least = min(failed, key=lambda x: x["batch"])
    return f"{least['batch']} {least['reason']}"


def _table(titles, rows):
    def line(cells):
        return "| " + " | ".join(str(x).replace("|", "\\|") for x in cells) + " |"

    return "\n".join([line(titles), "|" + "---|" * len(titles), *map(line, rows)])
