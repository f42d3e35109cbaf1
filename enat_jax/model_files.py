"""The JSON side of model directories: settings that rebuild a module, written whole or not."""

import dataclasses
import json
import pathlib

import numpy as np

from enat_jax.data import whole_files


def settings_of(module):
    """The fields of a Linen module (or dataclass) as JSON values."""
    names = {f.name for f in dataclasses.fields(module)} - {"parent", "name"}
    values = {name: getattr(module, name) for name in sorted(names)}
    return {k: np.dtype(v).name if k == "dtype" else v for k, v in values.items()}


def settings_from(values):
    """Keyword arguments from what ``settings_of`` gave and JSON turned into lists: tuples again."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def write_json(path, values):
    """Write JSON, whole or not at all; parents are created."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    whole_files.write(path, text.encode())


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
    values = whole_files.read_json(path, advice)
    found = values.get("format") if isinstance(values, dict) else None
    if found != expected_format:
        raise ValueError(f"{path} is of format {found!r}, not {expected_format!r}: {advice}")
    return values
