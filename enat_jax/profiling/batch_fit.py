"""The largest batch that fits in memory, and traces of training steps.

A batch is tried by measuring it. Before a compiled program runs, what it will allocate is compared
with what is free, so that most batches that are too large cost a compilation and nothing else; on a
CPU, where running out of memory kills the process, nothing else is ever tried.
"""

import dataclasses
import functools
import gc
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enat_jax.profiling import timing
from enat_jax.runtime import exits, memory
from enat_jax.schedules import costs

GIB = 2**30
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED")


class DoesNotFit(Exception):
    """More memory is needed than is free; found out before anything ran."""


# --- memory ---------------------------------------------------------------------------------


def program_bytes(compiled: jax.stages.Compiled) -> int | None:
    """What a run allocates beside its arguments, which are there already; None: not known."""
    x = compiled.memory_analysis()
    if x is None:
        return None
    return x.temp_size_in_bytes + x.output_size_in_bytes - x.alias_size_in_bytes


def tree_bytes(tree: Any) -> int:
    """Of arrays or of their ``jax.ShapeDtypeStruct``."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of compiling or running says that memory ran out."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return any(mark in str(error) for mark in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


class Check:
    """Raises ``DoesNotFit`` for what needs more than is free; remembers the tightest program.

    Args:
        free: gives the free bytes, or None if they are not known; then everything passes.

    Attributes:
        needed, free: bytes, of the program that came closest to what was free; None: none yet.
    """

    def __init__(self, free: Callable[[], int | None]):
        self._free = free
        self.needed = self.free = None

    def __call__(self, compiled: jax.stages.Compiled) -> None:
        needed, free = program_bytes(compiled), self._free()
        if needed is None or free is None:
            return
        if self.free is None or needed * self.free > self.needed * free:
            self.needed, self.free = needed, free
        _compare(needed, free)

    def arrays(self, tree: Any) -> None:
        """The same for arrays that are about to be made."""
        _compare(tree_bytes(tree), self._free())

    def growth(self) -> int:
        """How many times as large a batch surely fits, a power of two; at least 2: to be tried.

        The need of a program is a constant and a share that grows with the batch: taking all of it
        to grow asks for too little rather than too much.
        """
        if self.free is None:
            return 2
        times = max(2, self.free // max(self.needed, 1))
        return 1 << (times.bit_length() - 1)


def _compare(needed, free):
    if free is not None and needed > free:
        raise DoesNotFit(f"needs {needed / GIB:.3g} GiB of {free / GIB:.3g} GiB that are free")


# --- the largest batch ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Try:
    """One batch size that was tried.

    Attributes:
        fits: whether it ran; reason: why not, "" if it did.
        ran_out: memory ran out while compiling or running, rather than before.
        needed, free: bytes, as ``Check`` has them.
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
        batch: images; result: its measurement.
        tries: of ``Try``, in their order.
    """

    batch: int
    result: Any
    tries: tuple[Try, ...]

    @property
    def own_peak(self) -> bool:
        """Whether the peak memory in ``result`` is its own, not that of a try that ran out."""
        return not any(x.ran_out for x in self.tries)

    def json(self) -> dict[str, Any]:
        tries = [dataclasses.asdict(x) for x in self.tries]
        return {"batch": self.batch, "own_peak": self.own_peak, "tries": tries}


def fit(attempt, *, first, most, free=memory.free_bytes, tell=lambda line: None) -> Fit:
    """The largest of ``first`` doubled or halved, and ``most``, that fits.

    Args:
        attempt: ``attempt(batch, check) -> (result, images per second)`` measures a batch, and
            shows each compiled program to the ``Check`` before it runs. Everything that it made
            must be free when it has returned or raised.
        first, most: batch sizes, at least 1; ``first`` is tried first, none above ``most``.
        free: gives the free bytes, or None; see ``free_bytes``.
        tell: is given a line of text for each try.

    Raises:
        ValueError: not even a batch of 1 fits.
    """
    if not 1 <= first <= most:
        raise ValueError(f"{first=} must lie between 1 and {most=}")
    tries, best, batch, failed = [], None, first, None
    while True:
        result, found, growth = _try(attempt, batch, Check(free))
        tries.append(found)
        tell(f"batch {batch}: {'fits' if found.fits else found.reason}")
        if found.fits:
            best = batch, result
            batch = min(batch * growth, most)
            if failed is not None:
                batch = min(batch, failed // 2)
        else:
            failed, batch = batch, batch // 2
        if batch <= (best[0] if best else 0):
            break
    if best is None:
        raise ValueError(f"not even a batch of 1 fits: {found.reason}")
    return Fit(*best, tuple(tries))


def _try(attempt, batch, check):
    """``(result, Try, growth)`` of one batch, with nothing left in memory but these."""
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
    return (
        result,
        Try(batch, not reason, reason, ran_out, check.needed, check.free, rate),
        check.growth(),
    )


# --- what is tried --------------------------------------------------------------------------


def fit_sampler(
    model, settings, segments, *, codec=None, first, most, tell, free=memory.free_bytes, **how
) -> Fit:
    """``fit`` of ``timing.time_sampler``; the result is its list.

    Args:
        model, settings, segments, codec, how: see there.
        first, most, tell, free: see ``fit``.
    """
    ids, labels = jnp.zeros((1, model.num_tokens), jnp.int32), jnp.zeros((1,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids, labels)["params"]

    def attempt(batch, check):
        check.arrays(params)
        found = timing.time_sampler(
            model, settings, batch, segments, codec=codec, check=check, **how
        )
        return found, found[0].images_per_second[0]

    return fit(attempt, first=first, most=most, tell=tell, free=free)


def fit_training(task, *, max_timed, first, most, tell, free=memory.free_bytes, **how) -> Fit:
    """The largest batch whose step fits in every shape; the result is a ``TrainingMeasurement``.

    First comes the shape with the most padded work, which is that with the most to remember; the
    most probable shapes are then measured with the batch at which it fits.

    Args:
        task: ``tasks.enat.Task`` of any batch size.
        max_timed, how: see ``timing.time_training``; first, most, tell, free: see ``fit``.
    """
    cost = functools.partial(costs.training_cost, costs.dims_of(task.model))
    largest = int(np.argmax([int(cost(*bucket.windows)) for bucket in task.buckets]))
    state = jax.eval_shape(task.init, jax.random.key(0))

    def measured(batch, check, **which):
        check.arrays(state)
        resized = dataclasses.replace(task, batch_size=batch)
        return timing.time_training(resized, check=check, **which, **how)

    def attempt_largest(batch, check):
        (found,) = measured(batch, check, chosen=[largest]).timed
        return found, found.images_per_second[0]

    def attempt_probable(batch, check):
        found = measured(batch, check, max_timed=max_timed)
        return found, found.images_per_second

    holds = fit(attempt_largest, first=first, most=most, tell=tell, free=free)
    final = fit(attempt_probable, first=holds.batch, most=holds.batch, free=free)
    return dataclasses.replace(final, tries=holds.tries + final.tries)


# --- traces ---------------------------------------------------------------------------------


def trace_training(task, directory, steps=3) -> None:
    """Write a trace of ``jax.profiler`` of the training step in its most probable shape.

    Args:
        task: ``tasks.enat.Task`` of the batch size to trace.
        directory: to write into, for TensorBoard's profile plugin, XProf or Perfetto.
        steps: that are traced, after the step was compiled and has run twice.
    """
    bucket = task.buckets[int(np.argmax(timing.shape_shares(task)[0]))]
    inputs, state, batch = timing.training_inputs(task)
    compiled = inputs.lower(bucket.windows).compile()
    traced = timing.traced_of(bucket)
    for _ in range(2):
        state, _ = compiled(state, batch, traced)
    jax.block_until_ready(state)
    with jax.profiler.trace(str(directory)):
        for number in range(steps):
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = compiled(state, batch, traced)
        jax.block_until_ready((state, metrics))


# --- the machine ----------------------------------------------------------------------------


def driver() -> str | None:
    """Version of NVIDIA's driver; None where its tool is not there or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
