"""How fast devices multiply matrices: the yardstick of all speeds that are reported."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from enat_jax.runtime import numerics

RATE_SHAPE, RATE_SHAPE_CPU = (4096, 4096, 4096), (1024, 1024, 1024)
MIN_SECONDS = 0.02  # of one timing, within which shorter calls are repeated


def timer(work: Callable[[], Any], least: float = MIN_SECONDS) -> Callable[[], float]:
    """Warms ``work`` up; the result measures, at each call, its seconds per call.

    Args:
        work: returns the arrays to wait for.
        least: seconds for which ``work`` is repeated at least.
    """

    def measure(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = work()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    once = measure(1)
    if once < 1:
        once = measure(1)  # the first may have loaded or initialised something
    return functools.partial(measure, max(1, math.ceil(least / max(once, 1e-6))))


def matrix_product(
    shape: tuple[int, int, int], dtype: DTypeLike, devices: Sequence[jax.Device]
) -> Callable[[], Shaped[Array, "rows columns"]]:
    """Returns ``work`` for ``timer``: a product of random matrices on each device at once.

    Args:
        shape: (rows, inner, columns) of each device.
        dtype: of the matrices.
        devices: of this process.
    """
    rows, inner, columns = shape
    mesh = Mesh(np.array(devices), ("rows",), axis_types=(AxisType.Auto,))
    shardings = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())

    @numerics.jit(out_shardings=shardings)
    def factors() -> tuple[Shaped[Array, "rows inner"], Shaped[Array, "inner columns"]]:
        keys = jax.random.split(numerics.key(0))
        normal = functools.partial(jax.random.normal, dtype=dtype)
        return normal(keys[0], (rows * len(devices), inner)), normal(keys[1], (inner, columns))

    a, b = factors()
    return functools.partial(numerics.jit(jnp.dot).lower(a, b).compile(), a, b)


def matrix_rate(
    dtype: DTypeLike, devices: Sequence[jax.Device] | None = None, seconds: float = 0.3
) -> float:
    """Measures multiply-adds per second of devices that all multiply matrices at the same time.

    Devices that share a processor, or its power, are thus not counted as if each had it alone.
    Takes about a second after compiling, and some 300 MB a device, which must be idle meanwhile.

    Args:
        dtype: of the matrices, multiplied at jax's default precision.
        devices: of this process, None: all; rates of processes that start together add up.
        seconds: least time to repeat the products for.
    """
    devices = jax.local_devices() if devices is None else devices
    shape = RATE_SHAPE_CPU if devices[0].platform == "cpu" else RATE_SHAPE
    run = timer(matrix_product(shape, dtype, devices), seconds)
    return math.prod(shape) * len(devices) / run()
