"""Programs compiled for TPUs that need not be there: memory, work and traffic.

All numbers are those of the program that TPUs would run, as their compiler states or prints it.
Seconds that follow from them and from stated peaks are predictions.
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enat_jax.inference import sampler_schedule, sampling
from enat_jax.models.transformers import Transformer
from enat_jax.models.vqgan import VQGAN
from enat_jax.profiling import (
    accelerators,
    collectives,
    hlo_memory,
    hlo_products,
    hlo_text,
    setup,
    timing,
)
from enat_jax.profiling.accelerators import Assumptions, Hardware, Topology
from enat_jax.runtime import numerics, sharding
from enat_jax.schedules import shape_buckets
from enat_jax.training import enat_task, train_step, vqgan_task


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device that a program needs, as the compiler states them.

    Attributes:
        arguments: such as parameters, optimizer and batch.
        outputs: results.
        aliased: results that take the place of arguments.
        heap: of temporaries, in all memories of the chip together.
        peak: of all arrays that are in HBM at once, arguments and results too.
        code: of the program itself.
        limit: that the compiler has for all of it.
    """

    arguments: int
    outputs: int
    aliased: int
    heap: int
    peak: int
    code: int
    limit: int

    @property
    def temporaries(self) -> int:
        """Bytes of the peak that are neither arguments nor results."""
        return max(0, self.peak - self.arguments - self.outputs + self.aliased)

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.peak + self.code


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in one call on one device.

    Attributes:
        launches: instructions that run.
        moved_bytes: that the device sends if all of them are rings.
        beside_bytes: those of them that are sent while the program computes.
    """

    launches: int
    moved_bytes: float
    beside_bytes: float


@dataclasses.dataclass(frozen=True)
class Seconds:
    """A prediction: what a call would take on one device.

    Attributes:
        products: of the matrix units, padding included.
        memory: of reads and writes of HBM.
        beside: of collectives that run beside computation.
        alone: of those that do not.
    """

    products: float
    memory: float
    beside: float
    alone: float

    @property
    def least(self) -> float:
        """Everything that can overlap does."""
        return max(self.products, self.memory, self.beside) + self.alone

    @property
    def most(self) -> float:
        """Nothing overlaps."""
        return self.products + self.memory + self.beside + self.alone


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that fits; numbers are those of one device and call.

    Attributes:
        batch_size: images of a call, on all devices.
        memory: of the compiler.
        compile_seconds: tracing, lowering and compiling.
        processor_seconds: of the CPU, in all threads, for the same.
        exact: multiply-adds that the method needs, divided by the devices; None: not counted.
        multiply_adds: of all products of the program.
        padding: share of the work of the matrix units that tiles add, see ``hlo_products``.
        hbm_bytes: read from and written to memory.
        cycles: that the compiler estimates, by what runs, see ``cycles``.
        traffic: by the kind of collective.
    """

    batch_size: int
    memory: Memory
    compile_seconds: float
    processor_seconds: float
    exact: float | None
    multiply_adds: int
    padding: float
    hbm_bytes: int
    cycles: dict[str, int]
    traffic: dict[str, Traffic]

    @property
    def needed(self) -> int:
        """Bytes of memory."""
        return self.memory.total

    @property
    def fits(self) -> bool:
        """Whether there is as much memory as it needs."""
        return self.memory.total <= self.memory.limit

    def seconds(self, hardware: Hardware, assumptions: Assumptions) -> Seconds:
        """Predicts the seconds of a call from stated peaks and fractions of them."""
        sent = hardware.bandwidth * assumptions.of_bandwidth
        beside = sum(x.beside_bytes for x in self.traffic.values())
        moved = sum(x.moved_bytes for x in self.traffic.values())
        padded = self.multiply_adds / (1 - self.padding)
        return Seconds(
            products=2 * padded / (hardware.flops * assumptions.of_flops),
            memory=self.hbm_bytes / (hardware.memory_bandwidth * assumptions.of_bandwidth),
            beside=beside / sent,
            alone=(moved - beside) / sent,
        )


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A program that the compiler refuses because of its memory.

    Attributes:
        batch_size: images of a call, on all devices.
        needed: bytes, as the compiler states them.
        limit: bytes that there are.
        compile_seconds, processor_seconds: as of ``Program``.
    """

    batch_size: int
    needed: int
    limit: int
    compile_seconds: float
    processor_seconds: float

    @property
    def fits(self) -> bool:
        """False."""
        return False


Found = Program | TooLarge


@dataclasses.dataclass(frozen=True)
class Row:
    """What was compiled for one layout of a topology.

    Attributes:
        topology: its name.
        layout: such as "data=4,fsdp=2".
        setting: what is compiled, such as "remat=full".
        tries: in their order; the last one that fits has the largest batch, if it was searched for.
    """

    topology: str
    layout: str
    setting: str
    tries: tuple[Found, ...]

    @property
    def best(self) -> Found:
        """The largest batch that fits, or the smallest that does not."""
        fitting = [x for x in self.tries if x.fits]
        if fitting:
            return max(fitting, key=lambda x: x.batch_size)
        return min(self.tries, key=lambda x: x.batch_size)

    def json(self) -> dict[str, Any]:
        """Returns all fields, and for each try whether it fits."""
        tries = [dataclasses.asdict(x) | {"fits": x.fits} for x in self.tries]
        return dataclasses.asdict(self) | {"tries": tries}


# --- compiling ------------------------------------------------------------------------------


def compile_program(
    lower: Callable[[], jax.stages.Lowered],
    topology: Topology,
    batch_size: int,
    exact: float | None = None,
) -> Found:
    """Compiles a program for TPUs and reads it.

    Args:
        lower: lowers it for devices of the topology.
        topology: of the devices.
        batch_size: images of a call, on all devices.
        exact: see ``Program``.
    """
    start, used = time.perf_counter(), time.process_time()
    taken = lambda: (time.perf_counter() - start, time.process_time() - used)  # noqa: E731
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        large = accelerators.too_large(error)
        if large is None:
            raise
        return TooLarge(batch_size, *large, *taken())
    seconds = taken()
    stated: Any = compiled.memory_analysis()
    module = hlo_text.parse(compiled.as_text() or "")
    return Program(
        batch_size,
        Memory(
            arguments=stated.argument_size_in_bytes,
            outputs=stated.output_size_in_bytes,
            aliased=stated.alias_size_in_bytes,
            heap=stated.temp_size_in_bytes,
            peak=stated.peak_memory_in_bytes,
            code=stated.generated_code_size_in_bytes,
            limit=topology.memory_bytes,
        ),
        *seconds,
        exact=exact,
        multiply_adds=hlo_products.multiply_adds(module),
        padding=hlo_products.padding(module),
        hbm_bytes=hlo_memory.hbm_bytes(module),
        cycles=cycles(module),
        traffic=traffic(module),
    )


def traffic(module: hlo_text.Module) -> dict[str, Traffic]:
    """Adds up the collectives of a TPU's program by their kind."""
    kinds: dict[str, list[collectives.Collective]] = {}
    for collective in collectives.find_in(module):
        kinds.setdefault(collective.on_accelerator().kind, []).append(collective.on_accelerator())
    return {
        kind: Traffic(
            launches=sum({(x.computation, x.instruction): x.count for x in members}.values()),
            moved_bytes=sum(x.count * x.moved_bytes for x in members),
            beside_bytes=sum(x.count * x.moved_bytes for x in members if x.beside),
        )
        for kind, members in sorted(kinds.items())
    }


