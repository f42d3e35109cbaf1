"""Paths as people type them: ``~`` is a home, and the address of a store is no path of a machine.

What works in buckets, too, takes its paths from ``place``; all else takes them from ``local``.
"""

import os
import pathlib
import re
from typing import Any

BUCKET = "gs://"  # what addresses begin with that can be written to
HUB = "hf://"  # of models, which ``checkpoints.hub`` fetches

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+://")
# What ``pathlib.Path`` makes of an address, of which a directory named "run:" is to be told apart.
_SHORTENED = re.compile(
    r"(gs|gcs|s3[an]?|hdfs|abfss?|wasbs?|az|adl|oci|https?|s?ftp|file|hf):/(?!/)"
)


def address(path: str | os.PathLike) -> str | None:
    """Returns the address of a store, such as gs://bucket/x, or None if it is a path."""
    text = os.fspath(path)
    if not isinstance(path, str) and _SHORTENED.match(text):
        text = text.replace(":/", "://", 1)
    return text if _ADDRESS.match(text) else None


def place(path: str | os.PathLike) -> pathlib.Path:
    """Returns a ``pathlib.Path`` of this machine, or of an address in a bucket what acts like one.

    That is an ``etils.epath.Path``, which is no ``pathlib.Path``: so the two are told apart. Names
    of objects are taken as they are; a directory is there as long as something is in it.

    Raises:
        ValueError: as ``local`` does for other addresses than those of ``BUCKET``.
    """
    found = address(path)
    if found is None or not found.startswith(BUCKET):
        return local(path)
    if not re.fullmatch(r"[a-z0-9][\w.-]+", found.removeprefix(BUCKET).partition("/")[0]):
        raise ValueError(f"{found} names no bucket: give an address such as {BUCKET}bucket/name")
    import fsspec  # late, both: most programs write to no bucket
    from etils import epath

    # Other processes, and TensorStore in this one, write what a list of names would not know.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    acting: Any = epath.Path(found)
    return acting


def cache_directory() -> pathlib.Path:
    """Returns where downloads and compiled programs are kept; it need not be there yet.

    That is ``enat_jax`` in $XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        RuntimeError: the user has no home.
    """
    given = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not given.is_absolute():  # which says nothing, by the convention of the variable
        given = pathlib.Path("~/.cache")
    return given.expanduser() / "enat_jax"


def local(path: str | os.PathLike) -> pathlib.Path:
    """Returns a path of this machine; a text may begin with the home directory ``~`` or ``~user``.

    Raises:
        ValueError: it is empty or an address such as gs://bucket/x, or there is no such user.
    """
    text = os.fspath(path)
    if not text:
        raise ValueError("an empty text is no path: name a file or directory")
    if found := address(path):
        raise ValueError(
            f"{found} is an address and no path of this machine: name a local directory, or one "
            "where the store is mounted"
        )
    if isinstance(path, str) and text.startswith("~"):
        text = os.path.expanduser(text)
        if text.startswith("~"):
            raise ValueError(f"{text}: this machine has no user {text.partition('/')[0]}")
    return pathlib.Path(text)
