"""One of several processes that save and restore together; says what it saw in a JSON file."""

import contextlib
import functools
import json
import os
import pathlib
import sys
import traceback
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from enat_jax.checkpoints import best, checkpoint

META = {"seed": 0}
BEST = best.Best("fid", "min")


@functools.cache
def maker(mesh):
    split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))

    def values(step):
        split = jax.random.normal(jax.random.key(step), (8, 512))
        return {"split": split, "whole": jnp.arange(3.0) + step, "step": step}

    return jax.jit(values, out_shardings={"split": split, "whole": whole, "step": whole})


def make_state(step, mesh):
    """Each process holds a half of the large array, and writes a file of its own."""
    return maker(mesh)(np.int32(step))


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def same(state, expected):
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
    return all(
        np.array_equal(one.data, other.data)
        for a, b in pairs
        for one, other in zip(a.addressable_shards, b.addressable_shards, strict=True)
    )


def failure(function):
    try:
        function()
    except (OSError, ValueError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(index, directory):
    seen = {}
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    checkpoints = directory / "checkpoints"

    def restore(step=None):
        with checkpoint.Checkpointer(checkpoints, 10, best=BEST) as checkpointer:
            state, found = checkpointer.restore(abstract(make_state(0, mesh)), META, step)
        return [found, same(state, make_state(found, mesh)), checkpointer.all_steps()]

    def on_first(function):
        if index == 0:
            function()
        multihost_utils.sync_global_devices("on the first")

    # The processes disagree about what is best: the first one's word counts.
    with checkpoint.Checkpointer(checkpoints, 10, keep=1, best=BEST) as checkpointer:
        for step, fids in ((10, (1.0, 9.0)), (20, (5.0, 1.0)), (30, (7.0, 7.0))):
            checkpointer.save(step, make_state(step, mesh), META)
            checkpointer.record(step, {"fid": fids[index]})
        steps = checkpointer.all_steps()
        seen["best"] = [checkpointer.best.best_of(steps), steps]
    seen["newest"] = restore()

    def cut():
        files = checkpoints.glob("30/state/ocdbt.process_1/d/*")
        file = max(files, key=lambda file: file.stat().st_size)
        os.truncate(file, file.stat().st_size // 2)

    on_first(cut)
    seen["one process cannot read"] = restore()

    with checkpoint.Checkpointer(checkpoints, 10) as checkpointer:
        for step in (20, 30):
            checkpointer.save(step, make_state(step, mesh), META)
    with mock.patch.object(pathlib.Path, "rename", side_effect=PermissionError("not yours")):
        seen["cannot rename"] = failure(lambda: restore(step=20))
    lack = mock.Mock(side_effect=MemoryError("too large"))
    with contextlib.ExitStack() as faults:
        if index == 1:
            faults.enter_context(mock.patch.object(ocp.StandardCheckpointHandler, "restore", lack))
        seen["no memory"] = failure(restore)
    seen["no such step"] = failure(lambda: restore(step=25))
    seen["a step by name"] = restore(step=20)

    # One process leaves by an exception while the other one waits for the same save.
    try:
        with checkpoint.Checkpointer(checkpoints, 10) as checkpointer:
            checkpointer.save(30, make_state(30, mesh), META)
            if index == 1:
                raise KeyboardInterrupt
            checkpointer.wait()
    except KeyboardInterrupt:
        pass
    multihost_utils.sync_global_devices("left")
    seen["after an exception"] = restore()
    (directory / f"seen_{index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    index, count = int(os.environ["JAX_PROCESS_ID"]), int(os.environ["JAX_NUM_PROCESSES"])
    jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, index)
    try:
        main(index, pathlib.Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # an ordinary exit would wait for the other process, which waits for this one
    jax.distributed.shutdown()
