"""Makes a mesh, and shardings of states and batches, of a sharding policy, which is data."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # axes that the batch is divided over
Rule = tuple[str, tuple[str | None, ...]]


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The sharding policy of a config: sizes of the mesh's axes, and what is divided over them.

    Attributes:
        data: devices that share the batch and have all parameters; -1: all that are left.
        fsdp: devices that share the batch and the parameters too, gathering them layer by layer.
        tensor: devices that share heads and hidden units of each layer.
        rules: pairs (regular expression, axes). The first expression that is found in the path of
            an array of the state, such as "params/encoder/mlp/up/kernel", gives an axis or None
            for each of its dimensions. "fsdp" may move: where its size does not divide its
            dimension, it divides the largest other one that it can. Another axis that does not
            divide its dimension is dropped. No rule: undivided. None: the rules of the task.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: Sequence[Rule] | None = None

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in AXES}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
                raise ValueError(f"sharding.{name}={size!r} must be a positive number or -1")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"sharding: at most one of {sizes} may be -1")
        for rule in self.rules or ():
            _check_rule(rule)


def _check_rule(rule: Any) -> None:
    """Raises ValueError, naming the rule, unless it is as ``Sharding`` says."""
    match rule:
        case (str(pattern), (tuple() | list()) as axes):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"sharding.rules: {pattern!r} is no expression: {error}"
                ) from error
        case _:
            raise ValueError(
                f"sharding.rules: {rule!r} is no pair of an expression and axes, such as "
                "('mlp/up/kernel$', (None, 'fsdp', 'tensor'))"
            )
    named = [axis for axis in axes if axis is not None]
    if not all(axis in AXES for axis in named) or len(set(named)) < len(named):
        raise ValueError(f"sharding.rules: {axes!r} must be None or of {AXES}, each at most once")


def make_mesh(policy: Sharding, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of the axes "data", "fsdp" and "tensor" over ``devices``, by default all.

    Raises:
        ValueError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(policy, name) for name in AXES]
    shown = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known:
        raise ValueError(f"{len(devices)} devices cannot be arranged as sharding {shown}")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(f"sharding {shown} uses {known} of {len(devices)} devices; use -1")
    # Auto: Flax linen does not work on the Explicit axes that are jax's default.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def of_state(abstract_state: PyTree, mesh: Mesh, rules: Sequence[Rule]) -> PyTree[NamedSharding]:
    """Returns the sharding of every array of a state, by rules; see ``Sharding``.

    Raises:
        ValueError: a rule is not of as many dimensions as an array that it matches.
    """

    def of_leaf(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        undivided = (None,) * leaf.ndim
        axes = next((axes for pattern, axes in rules if re.search(pattern, name)), undivided)
        if len(axes) != leaf.ndim:
            raise ValueError(f"the rule {axes} does not fit {name}, of shape {leaf.shape}")
        return NamedSharding(mesh, PartitionSpec(*_fit(axes, leaf.shape, mesh)))

    return jax.tree_util.tree_map_with_path(of_leaf, abstract_state)


def _fit(axes: Sequence[str | None], shape: tuple[int, ...], mesh: Mesh) -> list[str | None]:
    """Returns the axes that divide their dimensions, where "fsdp" may have moved to another."""
    fits = [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape, strict=True)
    ]
    if "fsdp" in axes and "fsdp" not in fits:
        free = [i for i, axis in enumerate(fits) if not axis and shape[i] % mesh.shape["fsdp"] == 0]
        if free:
            fits[max(free, key=lambda i: shape[i])] = "fsdp"
    return fits


def shard_bytes(abstract_state: PyTree) -> int:
    """Returns the bytes that the largest share of a state needs on one device.

    Args:
        abstract_state: tree of arrays or ``jax.ShapeDtypeStruct``, with shardings.
    """
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract_state)
    )


def batch_ways(mesh: Mesh) -> int:
    """Returns the number of parts that a batch is divided into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def of_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def global_batch(
    local: Mapping[str, Shaped[np.ndarray, "rows ..."]], mesh: Mesh
) -> dict[str, Shaped[Array, "b ..."]]:
    """Makes global arrays from this process's part of the batch.

    The part of process i of n is the i-th of n equal runs of rows. Where devices of the axis
    "tensor" are of several processes, each of them must be given the rows of its devices.
    """
    sharding = of_batch(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in local.items()}


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Says which part of every batch this process loads: the i-th of n equal runs of rows.

    Processes whose devices differ along "tensor" only load the same part.

    Returns:
        (i, n).

    Raises:
        ValueError: the devices of this process do not have adjacent rows.
    """
    ways = batch_ways(mesh)
    indices = of_batch(mesh).addressable_devices_indices_map((ways,)).values()
    parts = [index[0].indices(ways) for index in indices if index is not None]
    first = min(part[0] for part in parts)
    last = max(part[1] for part in parts)
    if len({part[0] for part in parts}) != last - first or ways % (last - first):
        raise ValueError(f"the devices of a process do not have adjacent rows of a batch: {mesh}")
    return first // (last - first), ways // (last - first)


def place(rows: Shaped[np.ndarray, "n ..."], mesh: Mesh) -> Shaped[Array, "b ..."]:
    """Makes a global array of rows that every process has whole, filled up by repetition.

    The result has the least number of rows that divides over the mesh; ``to_host(x)[:n]`` undoes
    it.
    """
    ways = batch_ways(mesh)
    padded = np.resize(rows, (-(-len(rows) // ways) * ways, *np.shape(rows)[1:]))
    return jax.make_array_from_callback(padded.shape, of_batch(mesh), lambda at: padded[at])


def to_host(tree: PyTree[jax.Array]) -> PyTree[np.ndarray]:
    """Returns whole numpy arrays on every process; all processes must call it."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
