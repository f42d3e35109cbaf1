"""Everything worth knowing about one machine, measured row by row: ``benchmark profile``.

Each row is a call of ``benchmark train`` or ``benchmark sampler`` in a process of its own, so that
its peak memory is its own and nothing that it breaks can break another. This process never touches
the device. Rows are kept as they come, and rows that are there already are not measured again.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from enat_jax.models import blocks
from enat_jax.profiling import reports
from enat_jax.runtime import files

FORMAT = "enat_jax profile"
TASKS = ("train", "sampler")
SEGMENTS = (1, 2, 4)
# Of the device's memory, for arrays; jax's default of 0.75 would say what fits in three quarters.
MEMORY_SHARE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
Call = Callable[..., dict[str, Any]]  # takes what ``run`` takes
_ERROR = re.compile(r"error: |[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        config: file of the transformer's config.
        task: of ``TASKS``.
        setting: what is not as in the baseline, such as "remat=full"; "baseline" for the baseline.
        arguments: of ``benchmark``, different for all rows.
    """

    config: str
    task: str
    setting: str
    arguments: tuple[str, ...]


# --- what to measure ------------------------------------------------------------------------


def list_rows(
    configs: Mapping[str, ml_collections.ConfigDict],
    tokenizer_config: str,
    *,
    dtype: str,
    most: int,
    repeats: int,
    shapes: int,
    overrides: Sequence[str] = (),
) -> list[Row]:
    """Returns the rows for some configs: all baselines first, then those with one change each.

    Args:
        configs: by their files, complete and with the overrides applied.
        tokenizer_config: file of the config of the decoder that is part of sampling.
        dtype: of the computation.
        most: largest batch to try.
        repeats: timings of each.
        shapes: of training that are timed.
        overrides: arguments such as ``--config.model.width=64`` for all rows.
    """
    how = ["--dtype", dtype, "--most", str(most), "--repeats", str(repeats)]
    of_task = {
        "train": ["--time", str(shapes)],
        "sampler": ["--decode", "--tokenizer-config", tokenizer_config],
    }
    ranked = []
    for path, config in configs.items():
        for task in TASKS:
            for rank, (setting, arguments) in enumerate(_settings(config, task)):
                command = [task, "--config", path, *how, *of_task[task], *overrides, *arguments]
                ranked.append((rank, Row(path, task, setting, tuple(command))))
    return [row for _, row in sorted(ranked, key=lambda x: x[0])]


def _settings(config: ml_collections.ConfigDict, task: str) -> list[tuple[str, list[str]]]:
    """Returns names and arguments of the baseline, and of all that differ from it in one value."""
    kernels = tuple(name for name in blocks.ATTENTION if name != "auto")  # which is one of these
    changes: list[tuple[str, tuple[str, ...]]] = [("attention", kernels)]
    if task == "train":
        changes.append(("remat", ("none", *blocks.REMAT)))
    found = [
        (f"{name}={value}", [f"--config.model.{name}={value}"])
        for name, values in changes
        for value in values
        if value != config.model[name]
    ]
    if task == "train":
        return [("baseline", []), *found]
    steps = config.sampler.num_steps
    usual = min(config.sampler.num_segments or steps, steps)
    found = [(name, [*arguments, "--segments", str(usual)]) for name, arguments in found]
    others = [n for n in (*SEGMENTS, steps) if n <= steps and n != usual]
    found += [(f"segments={n}", ["--segments", str(n)]) for n in dict.fromkeys(others)]
    return [("baseline", ["--segments", str(usual)]), *found]


# --- measuring ------------------------------------------------------------------------------


