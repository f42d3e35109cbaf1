"""Directories as Orbax is to have them, which does not take every name of the file system."""

import glob
import os
import pathlib
from collections.abc import Iterator

from etils.epath import gpath

from enat_jax.runtime import paths

_COMMITTED = "commit_success.txt"  # of Orbax, which cannot rename a checkpoint in a bucket
_TAKEN_FOR_ADDRESSES = ("gs", "s3", "az", "hf")  # of etils, to which /s3/x is s3://x


class _Literal(gpath.PosixGPath):
    """A path whose own characters are no wildcards when files below it are searched for.

    Those of etils are: in a directory named "run[1]", Orbax would not find the parts of a
    checkpoint that it has just written, and leave them out.
    """

    def glob(self, pattern: str) -> Iterator["_Literal"]:
        return map(_Literal, glob.iglob(os.path.join(glob.escape(str(self)), pattern)))


def absolute(path: str | os.PathLike) -> pathlib.Path:
    """Returns an absolute path, or of an address what acts like one, see ``paths.place``."""
    place = paths.place(path)
    return place.absolute() if isinstance(place, pathlib.Path) else place


def is_complete(path: pathlib.Path) -> bool:
    """Says whether Orbax has written a checkpoint to its end; it is there on a disk only then."""
    return isinstance(path, pathlib.Path) or (path / _COMMITTED).exists()


def of(path: str | os.PathLike) -> gpath.PosixGPath:
    """Returns a path, absolute, for Orbax to write or to read.

    Raises:
        ValueError: Orbax or TensorStore would take it for another one.
    """
    place = absolute(path)
    if not isinstance(place, pathlib.Path):
        return place
    if reason := refusal(place):
        raise ValueError(f"{place}: Orbax cannot use a directory {reason}: choose another name")
    return _Literal(place)


def refusal(path: str | os.PathLike) -> str | None:
    """Returns why Orbax cannot use a path, or None if it can."""
    place = absolute(path)
    if not isinstance(place, pathlib.Path):
        return None
    if "\\" in str(place):
        return "with a backslash in its name, which it takes for a slash"
    try:
        str(place).encode()
    except UnicodeEncodeError:
        return "whose name is not UTF-8"
    root, first, *_ = (*place.parts, "")
    if root == "/" and first in _TAKEN_FOR_ADDRESSES:
        return f"below /{first}, which it takes for the address {first}://"
    return None
