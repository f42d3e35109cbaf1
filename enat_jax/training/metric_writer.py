"""What a run tells people: scalars and images in files and online, a progress bar, pictures.

Only process 0 writes; on the others everything here but the pictures does nothing.
"""

import json
import logging
import math
import os
import pathlib
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2, summary_pb2

from enat_jax.runtime import files, paths, png

_CARRIED = ("metrics.jsonl", "wandb_run_id")  # that a run which goes on needs

_log = logging.getLogger(__name__)


class MetricWriter:
    """Writes TensorBoard event files and ``metrics.jsonl`` into the directory of a run.

    ``metrics.jsonl`` has one object a call, ``{"step": 100, "time": 1700000000.1, "loss": 0.5}``,
    time in seconds since 1970; a value that is not finite becomes null. Each line is on disk when
    the call returns.

    Of a run in a bucket all of this is written to a directory of this machine, and to the bucket
    by ``upload``: an object cannot be added to.

    Args:
        workdir: created if missing; it may be in a bucket.
        resume_step: the step from which the run goes on. What an interrupted run wrote beyond it is
            dropped from ``metrics.jsonl`` and hidden in TensorBoard, and what is already in
            ``metrics.jsonl`` at this very step is not written again. None starts anew: earlier
            lines are dropped.
        wandb: arguments of ``wandb.init``, such as project, name and mode: everything goes to
            Weights & Biases, too, to the same run after a resume (``wandb_run_id`` in the workdir).
            Nothing that fails there ends a run that has begun.

    Raises:
        ValueError: if the package wandb is not installed, or a run that starts anew fails to start
            there.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        resume_step: int | None = None,
        wandb: Mapping[str, Any] | None = None,
    ):
        self._active = jax.process_index() == 0
        self._written: set[str] = set()  # at the step from which the run goes on
        self._resume_step = resume_step
        self._bucket: Any = None  # the directory of the run, if it is there
        self._uploaded: dict[str, tuple[int, int]] = {}  # sizes and times by name
        if not self._active:
            return
        workdir = self._in_bucket(paths.place(workdir))
        workdir.mkdir(parents=True, exist_ok=True)
        # First: what fails here must leave the files of an earlier run alone.
        self._wandb = None if wandb is None else _WandbRun(workdir, wandb, resume_step is not None)
        path = workdir / "metrics.jsonl"
        kept = [] if resume_step is None else _lines_until(path, resume_step)
        for line in kept:
            if line["step"] == resume_step:
                self._written |= line.keys() - {"step", "time"}
        files.write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._lines = path.open("a", encoding="utf-8")
        # SummaryWriter of tensorboardX leaves writing to a thread, which ends at the first write
        # that fails, on a full disk say, and its callers then wait for it for ever.
        # File names count whole seconds: a second writer within one would truncate the first's.
        suffix = f".{time.time_ns()}"
        self._events = event_file_writer.EventsWriter(str(workdir / "events"), suffix)
        begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        for content in ({"file_version": "brain.Event:2"}, {"session_log": begin}):
            # TensorBoard hides what earlier writers wrote from this step on.
            self._event(0 if resume_step is None else resume_step + 1, **content)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers, or arrays of one number, of any device, under their names.

        Raises:
            ValueError: if a name is ``step`` or ``time``.
        """
        if reserved := {"step", "time"} & set(values):
            raise ValueError(f"a metric cannot be called {sorted(reserved)}: the line's own fields")
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        # TensorBoard may have lost what a killed run had already put into metrics.jsonl.
        for name, value in values.items():
            found = summary_pb2.Summary.Value(tag=name, simple_value=value)
            self._event(step, summary=summary_pb2.Summary(value=[found]))
        self._events.flush()
        line = {
            name: value if math.isfinite(value) else None
            for name, value in values.items()
            if step != self._resume_step or name not in self._written
        }
        if line:
            line = {"step": int(step), "time": round(time.time(), 3), **line}
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
        if self._wandb is not None:
            self._wandb.scalars(int(step), values)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, uint8 ``[h, w, c]`` with c = 1 or 3, to TensorBoard and W&B."""
        pictures = {name: png.checked(picture) for name, picture in images.items()}
        if not self._active:
            return
        for name, picture in pictures.items():
            self._event(step, summary=summary.image(name, picture, dataformats="HWC"))
        self._events.flush()
        if self._wandb is not None:
            self._wandb.images(int(step), pictures)

    def upload(self) -> None:
        """Of a run in a bucket, writes there what is new.

        To be called before each checkpoint: what was logged before it is then there with it.
        """
        if self._bucket is None:
            return
        for path in [*(self._local / x for x in _CARRIED), *self._local.glob("events.*")]:
            if not path.exists():
                continue
            name, found = str(path.relative_to(self._local)), path.stat()
            state = found.st_size, found.st_mtime_ns
            if self._uploaded.get(name) != state:
                files.write_atomically(self._bucket / name, path.read_bytes())
                self._uploaded[name] = state

    def close(self, failed: bool = False) -> None:
        """Puts everything on disk and closes the files; ``failed`` marks the run at W&B."""
        if self._active:
            self._lines.close()
            self._events.close()
            if self._wandb is not None:
                self._wandb.finish(exit_code=int(failed))
            self.upload()
            if self._bucket is not None:
                files.remove_tree(self._local)

    def _in_bucket(self, workdir: Any) -> pathlib.Path:
        """Returns where files are written that cannot be added to in a bucket: beside it, here."""
        if isinstance(workdir, pathlib.Path):
            return workdir
        self._bucket, self._local = workdir, pathlib.Path(tempfile.mkdtemp(prefix="enat_jax-"))
        for name in _CARRIED:
            if (workdir / name).exists():
                files.write_atomically(self._local / name, (workdir / name).read_bytes())
        return self._local

    def _event(self, step: int, **content: Any) -> None:
        self._events.write_event(event_pb2.Event(step=int(step), wall_time=time.time(), **content))

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.close(failed=kind is not None)


class _WandbRun:
    """A run at Weights & Biases; once it has started, its failures are worth one warning."""

    def __init__(self, workdir: pathlib.Path, settings: Mapping[str, Any], resumed: bool):
        try:
            import wandb
        except ImportError as error:
            raise ValueError("logging to Weights & Biases: pip install wandb") from error
        self._package, self._warned = wandb, False
        self._run: Any = None
        path = workdir / "wandb_run_id"
        known = resumed and path.exists()
        run_id = path.read_text(encoding="utf-8").strip() if known else secrets.token_hex(8)
        try:
            self._run = wandb.init(**settings, id=run_id, resume="allow", dir=str(workdir))
            # Steps of their own: W&B drops what is logged at or before a step that it has seen,
            # as a resumed run does that repeats the steps since its checkpoint.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            if not resumed:
                raise ValueError(f"Weights & Biases does not start: {error}") from error
            self._warn(error)  # a training that was interrupted goes on by itself, at night, too
        if not known:
            files.write_atomically(path, f"{run_id}\n".encode())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda: self._run.log({"step": step, **values}))

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        image = self._package.Image
        self._try(
            lambda: self._run.log(
                {"step": step} | {k: image(png.as_pillow(x)) for k, x in pictures.items()}
            )
        )

    def finish(self, exit_code: int) -> None:
        self._try(lambda: self._run.finish(exit_code=exit_code))

    def _try(self, call: Callable[[], None]) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            _log.warning("Weights & Biases failed, training goes on without it: %s", error)
        self._warned = True


def _lines_until(path: pathlib.Path, step: int) -> list[dict]:
    """The lines of a metrics file up to a step; a line cut off by a kill is dropped."""
    if not path.exists():
        return []
    kept = []
    content = path.read_text(encoding="utf-8", errors="replace")
    for number, text in enumerate(content.splitlines(), start=1):
        try:
            line = json.loads(text)
            keep = line["step"] <= step
        except (ValueError, KeyError, TypeError, RecursionError):
            _log.warning("%s: line %d is not a line of metrics; dropped", path, number)
            continue
        if keep:
            kept.append(line)
    return kept
