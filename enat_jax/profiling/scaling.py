"""What a training step would cost on other devices: predicted from the program compiled for them.

The step is compiled for as many CPU devices as the layout has, at full size, without allocating
anything. The compiled program of one device says what it computes and communicates; stated peaks of
accelerators and stated fractions of them turn that into seconds. None of it is measured on an
accelerator.
"""

import contextlib
import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from enat_jax.profiling import collectives, hlo_products, hlo_text, timing
from enat_jax.profiling.accelerators import Assumptions, Hardware
from enat_jax.runtime import sharding
from enat_jax.schedules import costs, shape_buckets
from enat_jax.training import train_step
from enat_jax.training.enat_task import Task

# LLVM's optimisation of the CPU's code takes long and leaves the program of XLA as it is.
_COMPILER_OPTIONS: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
_REMATERIALIZED = "Involuntary full rematerialization"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in one step of one device.

    Attributes:
        launches: instructions that run.
        moved_bytes: as accelerators would send them.
        cpu_moved_bytes: as the CPU's program sends them.
    """

    launches: int
    moved_bytes: float
    cpu_moved_bytes: float


@dataclasses.dataclass(frozen=True)
class Shape:
    """One compiled shape of the step in one layout; numbers are those of one device.

    Attributes:
        label: the ranges of its bucket, as JSON values.
        probability: share of the steps.
        exact: multiply-adds that the method needs, divided by the devices; see ``costs``.
        padded: multiply-adds in the windows of the shape, divided by the devices.
        compiled: multiply-adds of all matrix products of the program, recomputed ones too.
        xla_flops: of XLA's own analysis, which counts loop bodies once.
        argument_bytes: of XLA's analysis for the CPU.
        temp_bytes: of XLA's analysis for the CPU.
        traffic: by the kind of collective.
        rematerialized: XLA's warnings that it copies an array whole to change its layout.
    """

    label: dict[str, Any]
    probability: float
    exact: float
    padded: float
    compiled: int
    xla_flops: float
    argument_bytes: int
    temp_bytes: int
    traffic: dict[str, Traffic]
    rematerialized: tuple[str, ...]

    @property
    def moved_bytes(self) -> float:
        """Bytes that accelerators would send in all collectives."""
        return sum(x.moved_bytes for x in self.traffic.values())

    def seconds(self, hardware: Hardware, assumptions: Assumptions) -> tuple[float, float]:
        """Predicts the seconds of the products, and those of the collectives.

        Their maximum is a step with perfect overlap, their sum one without.
        """
        return (
            2 * self.compiled / (hardware.flops * assumptions.of_flops),
            self.moved_bytes / (hardware.bandwidth * assumptions.of_bandwidth),
        )


@dataclasses.dataclass(frozen=True)
class Layout:
    """A step in one layout.

    Attributes:
        sizes: devices along every axis of the mesh.
        batch_size: images of a step, on all devices.
        parameter_bytes: of the parameters on the device with the most.
        state_bytes: of the whole state on the device with the most.
        shapes: that were compiled.
    """

    sizes: dict[str, int]
    batch_size: int
    parameter_bytes: int
    state_bytes: int
    shapes: tuple[Shape, ...]

    @property
    def name(self) -> str:
        """Such as "data=4,fsdp=2"; "1 device" if nothing is divided."""
        return name_of(self.sizes)

    @property
    def share(self) -> float:
        """Share of all steps that the compiled shapes are."""
        return sum(x.probability for x in self.shapes)

    def mean(self, number: Callable[[Shape], float]) -> float:
        """Returns the expectation of ``number(shape)`` over the compiled shapes."""
        return sum(x.probability * number(x) for x in self.shapes) / self.share

    @property
    def memory_bytes(self) -> int:
        """Arguments and temporary arrays of the shape that needs most."""
        return max(x.argument_bytes + x.temp_bytes for x in self.shapes)

    def json(self) -> dict[str, Any]:
        """Returns all fields, the name and the share."""
        return dataclasses.asdict(self) | {"name": self.name, "share": self.share}


def parse_layouts(text: str) -> list[dict[str, int]]:
    """Reads layouts from text such as ``"data=8;data=4,fsdp=2"``.

    Returns:
        For each layout the devices along every axis of the mesh.

    Raises:
        ValueError: an axis or a size means nothing, or an axis is named twice.
    """
    layouts = []
    for part in text.split(";"):
        sizes = dict.fromkeys(sharding.AXES, 1)
        named = [axis.strip().partition("=") for axis in part.split(",")]
        for name, _, size in named:
            if name not in sizes or not size.isdecimal() or not 1 <= int(size[:9]) <= 4096:
                raise ValueError(
                    f"layout {part!r}: expected such as data=4,fsdp=2, of {sharding.AXES}"
                )
            sizes[name] = int(size)
        if len({name for name, _, _ in named}) < len(named):
            raise ValueError(f"layout {part!r} names an axis twice")
        layouts.append(sizes)
    return layouts


def name_of(sizes: dict[str, int]) -> str:
    """Returns such as "data=4,fsdp=2"; "1 device" if nothing is divided."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "1 device"


