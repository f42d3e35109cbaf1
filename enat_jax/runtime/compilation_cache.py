"""Compiled programs are kept in the user's cache folder, so that a second start compiles nothing.

Every program calls ``use`` when it starts, through ``cli.run``; a notebook may call it, too. What
the user has told JAX wins: with ``JAX_COMPILATION_CACHE_DIR`` JAX does alone what it is told, and
``JAX_ENABLE_COMPILATION_CACHE=false`` switches the cache off.

JAX has a bound for the size itself (``jax_compilation_cache_max_size``). It is not used: it reads
the whole folder, under a lock, for each program that is written, and a process that is killed
between two of its files leaves a folder to which nobody can write any more.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax

from enat_jax.runtime import exits, files, os_errors, paths

MAX_BYTES = 2 * 2**30  # of all entries when a program starts
_SUFFIX = "-cache"  # of JAX's files, whose names are PROGRAM-HASH-cache
_LEFT = 0.8  # share of ``MAX_BYTES`` that is left when entries are removed
_OFF = "JAX_ENABLE_COMPILATION_CACHE=false switches this off"
_TROUBLE = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)", re.DOTALL
)


@dataclasses.dataclass
class _Ours:
    """What ``use`` has set in this process; there is one, as of JAX's settings."""

    folder: str | None = None


_ours = _Ours()


def folder() -> pathlib.Path:
    """Returns the user's folder for compiled programs; raises as ``paths.cache_directory`` does."""
    return paths.cache_directory() / "compiled"


def use(place: pathlib.Path | None = None) -> pathlib.Path | None:
    """Lets JAX keep what this process compiles, of whatever size, from now on.

    To be called before anything is compiled; a later call takes the place of an earlier one. Where
    the folder cannot be written, one line on stderr says so, and all else works as it does with it.

    Args:
        place: folder; None: the user's own, ``folder()``.

    Returns:
        The folder; None if the user has told JAX otherwise or it cannot be written.
    """
    options: Any = jax.config  # whose options are added at run time
    ours = options.jax_compilation_cache_dir in (None, "", _ours.folder)
    if not (ours and options.jax_enable_compilation_cache):
        return None
    try:
        place = folder() if place is None else place
        files.require_writable(place)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)  # who writes here can run programs
        bound(place, MAX_BYTES)
    except (OSError, RuntimeError) as error:
        _say(place, error)
        return None
    _ours.folder = os.fspath(place)
    jax.config.update("jax_compilation_cache_dir", _ours.folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    warnings.showwarning = _showing(place, warnings.showwarning)
    return place


def bound(place: pathlib.Path, max_bytes: int) -> None:
    """Removes the entries that were not used for longest if all are larger than ``max_bytes``.

    When an entry was used is what the file system knows of it, or else when it was written.
    """
    entries = []
    with os.scandir(place) as found:
        for entry in (x for x in found if x.name.endswith(_SUFFIX)):
            with contextlib.suppress(FileNotFoundError):  # another process removes some, too
                about = entry.stat()
                entries.append((max(about.st_atime, about.st_mtime), about.st_size, entry.path))
    left = sum(size for _, size, _ in entries)
    if left <= max_bytes:
        return
    for _, size, path in sorted(entries):
        if left <= _LEFT * max_bytes:
            break
        pathlib.Path(path).unlink(missing_ok=True)
        left -= size


def _showing(place: pathlib.Path, show: Callable[..., None]) -> Callable[..., None]:
    """Returns a ``warnings.showwarning`` that mends what JAX warns of, and shows all else."""
    told = set()

    def showing(message: Warning | str, *about: Any, **named: Any) -> None:
        if not (found := _TROUBLE.match(str(message))):
            return show(message, *about, **named)
        doing, program, reason = found.groups()
        # A write that failed or was cut short leaves an entry that no later one would replace.
        with contextlib.suppress(OSError):
            for entry in place.glob(f"*{_SUFFIX}"):
                if entry.name.removesuffix(_SUFFIX).rpartition("-")[0] == program:
                    entry.unlink()
        if doing not in told:
            told.add(doing)
            _say(place, reason)

    return showing


def _say(place: pathlib.Path | None, reason: Exception | str) -> None:
    words = os_errors.words(reason) if isinstance(reason, OSError) else None
    where = "the user's cache folder" if place is None else place
    line = exits.one_line(words or reason, None)
    print(f"compiled programs cannot be kept in {where}: {line} ({_OFF})", file=sys.stderr)
