"""Files that are whole or not there, whoever writes them at the same time and whatever stops."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import secrets
from collections.abc import Iterator
from typing import Any

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]+\.unfinished")


def write(path: pathlib.Path, content: bytes) -> None:
    """Whole or not at all, even if the machine stops; several processes may write the same.

    Raises OSError, which names `path`.
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
def only_one(directory: pathlib.Path) -> Iterator[None]:
    """Within, `directory` belongs to this process; it is created if missing.

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
    """Whether it is a temporary file of `write`, left behind by a process that was killed."""
    return _UNFINISHED.fullmatch(path.name) is not None


def json_bytes(values: Any, indent: int | None = 2) -> bytes:
    """JSON as UTF-8, with a newline at its end."""
    # A path that is not UTF-8 holds surrogates, which become JSON's escapes of themselves.
    text = json.dumps(values, indent=indent, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def read_json(path: pathlib.Path, advice: str) -> Any:
    """JSON values of a file; raises OSError, ValueError with `advice` if they are damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it is not JSON ({error}): {advice}") from error
