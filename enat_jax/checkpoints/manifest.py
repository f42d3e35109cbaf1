"""What is written beside the arrays of a checkpoint, as plain JSON.

The manifest has the settings, the arrays and their checksums. What an evaluation of the state gave
is a file of its own, because the state is saved before it is evaluated.
"""

import json
import math
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from enat_jax.checkpoints import checksums
from enat_jax.runtime import files

EVALUATION = "evaluation.json"  # in the directory of a checkpoint

_MISSING = object()  # a value that is not there, other than None

Complete = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def make(state: PyTree, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Describes a state, with a checksum over the whole that shows damage to the manifest.

    Args:
        state: pytree of ``jax.Array``.
        meta: JSON values, which the caller compares when the state is restored.

    Raises:
        ValueError: something in ``state`` is not a ``jax.Array``.
    """
    for path, leaf in leaves(state).items():
        if not isinstance(leaf, jax.Array):
            raise ValueError(f"{path} of the state is a {type(leaf).__name__}, not a jax.Array")
    sums = jax.device_get(checksums.of_tree(state))
    manifest = {
        "config": files.as_json(meta),
        "tree": tree(state),
        "checksums": dict(zip(leaves(state), map(int, sums), strict=True)),
    }
    return {**manifest, "crc32": _crc(manifest)}


def read(directory: pathlib.Path) -> tuple[dict[str, Any] | None, str | None]:
    """Reads the manifest of a checkpoint; returns None and the reason instead if it is damaged."""
    try:
        # Orbax's handler would take a file that this user may not see for one that is missing.
        found = json.loads((directory / "meta" / "metadata").read_text())
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        return None, f"its meta cannot be read: {error}"
    if not isinstance(found, dict) or "crc32" not in found:
        return None, "its meta has no checksums: it is damaged or of an earlier version"
    if not _is_whole(found):
        return None, "the contents of its meta have changed"
    return found, None


def write_evaluation(
    directory: pathlib.Path, metrics: Mapping[str, float]
) -> dict[str, float | None]:
    """Writes what an evaluation gave into the directory of a checkpoint.

    Args:
        directory: of a checkpoint that is complete.
        metrics: numbers by name.

    Returns:
        ``metrics`` with None for what is not a finite number, which JSON does not have.

    Raises:
        OSError: it cannot be written.
    """
    values = {name: float(value) for name, value in metrics.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    content = {"metrics": finite}
    files.write_json(directory / EVALUATION, {**content, "crc32": _crc(content)})
    return finite


def evaluation(directory: pathlib.Path) -> dict[str, float | None] | None:
    """Returns what an evaluation of a checkpoint gave; None if none was completed.

    Earlier versions evaluated first, and then saved the state with the metrics in its manifest.
    """
    described, _ = read(directory)
    if described is None or "metrics" in described:
        return described and described["metrics"]
    try:
        found = files.read_json(directory / EVALUATION, "it is made anew")
    except (ValueError, FileNotFoundError):
        return None
    return found["metrics"] if isinstance(found, dict) and _is_whole(found) else None


def differences(
    manifest: Mapping[str, Any],
    meta: Mapping[str, Any],
    state: PyTree,
    complete: Complete = dict,
) -> str:
    """Says in what settings and arrays differ from the expected ones.

    Args:
        manifest: of the checkpoint.
        meta: expected settings.
        state: expected arrays, which may be abstract.
        complete: applied to settings before they are compared; may add what they leave out.

    Returns:
        The first eight values with what they are and what is expected; "" if the checkpoint fits.
    """
    saved, expected = (files.as_json(complete(x)) for x in (manifest["config"], meta))
    lines = []
    for before, after in ((saved, expected), (manifest["tree"], tree(state))):
        found = files.differences(before, after, missing=_MISSING)
        for name, was, now in sorted(found, key=lambda difference: difference[0]):
            if now is _MISSING:
                lines.append(f"{name} is only in the checkpoint ({was})")
            elif was is _MISSING:
                lines.append(f"{name} is missing in the checkpoint ({now} expected)")
            else:
                lines.append(f"{name} is {was} in the checkpoint but {now} is expected")
    return _shortened(lines)


def changed(manifest: Mapping[str, Any], state: PyTree) -> str:
    """Names the arrays of ``state`` whose contents are not those that were described; "" if none.

    All copies on this process's devices are compared, so that a device with faulty memory shows.
    """
    sums = checksums.of_tree(state)
    copies = jax.device_get([[shard.data for shard in x.addressable_shards] for x in sums])
    return _shortened(
        [
            path
            for path, values in zip(leaves(state), copies, strict=True)
            if any(int(value) != manifest["checksums"][path] for value in values)
        ]
    )


def leaves(state: PyTree) -> dict[str, Any]:
    """Returns the leaves in the order of ``jax.tree.leaves``, by paths such as "dense/kernel"."""
    found = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def tree(state: PyTree) -> dict[str, str]:
    """Returns the type and shape of every array by its path, such as "float32[3, 4]"."""
    return {
        path: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for path, leaf in leaves(state).items()
    }


def _crc(manifest: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _is_whole(manifest: Mapping[str, Any]) -> bool:
    rest = {key: value for key, value in manifest.items() if key != "crc32"}
    return manifest.get("crc32") == _crc(rest)


def _shortened(parts: Sequence[str]) -> str:
    more = [f"and {len(parts) - 8} more"] if len(parts) > 8 else []
    return "; ".join([*parts[:8], *more])