def cycles(module: hlo_text.Module) -> dict[str, int]:
    """Adds up the cycles that the compiler of TPUs notes at what it schedules.

    Returns:
        Those of "products", with what is fused to them, of "copies", which change a layout or move
        an array, and of the "rest". Collectives have no estimate.
    """
    found = dict.fromkeys(("products", "copies", "rest"), 0)
    for instruction, count in hlo_memory.scheduled(module):
        noted = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        kind = "copies" if instruction.opcode == "copy" else "rest"
        kind = "products" if hlo_products.has_product(module, instruction) else kind
        found[kind] += count * int(noted.group(1)) if noted else 0
    return found


# --- what is compiled -----------------------------------------------------------------------


def mesh_of(topology: Topology, sizes: dict[str, int]) -> jax.sharding.Mesh:
    """Returns a mesh of the first devices of a topology.

    Raises:
        ValueError: it has not as many.
    """
    count = math.prod(sizes.values())
    if count > len(topology.devices):
        raise ValueError(
            f"a layout of {count} devices for {topology.name}, which has {len(topology.devices)}"
        )
    policy = sharding.Sharding(sizes["data"], sizes["fsdp"], sizes["tensor"])
    return sharding.make_mesh(policy, topology.devices[:count])


def training(
    task: enat_task.Task,
    topology: Topology,
    mesh: jax.sharding.Mesh,
    rules: Any,
    batch_size: int,
    chosen: shape_buckets.Bucket | None = None,
) -> Found:
    """Compiles a transformer's step.

    Args:
        task: of any batch size.
        topology, mesh: of its devices.
        rules: of the state's sharding, see ``sharding.Sharding``.
        batch_size: images of a step.
        chosen: the shape; None: that with the most padded work, which needs the most memory.
    """
    task = dataclasses.replace(task, batch_size=batch_size)
    steps = train_step.CompiledSteps(task, mesh, rules, seed=0)
    largest = task.buckets[int(np.argmax(timing.padded_work(task)))]
    bucket = chosen or largest
    exact = timing.shape_shares(task)[1][task.buckets.index(bucket)]
    return compile_program(
        functools.partial(steps.lower, bucket.windows),
        topology,
        batch_size,
        batch_size / mesh.size * float(exact),
    )


