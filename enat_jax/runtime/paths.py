"""Paths as people type them: ``~`` is a home, and the address of a store is no path."""

import os
import pathlib
import re

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+://")
# What ``pathlib.Path`` makes of an address, of which a directory named "run:" is to be told apart.
_SHORTENED = re.compile(r"(gs|gcs|s3[an]?|hdfs|abfss?|wasbs?|az|adl|oci|https?|s?ftp|file|hf):/")


def local(path: str | os.PathLike) -> pathlib.Path:
    """Returns a path of this machine; a text may begin with the home directory ``~`` or ``~user``.

    Raises:
        ValueError: it is empty or an address such as gs://bucket/x, or there is no such user.
    """
    text = os.fspath(path)
    if not text:
        raise ValueError("an empty text is no path: name a file or directory")
    if not isinstance(path, str) and _SHORTENED.match(text):
        text = text.replace(":/", "://", 1)
    if _ADDRESS.match(text):
        raise ValueError(
            f"{text} is an address and no path of this machine: name a local directory, or one "
            "where the store is mounted"
        )
    if isinstance(path, str) and text.startswith("~"):
        text = os.path.expanduser(text)
        if text.startswith("~"):
            raise ValueError(f"{text}: this machine has no user {text.partition('/')[0]}")
    return pathlib.Path(text)
