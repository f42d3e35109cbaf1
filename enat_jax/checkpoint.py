"""Training states on disk, and the parameters of finished models. Orbax does the writing.

A save becomes visible by a rename after its last byte, so a process may be killed at any moment.
Every state is stored with two descriptions of itself: what the caller says must match when it is
restored (`meta`), and the path, shape and dtype of each array. Both are compared before anything
is read, so a checkpoint that does not fit and one that is damaged are never confused.
"""

import json
import logging
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

# What Orbax and TensorStore raise over missing or cut files. Anything else, such as a lack of
# memory or of permission, says nothing about the checkpoint and is passed on.
DAMAGE = (ValueError, KeyError, FileNotFoundError, NotADirectoryError)

_log = logging.getLogger(__name__)


class Checkpointer:
    """The newest checkpoints of one run, written in the background.

    Use as a context manager, or call `close`: leaving before a save is complete loses that save.

    Args:
      directory: of this run's checkpoints alone; created if missing.
      save_every: steps between saves, positive.
      keep: how many of the newest checkpoints stay, positive. With two, a damaged newest one
        leaves another to go on from.
    """

    def __init__(self, directory: str | pathlib.Path, save_every: int, keep: int = 2):
        if save_every < 1 or keep < 1:
            raise ValueError(f"{save_every=} and {keep=} must be positive")
        self._directory = pathlib.Path(directory).absolute()
        self._save_every = save_every
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(keep)
            ),
        )

    def save(self, step: int, state: Any, meta: Mapping[str, Any], force: bool = False) -> bool:
        """Starts to save `state` if `step` is a multiple of `save_every`; says if it did.

        Returns as soon as the arrays are copied: the caller may donate them at once. An error of
        the writing itself is raised by the next `save`, `wait` or `close`.

        Args:
          step: steps done so far. A step that is already on disk is not saved again.
          state: pytree of arrays.
          meta: plain JSON values: all that must be equal for the state to be of use later.
          force: save at any step, for instance the last.
        """
        step = int(step)
        if not (force or step % self._save_every == 0) or step in self._manager.all_steps():
            return False
        described = {"config": _as_json(meta), "tree": _describe(state)}
        # The interval was decided above; `force` keeps Orbax from deciding once more.
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(described)
            ),
            force=True,
        )

    def restore_latest(
        self, abstract_state: Any, expected_meta: Mapping[str, Any]
    ) -> tuple[Any, int] | None:
        """Returns the newest readable state and its step, or None if there is no checkpoint.

        A damaged checkpoint is reported as an error in the log and renamed to `STEP.damaged` once
        an older one has been read in its place; training then goes on from there.

        Args:
          abstract_state: the state's tree of `jax.ShapeDtypeStruct` with shardings: the devices
            and the sharding may differ from those at the time of saving.
          expected_meta: compared with the `meta` that was saved.

        Raises:
          ValueError: if the checkpoint's meta or arrays are not the expected ones, which are then
            named; or if there are checkpoints but all are damaged.
        """
        _require_shardings(abstract_state)
        self.wait()
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                args = ocp.args.Composite(meta=ocp.args.JsonRestore())
                described = self._manager.restore(step, args=args)["meta"]
                saved_meta, saved_tree = described["config"], described["tree"]
            except (*DAMAGE, TypeError) as error:
                damaged[step] = _first_line(error)
                continue
            self._require_fit(step, saved_meta, saved_tree, abstract_state, expected_meta)
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
                state = self._manager.restore(step, args=args)["state"]
            except DAMAGE as error:
                damaged[step] = _first_line(error)
                continue
            if damaged:
                self._set_aside(damaged, step)
            return state, step
        if damaged:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise ValueError(
                f"every checkpoint in {self._directory} is damaged ({reasons}); "
                "delete the directory to start from the beginning"
            )
        return None

    def wait(self) -> None:
        """Returns when the last save is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and lets go of the directory."""
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _require_fit(self, step, saved_meta, saved_tree, abstract_state, expected_meta) -> None:
        differences = _differences(saved_meta, _as_json(expected_meta))
        differences += _differences(saved_tree, _describe(abstract_state))
        if not differences:
            return
        shown = "; ".join(differences[:8])
        if len(differences) > 8:
            shown += f"; and {len(differences) - 8} more"
        raise ValueError(
            f"the checkpoint of step {step} in {self._directory} is of another configuration: "
            f"{shown}. Restore these settings or use another directory"
        )

    def _set_aside(self, damaged: Mapping[int, str], used: int) -> None:
        for step, reason in damaged.items():
            _log.error(
                "CHECKPOINT DAMAGED: step %d in %s cannot be read (%s). Going on from step %d; "
                "the damaged one is now %d.damaged",
                step,
                self._directory,
                reason,
                used,
                step,
            )
            if jax.process_index() == 0:
                aside = self._directory / f"{step}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                (self._directory / str(step)).rename(aside)
        # Otherwise the step could not be saved again when training reaches it.
        multihost_utils.sync_global_devices("checkpoint: damaged steps set aside")
        self._manager.reload()


