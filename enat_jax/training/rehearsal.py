"""What a run does only later and once, tried before its first step, so that no training is lost.

Evaluation, pictures, the model directory and the first checkpoint are made once of the state that
is there, and what is written is read back and removed. Nothing of the run changes by it.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping

import jax
import ml_collections
import numpy as np

from enat_jax.checkpoints import checkpoint
from enat_jax.runtime import agreement, exits, files, os_errors, png
from enat_jax.training import finished
from enat_jax.training.task import Pictured, Task, TrainState

DIRECTORY = "rehearsal"  # in that of the run, for as long as it takes

_FAILED = "before the first step, the rehearsal of {} failed"


def is_due(config: ml_collections.ConfigDict, workdir: pathlib.Path, restored: bool) -> bool:
    """Says whether there is something to try: in a new run, and in one with changed settings."""

    def changed() -> bool:
        try:
            last = files.read_json(workdir / "config.json", "")
        except (OSError, ValueError):
            return True
        return last != json.loads(config.to_json_best_effort())

    return not restored or agreement.broadcast_from_first(changed)


def rehearse(
    config: ml_collections.ConfigDict,
    task: Task,
    state: TrainState,
    mesh: jax.sharding.Mesh,
    workdir: pathlib.Path,
    *,
    pictures: bool,
    restored: bool,
) -> TrainState:
    """Does once what the run will do later; every process must call this.

    Args:
        config: of the run.
        task: what ``train_config.build`` made of it.
        state: from which the run goes on. It is written and read back, and deleted in between.
        mesh: of the run.
        workdir: of the run.
        pictures: whether evaluation makes pictures.
        restored: whether ``state`` has been read from a checkpoint, which need not be tried then.

    Returns:
        ``state``, bit for bit.

    Raises:
        OSError: something cannot be read or written.
        ValueError: something does not fit.
    """
    directory = workdir / DIRECTORY
    agreement.broadcast_from_first(lambda: files.remove_tree(directory))
    try:
        with told(_FAILED.format("evaluation")):
            found = dict(task.evaluate(state, mesh, few=True))
            if tuple(found) != tuple(task.evaluated):
                raise ValueError(f"it gives {', '.join(found)} and not {', '.join(task.evaluated)}")
        if pictures and isinstance(task, Pictured):
            with told(_FAILED.format("its pictures")):
                write_pictures(directory, dict(task.images(state, mesh)), 0)
        with told(_FAILED.format("writing the model")):
            for name in ("model", "pictures"):
                files.require_writable(workdir / name)
            finished.save(config, task, finished.weights(state), 0, directory / "model")
        if not restored:
            with (
                told(_FAILED.format("saving the state and reading it back")),
                checkpoint.Checkpointer(directory / "checkpoints", save_every=1) as checkpointer,
            ):
                checkpointer.save(0, state, {})
                state = checkpointer.read_back(0, state, {})
    finally:
        if jax.process_index() == 0:
            files.remove_tree(directory)
    return state


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Within, errors say in their one line, or below their traceback, what they have broken off.

    Raises:
        OSError, ValueError: what was raised within, after ``what`` and a colon.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        words = os_errors.words(error) or exits.one_line(error, None)
        raise OSError(f"{what}: {words}") from error
    except ValueError as error:
        raise ValueError(f"{what}: {exits.one_line(error, None)}") from error
    except Exception as error:
        error.add_note(what)
        raise


def write_pictures(directory: pathlib.Path, images: Mapping[str, np.ndarray], step: int) -> None:
    """Writes the pictures of an evaluation; every process must call this."""

    def write() -> None:
        for name, image in images.items():
            png.write_png(directory / f"{name}_{step:07d}.png", image)

    agreement.broadcast_from_first(write)
