"""Files written whole or not at all, locks of directories, and JSON.

What takes a path takes what acts like one in a bucket, see ``paths.place``, too, unless it says
otherwise. An object appears there whole, by itself; and nothing there can be locked.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, Self

import numpy as np
from jaxtyping import Float

from enat_jax.runtime import paths

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]+\.unfinished")


def write_atomically(
    path: pathlib.Path, content: bytes | Callable[[IO[bytes]], object], sync: bool = True
) -> None:
    """Writes a file whole or not at all; several processes may write the same one.

    Args:
        path: of the file, in a directory that exists.
        content: of the file, or a function that writes it.
        sync: wait for the disk, so that the file is whole even if the machine stops. Thousands of
            small files would feel this.

    Raises:
        OSError: the file cannot be written; the error names ``path``.
    """
    if not isinstance(path, pathlib.Path):  # in a bucket
        if callable(content):
            buffer = io.BytesIO()
            content(buffer)
            content = buffer.getvalue()
        path.write_bytes(content)
        return
    temporary = _temporary(path)
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                content(file) if callable(content) else file.write(content)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            # Another process may have been first, and have tidied up.
            if not (isinstance(error, FileNotFoundError) and path.exists()):
                raise


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Within, an OSError names ``path``: one of reading or writing names no file, or another."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def require_writable(path: pathlib.Path) -> None:
    """Raises an OSError if no files can be made in ``path``, which need not be there yet."""
    if not isinstance(path, pathlib.Path):
        probe = path / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
        return
    place = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    with naming(place), tempfile.TemporaryFile(dir=place):
        pass


@contextlib.contextmanager
def lock_directory(directory: pathlib.Path) -> Iterator[None]:
    """Within, ``directory`` belongs to this process; it is created if missing.

    The system lets go of it when the process ends, however that happens. On a file system without
    locks, and in a bucket, nothing is held.

    Raises:
        ValueError: another process has it.
    """
    if not isinstance(directory, pathlib.Path):
        yield
        return
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


@contextlib.contextmanager
def new_directory(out: pathlib.Path, last: str = "") -> Iterator[pathlib.Path]:
    """Gives an empty directory that becomes ``out`` at the end, or is gone if an error comes first.

    Args:
        out: what is not there yet, or an empty directory; its parents are created.
        last: name of the file that is copied to a bucket after all others.
    """
    if not isinstance(out, pathlib.Path):
        with tempfile.TemporaryDirectory() as temporary:
            yield pathlib.Path(temporary)
            found = [x for x in pathlib.Path(temporary).rglob("*") if x.is_file()]
            for path in sorted(found, key=lambda path: path.name == last):
                (out / path.relative_to(temporary)).write_bytes(path.read_bytes())
        return
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _temporary(out)
    try:
        unfinished.mkdir()
        yield unfinished
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_tree(directory: pathlib.Path) -> None:
    """Removes a directory with all that is in it, as far as that can be done."""
    if isinstance(directory, pathlib.Path):
        shutil.rmtree(directory, ignore_errors=True)
    else:
        directory.rmtree(missing_ok=True)


def append(path: pathlib.Path, content: bytes) -> None:
    """Adds to the end of a file; in a bucket, the file is written anew."""
    if isinstance(path, pathlib.Path):
        with open(path, "ab") as file:
            file.write(content)
    else:
        path.write_bytes((path.read_bytes() if path.exists() else b"") + content)


def _temporary(path: pathlib.Path) -> pathlib.Path:
    # No process number: those of two hosts, or in two containers, can be the same. A long name, of
    # up to 255 bytes, is cut to leave room for the rest.
    name = os.fsdecode(os.fsencode(path.name)[:200])
    return path.with_name(f".{name}.{secrets.token_hex(8)}.unfinished")


def is_unfinished(path: pathlib.Path) -> bool:
    """Says whether ``write_atomically`` left it as a temporary file when its process was killed."""
    return _UNFINISHED.fullmatch(path.name) is not None


def write_json(path: str | os.PathLike, values: Any, sort_keys: bool = True) -> None:
    """Writes JSON values as ``write_atomically`` does; parents of ``path`` are created.

    Args:
        path: of the file.
        values: to be written.
        sort_keys: whether the keys are sorted, so that files are easily compared.
    """
    path = paths.place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json_bytes(values, sort_keys))


def write_npz(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Writes named arrays as an .npz file, as ``write_atomically`` does."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())


def json_bytes(values: Any, sort_keys: bool = True) -> bytes:
    """Returns JSON values as UTF-8, with a newline at the end; see ``write_json``."""
    # A path that is not UTF-8 holds surrogates, which become JSON's escapes of themselves.
    text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n"
    return text.encode("utf-8", "backslashreplace")


def read_text(path: pathlib.Path) -> str:
    """Returns the text of a file that a user wrote, in UTF-8 with or without a byte-order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or holds zero bytes, as UTF-16 does.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path} is not text in UTF-8 (it holds zero bytes): save it as UTF-8")
    return text


