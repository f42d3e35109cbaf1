"""A program of steps that each need all processes, to be stopped, killed and hung by tests."""

import argparse
import multiprocessing
import os
import time

from enat_jax.runtime import cli, distributed, exits


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--heartbeat", type=int, default=100)
    parser.add_argument("--connect", type=int, default=60)
    parser.add_argument("--watchdog", type=float)
    parser.add_argument("--fail-at", type=int, help="the step in which the last process fails")
    parser.add_argument("--error", choices=["mistake", "bug", "everybody"], default="mistake")
    parser.add_argument("--child", action="store_true", help="have a process as loaders have")
    args = parser.parse_args(argv)
    distributed.initialize(heartbeat_timeout=args.heartbeat, connect_timeout=args.connect)

    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    if args.child:
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
        child.daemon = True
        child.start()
        print(f"child {child.pid}.", flush=True)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    local = np.ones(jax.local_device_count(), np.float32)
    state = jax.make_array_from_process_local_data(sharding, local)
    advance = jax.jit(lambda x: x + x.sum() / x.size, out_shardings=sharding)
    last = jax.process_index() == jax.process_count() - 1
    with distributed.Preemption() as preemption, distributed.Watchdog(args.watchdog) as watchdog:
        for step in range(1, args.steps + 1):
            state = jax.block_until_ready(advance(state))
            watchdog.completed(f"step {step + 1}")
            if step == 3:
                print(f"running as {os.getpid()} with {jax.device_count()} devices.", flush=True)
            if step == args.fail_at and (last or args.error == "everybody"):
                raise TypeError("a bug") if args.error == "bug" else ValueError("a mistake")
            if preemption.reached(step):
                raise cli.Stop(f"after step {step}", exits.STOPPED)
            time.sleep(0.01)


if __name__ == "__main__":
    cli.run(main)
