"""The progress of long work: a bar on a terminal, plain lines elsewhere."""

import math
import sys
import time
from typing import TextIO

import jax
import tqdm


class Progress:
    """A progress bar with loss, images per second and the time left.

    On a terminal a bar; elsewhere, in a log file say, a plain line every ``interval`` seconds and
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
        """Says that ``step`` steps are done.

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


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
