"""Small training states for the tests of checkpoints: saved, restored, compared."""

import shutil

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from enat_jax.checkpoints import checkpoint

META = {"model": {"width": 64, "sizes": (1, 2)}, "seed": 0}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    extra: dict


def make_state(step, width=3):
    params = {"dense": {"kernel": jnp.full((width, 4), 1.5 * step), "bias": jnp.arange(4.0) + step}}
    return State(
        step=jnp.int32(step),
        params=params,
        opt_state=optax.adamw(1e-3).init(params),
        extra={},
    )


def abstract(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), state)


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def save_steps(directory, steps, **settings):
    with checkpoint.Checkpointer(directory, save_every=10, **settings) as checkpointer:
        for step in steps:
            assert checkpointer.save(step, make_state(step), META)


def restore(directory, meta=META, state=None, step=None):
    with checkpoint.Checkpointer(directory, save_every=10) as checkpointer:
        return checkpointer.restore(abstract(state or make_state(0)), meta, step)


def on_devices(number, **specs):
    devices = jax.devices()[:number]
    mesh = jax.make_mesh(
        (number,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )
    return {
        name: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        for name, spec in specs.items()
    }


def empty_directory(path):
    shutil.rmtree(path)
    path.mkdir()
