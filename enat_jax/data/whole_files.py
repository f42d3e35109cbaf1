"""Files that are whole or not there, whoever writes them at the same time and whatever stops."""

import json
import os
import pathlib
import re
import secrets
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
