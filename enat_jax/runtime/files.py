"""Files that are whole or not there, whoever writes them at the same time and whatever stops."""

import contextlib
import errno
import fcntl
import io
import json
import os
import pathlib
import re
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]+\.unfinished")


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Whole or not at all, even if the machine stops; several processes may write the same.

    Raises OSError, which names ``path``.
    """
    # No process number: those of two hosts, or in two containers, can be the same.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            temporary.replace(path)
        except FileNotFoundError:  # another process was first, and has tidied up
            if not path.exists():
                raise
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk does not say whose, others name `temporary`
        raise


@contextlib.contextmanager
def lock_directory(directory: pathlib.Path) -> Iterator[None]:
    """Within, ``directory`` belongs to this process; it is created if missing.

    The system lets go of it when the process ends, however that happens. On a file system without
    locks nothing is held.

    Raises ValueError if another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is at work in {directory}: stop it or name another directory"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield


def is_unfinished(path: pathlib.Path) -> bool:
    """Whether it is a temporary file of ``write_atomically``, left by a process that was killed."""
    return _UNFINISHED.fullmatch(path.name) is not None


def json_bytes(values: Any, indent: int | None = 2) -> bytes:
    """JSON as UTF-8, with a newline at its end."""
    # A path that is not UTF-8 holds surrogates, which become JSON's escapes of themselves.
    text = json.dumps(values, indent=indent, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def read_json(path: pathlib.Path, advice: str) -> Any:
    """JSON values of a file; raises OSError, ValueError with ``advice`` if they are damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it is not JSON ({error}): {advice}") from error


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
            raise _naming(self._path, error) from error

    def _write(self, at: int, data: bytes) -> None:
        try:
            while data:
                count = os.pwrite(self._file, data, at)
                at, data = at + count, data[count:]
        except OSError as error:
            raise _naming(self._path, error) from error


def _naming(path: pathlib.Path, error: OSError) -> OSError:
    """The same error, with the name of the file."""
    return OSError(error.errno, error.strerror, str(path))
