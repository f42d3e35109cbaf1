"""Train the tokenizer, the transformer or a feature network.

    python -m enat_jax.train --config configs/digits.py --workdir runs/digits
    python -m enat_jax.train --config configs/digits.py --workdir runs/digits \\
        --config.train.num_steps=5000 --config.optimizer.learning_rate=5e-4

Start the same command again to continue an interrupted run from its last checkpoint: the result is
the one of an uninterrupted run, bit for bit on the same machine. WORKDIR receives `config.json`,
`checkpoints/`, `metrics.jsonl`, TensorBoard events, `pictures/` and, at the end, `model/`. SIGTERM
or Ctrl-C saves first; exit codes are in ``cli``. With several processes (``distributed``) each of
them runs this same command.
"""

import collections
import contextlib
import functools
import json
import logging
import pathlib

import jax
from absl import flags

from enat_jax.checkpoints import checkpoint, model_files
from enat_jax.data import loader
from enat_jax.evaluation import features
from enat_jax.runtime import (
    agreement,
    cli,
    distributed,
    exits,
    files,
    matrix_rate,
    png,
    progress,
    sharding,
)
from enat_jax.training import config as train_config
from enat_jax.training import finished, metric_writer, monitoring, train_step

AHEAD = 3  # steps that are dispatched before the first of them must be done


def train(config, workdir, devices=None, from_step=None):
    """Train as ``config`` says, from the last checkpoint in ``workdir`` if there is one.

    Args:
        config: ``ml_collections.ConfigDict``; see ``configs/``.
        workdir: directory of this run, which all processes share.
        devices: to train on; None: all devices of all processes.
        from_step: of the checkpoint to continue from; None: the last that is not damaged.

    Returns:
        The final ``TrainState``.

    Raises:
        ValueError: the config is not valid or does not fit the checkpoint.
        FileNotFoundError: data that the config names is not there.
        cli.Stop: asked to stop, and saved; or too many steps in a row were not finite.
    """
    workdir = pathlib.Path(workdir)
    built = train_config.build(config)
    with contextlib.ExitStack() as held:
        # The first process holds the directory for all.
        only_one = functools.partial(held.enter_context, files.lock_directory(workdir))
        agreement.broadcast_from_first(only_one)
        return _train(config, workdir, built, devices, from_step)


def _train(config, workdir, built, devices, from_step):
    loop, policy, optimizer, task = built

    # --- state: its shapes first, so that it is created or restored in shards ---------------
    mesh = sharding.make_mesh(policy, devices)
    rules = train_config.TASKS[config.task].RULES if policy.rules is None else policy.rules
    steps = train_step.CompiledSteps(
        task, mesh, rules, seed=config.seed, accumulate=loop.accumulate
    )
    best = checkpoint.Best(loop.best_metric, loop.best_mode) if loop.best_metric else None
    checkpointer = checkpoint.Checkpointer(
        *(workdir / "checkpoints", loop.save_every, loop.keep, loop.keep_every, best),
        complete=train_config.complete_identity,
    )
    meta = train_config.identity(config, task)
    restored = checkpointer.restore(steps.abstract_state, meta, from_step)
    state, start = (steps.init(), 0) if restored is None else restored
    if start > loop.num_steps:
        raise ValueError(
            f"{workdir} has been trained for {start} steps already, more than "
            f"train.num_steps={loop.num_steps}"
        )
    if jax.process_index() == 0:
        model_files.write_json(workdir / "config.json", json.loads(config.to_json_best_effort()))
    _log(
        f"{'starting' if restored is None else f'continuing from step {start}'}: "
        f"{_describe(steps.abstract_state, mesh)}"
    )

    # --- what the loop reads, tells and heeds -----------------------------------------------
    put = functools.partial(sharding.global_batch, mesh=mesh)
    share = sharding.process_share(mesh)
    batches = loader.prefetch(task.batches(start * loop.accumulate, share), put)
    rate = None
    if loop.matrix_rate and task.work(0):
        rate = jax.process_count() * matrix_rate.matrix_rate(task.model.dtype, mesh.local_devices)
    wandb = {"project": loop.wandb_project} if loop.wandb_project else None
    monitor = monitoring.Monitor(loop.batch_size, rate)
    under_way = collections.deque()
    skipped_in_a_row = 0
    with (
        checkpointer,
        metric_writer.MetricWriter(workdir, None if restored is None else start, wandb) as writer,
        progress.Progress(loop.num_steps, loop.batch_size, start) as bar,
        distributed.Preemption() as preemption,
        distributed.Watchdog(loop.hang_timeout) as watchdog,
    ):

        @contextlib.contextmanager
        def compiling():
            _log(f"compiling a step of shape number {len(steps.compiled) + 1}")
            with monitor.compiling(), watchdog.paused():
                yield

        def log(step):
            with monitor.logging():
                summary = monitor.summary()
                updates = step - int(state.skipped)
                used = optimizer.learning_rate_at(max(updates - 1, 0), loop.num_steps)
                writer.scalars(step, summary | {"learning_rate": float(used)})
                bar.update(step, summary["loss"])

        steps.compiling = compiling
        # The order matters: evaluate, save, next batch, step, log. What a checkpoint of step k
        # goes with has then been evaluated, and a resumed run does not evaluate it again.
        for step in range(start, loop.num_steps + 1):
            last = step == loop.num_steps
            fresh = step > start or restored is None
            evaluation = {}
            if fresh and (last or (step and step % loop.eval_every == 0)):
                with monitor.evaluating(), watchdog.paused():
                    evaluation = _evaluate(task, state, mesh, step, writer, workdir, loop)
            if fresh and step:
                with monitor.saving(), watchdog.paused():
                    checkpointer.save(step, state, meta, evaluation, force=last)
            if last:
                break
            if preemption.reached(step):
                with watchdog.paused():
                    if monitor.num_steps:
                        log(step)
                    checkpointer.save(step, state, meta, evaluation, force=True)
                    checkpointer.wait()
                again = exits.AGAIN if from_step is None else "to go on, start without --from_step"
                raise cli.Stop(f"on request, saved after step {step}; {again}", exits.STOPPED)
            with monitor.waiting():
                batch = [next(batches) for _ in range(loop.accumulate)]
            with monitor.dispatching():
                state, metrics = steps(state, batch, step)
            monitor.step(metrics, **_work(task, step, loop.accumulate))
            # Dispatch runs ahead of the devices; too far, and progress would not be what it says.
            under_way.append((step, metrics["skipped"]))
            # None is left when the run ends: what is exported has been heeded, too.
            ahead = AHEAD if step + 1 < loop.num_steps else 1
            while len(under_way) >= ahead:
                done, skipped = under_way.popleft()
                skipped_in_a_row = _heed(done, float(skipped), skipped_in_a_row, loop.max_skipped)
                watchdog.beat(f"step {done + 1}")
            if (step + 1) % loop.log_every == 0 or step + 1 == loop.num_steps:
                log(step + 1)
            else:
                bar.update(step + 1)
        with watchdog.paused():
            checkpointer.wait()
            _export(task, config, state, loop.num_steps, workdir / "model")
    _log(f"done: {loop.num_steps} steps, model in {workdir / 'model'}")
    return state


