"""Arrays of .npz files from anywhere: nothing is unpickled, sizes are checked before reading."""

import contextlib
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np

from enat_jax.data import records

_DAMAGE = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


class Archive:
    """The arrays of an .npz file by name; headers are read without the data."""

    def __init__(self, file: zipfile.ZipFile):
        self._file = file
        names = [name for name in file.namelist() if name.endswith(".npy")]
        self._names = {name.removesuffix(".npy"): name for name in names}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and type; they fit the number of bytes."""
        with self._file.open(self._names[name]) as file:
            shape, _, dtype = self._read_header(name, file)
            return shape, dtype

    def rows(self, name: str, number: int) -> Iterator[np.ndarray]:
        """Parts of an array ``[n, ...]``, ``number`` rows or less at a time."""
        with self._file.open(self._names[name]) as file:
            shape, by_columns, dtype = self._read_header(name, file)
            if by_columns and len(shape) > 1:
                raise ValueError(f"{name} is stored by columns")
            for start in range(0, shape[0], number):
                part = (min(number, shape[0] - start), *shape[1:])
                data = file.read(_product(part) * dtype.itemsize)
                yield np.frombuffer(data, dtype).reshape(part)

    def read(self, name: str) -> np.ndarray:
        """All of an array."""
        self.header(name)  # before memory is taken for what a damaged one may say
        with self._file.open(self._names[name]) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def _read_header(self, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        shape, by_columns, dtype = records.read_npy_header(file)
        if dtype.hasobject:
            raise ValueError(f"{name} holds pickled Python objects, which are never read")
        size = self._file.getinfo(self._names[name]).file_size - file.tell()
        if any(length < 0 for length in shape) or _product(shape) * dtype.itemsize != size:
            raise ValueError(f"{name} has {size} bytes for shape {shape} of {dtype}")
        return shape, by_columns, dtype


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for length in shape:  # of Python's numbers, which do not overflow
        result *= length
    return result


@contextlib.contextmanager
def opened(path: str | os.PathLike, advice: str) -> Iterator[Archive]:
    """Opens an .npz file; errors of reading it within become one line that names it.

    Raises:
        OSError: if there is no such file or it cannot be read.
        ValueError: with ``advice``, if it is no .npz file or damaged.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory, not an .npz file: {advice}")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: {advice}")
    with open(path, "rb") as file:
        start = file.read(6)
        if start == b"\x93NUMPY":
            raise ValueError(f"{path} is a single array (.npy), not an .npz file: {advice}")
        if not start.startswith(b"PK"):
            raise ValueError(f"{path} is no .npz file: {advice}")
        try:
            with zipfile.ZipFile(file) as archive:
                yield Archive(archive)
        except _DAMAGE as error:
            if str(path) in str(error):
                raise
            raise ValueError(f"{path} is damaged ({error}): {advice}") from error