def read_json(path: pathlib.Path, advice: str) -> Any:
    """Reads the JSON values of a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON; the message ends with ``advice``.
    """
    try:
        with naming(path):
            return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it is not JSON ({error}): {advice}") from error


def read_description(path: str | os.PathLike, expected_format: str, advice: str) -> dict[str, Any]:
    """Reads a JSON file that describes what lies beside it, and checks its field ``format``.

    Args:
        path: of the file.
        expected_format: what the field must say, such as "enat_jax model 2".
        advice: what a user without such a file should do.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it is not JSON, or of another format.
    """
    path = paths.place(path)
    try:
        values = read_json(path, advice)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"there is no {path}: {advice}") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != expected_format:
        if _is_newer(found, expected_format):
            advice = "it is of a newer version of enat_jax, update this one"
        raise ValueError(f"{path} is of format {found!r}, not {expected_format!r}: {advice}")
    return values


def _is_newer(found: Any, expected: str) -> bool:
    """Says whether "enat_jax model 3" was found and "enat_jax model 2" expected."""
    matches = [re.fullmatch(r"(.+) (\d{1,9})", str(text)) for text in (found, expected)]
    parts = [match.groups() for match in matches if match]
    return len(parts) == 2 and parts[0][0] == parts[1][0] and int(parts[0][1]) > int(parts[1][1])


def differences(
    before: Any, now: Any, name: str = "", missing: Any = None
) -> list[tuple[str, Any, Any]]:
    """Compares two trees of JSON values.

    Args:
        before: one of the trees.
        now: the other one.
        name: what all dotted names begin with.
        missing: stands for a value that only the other tree has.

    Returns:
        The dotted name and both values of each place where they differ.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in before | now:
            inner = f"{name}.{key}" if name else str(key)
            found += differences(before.get(key, missing), now.get(key, missing), inner, missing)
        return found
    return [] if before == now else [(name, before, now)]


def as_json(values: Any) -> Any:
    """Returns JSON values as a file would give them back: tuples are lists, keys are strings."""
    return json.loads(json.dumps(values))


class Rows:
    """A .npy file, float32 ``[n, d]``, whose rows are written in place.

    Args:
        path: of the file.
        num_rows: n.
        width: d.
    """

    def __init__(self, path: pathlib.Path, num_rows: int, width: int) -> None:
        header = io.BytesIO()
        layout = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, width)}
        np.lib.format.write_array_header_1_0(header, layout)
        self._path, self._header, self._width = path, header.getvalue(), width
        self.num_bytes = len(self._header) + 4 * num_rows * width
        self._file = -1

    def __enter__(self) -> Self:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        # Not a memory map: where the disk is full it would end the process, a write only fails.
        self._write(0, self._header)
        os.ftruncate(self._file, self.num_bytes)
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)

    def write(self, first: int, rows: Float[np.ndarray, "b d"]) -> None:
        """Writes rows from number ``first`` on; raises OSError, which names the file."""
        data = np.ascontiguousarray(rows, "<f4").tobytes()
        self._write(len(self._header) + 4 * first * self._width, data)

    def sync(self) -> None:
        """Waits until the disk has what was written."""
        with naming(self._path):
            os.fsync(self._file)

    def _write(self, at: int, data: bytes) -> None:
        with naming(self._path):
            while data:
                count = os.pwrite(self._file, data, at)
                at, data = at + count, data[count:]