def _work(task, step, accumulate):
    """Mean share of masked tokens of a step's micro-batches and sums of their multiply-adds."""
    parts = [task.work(step * accumulate + i) for i in range(accumulate)]
    scale = {"masked_share": 1 / accumulate}
    return {name: scale.get(name, 1) * sum(part[name] for part in parts) for name in parts[0]}


def _heed(step, skipped, in_a_row, most):
    """Steps in a row that were not finite, ``step`` included; stops the run if they are too many.

    Raises:
        cli.Stop: they are.
    """
    if not skipped:
        return 0
    in_a_row += 1
    _log(f"step {step}: loss or gradients are not finite; no update ({in_a_row} in a row)")
    if in_a_row >= most:
        raise cli.Stop(
            f"loss or gradients of {in_a_row} steps in a row were not finite, the last of them "
            f"step {step}; parameters are those before. Lower the learning rate, or clip gradients "
            "(config.optimizer.clip_norm)",
            exits.DIVERGED,
        )
    return in_a_row


def _evaluate(task, state, mesh, step, writer, workdir, loop):
    """The evaluation's numbers, which are written, and its pictures."""
    found = dict(task.evaluate(state, mesh))
    writer.scalars(step, found)
    if not loop.pictures:
        return found
    images = dict(task.images(state, mesh))
    writer.images(step, images)
    if jax.process_index() == 0:
        for name, image in images.items():
            png.write_png(workdir / "pictures" / f"{name}_{step:07d}.png", image)
    return found


def _export(task, config, state, step, directory):
    """Write the finished model's directory."""
    # Tasks without a moving average have none.
    params = sharding.to_host(state.ema_params or state.params)
    if config.task == "classifier":
        size, provenance = task.source.image_shape[:2], finished.provenance(config, task, step)
        source = config.data.source
        features.save_trained(directory, task.model, params, size, source, provenance)
    else:
        finished.trained(config, task, params, step).save(directory)


def _describe(abstract_state, mesh):
    parameters = sum(x.size for x in jax.tree.leaves(abstract_state.params))
    return (
        f"{parameters:,} parameters, {mesh.size} device(s) as "
        f"{', '.join(f'{name}={size}' for name, size in mesh.shape.items())}, "
        f"{sharding.shard_bytes(abstract_state) / 2**20:,.0f} MiB of state on each"
    )


def _log(message):
    if jax.process_index() == 0:
        print(f"[train] {message}", flush=True)


_CONFIG = train_config.define()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_FROM_STEP = flags.DEFINE_integer(
    "from_step", None, "Step of the checkpoint to continue from; by default the last."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    distributed.MODES,
    "Whether this is one of several processes: as the environment says, yes, or no.",
)


def main(argv):
    del argv
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise ValueError("give --config FILE and --workdir DIR; see --help")
    for name, level in (("absl", logging.ERROR), ("jax", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
    if not jax.config.jax_compilation_cache_dir:
        cache = pathlib.Path(_WORKDIR.value).absolute() / "compilation_cache"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    distributed.initialize(_DISTRIBUTED.value)
    train(_CONFIG.value, _WORKDIR.value, from_step=_FROM_STEP.value)


if __name__ == "__main__":
    cli.run_absl(main)
