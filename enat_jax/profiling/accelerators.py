"""Accelerators that need not be there: their stated peaks, and TPUs to compile for.

The compiler of TPUs, ``libtpu``, runs without one: it gives devices of a named topology, for which
programs can be compiled whole, and whose memory it checks. None of them can run.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from enat_jax.runtime import exits, numerics

# Read by libtpu when it is loaded. Without them it looks for the machine's TPUs, complains that
# there are none, and lets only one process at a time compile.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SHAPES = {"v5e": _PLANE, "v6e": _PLANE, "v5p": _CUBE}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_AMOUNT = r"(\d+(?:\.\d+)?)([KMGT]?)"
# What the compiler says of a program that does not fit, in its two forms.
_TOO_LARGE = (
    re.compile(rf"\({_AMOUNT}B?\) exceeds available HBM \({_AMOUNT}B?\)"),
    re.compile(rf"Used {_AMOUNT}B? of {_AMOUNT}B? hbm"),
)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Peaks of one device, as its vendor states them.

    Attributes:
        name: of the device.
        flops: per second, dense bfloat16 products.
        memory_bytes: of the device.
        bandwidth: bytes per second that a device sends in a ring with others of its kind.
        memory_bandwidth: bytes per second between the device and its memory.
        source: whose statement, and how the bandwidth follows from it.
    """

    name: str
    flops: float
    memory_bytes: float
    bandwidth: float
    memory_bandwidth: float
    source: str


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Fractions of the stated peaks that are taken as reached.

    Attributes:
        of_flops: in the matrix products.
        of_bandwidth: in the collectives.
    """

    of_flops: float
    of_bandwidth: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value!r} must lie in (0, 1]")


TPUS = {
    "v5e": Hardware(
        "TPU v5e",
        197e12,
        16e9,
        100e9,
        819e9,
        "Google Cloud's TPU v5e page: 197 bf16 TFLOP/s and 16 GB a chip at 819 GB/s; 400 GB/s of "
        "ICI a chip, both directions of 4 ports; a ring along one axis of the torus sends through "
        "2 of them: 100 GB/s",
    ),
    "v5p": Hardware(
        "TPU v5p",
        459e12,
        95e9,
        200e9,
        2765e9,
        "Google Cloud's TPU v5p page: 459 bf16 TFLOP/s and 95 GB a chip at 2765 GB/s; 1200 GB/s of "
        "ICI a chip, both directions of 6 ports; a ring sends through 2 of them: 200 GB/s",
    ),
    "v6e": Hardware(
        "TPU v6e",
        918e12,
        32e9,
        200e9,
        1640e9,
        "Google Cloud's TPU v6e page: 918 bf16 TFLOP/s and 32 GB a chip at 1640 GB/s; 800 GB/s of "
        "ICI a chip, both directions of 4 ports; a ring sends through 2 of them: 200 GB/s",
    ),
}
HARDWARE = (
    TPUS["v5e"],
    Hardware(
        "H100 SXM",
        989e12,
        80e9,
        450e9,
        3350e9,
        "NVIDIA's H100 page: 989 bf16 TFLOP/s without sparsity, 80 GB at 3.35 TB/s; 900 GB/s of "
        "NVLink, both directions: 450 GB/s. One node, so 8 devices at most",
    ),
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """TPUs to compile for.

    Attributes:
        name: such as "v5e:2x4".
        devices: that programs can be compiled for, in the order of the topology.
        hardware: what each of them is.
        memory_bytes: that the compiler has for a program on each of them.
    """

    name: str
    devices: list[jax.Device]
    hardware: Hardware
    memory_bytes: int


def topology(name: str) -> Topology:
    """Returns the TPUs of a topology, which need not be there.

    Args:
        name: kind and shape, such as "v5e:2x4"; see ``SHAPES``.

    Raises:
        ValueError: libtpu is not installed, or there is no such topology.
    """
    kind, _, shape = name.partition(":")
    if kind not in TPUS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(f"there is no topology {name!r}: {known_shapes()}")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "compiling for TPUs needs their compiler, libtpu: pip install -e '.[tpu]', which needs "
            "no TPU"
        )
    os.environ.update({k: v for k, v in _ENVIRONMENT.items() if k not in os.environ})
    if not os.environ.get("JAX_PLATFORMS"):  # else jax would look for TPUs to run on
        jax.config.update("jax_platforms", "cpu")
    # A host of these TPUs has 2x2 chips or more; that of a single chip has one.
    alone: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if set(shape) <= {*"1x"} else {}
    try:
        devices = topologies.get_topology_desc(name, platform="tpu", **alone).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"there is no topology {name!r} ({exits.one_line(error)}): {known_shapes()}"
        ) from error
    hardware = TPUS[kind]
    return Topology(name, devices, hardware, _memory_of(devices[0]) or int(hardware.memory_bytes))


def known_shapes() -> str:
    """Returns a sentence that lists the topologies that Google rents out."""
    return "give one of " + "; ".join(
        f"{kind}:{shapes[0]}, {', '.join(shapes[1:])}" for kind, shapes in SHAPES.items()
    )


def too_large(error: jax.errors.JaxRuntimeError) -> tuple[int, int] | None:
    """Returns the bytes that a program needs and those there are, from a compiler's error.

    None: the error says nothing of the kind.
    """
    for pattern in _TOO_LARGE:
        if found := pattern.search(str(error)):
            needed, unit, there, unit_there = found.groups()
            return int(float(needed) * _UNITS[unit]), int(float(there) * _UNITS[unit_there])
    return None


def _memory_of(device: jax.Device) -> int | None:
    """Returns the memory that the compiler has for a program: it names it when refusing one."""
    everywhere = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())
    huge = jax.ShapeDtypeStruct((2**20, 2**20), np.float32, sharding=everywhere)
    try:
        numerics.jit(lambda x: (x * 2).sum(), out_shardings=everywhere).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        found = too_large(error)
        return found[1] if found else None
    return None
