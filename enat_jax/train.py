"""Train the tokenizer or the transformer.

    python -m enat_jax.train --config configs/digits.py --workdir runs/digits
    python -m enat_jax.train --config configs/digits.py --workdir runs/digits \\
        --config.train.num_steps=5000 --config.optimizer.learning_rate=5e-4

Start the same command again to continue an interrupted run from its last checkpoint: the result is
the one of an uninterrupted run, bit for bit on the same machine. WORKDIR receives `config.json`,
`checkpoints/`, `metrics.jsonl`, TensorBoard events, `pictures/` and, at the end, `model/`.
"""

import dataclasses
import functools
import json
import logging
import pathlib

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from enat_jax import (
    checkpoint,
    cli,
    generator,
    metric_writer,
    model_files,
    sharding,
    tokenizer,
    train_step,
)
from enat_jax.data import loader
from enat_jax.tasks import enat, vqgan

TASKS = {"vqgan": vqgan, "enat": enat}
SECTIONS = {
    "vqgan": {"model", "data", "loss", "optimizer", "train", "sharding"},
    "enat": {"model", "data", "mask", "training", "sampler", "optimizer", "train", "sharding"},
}
AHEAD = 3  # steps that are dispatched before the first of them must be done


@dataclasses.dataclass(frozen=True)
class Loop:
    """The section ``train`` of a config; all intervals in steps.

    Attributes:
        batch_size: images of a step, over all devices.
        num_steps: of the whole run.
        accumulate: micro-batches that a step's batch is cut into, each with its own token counts;
            the update is that of their mean gradient.
        log_every, eval_every, save_every: intervals; evaluation and saving happen at the end too.
        pictures: whether evaluation makes pictures.
    """

    batch_size: int
    num_steps: int
    accumulate: int = 1
    log_every: int = 100
    eval_every: int = 5000
    save_every: int = 5000
    pictures: bool = True

    def __post_init__(self):
        counts = ("batch_size", "num_steps", "accumulate", "log_every", "eval_every", "save_every")
        for name in counts:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"train.{name}={value!r} must be a whole number of at least 1")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.batch_size={self.batch_size} is not divisible by "
                f"train.accumulate={self.accumulate}"
            )


def train(config, workdir, devices=None):
    """Train as ``config`` says, from the last checkpoint in ``workdir`` if there is one.

    Args:
        config: ``ml_collections.ConfigDict``; see ``configs/``.
        workdir: directory of this run.
        devices: to train on; None: all devices of all processes.

    Returns:
        The final ``TrainState``.

    Raises:
        ValueError: the config is not valid or does not fit the checkpoint.
        FileNotFoundError: data that the config names is not there.
    """
    workdir = pathlib.Path(workdir)
    loop, policy, task = _build(config)

    # --- state: its shapes first, so that it is created or restored in shards ---------------
    mesh = sharding.make_mesh(policy, devices)
    rules = TASKS[config.task].RULES if policy.rules is None else policy.rules
    steps = train_step.Steps(task, mesh, rules, seed=config.seed, accumulate=loop.accumulate)
    checkpointer = checkpoint.Checkpointer(workdir / "checkpoints", loop.save_every)
    meta = _identity(config, task)
    restored = checkpointer.restore_latest(steps.abstract_state, meta)
    if restored is None:
        state, start = steps.init(), 0
        _log(f"starting: {_describe(steps.abstract_state, mesh)}")
    else:
        state, start = restored
        _log(f"continuing from step {start}: {_describe(steps.abstract_state, mesh)}")
    if start > loop.num_steps:
        raise ValueError(
            f"{workdir} has been trained for {start} steps already, more than "
            f"train.num_steps={loop.num_steps}"
        )
    if jax.process_index() == 0:
        model_files.write_json(workdir / "config.json", json.loads(config.to_json_best_effort()))

    put = functools.partial(sharding.global_batch, mesh=mesh)
    share = sharding.process_share(mesh)
    batches = loader.prefetch(task.batches(start * loop.accumulate, share), put)
    recent = []
    with (
        checkpointer,
        metric_writer.MetricWriter(workdir, None if restored is None else start) as writer,
        metric_writer.Progress(loop.num_steps, loop.batch_size, start) as progress,
    ):
        # The order matters: evaluate, save, next batch, step, log. What a checkpoint of step k
        # goes with has then been evaluated, and a resumed run does not evaluate it again.
        for step in range(start, loop.num_steps + 1):
            last = step == loop.num_steps
            fresh = step > start or restored is None
            if fresh and (last or (step and step % loop.eval_every == 0)):
                _evaluate(task, state, mesh, step, writer, workdir, loop.pictures)
            if fresh and step:
                checkpointer.save(step, state, meta, force=last)
            if last:
                break
            batch = [next(batches) for _ in range(loop.accumulate)]
            state, metrics = steps(state, batch, step)
            recent.append(metrics)
            # Dispatch runs ahead of the devices; too far, and progress would not be what it says.
            if len(recent) >= AHEAD:
                jax.block_until_ready(recent[-AHEAD])
            if (step + 1) % loop.log_every == 0 or step + 1 == loop.num_steps:
                means = _means(recent)
                recent.clear()
                writer.scalars(step + 1, means)
                progress.update(step + 1, means["loss"])
            else:
                progress.update(step + 1)
        checkpointer.wait()
    _export(task, config, state, loop.num_steps, workdir / "model")
    _log(f"done: {loop.num_steps} steps, model in {workdir / 'model'}")
    return state


