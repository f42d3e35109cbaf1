"""Text of what ``timing`` measured."""

COLUMNS = (
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
LEGEND = """\
GMA: 10^9 multiply-adds a call, two flops each.
exact: what the method needs; padded: what the compiled windows compute; padding: the difference.
of matmul: exact GMA/s over that of {matmul} in {dtype} at jax's
  default precision, timed in turns with the calls; medians of {repeats}.
compile s: tracing, lowering and compiling. peak: {peak}, the largest so far."""


def table(columns, rows):
    """Right-aligned text; columns are (title, row -> text)."""
    cells = [[title for title, _ in columns], *([text(row) for _, text in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def sampler(found):
    """Text of a list of ``timing.Measurement``."""
    return table([("segments", lambda x: str(x.label["segments"])), *COLUMNS], found)


def training(found):
    """Text of a ``timing.TrainingMeasurement``."""
    columns = [
        ("visible", lambda x: "{}-{}".format(*x[1].label["visible"])),
        (
            "cached",
            lambda x: "{}-{}".format(*x[1].label["cached"]) if x[1].label["reuse"] else "no reuse",
        ),
        ("of steps", lambda x: f"{x[0]:.1%}"),
        *((title, lambda x, text=text: text(x[1])) for title, text in COLUMNS),
    ]
    lines = table(columns, list(zip(found.probabilities, found.timed, strict=True)))
    return (
        f"{lines}\n\n{found.shapes} shapes; expected padded work {found.padding:+.1%} over exact "
        f"(over all splits).\nTimed: the {len(found.timed)} most probable, {found.share:.1%} of "
        f"all steps. Expected over these: {found.images_per_second:.4g} images/s, "
        f"{found.fraction:.1%} of matmul."
    )
