"""Train the tokenizer, the transformer or a feature network.

    python -m enat_jax.train --config configs/digits.py --workdir runs/digits
    python -m enat_jax.train --config configs/digits.py --workdir runs/digits \\
        --config.train.num_steps=5000 --config.optimizer.learning_rate=5e-4
    python -m enat_jax.train --config configs/digits.py --help   # all settings, types and defaults

Start the same command again to continue an interrupted run from its last checkpoint: the result is
the one of an uninterrupted run, bit for bit on the same machine, whatever JAX is set to. Where a
precision of JAX or XLA is set, all of a run needs the same one, see ``numerics``. WORKDIR receives
`config.json`, `checkpoints/`, `metrics.jsonl`, TensorBoard events, `pictures/`, what is known of
the training pictures in `data/` and, at the end, `model/`. SIGTERM or Ctrl-C saves first; exit
codes are in ``cli``. With several processes (``distributed``) each of them runs this same command.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import ml_collections
from absl import flags

from enat_jax.checkpoints import best, checkpoint, orbax_paths
from enat_jax.data import loader
from enat_jax.runtime import (
    agreement,
    buckets,
    cli,
    compilation_cache,
    distributed,
    exits,
    files,
    matrix_rate,
    memory,
    numerics,
    paths,
    progress,
    sharding,
)
from enat_jax.training import config as train_config
from enat_jax.training import (
    finished,
    metric_writer,
    monitoring,
    optim,
    outlook,
    rehearsal,
    tokenizer_health,
    train_step,
)
from enat_jax.training import task as tasks
from enat_jax.training.task import Counted, OfPictures, Pictured, Task, TrainState

_Built = tuple[train_config.Loop, sharding.Sharding, optim.Optimizer, Task]

AHEAD = 3  # steps that are dispatched before the first of them must be done


def train(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    devices: Sequence[jax.Device] | None = None,
    from_step: int | None = None,
) -> TrainState:
    """Trains as ``config`` says, from the last checkpoint in ``workdir`` if there is one.

    Args:
        config: see ``configs/``.
        workdir: directory of this run, which all processes share, or gs://BUCKET/NAME.
        devices: to train on; None: all devices of all processes.
        from_step: of the checkpoint to continue from; None: the last that is not damaged.

    Returns:
        The final ``TrainState``.

    Raises:
        ValueError: the config is not valid or does not fit the checkpoint.
        FileNotFoundError: data that the config names is not there.
        cli.Stop: asked to stop, and saved; or too many steps in a row were not finite.
    """
    workdir = paths.place(workdir)
    orbax_paths.of(workdir)  # refuses a name that no checkpoint can have, before there is anything
    built = train_config.build(config)
    with contextlib.ExitStack() as held, numerics.pinned():
        held.enter_context(buckets.explained(workdir))
        agreement.broadcast_from_first(functools.partial(buckets.require, workdir))
        # The first process holds the directory for all.
        only_one = functools.partial(held.enter_context, files.lock_directory(workdir))
        agreement.broadcast_from_first(only_one)
        loop, policy, optimizer, task = built
        if isinstance(task, OfPictures):
            task = task.chosen(workdir, _log)
            held.enter_context(task.reporting())
            built = (loop, policy, optimizer, task)
        return _train(config, workdir, built, devices, from_step)


@dataclasses.dataclass
class _Run:
    """What the loop works with, and what it has to remember between steps.

    Attributes:
        health: gives advice on what metrics say; None where nobody does.
        under_way: steps that were dispatched, oldest first: (step, whether it was skipped).
        skipped_in_a_row: of the steps that are done, the last so many were not finite.
    """

    workdir: pathlib.Path
    loop: train_config.Loop
    optimizer: optim.Optimizer
    task: Task
    meta: dict[str, Any]
    mesh: jax.sharding.Mesh
    steps: train_step.CompiledSteps
    checkpointer: checkpoint.Checkpointer
    writer: metric_writer.MetricWriter
    bar: progress.Progress
    preemption: distributed.Preemption
    watchdog: distributed.Watchdog
    monitor: monitoring.Monitor
    health: tokenizer_health.Health | None
    under_way: collections.deque[tuple[int, jax.Array]]
    skipped_in_a_row: int = 0


def _train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    built: _Built,
    devices: Sequence[jax.Device] | None,
    from_step: int | None,
) -> TrainState:
    loop, policy, optimizer, task = built

    # --- state: its shapes first, so that it is created or restored in shards ---------------
    mesh = sharding.make_mesh(policy, devices)
    rules = train_config.TASKS[config.task].RULES if policy.rules is None else policy.rules
    steps = train_step.CompiledSteps(
        task, mesh, rules, seed=config.seed, accumulate=loop.accumulate
    )
    checkpointer = _checkpointer(workdir, loop, task)
    meta = train_config.identity(config, task) | numerics.recorded()
    restored = checkpointer.restore(steps.abstract_state, meta, from_step)
    state, start = (steps.init(), 0) if restored is None else restored
    if start > loop.num_steps:
        raise ValueError(
            f"{workdir} has been trained for {start} steps already, more than "
            f"train.num_steps={loop.num_steps}"
        )
    _log(
        f"{'starting' if restored is None else f'continuing from step {start}'}: "
        f"{_describe(steps.abstract_state, mesh)}"
    )
    for sentence in outlook.sentences(loop, optimizer, task.loss):
        _log(sentence if restored is None else f"{sentence}, in a run from the beginning")
    if loop.rehearse and start < loop.num_steps:
        state = _rehearse(config, built, state, mesh, workdir, restored is not None)
    if jax.process_index() == 0:
        files.write_json(workdir / "config.json", json.loads(config.to_json_best_effort()))

    # --- what the loop reads, and whom it tells ----------------------------------------------
    put = functools.partial(sharding.global_batch, mesh=mesh)
    share = sharding.process_share(mesh)
    batches = loader.prefetch(task.batches(start * loop.accumulate, share), put)
    monitor = monitoring.Monitor(loop.batch_size, _matrix_rate(loop, task, mesh))
    wandb = {"project": loop.wandb_project} if loop.wandb_project else None
    with (
        checkpointer,
        metric_writer.MetricWriter(workdir, None if restored is None else start, wandb) as writer,
        progress.Progress(loop.num_steps, loop.batch_size, start) as bar,
        distributed.Preemption() as preemption,
        distributed.Watchdog(loop.hang_timeout) as watchdog,
    ):
        run = _Run(
            *(workdir, loop, optimizer, task, meta, mesh, steps, checkpointer, writer, bar),
            *(preemption, watchdog, monitor, tokenizer_health.of(task, loop.num_steps, start)),
            collections.deque(),
        )
        steps.compiling = functools.partial(_compiling, run)
        again = exits.AGAIN if from_step is None else "to go on, start without --from_step"
        state = _loop(run, state, batches, start, restored is None, again)
        with watchdog.paused():
            finished.save(config, task, finished.weights(state), loop.num_steps, workdir / "model")
            if start < loop.num_steps:
                state = checkpointer.read_back(loop.num_steps, state, meta)
    _log(f"done: {loop.num_steps} steps, model in {workdir / 'model'}")
    return state


def _checkpointer(
    workdir: pathlib.Path, loop: train_config.Loop, task: Task
) -> checkpoint.Checkpointer:
    def complete(values: Mapping[str, Any]) -> dict[str, Any]:
        recognised = values["data"]
        if isinstance(task, OfPictures):
            recognised = task.recognise(recognised)
        return train_config.complete_identity({**values, "data": recognised})

    kept = best.Best(loop.best_metric, loop.best_mode) if loop.best_metric else None
    return checkpoint.Checkpointer(
        *(workdir / "checkpoints", loop.save_every, loop.keep, loop.keep_every, kept),
        complete=complete,
    )


def _rehearse(
    config: ml_collections.ConfigDict,
    built: _Built,
    state: TrainState,
    mesh: jax.sharding.Mesh,
    workdir: pathlib.Path,
    restored: bool,
) -> TrainState:
    loop, *_, task = built
    if not rehearsal.is_due(config, workdir, restored):
        return state
    _log(
        "rehearsing evaluation, pictures, checkpoint and model: what cannot work is refused now, "
        "and what is compiled serves later"
    )
    begun = time.monotonic()
    state = rehearsal.rehearse(
        *(config, task, state, mesh, workdir), pictures=loop.pictures, restored=restored
    )
    _log(f"all of them work ({time.monotonic() - begun:.1f} s)")
    return state


def _matrix_rate(loop: train_config.Loop, task: Task, mesh: jax.sharding.Mesh) -> float | None:
    """Multiply-adds per second of all devices; None where the share of it is not asked for."""
    if not (loop.matrix_rate and isinstance(task, Counted)):
        return None
    return jax.process_count() * matrix_rate.matrix_rate(task.model.dtype, mesh.local_devices)


def _loop(
    run: _Run,
    state: TrainState,
    batches: Iterator[train_step.Batch],
    start: int,
    is_new: bool,
    again: str,
) -> TrainState:
    """Takes the steps from ``start`` on; ``again``: how to go on after a stop on request.

    The order matters: save, evaluate, next batch, step, log. What fails in an evaluation costs no
    step, and a run that was stopped within one makes up for it when it goes on.
    """
    loop, monitor, watchdog = run.loop, run.monitor, run.watchdog
    for step in range(start, loop.num_steps + 1):
        last = step == loop.num_steps
        due = last or (step > 0 and step % loop.eval_every == 0)
        restored = step == start and not is_new
        if step and not restored:
            with monitor.saving(), watchdog.paused():
                run.writer.upload()
                run.checkpointer.save(step, state, run.meta, force=due)
        if due and not (restored and run.checkpointer.is_evaluated(step)):
            with monitor.evaluating(), watchdog.paused():
                _evaluate(run, state, step)
        if last:
            break
        if run.preemption.reached(step):
            _save_and_stop(run, state, step, again)
        with monitor.waiting():
            batch = [next(batches) for _ in range(loop.accumulate)]
        with monitor.dispatching():
            state, metrics = run.steps(state, batch, step)
        monitor.step(metrics, **tasks.work(run.task, step * loop.accumulate, loop.accumulate))
        run.under_way.append((step, metrics["skipped"]))
        # None is left when the run ends: whether what is exported was finite is known, too.
        _wait_for_steps(run, ahead=AHEAD if step + 1 < loop.num_steps else 1)
        if (step + 1) % loop.log_every == 0 or step + 1 == loop.num_steps:
            _log_metrics(run, state, step + 1)
        else:
            run.bar.update(step + 1)
    return state


@contextlib.contextmanager
def _compiling(run: _Run) -> Iterator[None]:
    _log(f"compiling a step of shape number {len(run.steps.compiled) + 1}")
    run.bar.leave_out()
    with run.monitor.compiling(), run.watchdog.paused():
        yield


def _log_metrics(run: _Run, state: TrainState, step: int) -> None:
    """Writes what was measured since the last line; ``step`` steps are done."""
    with run.monitor.logging():
        summary = run.monitor.summary()
        updates = step - int(state.skipped)
        used = run.optimizer.learning_rate_at(max(updates - 1, 0), run.loop.num_steps)
        run.writer.scalars(step, summary | {"learning_rate": float(used)})
        for sentence in run.health.advice(step, summary) if run.health is not None else ():
            _log(f"advice for another run: {sentence}")
        run.bar.update(step, summary["loss"])


def _save_and_stop(run: _Run, state: TrainState, step: int, again: str) -> NoReturn:
    """Saves, and ends the run by ``cli.Stop``."""
    with run.watchdog.paused():
        if run.monitor.num_steps:
            _log_metrics(run, state, step)
        run.writer.upload()
        run.checkpointer.save(step, state, run.meta, force=True)
        run.checkpointer.wait()
    raise cli.Stop(f"on request, saved after step {step}; {again}", exits.STOPPED)


def _wait_for_steps(run: _Run, ahead: int) -> None:
    """Waits until fewer than ``ahead`` steps are under way, and counts those that were skipped.

    Dispatch runs ahead of the devices; too far, and the progress bar would not be true.

    Raises:
        cli.Stop: too many steps in a row were not finite.
    """
    while len(run.under_way) >= ahead:
        step, skipped = run.under_way.popleft()
        run.skipped_in_a_row = run.skipped_in_a_row + 1 if float(skipped) else 0
        if run.skipped_in_a_row:
            _log(
                f"step {step}: loss or gradients are not finite; no update "
                f"({run.skipped_in_a_row} in a row)"
            )
        if run.skipped_in_a_row >= run.loop.max_skipped:
            raise cli.Stop(
                f"loss or gradients of {run.skipped_in_a_row} steps in a row were not finite, the "
                f"last of them step {step}; parameters are those before. Lower the learning rate, "
                "or clip gradients (config.optimizer.clip_norm)",
                exits.DIVERGED,
            )
        run.watchdog.completed(f"step {step + 1}")


def _evaluate(run: _Run, state: TrainState, step: int) -> None:
    """Writes the numbers and pictures of an evaluation of the state that is saved."""
    run.bar.leave_out()
    run.checkpointer.wait()
    with rehearsal.told(
        f"the state after step {step} is saved, but its evaluation failed; see to the cause and "
        f"{exits.AGAIN}, which begins with this evaluation"
    ):
        found = dict(run.task.evaluate(state, run.mesh))
        run.writer.scalars(step, found)
        if run.loop.pictures and isinstance(run.task, Pictured):
            images = dict(run.task.images(state, run.mesh))
            run.writer.images(step, images)
            rehearsal.write_pictures(run.workdir / "pictures", images, step)
        run.writer.upload()
        run.checkpointer.record(step, found)


def _describe(abstract_state: TrainState, mesh: jax.sharding.Mesh) -> str:
    parameters = sum(x.size for x in jax.tree.leaves(abstract_state.params))
    return (
        f"{parameters:,} parameters, {mesh.size} device(s) as "
        f"{', '.join(f'{name}={size}' for name, size in mesh.shape.items())}, "
        f"{sharding.shard_bytes(abstract_state) / 2**20:,.0f} MiB of state on each"
    )


def _log(message: str) -> None:
    if jax.process_index() == 0:
        print(f"[train] {message}", flush=True)


_CONFIG = train_config.define()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, or gs://BUCKET/NAME.")
_FROM_STEP = flags.DEFINE_integer(
    "from_step", None, "Step of the checkpoint to continue from; by default the last."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    distributed.MODES,
    "Whether this is one of several processes: as the environment says, yes, or no.",
)


def main(argv: list[str]) -> None:
    del argv
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise ValueError("give --config FILE and --workdir DIR; see --help")
    for name, level in (("absl", logging.CRITICAL), ("jax", logging.WARNING)):  # as in `cli.run`
        logging.getLogger(name).setLevel(level)
    workdir = paths.place(_WORKDIR.value)
    distributed.initialize(_DISTRIBUTED.value)
    if jax.process_count() > 1 and isinstance(workdir, pathlib.Path):
        # The first process alone writes what all of them can read here.
        compilation_cache.use(workdir.absolute() / "compilation_cache")
    with buckets.explained(workdir):
        for sentence in train_config.keep_what_began(workdir):
            _log(sentence)
    train(_CONFIG.value, workdir, from_step=_FROM_STEP.value)


if __name__ == "__main__":
    memory.keep_freed()
    cli.run_absl(main)
