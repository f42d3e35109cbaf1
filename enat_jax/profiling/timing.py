"""The sampler and the training step, timed against the machine's own matrix-multiply rate.

Random tokens, labels, texts and parameters; everything on one device. Work is counted in
multiply-adds by ``costs``: "exact" is what the method needs, "padded" what the compiled windows
compute. The frozen encoder of texts is part of a training step and its time, not of its work.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from enat_jax.inference import sampler_schedule, sampling, tokenizer
from enat_jax.models.transformers import Transformer
from enat_jax.models.vqgan import VQGAN
from enat_jax.profiling import setup
from enat_jax.runtime import matrix_rate, memory, numerics, sharding
from enat_jax.schedules import costs, shape_buckets
from enat_jax.training import train_step
from enat_jax.training.enat_task import Task
from enat_jax.training.task import TrainState

MatmulShape = tuple[int, int, int]  # rows, inner, columns
MATMUL_SHAPE: MatmulShape = (2048, 3072, 2048)  # [2048, 3072] x [3072, 2048]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One compiled function, timed.

    Attributes:
        label: JSON values that no other row of its table has.
        images: per call.
        exact: multiply-adds per call that the method needs.
        padded: multiply-adds per call in the compiled windows.
        compile_seconds: tracing, lowering and compiling, without a run.
        seconds: per call, one entry a repeat.
        matmul_rates: multiply-adds per second of the matrix product, measured before, between and
            after the repeats.
        peak_bytes: largest memory so far in this process.
        peak_of: which memory that is.
    """

    label: dict[str, Any]
    images: int
    exact: float
    padded: float
    compile_seconds: float
    seconds: tuple[float, ...]
    matmul_rates: tuple[float, ...]
    peak_bytes: int
    peak_of: str

    @property
    def call_seconds(self) -> float:
        """Median seconds of a call."""
        return statistics.median(self.seconds)

    @property
    def images_per_second(self) -> tuple[float, float, float]:
        """Median, least and largest."""
        slow, fast = max(self.seconds), min(self.seconds)
        return self.images / self.call_seconds, self.images / slow, self.images / fast

    @property
    def padding(self) -> float:
        """Padded work beyond the exact, as a share of the exact."""
        return self.padded / self.exact - 1

    @property
    def exact_rate(self) -> float:
        """Exact multiply-adds per second."""
        return self.exact / self.call_seconds

    @property
    def matmul_rate(self) -> float:
        """Median multiply-adds per second of the matrix product."""
        return statistics.median(self.matmul_rates)

    @property
    def fraction(self) -> float:
        """Exact rate as a fraction of the matrix product's."""
        return self.exact_rate / self.matmul_rate

    def json(self) -> dict[str, Any]:
        """Returns all fields, and what follows from them."""
        names = ("images_per_second", "padding", "exact_rate", "matmul_rate", "fraction")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}