def save_params(directory: str | pathlib.Path, params: Any) -> None:
    """Writes a pytree of arrays, atomically; an earlier one in `directory` is replaced.

    The directory holds nothing else. Every process must call this. A process killed at any moment
    leaves the earlier or the new parameters to `load_params`, whole.

    Args:
      directory: to be created; its parents too.
      params: nested dict of arrays, of any sharding.
    """
    final = pathlib.Path(directory).absolute()
    fresh, old = _sibling(final, "new"), _sibling(final, "old")
    first = jax.process_index() == 0
    if first:
        final.parent.mkdir(parents=True, exist_ok=True)
    multihost_utils.sync_global_devices("save_params: parents")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(fresh, args=ocp.args.PyTreeSave(params), force=True)
    if first:
        # There is no way to exchange two directories at once: `old` covers the gap.
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        fresh.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    multihost_utils.sync_global_devices("save_params: done")


def load_params(directory: str | pathlib.Path) -> dict:
    """Reads what `save_params` wrote, as numpy arrays, whatever devices there are or were.

    Raises:
      FileNotFoundError: if there are no parameters at `directory`.
      ValueError: if they are damaged.
    """
    final = pathlib.Path(directory).absolute()
    source = final if final.is_dir() else _sibling(final, "old")
    if not source.is_dir():
        raise FileNotFoundError(f"no parameters at {final}: not a directory")
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(source).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return checkpointer.restore(source, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except (*DAMAGE, AttributeError) as error:
        raise ValueError(
            f"the parameters at {final} cannot be read; write or copy them again "
            f"({_first_line(error)})"
        ) from error


def _sibling(path: pathlib.Path, suffix: str) -> pathlib.Path:
    return path.with_name(f".{path.name}.{suffix}")


def _as_json(meta: Mapping[str, Any]) -> Any:
    """What `meta` looks like after a way through a file: tuples are lists, keys are strings."""
    return json.loads(json.dumps(meta))


def _describe(tree: Any) -> dict[str, str]:
    """`{path: 'float32[3, 4]'}` of every array."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        )
        for path, leaf in leaves
    }


def _require_shardings(abstract_state: Any) -> None:
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_state)
    for path, leaf in leaves:
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name} of the abstract state has no sharding; give one to each leaf")


def _differences(saved: Any, expected: Any, path: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(expected, dict):
        found = []
        for key in sorted(saved.keys() | expected.keys()):
            inner = f"{path}.{key}" if path else key
            if key not in expected:
                found.append(f"{inner} is only in the checkpoint ({saved[key]})")
            elif key not in saved:
                found.append(f"{inner} is missing in the checkpoint ({expected[key]} expected)")
            else:
                found += _differences(saved[key], expected[key], inner)
        return found
    if saved == expected:
        return []
    return [f"{path} is {saved} in the checkpoint but {expected} is expected"]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:200]}"
