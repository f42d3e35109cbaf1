"""The largest batch that fits in memory, and traces of training steps.

A batch is tried by measuring it. Before a compiled program runs, what it will allocate is compared
with what is free, so that most batches that are too large cost a compilation and nothing else; on a
CPU, where running out of memory kills the process, nothing else is ever tried. A program for TPUs
that are not there is compiled and never runs: its compiler says what it needs.
"""

import dataclasses
import functools
import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from enat_jax.inference import sampling
from enat_jax.models.transformers import Transformer
from enat_jax.models.vqgan import VQGAN
from enat_jax.profiling import setup, timing
from enat_jax.profiling.tpu_programs import Found, Program
from enat_jax.runtime import exits, memory, numerics
from enat_jax.training.enat_task import Task

GIB = 2**30
MOST_COMPILED = 6  # batches that are compiled for TPUs to find the largest that fits
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED")


class DoesNotFit(Exception):
    """Says that more memory is needed than is free, which was found out before anything ran."""


# --- memory ---------------------------------------------------------------------------------


def program_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Returns the bytes that a run allocates beside its arguments, which are there already.

    None: the backend does not say.
    """
    x = compiled.memory_analysis()
    if x is None:
        return None
    return x.temp_size_in_bytes + x.output_size_in_bytes - x.alias_size_in_bytes


def tree_bytes(tree: PyTree) -> int:
    """Returns the bytes of all arrays, which may be ``jax.ShapeDtypeStruct``."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def out_of_memory(error: BaseException) -> bool:
    """Returns whether an error of compiling or running says that memory ran out."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return any(mark in str(error) for mark in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


class Check:
    """Raises ``DoesNotFit`` for what needs more than is free; remembers the tightest program.

    Args:
        free: gives the free bytes, or None if they are not known; then everything passes.

    Attributes:
        needed: bytes of the program that came closest to what was free; None: no program yet.
        free: bytes that were free then; None: no program yet.
    """

    def __init__(self, free: Callable[[], int | None]):
        self._free = free
        self.needed: int | None = None
        self.free: int | None = None

    def __call__(self, compiled: jax.stages.Compiled) -> None:
        needed, free = program_bytes(compiled), self._free()
        if needed is None or free is None:
            return
        if self.needed is None or self.free is None or needed * self.free > self.needed * free:
            self.needed, self.free = needed, free
        _compare(needed, free)

    def arrays(self, tree: PyTree) -> None:
        """Raises ``DoesNotFit`` if arrays that are about to be made need more than is free."""
        _compare(tree_bytes(tree), self._free())

    def growth(self) -> int:
        """Returns how many times as large a batch to try next, a power of two, at least 2.

        A batch that is more than twice as large surely fits: the need of a program is a constant
        and a share that grows with the batch, and here all of it is taken to grow.
        """
        if self.needed is None or self.free is None:
            return 2
        times = max(2, self.free // max(self.needed, 1))
        return 1 << (times.bit_length() - 1)


def _compare(needed: int, free: int | None) -> None:
    if free is not None and needed > free:
        raise DoesNotFit(f"needs {needed / GIB:.3g} GiB of {free / GIB:.3g} GiB that are free")


# --- the largest batch ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Try:
    """One batch size that was tried.

    Attributes:
        batch: images.
        fits: whether it ran.
        reason: why it did not; "" if it did.
        ran_out: whether memory ran out while compiling or running, rather than before.
        needed: bytes, as ``Check`` has them.
        free: bytes, as ``Check`` has them.
        images_per_second: median; None if it did not run.
    """

    batch: int
    fits: bool
    reason: str
    ran_out: bool
    needed: int | None
    free: int | None
    images_per_second: float | None


@dataclasses.dataclass(frozen=True)
class Fit:
    """The largest batch that fits, within a factor of two.

    Attributes:
        batch: images.
        result: its measurement.
        tries: all batches that were tried, in their order.
    """

    batch: int
    result: Any
    tries: tuple[Try, ...]

    @property
    def own_peak(self) -> bool:
        """Whether the peak memory in ``result`` is not that of a try that ran out."""
        return not any(x.ran_out for x in self.tries)

    def json(self) -> dict[str, Any]:
        """Returns all but the result, as JSON values."""
        tries = [dataclasses.asdict(x) for x in self.tries]
        return {"batch": self.batch, "own_peak": self.own_peak, "tries": tries}


# ``attempt(batch, check) -> (result, images per second)`` measures a batch, and shows each compiled
# program to the check before it runs. Everything that it made must be free when it has returned or
# raised.
Attempt = Callable[[int, Check], tuple[Any, float]]


def fit(
    attempt: Attempt,
    *,
    first: int,
    most: int,
    free: Callable[[], int | None] = memory.free_bytes,
    report: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Finds the largest of ``first`` doubled or halved, and ``most``, that fits.

    Args:
        attempt: measures a batch.
        first: batch that is tried first, at least 1.
        most: largest batch that may be tried.
        free: gives the free bytes, or None, as ``memory.free_bytes`` does.
        report: is given a line of text for each try.

    Raises:
        ValueError: not even a batch of 1 fits, or ``first`` is not between 1 and ``most``.
    """
    if not 1 <= first <= most:
        raise ValueError(f"{first=} must lie between 1 and {most=}")
    tries: list[Try] = []
    best, best_result = 0, None
    batch = first
    while batch > best:
        result, found, growth = _try(attempt, batch, Check(free))
        tries.append(found)
        report(f"batch {batch}: {'fits' if found.fits else found.reason}")
        if found.fits:
            best, best_result = batch, result
            batch = min(batch * growth, most)
        else:
            most = batch = batch // 2
    if not best:
        raise ValueError(f"not even a batch of 1 fits: {found.reason}")
    return Fit(best, best_result, tuple(tries))


