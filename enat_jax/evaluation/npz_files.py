"""The arrays of .npz files from anywhere: nothing is unpickled, and memory is taken for parts."""

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np

from enat_jax.data import records
from enat_jax.runtime import os_errors, paths

_DAMAGE = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


class Archive:
    """The arrays of an .npz file from anywhere, by name.

    Nothing is unpickled, and sizes are checked before memory is taken for them.
    """

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file
        names = [name for name in file.namelist() if name.endswith(".npy")]
        self._names = {name.removesuffix(".npy"): name for name in names}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Returns shape and type, which fit the number of bytes, without reading the data."""
        with self._file.open(self._names[name]) as file:
            shape, _, dtype = self._read_header(name, file)
            return shape, dtype

    def rows(self, name: str, number: int, first: int = 0) -> Iterator[np.ndarray]:
        """Yields parts of an array ``[n, ...]``, ``number`` rows or less at a time.

        Args:
            name: of the array.
            number: of rows.
            first: row to begin with.
        """
        with self._file.open(self._names[name]) as file:
            shape, by_columns, dtype = self._read_header(name, file)
            if by_columns and len(shape) > 1:
                raise ValueError(f"{name} is stored by columns")
            file.seek(first * math.prod(shape[1:]) * dtype.itemsize, os.SEEK_CUR)
            for start in range(first, shape[0], number):
                part = (min(number, shape[0] - start), *shape[1:])
                data = file.read(math.prod(part) * dtype.itemsize)
                yield np.frombuffer(data, dtype).reshape(part)

    def checksum(self, name: str) -> int:
        """Reads all of an array, a part at a time, and returns its CRC-32, which is right."""
        with self._file.open(self._names[name]) as file:
            while file.read(1 << 20):
                pass
        return self._file.getinfo(self._names[name]).CRC

    def read(self, name: str) -> np.ndarray:
        """Returns all of an array."""
        self.header(name)  # before memory is taken for what a damaged one may say
        with self._file.open(self._names[name]) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def _read_header(self, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        shape, by_columns, dtype = records.read_npy_header(file)
        if dtype.hasobject:
            raise ValueError(f"{name} holds pickled Python objects, which are never read")
        size = self._file.getinfo(self._names[name]).file_size - file.tell()
        if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"{name} has {size} bytes for shape {shape} of {dtype}")
        return shape, by_columns, dtype


@contextlib.contextmanager
def open_npz(path: str | os.PathLike, advice: str) -> Iterator[Archive]:
    """Opens an .npz file; errors of reading it within become one line that names it.

    Raises:
        OSError: if there is no such file or it cannot be read.
        ValueError: with ``advice``, if it is no .npz file or damaged.
    """
    path = paths.local(path)
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
        except (*_DAMAGE, OSError, MemoryError) as error:
            os_errors.pass_on(error, path)
            if str(path) in str(error):
                raise
            raise ValueError(f"{path} is damaged ({error}): {advice}") from error
