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

from enat_jax import checkpoint, cli, generator, metric_writer, model_files, sharding, tokenizer
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
        log_every, eval_every, save_every: intervals; evaluation and saving happen at the end too.
        pictures: whether evaluation makes pictures.
    """

    batch_size: int
    num_steps: int
    log_every: int = 100
    eval_every: int = 5000
    save_every: int = 5000
    pictures: bool = True

    def __post_init__(self):
        for name in ("batch_size", "num_steps", "log_every", "eval_every", "save_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"train.{name}={value!r} must be a whole number of at least 1")


def train(config, workdir):
    """Train as ``config`` says, from the last checkpoint in ``workdir`` if there is one.

    Args:
        config: ``ml_collections.ConfigDict``; see ``configs/``.
        workdir: directory of this run.

    Returns:
        The final ``TrainState``.

    Raises:
        ValueError: the config is not valid or does not fit the checkpoint.
        FileNotFoundError: data that the config names is not there.
    """
    workdir = pathlib.Path(workdir)
    loop, policy, task = _build(config)

    # --- state: its shapes first, so that it is created or restored in shards ---------------
    mesh = sharding.make_mesh(policy)
    if loop.batch_size % mesh.shape["data"]:
        raise ValueError(
            f"train.batch_size={loop.batch_size} is not divisible by {mesh.shape['data']} devices"
        )
    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(task.init, key)
    state_sharding = sharding.of_state(abstract, mesh, policy)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, state_sharding
    )
    checkpointer = checkpoint.Checkpointer(workdir / "checkpoints", loop.save_every)
    meta = _identity(config, task)
    restored = checkpointer.restore_latest(abstract, meta)
    if restored is None:
        state, start = jax.jit(task.init, out_shardings=state_sharding)(key), 0
        _log(
            f"starting: {_count(abstract.params):,} parameters, {len(mesh.devices.flat)} device(s)"
        )
    else:
        state, start = restored
        _log(f"continuing from step {start}")
    if start > loop.num_steps:
        raise ValueError(
            f"{workdir} has been trained for {start} steps already, more than "
            f"train.num_steps={loop.num_steps}"
        )
    if jax.process_index() == 0:
        model_files.write_json(workdir / "config.json", json.loads(config.to_json_best_effort()))

    # --- steps, one compiled function per static shape --------------------------------------
    @functools.cache
    def compiled(static):
        rep = sharding.replicated(mesh)
        return jax.jit(
            functools.partial(_step, task, static),
            in_shardings=(state_sharding, sharding.of_batch(mesh), rep, rep),
            out_shardings=(state_sharding, rep),
            donate_argnums=0,
        )

    put = functools.partial(sharding.global_batch, mesh=mesh)
    batches = loader.prefetch(task.batches(start), put)
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
                _evaluate(task, state, step, writer, workdir, loop.pictures)
            if fresh and step:
                checkpointer.save(step, state, meta, force=last)
            if last:
                break
            static, traced = task.shapes(step)
            state, metrics = compiled(static)(state, next(batches), traced, key)
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
        return loop, policy, TASKS[config.task].make(config)
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
    kept["data"] = task.data_identity()
    if config.optimizer.get("schedule", "constant") != "constant":
        kept["num_steps"] = config.train.num_steps  # the learning rate depends on it
    return kept


def _step(task, static, state, batch, traced, key):
    key = jax.random.fold_in(key, state.step)
    return task.train_step(state, batch, traced, key, static=static)


def _means(metrics):
    """Means over steps of a list of dicts of device scalars, fetched at once."""
    fetched = jax.device_get(metrics)
    return {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}


def _evaluate(task, state, step, writer, workdir, pictures):
    writer.scalars(step, dict(task.evaluate(state)))
    if not pictures:
        return
    images = dict(task.images(state))
    writer.images(step, images)
    if jax.process_index() == 0:
        for name, image in images.items():
            metric_writer.write_png(workdir / "pictures" / f"{name}_{step:07d}.png", image)


def _export(task, config, state, step, directory):
    """Write the finished model's directory."""
    provenance = {"config": json.loads(config.to_json_best_effort()), "step": step}
    if config.task == "vqgan":
        size = task.source.image_shape[:2]
        tokenizer.Tokenizer(task.model, state.params, size, provenance).save(directory)
    else:
        generator.Generator(
            task.model,
            state.ema_params,
            task.tokenizer,
            task.tokens.class_names,
            task.sampler,
            provenance,
        ).save(directory)


def _count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


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
