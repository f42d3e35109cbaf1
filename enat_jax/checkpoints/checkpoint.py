"""Training states on disk, and the parameters of finished models. Orbax does the writing.

A save becomes visible by a rename after its last byte, in a bucket by a last object, so a process
may be killed at any moment.
Every state is stored with a description of itself: what the caller says must match when it is
restored (``meta``), and the path, shape, dtype and checksum of each array. It is compared before
and after the arrays are read, so that a checkpoint that does not fit and one that is damaged are
never confused, and no array comes back other than it was saved.

With several processes, each method is to be called by all of them, on a file system that they
share. All come to the same result: the first one reads the descriptions, and an array that one
process cannot read is damaged for all.
"""

import functools
import itertools
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from enat_jax.checkpoints import best as best_checkpoint
from enat_jax.checkpoints import manifest, orbax_paths
from enat_jax.runtime import agreement, exits, files, os_errors

_log = logging.getLogger(__name__)


class Checkpointer:
    """The checkpoints of one run, written in the background.

    Use as a context manager, or call ``close``: leaving before a save is complete loses that save.

    Args:
        directory: of this run's checkpoints alone; created if missing. A ValueError names one that
            Orbax cannot use, before anything is written.
        save_every: steps between saves, positive.
        keep: how many of the newest checkpoints stay, positive. With two, a damaged newest one
            leaves another to go on from.
        keep_every: checkpoints at multiples of so many steps stay for good; a multiple of
            ``save_every``.
        best: the best checkpoint by this metric stays until there is a better one.
        complete: see ``manifest.differences``.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        save_every: int,
        keep: int = 2,
        keep_every: int | None = None,
        best: best_checkpoint.Best | None = None,
        complete: manifest.Complete = dict,
    ):
        if save_every < 1 or keep < 1:
            raise ValueError(f"{save_every=} and {keep=} must be positive")
        if keep_every is not None and (keep_every < 1 or keep_every % save_every):
            raise ValueError(f"{keep_every=} must be a positive multiple of {save_every=}")
        self._directory = orbax_paths.absolute(directory)
        self._save_every = save_every
        self._complete = complete
        self.best = None if best is None else best_checkpoint.KeepBest(best)
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_every is not None:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        if self.best is not None:
            policies.append(self.best)
        self._manager = ocp.CheckpointManager(
            orbax_paths.of(self._directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                # Where that fails, the threads that are to write wait in vain for five minutes.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )
        if self.best is not None:
            for step, metrics in agreement.broadcast_from_first(self._evaluations):
                self.best.note(step, metrics)

    def save(
        self,
        step: int,
        state: PyTree,
        meta: Mapping[str, Any],
        force: bool = False,
    ) -> bool:
        """Starts to save ``state`` if ``step`` is a multiple of ``save_every``; says if it did.

        Returns as soon as the arrays are copied: the caller may donate them at once.

        Args:
            step: steps done so far. A step that is already on disk is not saved again.
            state: pytree of ``jax.Array``.
            meta: plain JSON values: all that must be equal for the state to be of use later.
            force: save at any step, for instance the last.

        Raises:
            OSError: this or the last save could not be written.
            ValueError: something in ``state`` is not a ``jax.Array``.
        """
        step = int(step)
        if not (force or step % self._save_every == 0) or step in self._steps():
            return False
        self.wait()
        described = manifest.make(state, meta)
        if self.best is not None:
            self.best.note(step, {})  # until it is evaluated
        if jax.process_index() == 0:  # what killed or failed saves left would stay for ever
            for path in self._unfinished():
                files.remove_tree(path)
        try:
            # The interval was decided above; `force` keeps Orbax from deciding once more.
            return self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(described)
                ),
                force=True,
            )
        except OSError as error:
            raise self._not_saved(error) from error

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes on disk what an evaluation of the state of ``step`` gave, once that is saved.

        Without a finite value of the metric of ``best``, the checkpoint never counts as the best.
        With several processes, the metrics of the first one count.

        Raises:
            OSError: the state or the note could not be written.
        """
        self.wait()
        path = self._directory / str(step)
        write = functools.partial(manifest.write_evaluation, path, metrics)
        metrics = agreement.broadcast_from_first(write)
        if self.best is not None:
            self.best.note(step, metrics)

    def is_evaluated(self, step: int) -> bool:
        """Says whether an evaluation of the state of ``step`` has been completed."""
        path = self._directory / str(step)
        return agreement.broadcast_from_first(lambda: manifest.evaluation(path) is not None)

    def restore(
        self, abstract_state: PyTree, expected_meta: Mapping[str, Any], step: int | None = None
    ) -> tuple[PyTree, int] | None:
        """Returns the newest readable state and its step, or None if there is no checkpoint.

        A damaged checkpoint is reported as an error in the log and renamed to ``STEP.damaged`` once
        an older one has been read in its place; training then goes on from there.

        Args:
            abstract_state: the state's tree of ``jax.ShapeDtypeStruct`` with shardings: the
                devices, their number and the sharding may differ from those at the time of saving.
            expected_meta: compared with the ``meta`` that was saved.
            step: restore this one and no other. Newer ones are then renamed to ``STEP.set_aside``,
                so that training can save these steps again.

        Raises:
            ValueError: if the checkpoint's meta or arrays are not the expected ones, which are then
                named; if there are checkpoints but all are damaged; if ``step`` is not there or
                damaged.
            OSError: if files cannot be read or renamed for another reason than damage.
        """
        _require_shardings(abstract_state)
        self.wait()
        steps = agreement.broadcast_from_first(self._steps)
        if step is not None and step not in steps:
            raise ValueError(f"no checkpoint of step {step} in {self._directory}: {steps=}")
        damaged: dict[int, str] = {}
        for candidate in reversed(steps) if step is None else [step]:
            try:
                state = self._read(candidate, abstract_state, expected_meta)
            except _Damaged as damage:
                damaged[candidate] = str(damage)
                continue
            newer = [other for other in reversed(steps) if other > candidate]
            self._set_aside({other: damaged.get(other) for other in newer}, used=candidate)
            return state, candidate
        if step is not None:
            raise ValueError(
                f"the checkpoint of step {step} in {self._directory} is damaged ({damaged[step]}); "
                f"the other steps there are {[other for other in steps if other != step]}"
            )
        if damaged:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise ValueError(
                f"every checkpoint in {self._directory} is damaged ({reasons}); "
                "move the directory away to start from the beginning"
            )
        return None

    def read_back(self, step: int, state: PyTree, meta: Mapping[str, Any]) -> PyTree:
        """Returns what was saved of ``state``, having compared it with its checksums.

        ``state`` is deleted from the devices first, which may not have room for two.

        Raises:
            ValueError: the checkpoint is damaged.
            OSError: it cannot be written or read.
        """
        self.wait()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        jax.tree.map(lambda x: x.delete(), state)
        found = self.restore(abstract, meta, step)
        assert found is not None  # a step that is named is there, or ``restore`` raises
        return found[0]

    def all_steps(self) -> list[int]:
        """Returns the steps on disk in ascending order, once the last save is complete."""
        self.wait()
        return self._steps()

    def wait(self) -> None:
        """Returns when the last save is complete on disk.

        Raises:
            OSError: it could not be written. Earlier checkpoints are still there.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # whatever may end a thread that writes
            self._manager.reload()  # the steps that the failed save would have taken the place of
            raise self._not_saved(error) from error

    def close(self) -> None:
        """Waits for the last save and lets go of the directory; raises what ``wait`` does."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.close()
        except OSError as not_saved:
            if error is None:
                raise
            _log.error("%s", not_saved)  # the first error is the one to be raised

    def _read(self, step: int, abstract_state: PyTree, expected_meta: Mapping[str, Any]) -> PyTree:
        """Reads the state of ``step``.

        Raises:
            _Damaged: it cannot be read back as it was.
            ValueError: it is of another configuration.
        """
        path = self._directory / str(step)
        described, damage = agreement.broadcast_from_first(functools.partial(manifest.read, path))
        if described is None:
            raise _Damaged(damage)
        differences = manifest.differences(described, expected_meta, abstract_state, self._complete)
        if differences:
            raise ValueError(
                f"the checkpoint of step {step} in {self._directory} is of another configuration: "
                f"{differences}. Restore these settings or use another directory"
            )
        state = _read_arrays(path, abstract_state)
        changed = manifest.changed(described, state)
        failure = _Damaged(f"the contents of {changed} have changed") if changed else None
        agreement.raise_on_all(failure, minor=_Damaged)
        return state

    def _set_aside(self, reasons: Mapping[int, str | None], used: int) -> None:
        """Renames checkpoints: otherwise training could not save their steps again."""
        if not reasons:
            return

        def rename() -> list[str]:
            names = []
            for step, reason in reasons.items():
                path = self._directory / str(step)
                name = _free_name(path.with_suffix(".damaged" if reason else ".set_aside"))
                path.rename(name)
                names.append(name.name)
            return names

        for (step, reason), name in zip(
            reasons.items(), agreement.broadcast_from_first(rename), strict=True
        ):
            if reason:
                _log.error(
                    "CHECKPOINT DAMAGED: step %d in %s cannot be read (%s). Going on from step "
                    "%d; the damaged one is now %s",
                    *(step, self._directory, reason, used, name),
                )
            else:
                _log.warning(
                    "going on from step %d in %s as asked; the checkpoint of step %d is now %s",
                    *(used, self._directory, step, name),
                )
        self._manager.reload()

    def _evaluations(self) -> list[tuple[int, dict[str, float | None]]]:
        read = {step: manifest.evaluation(self._directory / str(step)) for step in self._steps()}
        return [(step, found) for step, found in read.items() if found is not None]

    def _unfinished(self) -> list[pathlib.Path]:
        if isinstance(self._directory, pathlib.Path):
            return list(self._directory.glob("*.orbax-checkpoint-tmp"))
        found = self._directory.iterdir() if self._directory.exists() else ()
        return [x for x in found if x.name.isdecimal() and not orbax_paths.is_complete(x)]

    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def _not_saved(self, error: Exception) -> OSError:
        fault = os_errors.behind(error, self._directory)
        reason = os_errors.words(fault) if fault else exits.one_line(error, named=True)
        return OSError(
            f"a checkpoint could not be written to {self._directory} ({reason}); "
            "earlier ones are still there: see to the disk and start again"
        )


