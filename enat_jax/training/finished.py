"""The model that a training run has made, from its parameters or from its directory."""

import json
import os
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from enat_jax.checkpoints import manifest, model_files, orbax_paths
from enat_jax.evaluation import features
from enat_jax.inference import generator, model_directory, tokenizer
from enat_jax.runtime import agreement, exits, files, numerics, os_errors, paths, sharding, versions
from enat_jax.training import config as train_config
from enat_jax.training import enat_task, outlook, vqgan_task
from enat_jax.training.task import Task, TrainState


def trained(
    config: ml_collections.ConfigDict,
    task: enat_task.Task | vqgan_task.Task,
    params: PyTree,
    step: int,
) -> generator.Generator | tokenizer.Tokenizer:
    """Returns what a run has made: a generator, or a tokenizer where it trains one.

    Args:
        config: of the run.
        task: what ``train_config.build`` made of it.
        params: those to keep, of a transformer the averages; numpy arrays.
        step: that they are of.
    """
    origin = provenance(config, task, step)
    if isinstance(task, vqgan_task.Task):
        height, width, _ = task.source.image_shape
        return tokenizer.Tokenizer(task.model, params, (height, width), origin)
    names = tuple(task.tokens.class_names) if task.model.num_classes else ()
    return generator.Generator(
        *(task.model, params, task.tokenizer, names, task.sampler, origin), text=task.text
    )


def provenance(config: ml_collections.ConfigDict, task: Task, step: int) -> dict[str, Any]:
    """Returns where weights come from, as JSON values: settings, step, data, versions."""
    return {
        "config": json.loads(config.to_json_best_effort()),
        "step": step,
        "data": files.as_json(task.data_identity()),
        "versions": versions.library_versions(),
    }


def weights(state: TrainState) -> PyTree:
    """Returns the parameters of the model that a run makes, as numpy arrays on every process."""
    return sharding.to_host(state.evaluated)


def save(
    config: ml_collections.ConfigDict, task: Any, params: PyTree, step: int, directory: pathlib.Path
) -> None:
    """Writes the model directory of a run of any task and opens it; arguments as in ``trained``."""
    if config.task != "classifier":
        made = trained(config, task, params, step)
        made.save(directory)
        agreement.broadcast_from_first(lambda: None)  # which writes the last file
        model_directory.check(made, directory)
        return
    size, origin = task.source.image_shape[:2], provenance(config, task, step)
    features.save_trained(directory, task.model, params, size, config.data.source, origin)
    agreement.broadcast_from_first(lambda: None)
    features.load_trained(directory)


def of_run(
    workdir: str | os.PathLike, step: int | None = None
) -> generator.Generator | tokenizer.Tokenizer:
    """Returns the newest model of a run's directory, or that of a step; changes nothing there.

    Args:
        workdir: of ``train``.
        step: of a checkpoint or of the finished model; None: the newest.

    Raises:
        OSError: this is no run's directory, or it has no checkpoint yet.
        ValueError: there is no such step, or it is damaged.
    """
    workdir = paths.place(workdir)
    steps = _steps(workdir)
    for name in ("model.json", "tokenizer.json"):
        if (workdir / name).is_file():
            raise ValueError(f"{workdir} is a model and no run: name it by --model")
        if (workdir / "model" / name).is_file():
            found = model_directory.load(workdir / "model")
            finished = found.provenance.get("step", -1)
            # A run that was made longer has newer checkpoints than its model.
            if step == finished or (step is None and finished >= max(steps, default=-1)):
                return found
    return _of_checkpoint(workdir, steps, step)


def _steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints, in order."""
    directory = workdir / "checkpoints"
    found = directory.iterdir() if directory.is_dir() else ()
    complete = (path for path in found if path.name.isdecimal() and orbax_paths.is_complete(path))
    return sorted(int(path.name) for path in complete)


def _of_checkpoint(
    workdir: pathlib.Path, steps: list[int], step: int | None
) -> generator.Generator | tokenizer.Tokenizer:
    path = workdir / "config.json"
    advice = "name the --workdir of a run of python -m enat_jax.train"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: {advice}")
    if not steps:
        raise FileNotFoundError(f"{workdir} has neither a finished model nor a checkpoint yet")
    if step is not None and step not in steps:
        raise ValueError(f"{workdir} has no checkpoint of step {step}: it has {steps}")
    config = ml_collections.ConfigDict(files.read_json(path, advice))
    if config.get("task") not in ("enat", "vqgan"):
        raise ValueError(f"{workdir} trains neither a transformer nor a tokenizer")
    *_, task = train_config.build(config)
    assert isinstance(task, enat_task.Task | vqgan_task.Task)
    damaged = []
    for candidate in reversed(steps) if step is None else [step]:
        params, damage = _read(workdir / "checkpoints" / str(candidate), config, task)
        if not damage:
            if start := outlook.of_average(task.loss, candidate):
                print(f"[export] {start}", flush=True)
            return trained(config, task, params, candidate)
        damaged.append(f"step {candidate}: {damage}")
        print(f"[export] checkpoint cannot be read, {damaged[-1]}", flush=True)
    raise ValueError(f"no checkpoint in {workdir} can be read ({'; '.join(damaged)})")


def _read(
    path: pathlib.Path, config: ml_collections.ConfigDict, task: Task
) -> tuple[PyTree, str | None]:
    """Reads the parameters to keep from a checkpoint; returns them, and what is damaged or None.

    ``Checkpointer`` would set aside what is damaged or newer, but the run may be under way.
    """
    described, damage = manifest.read(path)
    if described is None:
        return None, damage
    state = numerics.eval_shape(task.init, numerics.key(0))
    expected = train_config.identity(config, task)
    expected["numerics"] = described["config"].get("numerics", {})  # nothing is computed here
    differences = manifest.differences(described, expected, state, train_config.complete_identity)
    if differences:
        raise ValueError(f"{path} is not of the run's config.json: {differences}")
    name = "ema_params" if state.ema_params else "params"
    wanted = {name: getattr(state, name)}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(orbax_paths.of(path) / "state", args=args)
    except model_files.DAMAGE as error:
        os_errors.pass_on(os_errors.below(path) or error, path)
        return None, exits.one_line(error, named=True)
    changed = manifest.changed(described, found)
    return found[name], f"the contents of {changed} have changed" if changed else None
