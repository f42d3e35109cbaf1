"""Weights of model directories in two formats, and what all models with weights have in common."""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from enat_jax.checkpoints import orbax_paths, weight_files
from enat_jax.runtime import exits, os_errors, sharding

WEIGHTS = ("orbax", "safetensors")  # formats of weights; a directory may have one or both
DTYPES = ("float32", "bfloat16")  # that weights may be loaded in; they are saved in float32
# What Orbax and TensorStore raise over parameters whose files are missing or cut. Anything else,
# such as a lack of memory or of permission, says nothing about them and is passed on.
DAMAGE = (ValueError, KeyError, FileNotFoundError, NotADirectoryError)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model with its weights.

    Attributes:
        model: a Linen module.
        params: its (EMA) parameters, a nested dict of arrays.
        devices: of this process, that images are divided over; empty: the first one.
        saved_fingerprint: of the weights on disk, where ``params`` are those in another dtype.
    """

    model: Any
    params: PyTree
    devices: tuple[jax.Device, ...] = dataclasses.field(default=(), kw_only=True)
    saved_fingerprint: str | None = dataclasses.field(default=None, kw_only=True)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights in float32, hexadecimal."""
        return self.saved_fingerprint or fingerprint(self.params)

    def described(self, *details: str) -> str:
        """Returns one line for ``repr``, which would else print all weights."""
        count = sum(x.size for x in jax.tree.leaves(self.params))
        kind = type(self.model).__name__
        return f"{type(self).__name__}({', '.join([kind, f'{count:,} parameters', *details])})"

    def with_dtype(self, dtype: str) -> Self:
        """Returns the same with weights and computation in ``dtype``, "float32" or "bfloat16"."""
        return dataclasses.replace(
            self,
            model=self.model.clone(dtype=dtype),
            params=cast(self.params, dtype),
            saved_fingerprint=self.fingerprint,
        )

    @functools.cached_property
    def placed(self) -> tuple[jax.sharding.Mesh, PyTree]:
        """The mesh of ``devices``, and the parameters on all of them."""
        mesh = sharding.make_mesh(sharding.Sharding(), self.devices or jax.local_devices()[:1])
        return mesh, jax.device_put(self.params, sharding.replicated(mesh))

    def on_devices(self, dtype: str | None) -> Self:
        """Returns the same in ``dtype``, if it is not None, with its parameters on ``devices``."""
        found = self if dtype is None else self.with_dtype(dtype)
        # They are sent once: what is on the devices already is not sent again.
        return dataclasses.replace(found, params=found.placed[1])

    def save_weights(self, base: pathlib.Path, formats: Collection[str], format: str) -> None:
        """Writes the Orbax directory ``base``, the file ``base.safetensors``, or both.

        Args:
            base: path without a suffix; its parents are created.
            formats: of ``WEIGHTS``.
            format: of the description beside them, for the head of the safetensors file.

        Raises:
            ValueError: the weights were loaded in another dtype than they were saved in, or
                ``formats`` is empty or has an unknown one.
            OSError: they cannot be written.
        """
        if self.saved_fingerprint not in (None, fingerprint(self.params)):
            raise ValueError("weights were rounded when they were loaded: save those on disk")
        if not formats or not set(formats) <= set(WEIGHTS):
            raise ValueError(
                f"formats {list(formats)} of weights: choose from {', '.join(WEIGHTS)}"
            )
        if "orbax" in formats:
            save_params(base, self.params)
        if "safetensors" in formats and jax.process_index() == 0:
            metadata = {"format": format, "fingerprint": self.fingerprint}
            weight_files.write_safetensors(_safetensors(base), flat(self.params), metadata)


def settings_of(module: Any) -> dict[str, Any]:
    """Returns the fields of a Linen module (or dataclass) as JSON values."""
    names = {f.name for f in dataclasses.fields(module)} - {"parent", "name"}
    values = {name: getattr(module, name) for name in sorted(names)}
    return {k: np.dtype(v).name if k == "dtype" else v for k, v in values.items()}


