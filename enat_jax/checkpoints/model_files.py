"""Files of model directories: weights in two formats, and the JSON of settings beside them."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from enat_jax.checkpoints import checkpoint, weight_files
from enat_jax.runtime import files

WEIGHTS = ("orbax", "safetensors")  # formats of weights; a directory may have one or both
DTYPES = ("float32", "bfloat16")  # that weights may be loaded in; they are saved in float32


def settings_of(module):
    """The fields of a Linen module (or dataclass) as JSON values."""
    names = {f.name for f in dataclasses.fields(module)} - {"parent", "name"}
    values = {name: getattr(module, name) for name in sorted(names)}
    return {k: np.dtype(v).name if k == "dtype" else v for k, v in values.items()}


def settings_from(values):
    """Keyword arguments from what ``settings_of`` gave and JSON turned into lists: tuples again."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def flat(params):
    """``{"encoder/out/kernel": array, ...}`` of a nested dict, as numpy arrays: what a file has."""
    return traverse_util.flatten_dict(jax.device_get(params), sep="/")


def save_weights(base, params, formats, metadata):
    """Write weights as the Orbax directory ``base``, the file `base.safetensors`, or both.

    Args:
        base: path without a suffix; its parents are created.
        params: nested dict of arrays.
        formats: of ``WEIGHTS``.
        metadata: str to str, for the head of the safetensors file.

    Raises:
        ValueError: ``formats`` is empty or has another one.
        OSError: it cannot be written.
    """
    if not formats or not set(formats) <= set(WEIGHTS):
        raise ValueError(f"formats {list(formats)} of weights: choose from {', '.join(WEIGHTS)}")
    base = pathlib.Path(base)
    if "orbax" in formats:
        checkpoint.save_params(base, params)
    if "safetensors" in formats and jax.process_index() == 0:
        weight_files.write_safetensors(_safetensors(base), flat(params), metadata)


def load_weights(base):
    """Read what ``save_weights`` wrote, Orbax if it is there: a nested dict of numpy arrays.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: they are damaged.
    """
    base = pathlib.Path(base)
    try:
        return checkpoint.load_params(base)
    except FileNotFoundError as error:
        if not _safetensors(base).is_file():
            raise FileNotFoundError(
                f"no parameters at {base}: neither an Orbax directory nor "
                f"{_safetensors(base).name}; copy the whole model directory again"
            ) from error
    tensors = weight_files.read(_safetensors(base))
    try:
        return traverse_util.unflatten_dict(tensors, sep="/")
    except TypeError as error:  # a name that is another one's folder
        raise ValueError(f"{_safetensors(base)} has no weights of such a model") from error


def _safetensors(base):
    return base.with_name(f"{base.name}.safetensors")


def cast(params, dtype):
    """A nested dict of arrays, its floats in ``dtype``.

    Raises:
        ValueError: ``dtype`` is not one of ``DTYPES``.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} of a model: choose {' or '.join(DTYPES)}")
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: x.astype(dtype) if floats(x) else x, params)


def write_json(path, values):
    """Write JSON, whole or not at all; parents are created."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    files.write(path, text.encode())


def read_json(path, expected_format, advice):
    """Read a description and check that it is of the expected format.

    Args:
        path: of the file.
        expected_format: what its field ``format`` must say.
        advice: what a user without such a file should do.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or of another format.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: {advice}")
    values = files.read_json(path, advice)
    found = values.get("format") if isinstance(values, dict) else None
    if found != expected_format:
        if _is_newer(found, expected_format):
            advice = "it is of a newer version of enat_jax, update this one"
        raise ValueError(f"{path} is of format {found!r}, not {expected_format!r}: {advice}")
    return values


def _is_newer(found, expected):
    """Whether "enat_jax model 3" was found and "enat_jax model 2" expected."""
    parts = [re.fullmatch(r"(.+) (\d{1,9})", str(text)) for text in (found, expected)]
    return all(parts) and parts[0][1] == parts[1][1] and int(parts[0][2]) > int(parts[1][2])