def _try(attempt: Attempt, batch: int, check: Check) -> tuple[Any, Try, int]:
    """Tries one batch: the result, the try and ``Check.growth``; nothing else stays in memory."""
    result, reason, rate, ran_out = None, "", None, False
    try:
        result, rate = attempt(batch, check)
    except DoesNotFit as error:
        reason = str(error)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason, ran_out = f"ran out of memory ({exits.one_line(error)})", True
    # The exception is gone by now, and with its traceback what the functions in it had held.
    jax.clear_caches()
    gc.collect()
    found = Try(batch, not reason, reason, ran_out, check.needed, check.free, rate)
    return result, found, check.growth()


# --- programs for TPUs that are not there ---------------------------------------------------


def fit_compiled(
    attempt: Callable[[int], Found], *, first: int, ways: int, report: Callable[[Found], None]
) -> tuple[Found, ...]:
    """Finds the largest batch that fits, to a sixteenth or better, with few compilations.

    The memory that a program needs is nearly a constant and a share that grows with the batch: two
    batches predict the next one to try, which is compiled, too.

    Args:
        attempt: compiles for a batch.
        first: batch that is tried first.
        ways: parts that a batch is divided into.
        report: is shown each try.

    Returns:
        All tries, in their order.
    """
    tries: list[Found] = []
    batch: int | None = _rounded(first, ways)
    while batch is not None and len(tries) < MOST_COMPILED:
        tries.append(attempt(batch))
        report(tries[-1])
        batch = _next(tries, ways)
    return tuple(tries)


