"""The sampler and the training step, timed against the machine's own matrix-multiply rate.

Random tokens, labels and parameters; everything on one device. Work is counted in multiply-adds by
``costs``: "exact" is what the method needs, "padded" what the compiled windows compute.
"""

import dataclasses
import functools
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from enat_jax.inference import sampling
from enat_jax.runtime import matrix_rate, memory, sharding
from enat_jax.schedules import costs
from enat_jax.training import train_step

MATMUL_SHAPE = (2048, 3072, 2048)  # [2048, 3072] x [3072, 2048]
# Of ``matrix_rate``: what keeps an accelerator busy between two calls would take CPUs too long.


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One compiled function, timed.

    Attributes:
        label: JSON values that tell it from its neighbours in the table.
        images: per call.
        exact, padded: multiply-adds per call.
        compile_seconds: tracing, lowering and compiling, without a run.
        seconds: per call, one entry a repeat.
        matmul_rates: multiply-adds per second of the matrix product, measured before, between and
            after the repeats.
        peak_bytes, peak_of: largest memory so far in this process, and what was measured.
    """

    label: dict
    images: int
    exact: float
    padded: float
    compile_seconds: float
    seconds: tuple[float, ...]
    matmul_rates: tuple[float, ...]
    peak_bytes: int
    peak_of: str

    @property
    def call_seconds(self):
        return statistics.median(self.seconds)

    @property
    def images_per_second(self):
        """Median, least and largest."""
        slow, fast = max(self.seconds), min(self.seconds)
        return tuple(self.images / x for x in (self.call_seconds, slow, fast))

    @property
    def padding(self):
        """Padded work beyond the exact, as a share of the exact."""
        return self.padded / self.exact - 1

    @property
    def exact_rate(self):
        """Exact multiply-adds per second."""
        return self.exact / self.call_seconds

    @property
    def matmul_rate(self):
        return statistics.median(self.matmul_rates)

    @property
    def fraction(self):
        """Exact rate as a fraction of the matrix product's."""
        return self.exact_rate / self.matmul_rate

    def json(self):
        names = ("images_per_second", "padding", "exact_rate", "matmul_rate", "fraction")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}


def time_in_turns(
    function, work, dtype, *, repeats=5, matmul_shape=MATMUL_SHAPE, check=None, **fields
):
    """Time ``work(compiled)`` and, in turns with it, the machine's matrix product.

    Taking turns lets the drift of a shared machine hit both alike.

    Args:
        function: has ``lower`` bound to its arguments already: ``function() -> Lowered``.
        work: takes the compiled function, calls it, and returns the arrays to wait for.
        repeats: at least 1; dtype: of the product; matmul_shape: (rows, inner, columns).
        check: called with the compiled function before it runs, may raise; None: no check.
        fields: the other fields of ``Measurement``.
    """
    if repeats < 1:
        raise ValueError(f"{repeats=} must be at least 1")
    start = time.perf_counter()
    compiled = function().compile()
    compile_seconds = time.perf_counter() - start
    if check is not None:
        check(compiled)
    matmul = matrix_rate.matrix_product(matmul_shape, dtype, jax.local_devices()[:1])
    run, run_matmul = (
        matrix_rate.timer(functools.partial(work, compiled)),
        matrix_rate.timer(matmul),
    )
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


def time_sampler(model, settings, batch_size, segments, *, codec=None, **how):
    """Time the sampler for several numbers of segments.

    Args:
        model: ``enat.ENAT`` or ``nat.NAT``; its parameters are random.
        settings: ``sampling.Settings``; its ``num_segments`` is not used.
        batch_size: images a call.
        segments: numbers of segments; above ``num_steps`` means ``num_steps``.
        codec: ``vqgan.VQGAN`` whose decoder is part of the call; None: tokens only.
        how: ``repeats``, ``matmul_shape`` and ``check`` of ``time_in_turns``.

    Returns:
        list of ``Measurement``, one for each different number of segments.

    Raises:
        ValueError: the sizes do not fit together.
    """
    if batch_size < 1:
        raise ValueError(f"{batch_size=} must be at least 1")
    dims = costs.dims_of(model)
    side, codec_params, codec_cost = _codec(model, codec)
    params = _random_params(model)
    labels = jnp.arange(batch_size, dtype=jnp.int32) % model.num_classes
    index, key = jnp.arange(batch_size, dtype=jnp.int32), jax.random.key(0)
    decoded = batch_size * codec_cost
    guided = settings.guidance_weights() > 0
    exact = costs.exact_sampling_cost(
        dims, settings.num_steps, guided=guided, batch_size=batch_size
    )
    found = []
    for count in dict.fromkeys(min(count, settings.num_steps) for count in segments):
        static, inputs = sampling.make_schedule(
            dataclasses.replace(settings, num_segments=count), model
        )
        padded = costs.padded_sampling_cost(
            dims, static.segments, static.guided, batch_size=batch_size
        )
        arguments = (params, codec_params, inputs, labels, index, key)
        sample = jax.jit(functools.partial(_sample, model, static, codec, side))
        found.append(
            time_in_turns(
                functools.partial(sample.lower, *arguments),
                lambda compiled, arguments=arguments: compiled(*arguments),
                model.dtype,
                **how,
                label={"segments": count},
                images=batch_size,
                exact=exact + decoded,
                padded=padded + decoded,
            )
        )
    return found