def tokenizer_training(
    task: vqgan_task.Task,
    topology: Topology,
    mesh: jax.sharding.Mesh,
    rules: Any,
    batch_size: int,
) -> Found:
    """Compiles a tokenizer's step with all its terms."""
    task = dataclasses.replace(task, batch_size=batch_size)
    steps = train_step.CompiledSteps(task, mesh, rules, seed=0)
    static: Any = ()
    if (adversary := task.adversary) is not None:
        static = (True, bool(adversary.settings.penalty))
    return compile_program(functools.partial(steps.lower, static), topology, batch_size)


def sampler(
    model: Transformer,
    codec: VQGAN | None,
    settings: sampling.Settings,
    topology: Topology,
    mesh: jax.sharding.Mesh,
    batch_size: int,
) -> Found:
    """Compiles the sampler, with the image decoder of ``codec`` unless it is None."""
    static, inputs = sampler_schedule.make(settings, model)
    whole, divided = sharding.replicated(mesh), sharding.of_batch(mesh)

    def place(tree: Any, where: Any) -> Any:
        as_shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
        return jax.tree.map(as_shape, tree)

    of_codec = {}
    if codec is not None:
        of_codec = numerics.eval_shape(functools.partial(timing.init_codec, model, codec))
    params = numerics.eval_shape(functools.partial(setup.init_model, model))
    numbers = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=divided)
    prompts = [
        place(numerics.eval_shape(functools.partial(setup.make_prompt, model, rows)), where)
        for rows, where in ((batch_size, divided), (1, whole))
    ]
    key = numerics.eval_shape(functools.partial(numerics.key, 0))
    arguments = (*place((of_codec, inputs, params), whole), numbers, numbers, place(key, whole))
    program = numerics.jit(timing.sampling_program(model, codec, static))
    exact = sum(timing.exact_sampling_work(model, codec, settings, batch_size))
    return compile_program(
        functools.partial(program.lower, *arguments, *prompts),
        topology,
        batch_size,
        float(exact) / mesh.size,
    )