def _build(config):
    """The loop settings, sharding policy and task of a config; unknown keys raise."""
    if config.get("task") not in TASKS:
        raise ValueError(f"task={config.get('task')!r} is unknown: one of {sorted(TASKS)}")
    expected = SECTIONS[config.task] | {"task", "seed"}
    unknown, missing = set(config) - expected, expected - set(config) - {"sharding"}
    if unknown or missing:
        raise ValueError(
            f"a config of task {config.task!r} has no sections {sorted(unknown)} "
            f"and needs {sorted(missing)}"
        )
    try:
        loop = Loop(**config.train.to_dict())
        policy = sharding.Sharding(**config.get("sharding", {}))
        return loop, policy, TASKS[config.task].make(config, loop.batch_size // loop.accumulate)
    except TypeError as error:
        # A dataclass names the key that it does not know, or that it needs.
        if "unexpected keyword" in str(error) or "required positional" in str(error):
            raise ValueError(f"config: {error}") from error
        raise


def _identity(config, task):
    """What a checkpoint must have been made with to be continued, as JSON values."""
    values = json.loads(config.to_json_best_effort())
    kept = {k: v for k, v in values.items() if k not in ("data", "train", "sampler", "sharding")}
    kept["batch_size"] = config.train.batch_size
    kept["accumulate"] = config.train.get("accumulate", 1)
    kept["data"] = task.data_identity()
    if config.optimizer.get("schedule", "constant") != "constant":
        kept["num_steps"] = config.train.num_steps  # the learning rate depends on it
    return kept


def _means(metrics):
    """Means over steps of a list of dicts of device scalars, fetched at once."""
    fetched = jax.device_get(metrics)
    return {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}


def _evaluate(task, state, mesh, step, writer, workdir, pictures):
    writer.scalars(step, dict(task.evaluate(state, mesh)))
    if not pictures:
        return
    images = dict(task.images(state, mesh))
    writer.images(step, images)
    if jax.process_index() == 0:
        for name, image in images.items():
            metric_writer.write_png(workdir / "pictures" / f"{name}_{step:07d}.png", image)


def _export(task, config, state, step, directory):
    """Write the finished model's directory."""
    provenance = {"config": json.loads(config.to_json_best_effort()), "step": step}
    params = sharding.to_host(state.params if config.task == "vqgan" else state.ema_params)
    if config.task == "vqgan":
        size = task.source.image_shape[:2]
        tokenizer.Tokenizer(task.model, params, size, provenance).save(directory)
    else:
        generator.Generator(
            task.model,
            params,
            task.tokenizer,
            task.tokens.class_names,
            task.sampler,
            provenance,
        ).save(directory)


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


_CONFIG = config_flags.DEFINE_config_file("config", None, "File of the config.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")


def main(argv):
    del argv
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise ValueError("give --config FILE and --workdir DIR; see --help")
    for name, level in (("absl", logging.ERROR), ("jax", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
    train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    cli.run_absl(main)
