"""What the training loop measures between two log lines: metrics, speed, memory, lost time.

Times and memory are those of this process. The metrics of a step stay on the devices until
``Monitor.summary`` fetches all of them at once, so that measuring does not slow dispatch down.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from enat_jax.runtime import memory

MASKED_PERCENT = (0, 25, 50, 75, 100)  # bounds of the ranges whose losses are told apart
_OTHER = "other"  # training outside all contexts
_TRAINING = (_OTHER, "data_wait", "dispatch")
_APART = ("compilation", "evaluation", "saving", "logging")


class _Step(NamedTuple):
    metrics: Mapping[str, jax.Array | float]
    exact_work: float | None
    padded_work: float | None


class Monitor:
    """Collects the steps of a training loop and sums up those since the last log line.

    The loop says what it does::

        with monitor.waiting():
            batch = next(batches)
        with monitor.dispatching():
            state, metrics = step(state, batch)
        monitor.step(metrics)
        ...
        with monitor.logging():
            writer.scalars(number, monitor.summary())

    Training time is all time since the last summary, the first time since the monitor was made,
    but for what passed in ``compiling``, ``evaluating``, ``saving`` and ``logging``. These four
    begin by waiting for the steps under way; that, and the wait of ``summary``, is training time
    wherever it happens. What the loop does outside all contexts, such as keeping dispatch a few
    steps ahead at most, is training, too. Of contexts within each other the innermost counts.

    Args:
        images_per_step: the global batch size.
        matrix_rate: multiply-adds per second of all devices of all processes at plain matrix
            products, what ``matrix_rate.matrix_rate`` gives times the processes. None: there is no
            "matrix_rate_fraction".
        clock: seconds, as ``time.perf_counter``.
    """

    def __init__(
        self,
        images_per_step: int,
        matrix_rate: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._images_per_step = images_per_step
        self._matrix_rate = matrix_rate
        self._clock = clock
        self._inside, self._since = _OTHER, clock()
        self._begin()

    def _begin(self) -> None:
        self._steps: list[_Step] = []
        self._seconds = dict.fromkeys((*_TRAINING, *_APART), 0.0)

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for getting the next batch."""
        return self._spending("data_wait")

    def dispatching(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for calling the compiled step, which returns before it is done."""
        return self._spending("dispatch")

    def compiling(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for compiling, within ``dispatching`` if that is where it happens."""
        return self._spending("compilation")

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for evaluation and making pictures."""
        return self._spending("evaluation")

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for saving a checkpoint; writing beside training is not counted."""
        return self._spending("saving")

    def logging(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for writing a summary; its time is in the summary after it."""
        return self._spending("logging")

    @contextlib.contextmanager
    def _spending(self, name: str) -> Iterator[None]:
        outer = self._switch(_OTHER)
        if name in _APART and self._steps:
            jax.block_until_ready(self._steps[-1].metrics)
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, name: str) -> str:
        """Counts time as spent on ``name`` from now on; returns what it was spent on so far."""
        now, before = self._clock(), self._inside
        self._seconds[before] += now - self._since
        self._inside, self._since = name, now
        return before

    def step(
        self,
        metrics: Mapping[str, jax.Array | float],
        *,
        masked_share: float | None = None,
        exact_work: float | None = None,
        padded_work: float | None = None,
    ) -> None:
        """Adds one step.

        Args:
            metrics: float32 scalars on the devices, not fetched here. "skipped", 0 or 1, says
                that the step was not finite and changed nothing.
            masked_share: of the tokens, in [0, 1]; becomes a metric of this name.
            exact_work, padded_work: multiply-adds over all devices; see ``costs``.

        Raises:
            ValueError: the share does not lie in [0, 1].
        """
        if masked_share is not None:
            if not 0 <= masked_share <= 1:
                raise ValueError(f"{masked_share=} must lie in [0, 1]")
            metrics = {**metrics, "masked_share": masked_share}
        self._steps.append(_Step(metrics, exact_work, padded_work))

    def summary(self) -> dict[str, float]:
        """Waits for the steps since the last summary, sums them up and begins anew.

        The names and what they mean; each is there only where its values are known:

            loss, accuracy, ...: mean of the metric over the steps that were not skipped; NaN if
                all were.
            skipped: number of steps that were skipped, because they were not finite.
            masked_share: mean share of tokens that were masked, of the steps not skipped.
            loss/masked_0_25, loss/masked_25_50, loss/masked_50_75, loss/masked_75_100: mean loss
                of the steps in which so many percent of the tokens were masked, the upper bound
                excluded except for 100; only of ranges that occurred.
            images_per_second: of all devices, in training time.
            seconds_per_step: of training time.
            data_wait: share of training time spent waiting for data.
            dispatch: share of training time that the host spent calling the compiled step.
            compilation: share of all time spent compiling.
            evaluation: share of all time spent evaluating.
            saving: share of all time spent waiting for a checkpoint to be saved.
            logging: share of all time spent writing the summary before this one.
            matrix_rate_fraction: exact multiply-adds per second of training time, as a fraction
                of ``matrix_rate``.
            padding: padded work beyond the exact, as a share of the exact.
            device_memory_bytes: the most that one device of this process ever had in use.
            host_memory_bytes: the most that this process, without its workers, ever had resident.

        Raises:
            RuntimeError: there was no step.
        """
        if not self._steps:
            raise RuntimeError("no step since the last summary: nothing to sum up")
        outer = self._switch(_OTHER)
        fetched = jax.device_get([step.metrics for step in self._steps])
        self._switch(outer)
        found = _means(fetched) | self._speed() | self._work()
        device = memory.device_peak()
        if device is not None:
            found["device_memory_bytes"] = float(device)
        found["host_memory_bytes"] = float(memory.resident_peak())
        self._begin()
        return found

    @property
    def num_steps(self) -> int:
        """Steps since the last summary."""
        return len(self._steps)

    def _training_seconds(self) -> float:
        return sum(self._seconds[name] for name in _TRAINING)

    def _speed(self) -> dict[str, float]:
        training, everything = self._training_seconds(), sum(self._seconds.values())
        seconds_per_step = training / len(self._steps)
        return {
            "images_per_second": self._images_per_step / seconds_per_step,
            "seconds_per_step": seconds_per_step,
            "data_wait": self._seconds["data_wait"] / training,
            "dispatch": self._seconds["dispatch"] / training,
            **{name: self._seconds[name] / everything for name in _APART},
        }

    def _work(self) -> dict[str, float]:
        exact = [x.exact_work for x in self._steps if x.exact_work is not None]
        padded = [x.padded_work for x in self._steps if x.padded_work is not None]
        found = {}
        if len(exact) == len(self._steps):
            if self._matrix_rate is not None:
                rate = sum(exact) / self._training_seconds()
                found["matrix_rate_fraction"] = rate / self._matrix_rate
            if len(padded) == len(self._steps):
                found["padding"] = sum(padded) / sum(exact) - 1
        return found


def _means(fetched: list[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Means of the metrics over the steps that were not skipped, and of the loss by range."""
    steps = [{name: float(value) for name, value in step.items()} for step in fetched]
    kept = [step for step in steps if not step.get("skipped")]
    names = dict.fromkeys(name for step in steps for name in step)
    found = {name: _mean([step[name] for step in kept if name in step]) for name in names}
    if "skipped" in names:
        found["skipped"] = float(len(steps) - len(kept))
    by_range: dict[int, list[float]] = {}
    for step in kept:
        if "loss" in step and "masked_share" in step:
            # Of a full share, too: all tokens masked belong to the last range.
            percent = 100 * step["masked_share"]
            number = sum(percent >= bound for bound in MASKED_PERCENT[1:-1])
            by_range.setdefault(number, []).append(step["loss"])
    for number, losses in sorted(by_range.items()):
        low, high = MASKED_PERCENT[number : number + 2]
        found[f"loss/masked_{low}_{high}"] = _mean(losses)
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
