"""Token records of fixed length in .npy files, read by index without holding the files in memory.

Records are read with ``pread``: a batch of random records costs one system call each, memory does
not grow with the files (a memory map's would, page by page), and a damaged file is an error instead
of a crash. ``python -m enat_jax.benchmark loader`` compares.

Files are opened when they are read first, and as many stay open as the process can spare.
"""

import functools
import io
import os
import pathlib
import resource
import weakref
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from jaxtyping import Int, Shaped

from enat_jax.runtime import exits, os_errors


def dtype(length: int, codebook_size: int) -> np.dtype:
    """Returns the type of a record: tokens in the smallest type, label, flip flag, image index."""
    tokens = np.min_scalar_type(codebook_size - 1).newbyteorder("<")
    fields = [("tokens", tokens, (length,)), ("label", "<i4"), ("flip", "u1"), ("image", "<u4")]
    return np.dtype(fields)


def npy_bytes(rows: np.ndarray) -> bytes:
    """Returns the .npy file of an array."""
    file = io.BytesIO()
    np.save(file, rows, allow_pickle=False)
    return file.getvalue()


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads the head of a .npy file: its shape, whether it is stored by columns, and its type.

    Raises:
        ValueError: it is no .npy file, or of an unknown version. Damage may raise anything.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version} of the format is unknown")


def npy_header(path: pathlib.Path) -> tuple[int, np.dtype, int]:
    """Reads the head of a .npy file whose rows are records.

    Returns:
        The number of rows, the type of a row, with its shape, and where in the file the first is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .npy file, or not as long as it says.
    """
    with open(path, "rb") as file:
        try:
            shape, by_columns, found = read_npy_header(file)
            row = np.dtype((found, shape[1:]))
        except Exception as error:  # numpy parses a header as Python, so damage may raise anything
            os_errors.pass_on(error, path)
            raise ValueError(
                f"{path} is not a .npy file, or its header is damaged ({exits.one_line(error)})"
            ) from error
        if by_columns or not shape or found.hasobject:
            raise ValueError(f"{path} holds {found} {shape}, which are no rows of records")
        start, size = file.tell(), os.fstat(file.fileno()).st_size
    if size != start + shape[0] * row.itemsize:
        raise ValueError(
            f"{path} has {size} bytes instead of {start + shape[0] * row.itemsize}: it is cut off"
        )
    return shape[0], row, start


def evenly(num_rows: int, max_rows: int) -> Int[np.ndarray, " n"]:
    """Returns the int64 numbers of at most ``max_rows`` rows, evenly over a set sorted by class."""
    return np.linspace(0, num_rows - 1, min(num_rows, max_rows)).astype(np.int64)


class _Descriptor:
    """An open file, closed when nobody has it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)


MAX_OPEN = 128  # files that one set keeps open, so that no set needs to have more


def _most_open() -> int:
    """Returns how many files one set keeps open: ``MAX_OPEN`` where 1024 are allowed, as is usual.

    There may be two or three sets, and everything else in a process needs some files, too.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN if limit == resource.RLIM_INFINITY else min(MAX_OPEN, max(1, limit // 8))


class Files:
    """The records of several .npy files, one after the other.

    Args:
        paths: of the files.
        lengths: number of records of each file.
        record: type of a record.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not of ``record``, or has another number of records.
    """

    def __init__(
        self, paths: Sequence[pathlib.Path], lengths: Sequence[int], record: np.dtype
    ) -> None:
        self.paths = [pathlib.Path(p) for p in paths]
        self._names = [str(path) for path in self.paths]
        self._lengths = np.asarray(lengths, np.int64)
        self._record = record
        self._ends = np.cumsum(self._lengths)
        # Threads may share it: a file that is no longer kept stays open for those that read it.
        self._descriptor = functools.lru_cache(_most_open())(_Descriptor)
        starts = []
        for path, length in zip(self.paths, lengths, strict=True):
            found_length, found, start = npy_header(path)
            if (found_length, found) != (length, record):
                raise ValueError(f"{path} holds {found_length} {found}, not {length} {record}")
            starts.append(start)
        self._starts = np.asarray(starts, np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Shaped[np.ndarray, " b"]:
        """Returns the records at ``indices`` in [0, n)."""
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"{indices.min()} to {indices.max()} is not within 0 to {len(self)}")
        files = np.searchsorted(self._ends, indices, side="right")
        rows = indices - (self._ends - self._lengths)[files]
        size = self._record.itemsize
        out = np.empty(len(indices), self._record)
        view = out.view(np.uint8).data.cast("B")
        # In the order of the files, which is kind to disks and their read-ahead.
        order = np.lexsort((rows, files))
        positions = (self._starts[files] + rows * size)[order].tolist()
        last = -1
        for i, file, position in zip(order.tolist(), files[order].tolist(), positions, strict=True):
            if file != last:
                last, path = file, self._names[file]
                descriptor = self._descriptor(path)
            row = view[i * size : (i + 1) * size]
            try:
                count = os.preadv(descriptor.number, [row], position)
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from error
            if count != size:
                raise ValueError(f"{path} was cut off while it was in use")
        return out

    def __reduce__(self) -> tuple[type["Files"], tuple[list[pathlib.Path], list[int], np.dtype]]:
        # Open files cannot be pickled: each of Grain's workers opens them again.
        return Files, (self.paths, self._lengths.tolist(), self._record)


class Reference:
    """Records from a feature file of the reference: .npy, int64 ``[n, 1 + l]``, label and tokens.

    Args:
        path: of the file.
        codebook_size: number of codes, v.
        num_classes: number of classes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file. Reading raises it if a record does not fit codebook or
            classes.
    """

    def __init__(self, path: pathlib.Path, codebook_size: int, num_classes: int) -> None:
        length, row, _ = npy_header(path)
        if len(row.shape) != 1 or row.shape[0] < 2 or row.base != np.dtype("<i8"):
            raise ValueError(
                f"{path} holds rows of {row}: a feature file of the reference is int64 "
                "[n, 1 + tokens], rows of a label and its tokens"
            )
        if not length:
            raise ValueError(f"{path} has no rows")
        self._path = path
        self._rows = Files([path], [length], row)
        self._codebook_size = codebook_size
        self._num_classes = num_classes
        self.num_tokens = row.shape[0] - 1

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Shaped[np.ndarray, " b"]:
        """Returns the records at ``indices`` in [0, n)."""
        rows = self._rows[indices]
        bounds = np.full(rows.shape[1], self._codebook_size)
        bounds[0] = self._num_classes
        wrong = (rows < 0) | (rows >= bounds)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"{self._path}: {f'token {column - 1}' if column else 'the label'} of row "
                f"{indices[row]} is {rows[row, column]}, not within [0, {bounds[column]}): the "
                "file does not fit the config"
            )
        out = np.zeros(len(rows), dtype(self.num_tokens, self._codebook_size))
        out["label"], out["tokens"], out["image"] = rows[:, 0], rows[:, 1:], indices
        return out


def equal_batches(num: int, batch_size: int) -> Iterator[tuple[slice, int]]:
    """Yields batches of one size of ``num`` records, so that one compiled program serves them all.

    The last one reaches back: with each comes how many of its first records were in the one before.
    """
    for start in range(0, num, batch_size):
        first = max(0, min(start, num - batch_size))
        yield slice(first, first + batch_size), start - first