def settings_from(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns keyword arguments from what ``settings_of`` gave, with tuples in place of lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def flat(params: PyTree) -> dict[str, np.ndarray]:
    """Returns the arrays of a nested dict by names such as "encoder/out/kernel"."""
    return traverse_util.flatten_dict(jax.device_get(params), sep="/")


def load_weights(base: pathlib.Path, expected_fingerprint: str) -> dict[str, Any]:
    """Reads what ``TrainedModel.save_weights`` wrote.

    Args:
        base: path without a suffix. The Orbax directory is read if it is there.
        expected_fingerprint: of the weights.

    Returns:
        Nested dict of numpy arrays.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: they are damaged, or not those of ``expected_fingerprint``.
    """
    file = _safetensors(base)
    try:
        unusable = file.is_file() and orbax_paths.refusal(base)
        params = _load_file(file) if unusable else load_params(base)
    except FileNotFoundError as error:
        if not file.is_file():
            raise FileNotFoundError(
                f"no parameters at {base}: neither an Orbax directory nor {file.name}; "
                "copy the whole model directory again"
            ) from error
        params = _load_file(file)
    if fingerprint(params) != expected_fingerprint:
        raise ValueError(f"the weights in {base.parent} are not those that were saved: damaged")
    return params


def _load_file(file: pathlib.Path) -> dict[str, Any]:
    try:
        return traverse_util.unflatten_dict(weight_files.read(file), sep="/")
    except TypeError as error:  # a name that is another one's folder
        raise ValueError(f"{file} has no weights of such a model") from error


@contextlib.contextmanager
def parsing(path: pathlib.Path) -> Iterator[None]:
    """Within, a field of a description that is missing or wrong becomes a ValueError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _safetensors(base: pathlib.Path) -> pathlib.Path:
    return base.with_name(f"{base.name}.safetensors")


def cast(params: PyTree, dtype: str) -> PyTree:
    """Returns a nested dict of arrays with its floats in ``dtype``.

    Raises:
        ValueError: ``dtype`` is not one of ``DTYPES``.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} of a model: choose {' or '.join(DTYPES)}")
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: x.astype(dtype) if floats(x) else x, params)


def fingerprint(params: PyTree) -> str:
    """Returns the SHA-256 of a tree of arrays: of their paths, shapes, types and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_params(directory: str | pathlib.Path, params: PyTree) -> None:
    """Writes a pytree of arrays, atomically; an earlier one in ``directory`` is replaced.

    The directory holds nothing else. Every process must call this. A process killed at any moment
    leaves the earlier or the new parameters to ``load_params``, whole.

    Args:
        directory: to be created; its parents too.
        params: nested dict of arrays, of any sharding.

    Raises:
        ValueError: Orbax cannot use such a directory; nothing is written.
        OSError: they cannot be written.
    """
    import orbax.checkpoint as ocp  # late: 290 modules, which safetensors files do not need

    final = orbax_paths.absolute(directory)
    orbax_paths.of(final)  # refuses what Orbax cannot use, before there is anything
    renamed = isinstance(final, pathlib.Path)  # in a bucket what describes the model comes last
    fresh, old = _sibling(final, "new") if renamed else final, _sibling(final, "old")
    if jax.process_count() > 1:  # arrays that each process has for itself, the first one writes
        params = jax.tree.map(_local_as_numpy, params)
    first = jax.process_index() == 0
    if first:
        final.parent.mkdir(parents=True, exist_ok=True)
    multihost_utils.sync_global_devices("save_params: parents")
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(orbax_paths.of(fresh), args=ocp.args.PyTreeSave(params), force=True)
    except Exception as error:  # TensorStore says in a ValueError that the disk is full
        os_errors.pass_on(error, final)
        raise
    if first and renamed:
        # There is no way to exchange two directories at once: `old` covers the gap.
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        fresh.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    multihost_utils.sync_global_devices("save_params: done")


def load_params(directory: str | pathlib.Path) -> dict[str, Any]:
    """Reads what ``save_params`` wrote, as numpy arrays, whatever devices there are or were.

    Raises:
        FileNotFoundError: if there are no parameters at ``directory``.
        ValueError: if they are damaged.
    """
    final = orbax_paths.absolute(directory)
    source = final if final.is_dir() else _sibling(final, "old")
    if not source.is_dir():
        raise FileNotFoundError(f"no parameters at {final}: not a directory")
    import orbax.checkpoint as ocp  # late, as in `save_params`

    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            place = orbax_paths.of(source)
            described = checkpointer.metadata(place).item_metadata
            if described is None:
                raise ValueError("what describes them is missing")
            tree = described.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return checkpointer.restore(place, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except (*DAMAGE, AttributeError) as error:
        os_errors.pass_on(os_errors.below(final) or error, final)
        raise ValueError(
            f"the parameters at {final} cannot be read; write or copy them again "
            f"({exits.one_line(error, named=True)})"
        ) from error


def _local_as_numpy(x: Any) -> Any:
    return jax.device_get(x) if isinstance(x, jax.Array) and x.is_fully_addressable else x


def _sibling(path: pathlib.Path, suffix: str) -> pathlib.Path:
    return path.with_name(f".{path.name}.{suffix}")
