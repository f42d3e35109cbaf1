"""What a run tells people: scalars and images in files and online, a progress bar, pictures.

Only process 0 writes; on the others everything here but the pictures does nothing.
"""

import io
import json
import logging
import math
import os
import pathlib
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import jax
import numpy as np
import tqdm
from PIL import Image, PngImagePlugin
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2, summary_pb2

from enat_jax.runtime import files

_log = logging.getLogger(__name__)


class MetricWriter:
    """Writes TensorBoard event files and `metrics.jsonl` into the directory of a run.

    `metrics.jsonl` has one object a call, `{"step": 100, "time": 1700000000.1, "loss": 0.5}`, time
    in seconds since 1970; a value that is not finite becomes null. Each line is on disk when the
    call returns.

    Args:
      workdir: created if missing.
      resume_step: the step from which the run goes on. What an interrupted run wrote beyond it is
        dropped from `metrics.jsonl` and hidden in TensorBoard, and what is already in
        `metrics.jsonl` at this very step is not written again. None starts anew: earlier lines
        are dropped.
      wandb: arguments of `wandb.init`, such as project, name and mode: everything goes to Weights
        & Biases, too, to the same run after a resume (`wandb_run_id` in the workdir). Nothing that
        fails there ends a run that has begun.

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
        if not self._active:
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        # First: what fails here must leave the files of an earlier run alone.
        self._wandb = None if wandb is None else _WandbRun(workdir, wandb, resume_step is not None)
        path = workdir / "metrics.jsonl"
        kept = [] if resume_step is None else _lines_until(path, resume_step)
        for line in kept:
            if line["step"] == resume_step:
                self._written |= line.keys() - {"step", "time"}
        files.write(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._lines = path.open("a", encoding="utf-8")
        self._events = _Events(workdir, 0 if resume_step is None else resume_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers, or arrays of one number, of any device, under their names.

        Raises:
          ValueError: if a name is `step` or `time`.
        """
        if reserved := {"step", "time"} & set(values):
            raise ValueError(f"a metric cannot be called {sorted(reserved)}: the line's own fields")
        if not self._active:
            return
        now = time.time()
        line = {}
        values = {name: float(value) for name, value in values.items()}
        for name, value in values.items():
            # TensorBoard may have lost what a killed run had already put into metrics.jsonl.
            self._events.scalar(name, value, int(step), now)
            if step != self._resume_step or name not in self._written:
                line[name] = value if math.isfinite(value) else None
        self._events.flush()
        if line:
            line = {"step": int(step), "time": round(now, 3), **line}
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
        if self._wandb is not None:
            self._wandb.scalars(int(step), values)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, uint8 `[h, w, c]` with c = 1 or 3, to TensorBoard and W&B."""
        pictures = {name: _checked(picture) for name, picture in images.items()}
        if not self._active:
            return
        for name, picture in pictures.items():
            self._events.image(name, picture, int(step), time.time())
        self._events.flush()
        if self._wandb is not None:
            self._wandb.images(int(step), pictures)

    def flush(self) -> None:
        """Puts everything on disk."""
        if self._active:
            self._events.flush()

    def close(self, failed: bool = False) -> None:
        """Puts everything on disk and closes the files; `failed` marks the run at W&B."""
        if self._active:
            self._lines.close()
            self._events.close()
            if self._wandb is not None:
                self._wandb.finish(exit_code=int(failed))

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind, *exception) -> None:
        self.close(failed=kind is not None)


class _Events:
    """A TensorBoard event file, written by the caller itself.

    tensorboardX's SummaryWriter leaves that to a thread, which ends at the first write that fails,
    on a full disk say; its callers then wait for it for ever.
    """

    def __init__(self, workdir: pathlib.Path, purge_step: int):
        # The names count whole seconds: a second writer within one would truncate the first's.
        suffix = f".{time.time_ns()}"
        self._file = event_file_writer.EventsWriter(str(workdir / "events"), suffix)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        for content in ({"file_version": "brain.Event:2"}, {"session_log": start}):
            self._add(purge_step, time.time(), **content)

    def scalar(self, name: str, value: float, step: int, now: float) -> None:
        found = summary_pb2.Summary.Value(tag=name, simple_value=value)
        self._add(step, now, summary=summary_pb2.Summary(value=[found]))

    def image(self, name: str, picture: np.ndarray, step: int, now: float) -> None:
        self._add(step, now, summary=summary.image(name, picture, dataformats="HWC"))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _add(self, step: int, now: float, **content) -> None:
        self._file.write_event(event_pb2.Event(step=step, wall_time=now, **content))


class _WandbRun:
    """A run at Weights & Biases; once it has started, its failures are worth one warning."""

    def __init__(self, workdir: pathlib.Path, settings: Mapping[str, Any], resumed: bool):
        try:
            import wandb
        except ImportError as error:
            raise ValueError("logging to Weights & Biases: pip install wandb") from error
        self._package, self._run, self._warned = wandb, None, False
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
            files.write(path, f"{run_id}\n".encode())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda: self._run.log({"step": step, **values}))

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        def log():
            images = {name: self._package.Image(_plain(x)) for name, x in pictures.items()}
            self._run.log({"step": step, **images})

        self._try(log)

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


class Progress:
    """A progress bar with loss, images per second and the time left.

    On a terminal a bar; elsewhere, in a log file say, a plain line every `interval` seconds and
    one at the end.

    Args:
      num_steps: of the whole run.
      images_per_step: the global batch size.
      initial_step: where this run goes on.
      stream: standard error if None.
      interval: least seconds between two plain lines.
      unit: what the plain lines call a step.
    """

    def __init__(
        self,
        num_steps: int,
        images_per_step: int,
        initial_step: int = 0,
        stream: TextIO | None = None,
        interval: float = 10.0,
        unit: str = "step",
    ):
        self._unit = unit
        self._stream = sys.stderr if stream is None else stream
        self._num_steps = num_steps
        self._images_per_step = images_per_step
        self._step = self._shown_step = initial_step
        self._start = self._shown_time = time.monotonic()
        self._initial_step = initial_step
        self._interval = interval
        self._loss: float | None = None
        self._active = jax.process_index() == 0
        self._bar = None
        if self._active and self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=num_steps,
                initial=initial_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
                "[{elapsed}<{remaining}{postfix}]",
            )

    def update(self, step: int, loss: float | None = None) -> None:
        """Says that `step` steps are done.

        Args:
          step: counted from the start of the whole run.
          loss: the latest, where it is at hand: fetching it at every step would wait for the
            device. The last one given stays shown.
        """
        self._loss = self._loss if loss is None else float(loss)
        advance, self._step = step - self._step, step
        if self._bar is not None:
            # The rate is tqdm's own, a moving average, so that both figures agree.
            rate = self._bar.format_dict["rate"]
            images = "" if rate is None else f"{rate * self._images_per_step:.0f} images/s"
            self._bar.set_postfix_str(_joined(self._loss_text(), images), refresh=False)
            self._bar.update(advance)
        elif self._active and time.monotonic() - self._shown_time >= self._interval:
            self._print_line()

    def close(self) -> None:
        """Leaves the bar as it stands, or prints the last line."""
        if self._bar is not None:
            self._bar.close()
        elif self._active and self._step > self._shown_step:
            self._print_line()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _loss_text(self) -> str:
        return "" if self._loss is None else f"loss {self._loss:.4g}"

    def _print_line(self) -> None:
        now = time.monotonic()
        rate = (self._step - self._shown_step) / max(now - self._shown_time, 1e-9)
        left = (self._num_steps - self._step) / rate if rate > 0 else math.inf
        remaining = tqdm.tqdm.format_interval(left) if math.isfinite(left) else "?"
        line = _joined(
            f"{self._unit} {self._step}/{self._num_steps}",
            self._loss_text(),
            f"{rate * self._images_per_step:.0f} images/s",
            f"{tqdm.tqdm.format_interval(now - self._start)} elapsed",
            f"{remaining} left",
        )
        print(line, file=self._stream, flush=True)
        self._shown_step, self._shown_time = self._step, now


def grid(images: np.ndarray, columns: int, pad: int = 2, background: int = 255) -> np.ndarray:
    """Lays out images in rows, `pad` pixels of `background` between and around them.

    Args:
      images: uint8 `[n, h, w, c]`, n > 0.
      columns: images in a row, positive.
      pad: pixels, not negative.
      background: also of the places that the last row leaves empty.

    Returns:
      uint8 `[H, W, c]`.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(f"{images.dtype=}, {images.shape=}: need uint8 [n, h, w, c], n > 0")
    if columns < 1 or pad < 0:
        raise ValueError(f"{columns=} must be positive and {pad=} not negative")
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    shape = (rows * (height + pad) + pad, columns * (width + pad) + pad, channels)
    canvas = np.full(shape, background, np.uint8)
    for i, image in enumerate(images):
        top = pad + i // columns * (height + pad)
        left = pad + i % columns * (width + pad)
        canvas[top : top + height, left : left + width] = image
    return canvas


def write_png(
    path: str | os.PathLike, image: np.ndarray, text: Mapping[str, str] | None = None
) -> None:
    """Writes a picture, uint8 `[h, w, c]` with c = 1 or 3, whole or not at all, creating parents.

    `text` goes into text chunks. The same arguments make the same bytes. Does not wait for the
    disk, which thousands of pictures would feel. Raises OSError, which names `path`.
    """
    content, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    Image.fromarray(_plain(_checked(image))).save(content, "PNG", pnginfo=chunks)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content.getvalue())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        error.filename = str(path)  # a full disk names none, others name `unfinished`
        raise


def _checked(picture: np.ndarray) -> np.ndarray:
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] not in (1, 3):
        raise ValueError(
            f"a picture of {picture.dtype} {picture.shape}: need uint8 [h, w, c] with c = 1 or 3"
        )
    return picture


def _plain(picture: np.ndarray) -> np.ndarray:
    """As Pillow and W&B want it: grey without an axis of channels."""
    return picture[..., 0] if picture.shape[-1] == 1 else picture


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


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