def run(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Calls ``benchmark`` in a fresh process.

    Args:
        arguments: of the program, without ``--json``.
        seconds: after which it is ended, and counts as failed.

    Returns:
        What it wrote as JSON; if it failed, why in one line ("failed"), and the end of "stderr".
    """
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "result.json"
        command = [sys.executable, "-m", "enat_jax.benchmark", *arguments, "--json", str(path)]
        environment = MEMORY_SHARE | os.environ
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, env=environment
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than {seconds / 60:.3g} minutes", "stderr": []}
        if done.returncode == 0:
            return json.loads(path.read_text())
    return {
        "failed": reason(done.stderr, done.returncode),
        "stderr": done.stderr.splitlines()[-40:],
    }


def reason(stderr: str, code: int) -> str:
    """Returns why a program ended, in one line: its last error, or else its signal or exit code."""
    errors = [line for line in stderr.splitlines() if _ERROR.match(line)]
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            return f"ended by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
    return errors[-1].removeprefix("error: ")[:300] if errors else f"exit code {code}"


def profile(
    rows: Sequence[Row],
    out: str | os.PathLike,
    *,
    dtype: str,
    minutes: float | None,
    row_minutes: float,
    trace: str | os.PathLike | None = None,
    call: Call = run,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measures rows that are not in ``out`` yet; every row is written as soon as it is there.

    Args:
        rows: of ``list_rows``.
        out: directory of ``profile.json`` and ``profile.md``.
        dtype: of the matrix rate in the header.
        minutes: after which no row is begun; None: no limit.
        row_minutes: that a row may take.
        trace: directory for a trace of the fastest training step of each config; None: no traces.
        call: calls ``benchmark``.
        clock: gives seconds.

    Returns:
        What ``profile.json`` holds.

    Raises:
        ValueError: the machine cannot be measured, or ``out`` holds rows of another machine.
    """
    path = pathlib.Path(out) / "profile.json"
    end = float("inf") if minutes is None else clock() + 60 * minutes
    call = functools.partial(call, seconds=60 * row_minutes)
    saved = _begin(path, call(["machine", "--dtype", dtype]))
    known = {tuple(x["arguments"]): x for x in saved["rows"]}
    batches: dict[tuple[str, str], int] = {}  # of baselines, with which the others begin
    for row in rows:
        done = known.get(row.arguments)
        if done is None and clock() < end:
            first = batches.get((row.config, row.task))
            print(f"{row.task} {pathlib.Path(row.config).stem}: {row.setting}", file=sys.stderr)
            start, date = clock(), _now()
            done = dataclasses.asdict(row) | _measure_row(row, first, call)
            done |= {"arguments": list(row.arguments), "seconds": clock() - start, "date": date}
            saved["rows"].append(done)
            known[row.arguments] = done
        saved["left"] = sum(x.arguments not in known for x in rows)
        _write(path, saved)
        if done is not None and row.setting == "baseline" and "failed" not in done:
            batches[row.config, row.task] = done["batch"]
    if trace is not None and not saved["left"]:
        for fastest in reports.best(saved["rows"]):
            name = fastest["config"]
            if fastest["task"] == "train" and name not in saved["traces"] and clock() < end:
                directory = pathlib.Path(trace) / pathlib.Path(name).stem
                saved["traces"][name] = _trace(fastest, str(directory), call)
        _write(path, saved)
    return saved


def _measure_row(row: Row, first: int | None, call: Call) -> dict[str, Any]:
    """Returns figures of a row; ``first`` is the batch to begin with, None: the default."""
    start = [] if first is None else ["--first", str(first)]
    result = call([*row.arguments, "--batch", "fit", *start])
    if "failed" in result:
        return result
    fit = result["fit"]
    if not fit["own_peak"]:  # the peak would be that of the batch that ran out of memory
        result = call([*row.arguments, "--batch", str(fit["batch"])])
        if "failed" in result:
            return result | {"fit": fit}
    return figures(result) | {"fit": fit}


def _trace(row: dict[str, Any], directory: str, call: Call) -> dict[str, Any]:
    """Traces a measured row of training, and returns what ``profile.json`` says about it."""
    how = ["--batch", str(row["batch"]), "--trace", directory]
    result = call([*row["arguments"], *how])
    found = {name: row[name] for name in ("setting", "batch")} | {"directory": directory}
    return found | {name: result[name] for name in ("failed",) if name in result}


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Returns figures of a row from what ``benchmark train`` or ``benchmark sampler`` wrote.

    Those of training are expectations over the shapes that were timed.
    """
    timed = result["timed"] if result["benchmark"] == "train" else result["rows"]
    weights = [x.get("probability", 1.0) for x in timed]

    def mean(number: Callable[[dict[str, Any]], float]) -> float:
        return sum(w * number(x) for w, x in zip(weights, timed, strict=True)) / sum(weights)

    seconds = [
        mean(lambda x: x["images"] / x["images_per_second"][0]),  # the median of a call
        mean(lambda x: max(x["seconds"])),
        mean(lambda x: min(x["seconds"])),
    ]
    rate = mean(lambda x: x["exact"]) / seconds[0]
    return {
        "batch": result["batch_size"],
        "images_per_second": [timed[0]["images"] / x for x in seconds],
        "exact_rate": rate,
        "fraction": result.get("fraction", timed[0].get("fraction")),
        "padding": result.get("padding", timed[0].get("padding")),
        "compile_seconds": sum(x["compile_seconds"] for x in timed) / len(timed),
        "peak_bytes": max(x["peak_bytes"] for x in timed),
        "peak_of": timed[0]["peak_of"],
        "shapes": result.get("shapes"),
        "timed_share": result.get("timed_share"),
        "dtype": result["model"]["dtype"],
    }


# --- what is kept ---------------------------------------------------------------------------


def _begin(path: pathlib.Path, measured: dict[str, Any]) -> dict[str, Any]:
    """Returns what ``path`` holds, or nothing yet, with the machine as it was just measured."""
    if "failed" in measured:
        raise ValueError(f"the machine cannot be measured: {measured['failed']}")
    saved: dict[str, Any] = {"format": FORMAT, "rows": [], "traces": {}}
    if path.exists():
        saved = files.read_description(path, FORMAT, "choose another --out")
        before, now = (
            {name: x["machine"][name] for name in ("device", "driver", "jax")}
            for x in (saved, measured)
        )
        if before != now:
            raise ValueError(
                f"{path} was measured on {before}, this is {now}: choose another --out"
            )
    keep = ("machine", "matrix_rate", "dtype")
    return saved | {name: measured[name] for name in keep} | {"date": _now(), "left": 0}


def _write(path: pathlib.Path, saved: dict[str, Any]) -> None:
    files.write_json(path, saved)
    files.write_atomically(path.with_suffix(".md"), reports.profile_markdown(saved).encode())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


@contextlib.contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """Lets SIGTERM end this process like Ctrl-C, and thereby the process of the row, too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