def time_in_turns(
    lower: Callable[[], jax.stages.Lowered],
    work: Callable[[jax.stages.Compiled], PyTree],
    dtype: str,
    *,
    repeats: int = 5,
    matmul_shape: MatmulShape = MATMUL_SHAPE,
    check: Callable[[jax.stages.Compiled], None] | None = None,
    **fields: Any,
) -> Measurement:
    """Times a compiled function and, in turns with it, the machine's matrix product.

    Taking turns lets the drift of a shared machine hit both alike.

    Args:
        lower: lowers the function for its arguments.
        work: calls the compiled function, and returns the arrays to wait for.
        dtype: of the matrix product.
        repeats: at least 1.
        matmul_shape: of the matrix product.
        check: called with the compiled function before it runs, may raise; None: no check.
        fields: the other fields of ``Measurement``.

    Raises:
        ValueError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"{repeats=} must be at least 1")
    start = time.perf_counter()
    compiled = lower().compile()
    compile_seconds = time.perf_counter() - start
    if check is not None:
        check(compiled)
    matmul = matrix_rate.matrix_product(matmul_shape, dtype, jax.local_devices()[:1])
    run = matrix_rate.timer(functools.partial(work, compiled))
    run_matmul = matrix_rate.timer(matmul)
    seconds, matmul_seconds = [], [run_matmul()]
    for _ in range(repeats):
        seconds.append(run())
        matmul_seconds.append(run_matmul())
    peak_bytes, peak_of = memory.peak_memory()
    return Measurement(
        compile_seconds=compile_seconds,
        seconds=tuple(seconds),
        matmul_rates=tuple(math.prod(matmul_shape) / x for x in matmul_seconds),
        peak_bytes=peak_bytes,
        peak_of=peak_of,
        **fields,
    )


# --- the sampler ----------------------------------------------------------------------------


def time_sampler(
    model: Transformer,
    settings: sampling.Settings,
    batch_size: int,
    segments: Sequence[int],
    *,
    codec: VQGAN | None = None,
    **how: Any,
) -> list[Measurement]:
    """Times the sampler for several numbers of segments.

    Args:
        model: the transformer; its parameters are random.
        settings: of the sampler; their ``num_segments`` is not used.
        batch_size: images a call.
        segments: numbers of segments; above ``num_steps`` means ``num_steps``.
        codec: whose decoder, with random parameters, is part of the call; None: tokens only.
        how: ``repeats``, ``matmul_shape`` and ``check`` of ``time_in_turns``.

    Returns:
        One measurement for each different number of segments.

    Raises:
        ValueError: the sizes do not fit together.
    """
    if batch_size < 1:
        raise ValueError(f"{batch_size=} must be at least 1")
    codec_params = (
        {} if codec is None else numerics.jit(functools.partial(init_codec, model, codec))()
    )
    params = numerics.jit(functools.partial(setup.init_model, model))()
    index = jnp.arange(batch_size, dtype=jnp.int32)
    labels, key = index % max(model.num_classes, 1), numerics.key(0)
    prompts = [setup.make_prompt(model, rows) for rows in (batch_size, 1)]  # and the null prompt
    dims = costs.dims_of(model)
    exact, decoded = exact_sampling_work(model, codec, settings, batch_size)

    def time_segments(num_segments: int) -> Measurement:
        static, inputs = sampler_schedule.make(
            dataclasses.replace(settings, num_segments=num_segments), model
        )
        padded = costs.padded_sampling_cost(
            dims, static.segments, static.guided, batch_size=batch_size
        )
        arguments = (codec_params, inputs, params, labels, index, key, *prompts)
        return time_in_turns(
            lambda: numerics.jit(sampling_program(model, codec, static)).lower(*arguments),
            lambda compiled: compiled(*arguments),
            model.dtype,
            **how,
            label={"segments": num_segments},
            images=batch_size,
            exact=exact + decoded,
            padded=padded + decoded,
        )

    counts = dict.fromkeys(min(count, settings.num_steps) for count in segments)
    return [time_segments(count) for count in counts]


def exact_sampling_work(
    model: Transformer, codec: VQGAN | None, settings: sampling.Settings, batch_size: int
) -> tuple[int, int]:
    """Returns the exact multiply-adds of drawing tokens, and those of decoding them to images."""
    guided = settings.guidance_weights() > 0
    drawn = costs.exact_sampling_cost(
        costs.dims_of(model),
        settings.num_steps,
        guided=guided,
        counts=settings.counts,
        batch_size=batch_size,
    )
    side = math.isqrt(model.num_tokens)
    decoded = 0 if codec is None else batch_size * costs.image_decoder_cost(codec, side, side)
    return drawn, decoded


def sampling_program(
    model: Transformer, codec: VQGAN | None, static: sampler_schedule.Schedule
) -> Callable[..., Array]:
    """Returns the sampler as a function to be compiled.

    Its arguments are the codec's parameters, {} without one, the inputs of the schedule, the
    transformer's parameters, labels, numbers of the images and a key, and for a model of texts the
    prompt and the null prompt. It returns tokens [b, n], or images of the codec.
    """
    side = math.isqrt(model.num_tokens)

    def sample(codec_params: PyTree, *arguments: Any) -> Array:
        codes = sampling.sample_tokens(model, static, *arguments)
        if codec is None:
            return codes
        return tokenizer.decode(codec, codec_params, codes.reshape(-1, side, side))

    return sample


def init_codec(model: Transformer, codec: VQGAN) -> PyTree:
    """Returns random parameters of a codec that can decode the transformer's tokens; pure.

    Raises:
        ValueError: it cannot.
    """
    side = math.isqrt(model.num_tokens)
    if side**2 != model.num_tokens:
        raise ValueError(f"{model.num_tokens=} is not a square: cannot be decoded to an image")
    if codec.codebook_size != model.codebook_size:
        raise ValueError(
            f"the tokenizer's codebook_size={codec.codebook_size} is not the transformer's, "
            f"{model.codebook_size}: name the tokenizer's config that belongs to it"
        )
    grid = jnp.zeros((1, side, side), jnp.int32)
    return codec.init(numerics.key(0), grid, method="decode_codes")["params"]


# --- the training step ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrainingMeasurement:
    """Training steps in some of their shapes.

    Attributes:
        shapes: number of all compiled shapes of a run.
        padding: expected padded work beyond the exact over all splits, as a share of the exact.
        timed: the shapes that were timed; ``exact`` is the expectation over the splits of a shape.
        probabilities: of the timed shapes.
    """

    shapes: int
    padding: float
    timed: tuple[Measurement, ...]
    probabilities: tuple[float, ...]

    @property
    def share(self) -> float:
        """Probability that a step has one of the timed shapes."""
        return sum(self.probabilities)

    def _mean(self, name: str) -> float:
        pairs = zip(self.probabilities, self.timed, strict=True)
        return sum(p * getattr(x, name) for p, x in pairs) / self.share

    @property
    def images_per_second(self) -> float:
        """Expected over the timed shapes."""
        return self.timed[0].images / self._mean("call_seconds")

    @property
    def fraction(self) -> float:
        """Expected exact rate over the timed shapes, as a fraction of the matrix product's."""
        rate = statistics.median(rate for x in self.timed for rate in x.matmul_rates)
        return self._mean("exact") / self._mean("call_seconds") / rate

    def json(self) -> dict[str, Any]:
        """Returns what is known of all shapes and of each timed one."""
        return {
            "shapes": self.shapes,
            "padding": self.padding,
            "timed_share": self.share,
            "images_per_second": self.images_per_second,
            "fraction": self.fraction,
            "timed": [
                {"probability": p, **x.json()}
                for p, x in zip(self.probabilities, self.timed, strict=True)
            ],
        }


