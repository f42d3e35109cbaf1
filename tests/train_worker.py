"""Trains the small transformer of ``small_runs`` as one of several processes; see test_survival.

    python tests/train_worker.py DATA WORKDIR RESULT NUM_STEPS

RESULT.PROCESS.npz receives, at the end, the whole parameters as this process has them. Steps are
slowed down, so that there is time to send a signal.
"""

import pathlib
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))


def main(arguments):
    from enat_jax.runtime import distributed

    distributed.initialize()
    import jax
    from small_runs import small_config

    from enat_jax import train
    from enat_jax.checkpoints import manifest
    from enat_jax.runtime import sharding
    from enat_jax.training import enat_task

    data, workdir, result, num_steps = arguments
    settings = {"train.num_steps": int(num_steps), "train.log_every": 1, "train.save_every": 4}
    settings |= {"optimizer.warmup_steps": 0, "optimizer.learning_rate": 1e-3}
    settings |= {"optimizer.eps": 1e-4, "train.rehearse": True}
    config = small_config(pathlib.Path(data), **settings)
    config.sharding = {"data": 4, "fsdp": 2, "tensor": 1}
    shapes = enat_task.Task.shapes

    def slow(task, index):
        time.sleep(0.2)
        return shapes(task, index)

    enat_task.Task.shapes = slow
    state = train.train(config, workdir)
    whole = sharding.to_host(state.params)
    for x, shards in zip(jax.tree.leaves(whole), jax.tree.leaves(state.params), strict=True):
        for shard in shards.addressable_shards:
            np.testing.assert_array_equal(shard.data, x[shard.index])
    arrays = manifest.leaves(whole)
    np.savez(f"{result}.{jax.process_index()}.npz", **arrays)


if __name__ == "__main__":
    from enat_jax.runtime import cli

    cli.run(main)