class _Damaged(Exception):
    """What was saved cannot be read back as it was."""


def _read_arrays(path: pathlib.Path, abstract_state: PyTree) -> PyTree:
    """Reads without Orbax's barriers, in which others would wait for a process that failed."""
    state: PyTree = None
    failure: Exception | None = None
    handler = ocp.StandardCheckpointHandler()
    try:
        args = ocp.args.StandardRestore(abstract_state)
        state = handler.restore(orbax_paths.of(path) / "state", args=args)
    except Exception as error:  # all of them, so that the other processes learn of it
        cause = error.__cause__ or error  # Orbax wraps TensorStore's errors
        failure = os_errors.behind(error, path) or os_errors.below(path)
        if failure is None:
            failure = error if _is_no_damage(cause) else _Damaged(exits.one_line(cause, named=True))
    finally:
        handler.close()
    agreement.raise_on_all(failure, minor=_Damaged)
    return state


def _is_no_damage(error: BaseException) -> bool:
    """Says no of files that are missing; a changed byte may lead to an error of any other type."""
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return isinstance(error, OSError | RuntimeError) and not missing


def _free_name(path: pathlib.Path) -> pathlib.Path:
    """``path``, or the first of ``path.2``, ``path.3`` and so on that is not taken."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def _require_shardings(abstract_state: PyTree) -> None:
    for path, leaf in manifest.leaves(abstract_state).items():
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
            raise ValueError(f"{path} of the abstract state has no sharding; give one to each leaf")
