"""The tables of programs that were compiled for TPUs, in Markdown."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from enat_jax.profiling import collectives
from enat_jax.profiling.accelerators import Assumptions, Topology
from enat_jax.profiling.tpu_programs import Found, Program, Row, TooLarge
from enat_jax.runtime import markdown

GB = 1e9
Rows = Sequence[tuple[Topology, Row]]
# The title of a column, and the text of its cell for a program of a topology.
Column = tuple[str, Callable[[Program, Topology], str]]

LEGEND = """\
Compiled by the TPUs' own compiler, without a TPU; of each device and call. arguments, outputs,
temporaries, code: GB, as the compiler states them; outputs: without those that take the place of
arguments; temporaries: what else is there at the peak. of memory: of what the compiler has for a
program. next larger: the least batch that was compiled and does not fit, if any. compile: seconds
of this machine, and of its processors in all threads. The largest shape of training is that with
the most padded work, which needs the most memory; a batch fits a run if it fits in this shape.
multiply-adds: of all products of the program; exact: those that the method needs; tiles: share of
the matrix units' work that padding to tiles of 128 by 128 adds to the products of the program. HBM:
read and written, counted instruction by instruction. cycles: the compiler's own estimate of what is
no collective, and the shares of products, with what is fused to them, and of copies that change a
layout. Collectives: how many run, and GB that a device sends in rings; beside: share of these GB
that is sent while the program computes, by the order in which it is scheduled. Some gathers and
scatters have become rings of permutes beside the product that needs them."""
PREDICTED = """\
*Predictions*, not measurements: products at {of_flops:.0%} of the stated peak for bfloat16, padding
to tiles included, HBM and collectives at {of_bandwidth:.0%} of the stated bandwidth, without
latency; nothing for the rest. images/s, of all devices: between no overlap and full overlap, except
of collectives that the program waits for."""


def topologies_markdown(found: Rows, assumptions: Assumptions) -> str:
    """Returns the tables of what was compiled and of predictions, and their grounds.

    Args:
        found: at least one row, with its topology.
        assumptions: fractions of stated peaks.
    """
    fitting = [(topology, row) for topology, row in found if isinstance(row.best, Program)]
    parts = [markdown.table(_titles(MEMORY, "next larger"), [_memory(*x) for x in found]), LEGEND]
    if fitting:
        for columns in (_work(fitting), _predictions(assumptions)):
            cells = [[*_names(row), *_cells(columns, row.best, t)] for t, row in fitting]
            parts.append(markdown.table(_titles(columns), cells))
        parts.append(PREDICTED.format(**vars(assumptions)))
        sources = dict.fromkeys(f"{t.hardware.name}: {t.hardware.source}." for t, _ in fitting)
        parts += [textwrap.fill(source, 98) for source in sources]
    return "\n\n".join(parts)


def _titles(columns: Sequence[Column], *more: str) -> list[str]:
    return ["topology", "layout", "program", "batch", *(title for title, _ in columns), *more]


def _names(row: Row) -> list[str]:
    return [row.topology, row.layout, row.setting, f"{row.best.batch_size:,}"]


def _cells(columns: Sequence[Column], program: Any, topology: Topology) -> list[str]:
    return [text(program, topology) for _, text in columns]


MEMORY: tuple[Column, ...] = (
    ("arguments", lambda x, _: f"{x.memory.arguments / GB:.3g}"),
    ("outputs", lambda x, _: f"{(x.memory.outputs - x.memory.aliased) / GB:.3g}"),
    ("temporaries", lambda x, _: f"{x.memory.temporaries / GB:.3g}"),
    ("code", lambda x, _: f"{x.memory.code / GB:.2g}"),
    ("of memory", lambda x, _: f"{x.needed / x.memory.limit:.0%} of {x.memory.limit / GB:.3g}"),
    ("compile", lambda x, _: f"{x.compile_seconds:.0f}, {x.processor_seconds:.0f}"),
)


def _memory(topology: Topology, row: Row) -> list[str]:
    best = row.best
    if isinstance(best, TooLarge):
        rest = ["-"] * (len(MEMORY) - 2)
        needs = f"needs {best.needed / GB:.3g} of {best.limit / GB:.3g}"
        seconds = f"{best.compile_seconds:.0f}, {best.processor_seconds:.0f}"
        return [*_names(row), *rest, needs, seconds, "-"]
    return [*_names(row), *_cells(MEMORY, best, topology), _next_larger(row)]


def _next_larger(row: Row) -> str:
    failed: list[Found] = [x for x in row.tries if x.batch_size > row.best.batch_size]
    if not failed:
        return "-"
    least = min(failed, key=lambda x: x.batch_size)
    return f"{least.batch_size:,} needs {least.needed / GB:.3g}"


def _work(found: Rows) -> list[Column]:
    programs = [row.best for _, row in found if isinstance(row.best, Program)]
    used = {kind for program in programs for kind in program.traffic}
    return [
        ("exact T", lambda x, _: "-" if x.exact is None else f"{x.exact / 1e12:.4g}"),
        ("multiply-adds T", lambda x, _: f"{x.multiply_adds / 1e12:.4g}"),
        ("tiles", lambda x, _: f"{x.padding:.1%}"),
        ("HBM GB", lambda x, _: f"{x.hbm_bytes / GB:.4g}"),
        ("cycles G", lambda x, _: _cycles(x)),
        *(
            (kind, lambda x, _, kind=kind: _sent(x, kind))
            for kind in collectives.KINDS
            if kind in used
        ),
    ]


def _cycles(program: Program) -> str:
    """Returns such as "6.7: 64%, 20%": all, in products and in copies."""
    total = sum(program.cycles.values())
    shares = (program.cycles[kind] / max(total, 1) for kind in ("products", "copies"))
    return f"{total / 1e9:.2g}: {', '.join(f'{share:.0%}' for share in shares)}"


def _sent(program: Program, kind: str) -> str:
    """Returns such as "73x, 1.2 GB, 80% beside"; "-" where there is none."""
    if kind not in program.traffic:
        return "-"
    x = program.traffic[kind]
    beside = x.beside_bytes / x.moved_bytes if x.moved_bytes else 0.0
    return f"{x.launches}x, {x.moved_bytes / GB:.3g} GB, {beside:.0%} beside"


def _predictions(assumptions: Assumptions) -> list[Column]:
    def ms(name: str) -> Callable[[Program, Topology], str]:
        def text(program: Program, topology: Topology) -> str:
            seconds = program.seconds(topology.hardware, assumptions)
            return _two_digits(1e3 * getattr(seconds, name))

        return text

    def images(program: Program, topology: Topology) -> str:
        seconds = program.seconds(topology.hardware, assumptions)
        slow, fast = (_two_digits(program.batch_size / x) for x in (seconds.most, seconds.least))
        return f"{slow} to {fast}"

    return [
        ("products ms", ms("products")),
        ("HBM ms", ms("memory")),
        ("collectives beside ms", ms("beside")),
        ("collectives alone ms", ms("alone")),
        ("images/s", images),
    ]


def _two_digits(number: float) -> str:
    return f"{float(f'{number:.2g}'):,.10g}"