def shape_shares(task: Task) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Returns the probability of each bucket of a task, and its expected exact work an image.

    The work is in multiply-adds, 0 where the probability is; both are float64. Where the cache is
    made in several reveals, it is that of one.
    """
    model, splits = task.model, task.splits
    mass = splits.visible_probabilities(model.num_tokens)
    shares = {True: splits.reuse_probability, False: 1 - splits.reuse_probability}
    probability, work = np.zeros(len(task.buckets)), np.zeros(len(task.buckets))
    cost = functools.partial(costs.exact_training_cost, costs.dims_of(model))
    for i, bucket in enumerate(task.buckets):
        for visible in range(bucket.visible[0], bucket.visible[1] + 1):
            cached = splits.cached_probabilities(visible) if bucket.reuse else np.ones(1)
            counts = np.arange(bucket.cached[0], min(bucket.cached[1] + 1, len(cached)))
            if not len(counts):
                continue
            parts = shares[bucket.reuse] * mass[visible] * cached[counts]
            probability[i] += parts.sum()
            work[i] += (parts * cost(counts, visible)).sum()
    return probability, np.divide(work, probability, where=probability > 0, out=np.zeros_like(work))


def padded_work(task: Task) -> Float[np.ndarray, " n"]:
    """Returns the multiply-adds an image in the windows of each bucket of a task, float64."""
    cost = functools.partial(costs.training_cost, costs.dims_of(task.model))
    reveals = task.splits.reveals
    return np.array([float(cost(*x.windows, reveals=reveals)) for x in task.buckets])


def training_inputs(
    task: Task,
) -> tuple[train_step.CompiledSteps, TrainState, dict[str, jax.Array], PyTree]:
    """Returns the steps, a fresh state, and a random batch and frozen weights, on one device."""
    model, rng = task.model, np.random.default_rng(0)
    ends = {"tokens": (0, model.codebook_size), "labels": (0, max(model.num_classes, 1))}
    if task.text is not None:
        context = task.text.context
        ends |= {"text": (0, task.text.kind.size), "lengths": (context, context + 1)}
    batch = {
        name: rng.integers(*ends[name], size=spec.shape, dtype=np.int32)
        for name, spec in task.batch_spec().items()
    }
    draw = lambda x: 0.02 * jax.random.normal(numerics.key(0), x.shape, x.dtype)  # noqa: E731
    frozen = numerics.jit(lambda: jax.tree.map(draw, task.frozen))()
    mesh = sharding.make_mesh(sharding.Sharding(), jax.local_devices()[:1])
    steps = train_step.CompiledSteps(task, mesh, (), seed=0)
    return steps, steps.init(), sharding.global_batch(batch, mesh), frozen


def traced_of(task: Task, bucket: shape_buckets.Bucket) -> dict[str, Any]:
    """Returns traced values of some step of a bucket, whose work depends on its windows alone."""
    counts = {"num_cached": bucket.cached[0], "num_visible": bucket.visible[1]}
    traced: dict[str, Any] = {k: np.int32(v) for k, v in counts.items()}
    if task.splits.reveals > 1:
        traced["earlier"] = np.zeros(task.splits.reveals - 1, np.int32)
    return traced | dict.fromkeys(train_step.RANDOMNESS, np.uint32(0))


def label_of(bucket: shape_buckets.Bucket) -> dict[str, Any]:
    """Returns the ranges of a bucket, as JSON values."""
    return {k: v for k, v in bucket._asdict().items() if k != "windows"}


def time_training(
    task: Task, *, max_timed: int = 4, chosen: Sequence[int] | None = None, **how: Any
) -> TrainingMeasurement:
    """Times the training step in its most probable shapes, or in chosen ones.

    Args:
        task: such as ``setup.make_task`` makes; its data are not used.
        max_timed: how many shapes; each is compiled. More than there are means all.
        chosen: indices of the buckets to time; None: those of the most probable.
        how: ``repeats``, ``matmul_shape`` and ``check`` of ``time_in_turns``.
    """
    b = task.batch_size
    (probability, exact), padded = shape_shares(task), padded_work(task)
    likely = np.argsort(-probability, kind="stable")[:max_timed]
    chosen = likely.tolist() if chosen is None else list(chosen)
    steps, state, batch, frozen = training_inputs(task)

    def work(traced: dict[str, Any], compiled: jax.stages.Compiled) -> PyTree:
        nonlocal state
        state, metrics = compiled(state, batch, traced, frozen)
        return state, metrics

    timed = tuple(
        time_in_turns(
            functools.partial(steps.lower, task.buckets[i].windows),
            functools.partial(work, traced_of(task, task.buckets[i])),
            task.model.dtype,
            **how,
            label=label_of(task.buckets[i]),
            images=b,
            exact=b * float(exact[i]),
            padded=b * float(padded[i]),
        )
        for i in chosen
    )
    return TrainingMeasurement(
        shapes=len(task.buckets),
        padding=float(probability @ padded / (probability @ exact) - 1),
        timed=timed,
        probabilities=tuple(probability[chosen].tolist()),
    )
