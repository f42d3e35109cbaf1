"""Files of an evaluation under way: whose directory it is, and rows that are written in place."""

import io
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from enat_jax.checkpoints import model_files
from enat_jax.runtime import files


def begin(
    directory: pathlib.Path, settings: Mapping[str, Any], advice: str = "name another --out"
) -> None:
    """Claim a directory for an evaluation, or find it claimed by the same.

    Several processes may do so at once. `advice`: what to do if it holds something else.

    Raises:
        ValueError: it holds something else; the message says what differs.
        OSError: it cannot be written.
    """
    path = directory / "plan.json"
    settings = json.loads(json.dumps(settings))  # as they are read again: no tuples
    # Looked at first: another host may claim it in between.
    occupied = directory.is_dir() and any(not x.name.startswith(".") for x in directory.iterdir())
    if path.exists():
        before = files.read_json(path, advice)
        if found := differences(before, settings):
            name, was, now = found[0]
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ValueError(
                f"{directory} holds an evaluation with other settings: {name} is {was}, now it "
                f"would be {now}{more}: {advice}"
            )
        return
    if occupied:
        raise ValueError(f"{directory} holds something else already: {advice}")
    model_files.write_json(path, settings)


def differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Where two trees of JSON values differ: dotted name, both values; None for a missing one."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in [*before, *(key for key in now if key not in before)]:
            inner = f"{name}.{key}" if name else str(key)
            found += differences(before.get(key), now.get(key), inner)
        return found
    return [] if before == now else [(name, before, now)]


class Rows:
    """A .npy file, float32 [n, d], whose rows are written in place."""

    def __init__(self, path: pathlib.Path, num_rows: int, width: int):
        header = io.BytesIO()
        layout = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, width)}
        np.lib.format.write_array_header_1_0(header, layout)
        self._path, self._header, self._width = path, header.getvalue(), width
        self.num_bytes = len(self._header) + 4 * num_rows * width
        self._file = None

    def __enter__(self) -> "Rows":
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        # Not a memory map: where the disk is full it would end the process, a write only fails.
        self._write(0, self._header)
        os.ftruncate(self._file, self.num_bytes)
        return self

    def __exit__(self, *exception) -> None:
        os.close(self._file)

    def write(self, first: int, rows: np.ndarray) -> None:
        data = np.ascontiguousarray(rows, "<f4").tobytes()
        self._write(len(self._header) + 4 * first * self._width, data)

    def sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            raise _of(self._path, error) from error

    def _write(self, at: int, data: bytes) -> None:
        try:
            while data:
                count = os.pwrite(self._file, data, at)
                at, data = at + count, data[count:]
        except OSError as error:
            raise _of(self._path, error) from error


def _of(path: pathlib.Path, error: OSError) -> OSError:
    """The same error, with the name of the file."""
    return OSError(error.errno, error.strerror, str(path))