def _codec(model, codec):
    """Side of the token grid, random parameters of the decoder, its multiply-adds an image."""
    if codec is None:
        return None, {}, 0
    side = math.isqrt(model.num_tokens)
    if side**2 != model.num_tokens:
        raise ValueError(f"{model.num_tokens=} is not a square: cannot be decoded to an image")
    if codec.codebook_size != model.codebook_size:
        raise ValueError(
            f"the tokenizer's codebook_size={codec.codebook_size} is not the transformer's, "
            f"{model.codebook_size}: name the tokenizer's config that belongs to it"
        )
    grid = jnp.zeros((1, side, side), jnp.int32)
    init = jax.jit(functools.partial(codec.init, method="decode_codes"))
    params = init(jax.random.key(0), grid)["params"]
    return side, params, costs.image_decoder_cost(codec, side, side)


def _sample(model, static, codec, side, params, codec_params, inputs, labels, index, key):
    codes = sampling.sample_tokens(model, static, inputs, params, labels, index, key)
    if codec is None:
        return codes
    grids = codes.reshape(-1, side, side)
    images = codec.apply({"params": codec_params}, grids, method="decode_codes")
    return jnp.rint(255 * jnp.clip(images, 0, 1)).astype(jnp.uint8)


def _random_params(model):
    ids, labels = jnp.zeros((1, model.num_tokens), jnp.int32), jnp.zeros((1,), jnp.int32)
    return jax.jit(model.init)(jax.random.key(0), ids, labels)["params"]


# --- the training step ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrainingMeasurement:
    """Training steps in some of their shapes.

    Attributes:
        shapes: all compiled shapes of a run.
        padding: expected padded work beyond the exact over all splits, as a share of the exact.
        timed: ``Measurement`` of each shape that was timed; its ``exact`` is the expectation over
            the splits of the shape.
        probabilities: of the timed shapes.
    """

    shapes: int
    padding: float
    timed: tuple[Measurement, ...]
    probabilities: tuple[float, ...]

    @property
    def share(self):
        """Probability that a step has one of the timed shapes."""
        return sum(self.probabilities)

    def _mean(self, name):
        pairs = zip(self.probabilities, self.timed, strict=True)
        return sum(p * getattr(x, name) for p, x in pairs) / self.share

    @property
    def images_per_second(self):
        """Expected over the timed shapes."""
        return self.timed[0].images / self._mean("call_seconds")

    @property
    def fraction(self):
        """Expected exact rate over the timed shapes, as a fraction of the matrix product's."""
        rate = statistics.median(rate for x in self.timed for rate in x.matmul_rates)
        return self._mean("exact") / self._mean("call_seconds") / rate

    def json(self):
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


def shape_shares(task):
    """Probability of each bucket of a task, and its expected exact work an image: float64 [n] each.
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


def training_inputs(task):
    """``(steps, state, batch)`` for one device: a fresh state and a random batch."""
    b, model = task.batch_size, task.model
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(model.codebook_size, size=(b, model.num_tokens), dtype=np.int32),
        "labels": rng.integers(model.num_classes, size=b, dtype=np.int32),
    }
    mesh = sharding.make_mesh(sharding.Sharding(), jax.local_devices()[:1])
    steps = train_step.CompiledSteps(task, mesh, (), seed=0)
    return steps, steps.init(), sharding.global_batch(batch, mesh)


def traced_of(bucket):
    """Any counts of the bucket: the work of a step depends on its windows alone."""
    counts = {"num_cached": bucket.cached[0], "num_visible": bucket.visible[1]}
    return {**{k: np.int32(v) for k, v in counts.items()}, "index": np.uint32(0)}


def time_training(task, *, max_timed=4, chosen=None, **how):
    """Time the training step in its most probable shapes, or in chosen ones.

    Args:
        task: ``tasks.enat.Task``, see ``make_task``.
        max_timed: how many shapes; each is compiled. More than there are means all.
        chosen: indices of the buckets to time; None: those of the most probable.
        how: ``repeats``, ``matmul_shape`` and ``check`` of ``time_in_turns``.

    Returns:
        ``TrainingMeasurement``.
    """
    b, model = task.batch_size, task.model
    cost = functools.partial(costs.training_cost, costs.dims_of(model))
    probability, exact = shape_shares(task)
    padded = np.array([float(cost(*bucket.windows)) for bucket in task.buckets])
    timed, (steps, state, batch) = [], training_inputs(task)
    likely = np.argsort(-probability, kind="stable")[:max_timed]
    chosen = likely if chosen is None else np.array(chosen)
    for i, bucket in ((i, task.buckets[i]) for i in chosen):
        traced = traced_of(bucket)

        def work(compiled, traced=traced):
            nonlocal state
            state, metrics = compiled(state, batch, traced)
            return state, metrics

        timed.append(
            time_in_turns(
                functools.partial(steps.lower, bucket.windows),
                work,
                model.dtype,
                **how,
                label={k: v for k, v in bucket._asdict().items() if k != "windows"},
                images=b,
                exact=b * float(exact[i]),
                padded=b * float(padded[i]),
            )
        )
    return TrainingMeasurement(
        shapes=len(task.buckets),
        padding=float(probability @ padded / (probability @ exact) - 1),
        timed=tuple(timed),
        probabilities=tuple(float(x) for x in probability[chosen]),
    )