def _rounded(batch: float, ways: int) -> int:
    """Rounds down to a multiple of ``ways`` of five binary digits, at least ``ways``."""
    of_each = max(1, int(batch) // ways)
    step = 1 << max(0, of_each.bit_length() - 5)
    return ways * (of_each // step * step)


def _next(tries: list[Found], ways: int) -> int | None:
    """Returns the batch to try next; None where nothing larger is expected to fit."""
    fitting = [x.batch_size for x in tries if x.fits]
    failing = [x.batch_size for x in tries if not x.fits]
    low, high = max(fitting, default=0), min(failing, default=None)
    above = next(
        b for b in (_rounded(low + i * ways, ways) for i in range(1, 1 + 2 * low + ways)) if b > low
    )
    if high is not None and above >= high:
        return None
    predicted = _rounded(_predicted(tries), ways)
    if len(tries) > 1 and low and predicted <= low:
        return None
    below = _rounded(high - ways, ways) if high is not None else predicted
    return min(max(predicted, above), max(below, ways))


def _predicted(tries: list[Found]) -> float:
    """Returns the batch whose program needs all memory but a hundredth, on a line through two."""
    limit = 0.99 * (tries[0].memory.limit if isinstance(tries[0], Program) else tries[0].limit)
    nearest = sorted(tries, key=lambda x: abs(x.needed - limit))[:2]
    if len(nearest) == 1:
        (only,) = nearest
        constant = only.memory.arguments + only.memory.code if isinstance(only, Program) else 0
        slope = (only.needed - constant) / only.batch_size
        return (limit - constant) / max(slope, 1.0)
    one, two = sorted(nearest, key=lambda x: x.batch_size)
    slope = (two.needed - one.needed) / (two.batch_size - one.batch_size)
    if slope <= 0:  # the compiler has begun to compute again what it has no room for
        return one.batch_size if two.needed > limit else 1.25 * two.batch_size
    return one.batch_size + (limit - one.needed) / slope


# --- what is tried --------------------------------------------------------------------------


def fit_sampler(
    model: Transformer,
    settings: sampling.Settings,
    segments: Sequence[int],
    *,
    first: int,
    most: int,
    report: Callable[[str], None],
    codec: VQGAN | None = None,
    free: Callable[[], int | None] = memory.free_bytes,
    **how: Any,
) -> Fit:
    """Finds the largest batch of the sampler that fits; its result is that of ``time_sampler``.

    Args:
        model, settings, segments, codec, how: see ``timing.time_sampler``.
        first, most, report, free: see ``fit``.
    """
    params = numerics.eval_shape(functools.partial(setup.init_model, model))

    def attempt(batch: int, check: Check) -> tuple[list[timing.Measurement], float]:
        check.arrays(params)
        found = timing.time_sampler(
            model, settings, batch, segments, codec=codec, check=check, **how
        )
        return found, found[0].images_per_second[0]

    return fit(attempt, first=first, most=most, report=report, free=free)


def fit_training(
    task: Task,
    *,
    max_timed: int,
    first: int,
    most: int,
    report: Callable[[str], None],
    free: Callable[[], int | None] = memory.free_bytes,
    **how: Any,
) -> Fit:
    """Finds the largest batch whose step fits in every shape; its result is of ``time_training``.

    First comes the shape with the most padded work, which is that with the most to remember; the
    most probable shapes are then measured with the batch at which it fits.

    Args:
        task: of any batch size.
        max_timed, how: see ``timing.time_training``.
        first, most, report, free: see ``fit``.
    """
    largest = int(np.argmax(timing.padded_work(task)))
    state = numerics.eval_shape(task.init, numerics.key(0))

    def attempt(batch: int, check: Check, **which: Any) -> tuple[timing.TrainingMeasurement, float]:
        check.arrays((state, task.frozen))
        resized = dataclasses.replace(task, batch_size=batch)
        found = timing.time_training(resized, check=check, **which, **how)
        (rate, *_) = found.timed[0].images_per_second
        return found, rate if "chosen" in which else found.images_per_second

    in_largest = fit(
        functools.partial(attempt, chosen=[largest]),
        first=first,
        most=most,
        report=report,
        free=free,
    )
    batch = in_largest.batch
    probable = functools.partial(attempt, max_timed=max_timed)
    final = fit(probable, first=batch, most=batch, free=free)
    return dataclasses.replace(final, tries=in_largest.tries + final.tries)


# --- traces ---------------------------------------------------------------------------------


def trace_training(task: Task, directory: str | os.PathLike, num_steps: int = 3) -> None:
    """Writes a trace of ``jax.profiler`` of the training step in its most probable shape.

    Args:
        task: of the batch size to trace.
        directory: to write into, for TensorBoard's profile plugin, XProf or Perfetto.
        num_steps: that are traced, after the step was compiled and has run twice.
    """
    bucket = task.buckets[int(np.argmax(timing.shape_shares(task)[0]))]
    steps, state, batch, frozen = timing.training_inputs(task)
    compiled = steps.lower(bucket.windows).compile()
    traced = timing.traced_of(task, bucket)
    for _ in range(2):
        state, _ = compiled(state, batch, traced, frozen)
    jax.block_until_ready(state)
    with jax.profiler.trace(str(directory)):
        for number in range(num_steps):
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = compiled(state, batch, traced, frozen)
        jax.block_until_ready((state, metrics))