def layouts_of(num_devices: int) -> list[dict[str, int]]:
    """Returns the layouts worth comparing on some devices: each axis alone, and pairs with 2."""
    sizes = dict.fromkeys(sharding.AXES, 1)
    if num_devices == 1:
        return [sizes]
    found = [sizes | {axis: num_devices} for axis in ("data", "fsdp")]
    half, odd = divmod(num_devices, 2)
    if not odd:
        found.append(sizes | {"tensor": 2, "fsdp": half})
        found += [sizes | {"data": half, "fsdp": 2}] if half > 1 else []
    return found


def cpu_devices(count: int) -> list[jax.Device]:
    """Returns that many CPU devices, made up if jax has not started yet.

    Raises:
        ValueError: jax runs already, with fewer.
    """
    with contextlib.suppress(RuntimeError):  # too late to change it: what is there may suffice
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"{count} CPU devices are needed, there are {len(devices)}: start with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


def chosen_buckets(
    task: Task, shapes_of_each: int
) -> list[tuple[shape_buckets.Bucket, float, float]]:
    """Returns the most probable buckets: so many with reuse, and so many without.

    Returns:
        For each bucket its probability, and its expected exact multiply-adds an image.
    """
    shares, exact = timing.shape_shares(task)
    ranked = [i for i in np.argsort(-shares, kind="stable") if shares[i] > 0]
    chosen = []
    for reuse in (False, True):
        chosen += [i for i in ranked if task.buckets[i].reuse == reuse][:shapes_of_each]
    return [(task.buckets[i], float(shares[i]), float(exact[i])) for i in chosen]


def compile_layout(
    task: Task, rules: Sequence[sharding.Rule], sizes: dict[str, int], *, shapes_of_each: int
) -> Layout:
    """Compiles the most probable shapes of a task's step in one layout.

    Args:
        task: its data are not used.
        rules: of the state's sharding, see ``sharding.Sharding``.
        sizes: devices along every axis of the mesh.
        shapes_of_each: compiled shapes with reuse, and without.

    Raises:
        ValueError: the batch cannot be divided so, or there are too few devices.
    """
    devices = cpu_devices(math.prod(sizes.values()))
    policy = sharding.Sharding(sizes["data"], sizes["fsdp"], sizes["tensor"])
    mesh = sharding.make_mesh(policy, devices)
    steps = train_step.CompiledSteps(task, mesh, rules, seed=0)
    shapes = tuple(
        _compile(task, steps, len(devices), bucket, probability, exact)
        for bucket, probability, exact in chosen_buckets(task, shapes_of_each)
    )
    state = steps.abstract_state
    return Layout(
        sizes=dict(sizes),
        batch_size=task.batch_size,
        parameter_bytes=sharding.shard_bytes(state.params),
        state_bytes=sharding.shard_bytes(state),
        shapes=shapes,
    )


def _compile(
    task: Task,
    steps: train_step.CompiledSteps,
    num_devices: int,
    bucket: shape_buckets.Bucket,
    probability: float,
    exact: float,
) -> Shape:
    images = task.batch_size / num_devices
    with _stderr_lines(_REMATERIALIZED) as rematerialized:
        compiled = steps.lower(bucket.windows).compile(_COMPILER_OPTIONS)
    # All of these are known of programs for CPUs.
    text: str = compiled.as_text() or ""
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    windows, reveals = bucket.windows, task.splits.reveals
    padded = costs.training_cost(costs.dims_of(task.model), *windows, reveals=reveals)
    return Shape(
        label=timing.label_of(bucket),
        probability=probability,
        exact=images * exact,
        padded=images * float(padded),
        compiled=hlo_products.multiply_adds(hlo_text.parse(text)),
        xla_flops=float(cost.get("flops", np.nan)),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        traffic=traffic(collectives.find(text)),
        rematerialized=tuple(rematerialized),
    )


def traffic(found: Iterable[collectives.Collective]) -> dict[str, Traffic]:
    """Adds up collectives by the kind that they would be on an accelerator.

    Args:
        found: of ``collectives.find``. Arrays of one instruction that fall under two kinds count
            as a launch of each.
    """
    kinds: dict[str, list[collectives.Collective]] = {}
    for collective in found:
        kinds.setdefault(collective.on_accelerator().kind, []).append(collective)
    return {
        kind: Traffic(
            launches=sum({(x.computation, x.instruction): x.count for x in members}.values()),
            moved_bytes=sum(x.count * x.on_accelerator().moved_bytes for x in members),
            cpu_moved_bytes=sum(x.count * x.moved_bytes for x in members),
        )
        for kind, members in sorted(kinds.items())
    }


@contextlib.contextmanager
def _stderr_lines(wanted: str) -> Iterator[list[str]]:
    """Collects the lines with ``wanted`` that are written to stderr meanwhile, by libraries too.

    Other lines are written to stderr afterwards.
    """
    lines: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file, os.fdopen(os.dup(2)) as kept:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(kept.fileno(), 2)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines():
                if wanted in line:
                    lines.append(line.strip())
                else:
                    print(line, file=sys.stderr)
