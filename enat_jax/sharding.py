"""From a sharding policy, which is data, to a mesh and the shardings of states and batches."""

import dataclasses
import math
import re

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The sharding policy of a config.

    Attributes:
        mesh: axis names and sizes; one size may be -1, which takes all devices that are left. The
            batch is divided over the axis "data"; what else an axis does is up to the rules.
        rules: pairs (regular expression, partition spec). The first expression that is found in
            the path of an array of the state, such as "params/encoder/mlp/up/kernel", decides its
            partition: for each dimension an axis name or None. No rule: replicated.
    """

    mesh: tuple[tuple[str, int], ...] = (("data", -1),)
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()

    def __post_init__(self):
        names = [name for name, _ in self.mesh]
        if "data" not in names or len(set(names)) < len(names):
            raise ValueError(f"mesh axes {names} must be distinct and include 'data'")
        unknown = {axis for _, spec in self.rules for axis in spec if axis} - set(names)
        if unknown:
            raise ValueError(f"rules name the axes {sorted(unknown)}, the mesh has {names}")


def make_mesh(policy, devices=None):
    """A ``jax.sharding.Mesh`` over ``devices``, by default all of all processes.

    Raises:
        ValueError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    names = [name for name, _ in policy.mesh]
    sizes = [size for _, size in policy.mesh]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh sizes {sizes} must be positive, at most one of them -1")
    if len(devices) % known:
        raise ValueError(f"{len(devices)} devices cannot be arranged as {dict(policy.mesh)}")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(f"{dict(policy.mesh)} uses {known} of {len(devices)} devices; use -1")
    # Auto: Flax linen does not work on the Explicit axes that are jax's default.
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


def of_state(abstract_state, mesh, policy):
    """The sharding of every array of a state, by the policy's rules.

    Raises:
        ValueError: a rule has more dimensions than an array it matches, or does not divide it.
    """

    def of_leaf(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((s for pattern, s in policy.rules if re.search(pattern, name)), ())
        if len(spec) > leaf.ndim:
            raise ValueError(f"the rule {spec} does not fit {name}, of shape {leaf.shape}")
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis and size % mesh.shape[axis]:
                raise ValueError(
                    f"{name} of shape {leaf.shape} cannot be divided by {spec}: "
                    f"{size} is not a multiple of {axis}={mesh.shape[axis]}"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(of_leaf, abstract_state)


def of_batch(mesh):
    """The sharding of arrays whose first axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh):
    """The sharding of what every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def global_batch(local, mesh):
    """Global arrays from this process's part of the batch, a dict of numpy arrays [b, ...]."""
    sharding = of_batch(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in local.items()}
