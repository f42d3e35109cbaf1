"""Prompts of a user in a file: a text on each line, or JSON lines."""

import json
import sys
from collections.abc import Iterable, Iterator

from enat_jax.data import caption_sources
from enat_jax.data.text_tokens import shortened
from enat_jax.runtime import paths

FIELDS = ("text", "prompt", "caption")  # of a line of JSON; the first that is there
STDIN = "-"


def read(name: str) -> list[str]:
    """Reads prompts, in their order.

    Args:
        name: path of a ``.jsonl`` file, each line of which is an object with one of ``FIELDS``, or
            of a ``.txt`` file with a prompt on each line; ``STDIN``: standard input, as a ``.txt``
            file. Blank lines are skipped.

    Raises:
        ValueError: the file has no prompts or is damaged; the message names file and line.
        OSError: it cannot be read.
    """
    if name == STDIN:
        name = "stdin"
        found = list(_texts(name, sys.stdin.buffer))
    else:
        path = paths.local(name)
        kind = path.suffix.lower()
        if kind not in ("", ".txt", ".jsonl"):
            raise ValueError(f"{path} is neither .txt, a prompt on each line, nor .jsonl")
        with open(path, "rb") as file:
            found = list((_objects if kind == ".jsonl" else _texts)(path, file))
    if not found:
        raise ValueError(f"{name} holds no prompt")
    return found


def _texts(name: object, lines: Iterable[bytes]) -> Iterator[str]:
    for place, line in caption_sources.numbered(name, lines):
        if "\0" in line:
            raise ValueError(f"{place}: this line holds a zero byte: save it as UTF-8 text")
        yield line.strip()


def _objects(name: object, lines: Iterable[bytes]) -> Iterator[str]:
    for place, line in caption_sources.numbered(name, lines):
        values = caption_sources.parsed(place, line)
        if not isinstance(values, dict):
            raise ValueError(f'{place}: this line is no object such as {{"text": "a cat"}}')
        said = [values[field] for field in FIELDS if field in values]
        if not said:
            raise ValueError(f"{place}: there is none of {list(FIELDS)}, but {sorted(values)}")
        if not isinstance(said[0], str):
            raise ValueError(f"{place}: the prompt {shortened(json.dumps(said[0]))} is no text")
        yield said[0]
