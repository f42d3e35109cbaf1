"""The progress of long work: a bar on a terminal, plain lines elsewhere."""

import math
import sys
from typing import Any, Self, TextIO

import jax
import tqdm

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
LINE = "{n_fmt}/{total_fmt}{postfix}, {elapsed} elapsed, {remaining} left"
MEMORY_S = 60.0  # of the rate: what is older than this counts for less and less
KNOWN_S = 1.0  # that must be counted before there is a rate; of shorter work, it is the mean of all


class Progress:
    """A progress bar with loss, images per second and the time left.

    On a terminal it is a bar; elsewhere, such as in a log file, a plain line every ``interval``
    seconds and one at the end. Of several processes the first one shows it. The rate is that of
    about the last minute.

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
    ) -> None:
        stream = sys.stderr if stream is None else stream
        how: dict[str, Any] = {"bar_format": BAR, "dynamic_ncols": True}
        if not stream.isatty():
            # With "gui" tqdm writes nothing itself.
            how = {"bar_format": f"{unit} {LINE}", "mininterval": interval, "gui": True}
        self._bar = _Bar(
            images_per_step,
            total=num_steps,
            initial=initial_step,
            file=stream,
            miniters=1,
            disable=jax.process_index() != 0,
            **how,
        )

    def update(self, step: int, loss: float | None = None) -> None:
        """Shows that ``step`` steps are done.

        Args:
            step: counted from the start of the whole run.
            loss: the latest, where it is at hand: fetching it at every step would wait for the
                device. The last one given stays shown.
        """
        if loss is not None:
            self._bar.set_postfix_str(f"loss {float(loss):.4g}", refresh=False)
        self._bar.count(step - self._bar.n)
        self._bar.update(step - self._bar.n)

    def leave_out(self) -> None:
        """Keeps the step under way, which has compiled or the like, out of rate and time left.

        The first one is always left out.
        """
        self._bar.leave_out()

    def close(self) -> None:
        """Leaves the bar as it stands, or prints the last line."""
        self._bar.mininterval = 0
        self._bar.is_last = True
        self._bar.update(0)
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Bar(tqdm.tqdm):
    """What tqdm shows, with a rate of our own; in its mode for windows ("gui") plain lines."""

    monitor_interval = 0  # no thread of its own: every update looks at the time

    def __init__(self, images_per_step: int, **how: Any) -> None:
        self._images_per_step = images_per_step
        self._steps, self._seconds = 0.0, 0.0  # that the rate is of
        self._since: float | None = None  # when the step under way began, if it is to be counted
        self.is_last = False  # of the lines
        super().__init__(**how)

    def count(self, steps: int) -> None:
        """Notes for the rate that so many steps have been done since the last call."""
        if self.disable:
            return
        now = self._time()
        if self._since is not None:
            seconds = max(0.0, now - self._since)
            kept = math.exp(-seconds / MEMORY_S)
            self._steps = kept * self._steps + steps
            self._seconds = kept * self._seconds + seconds
        self._since = now

    def leave_out(self) -> None:
        """Does not count what happens between the last call of ``count`` and the next."""
        self._since = None

    @property
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        done, seconds = self._steps, self._seconds
        if seconds < KNOWN_S and (self.is_last or values["n"] == values["total"]):
            done, seconds = values["n"] - values["initial"], values["elapsed"]
        elif seconds < KNOWN_S:
            # tqdm would take the mean since the start, which is hardly more than compilation.
            values["bar_format"] = values["bar_format"].replace("{remaining}", "?")
            seconds = 0.0
        values["rate"] = done / seconds if seconds else None
        if values["rate"]:
            images = f"{values['rate'] * self._images_per_step:.0f} images/s"
            values["postfix"] = ", ".join(filter(None, [values["postfix"], images]))
        return values

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.gui:
            print(self, file=self.fp, flush=True)
        else:
            super().display(msg, pos)
