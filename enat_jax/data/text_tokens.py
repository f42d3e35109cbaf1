"""Texts to whole numbers: the byte pairs of CLIP, or the words of a fixed vocabulary.

``Stored`` stands for texts that another program has read.

Both put a token in front that is always there, so that the empty text has one, too. ``identity``
says in JSON values what a number means, and ``of_identity`` turns it back into a tokenizer.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from enat_jax.data import clip_tokens
from enat_jax.runtime import files, paths

MIRRORED = ("left", "right")  # words that change places in a picture that is mirrored
MAX_WORDS = 2**16 - 1  # that 16 bits can number, with the first token
_SHOWN = 30  # words of a vocabulary in a message


@dataclasses.dataclass(frozen=True)
class Window:
    """Texts in a window of one size.

    Attributes:
        ids: tokens with start and end, padded behind.
        lengths: tokens of each text, start and end among them.
        dropped: of each text the words that had no room, "" mostly.
    """

    ids: Int[np.ndarray, "n p"]
    lengths: Int[np.ndarray, " n"]
    dropped: tuple[str, ...]


class TextTokens(Protocol):
    """Turns texts into tokens.

    Attributes:
        size: number of tokens that there are.
        start: the token in front of every text.
        end: the token behind every text; None: there is none.
        pad: what fills a window behind a text.
        sides: the tokens of ``MIRRORED``, none where they are not known.
    """

    @property
    def size(self) -> int: ...

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int | None: ...

    @property
    def pad(self) -> int: ...

    @property
    def sides(self) -> tuple[int, ...]: ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of texts, without ``start`` and ``end``.

        Raises:
            ValueError: a text has no tokens; the message names it.
            ImportError: a package is not installed.
        """

    def rest(self, text: str, kept: int) -> str:
        """Returns what of a text, as it is tokenized, stands behind its first ``kept`` tokens."""

    def identity(self) -> dict[str, Any]:
        """Returns JSON values that decide what the tokens of a text are."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """The byte pairs of CLIP, see ``clip_tokens``.

    Attributes:
        pad: what follows a text: its end, as Hugging Face pads OpenAI's weights, or 0, as OpenAI
            and OpenCLIP do. Weights do not say it, and states behind the end depend on it. It is no
            part of the identity, because stored texts are not padded.
    """

    pad: int = clip_tokens.END

    size = clip_tokens.END + 1
    start = clip_tokens.START
    end = clip_tokens.END
    sides = (1823, 1155)  # left</w> and right</w>

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See ``TextTokens``, as for the next two."""
        return clip_tokens.encode(texts)

    def rest(self, text: str, kept: int) -> str:
        return clip_tokens.rest(text, kept)

    def identity(self) -> dict[str, Any]:
        return {"kind": "clip"}


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of a fixed vocabulary, of texts in lower case that are split at blanks.

    Token 0 stands in front of every text and behind it where a window is longer; word i of the
    vocabulary is token i + 1.

    Raises:
        ValueError: the vocabulary is empty or too large, or a word is not in lower case, has
            blanks, or is there twice.
    """

    vocabulary: tuple[str, ...]

    start = 0
    end = None
    pad = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.vocabulary) <= MAX_WORDS:
            raise ValueError(
                f"a vocabulary of {len(self.vocabulary):,} words: there must be 1 to {MAX_WORDS:,}"
            )
        for i, word in enumerate(self.vocabulary):
            if word.lower().split() != [word]:
                raise ValueError(f"{word!r} is no word in lower case without blanks")
            if self._number[word] != i + 1:
                raise ValueError(f"{word!r} is in the vocabulary twice")

    @functools.cached_property
    def _number(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.vocabulary, 1)}

    @property
    def size(self) -> int:
        """See ``TextTokens``, as for those below."""
        return len(self.vocabulary) + 1

    @property
    def sides(self) -> tuple[int, ...]:
        known = all(word in self._number for word in MIRRORED)
        return tuple(self._number[word] for word in MIRRORED) if known else ()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self._token(word, text) for word in text.lower().split()] for text in texts]

    def _token(self, word: str, text: str) -> int:
        if word in self._number:
            return self._number[word]
        more = len(self.vocabulary) - _SHOWN
        raise ValueError(
            f"the word {shortened(word)} of the text {shortened(text)} is not in the vocabulary: "
            f"{' '.join(self.vocabulary[:_SHOWN])}{f' and {more:,} more' if more > 0 else ''}"
        )

    def rest(self, text: str, kept: int) -> str:
        return " ".join(text.lower().split()[kept:])

    def identity(self) -> dict[str, Any]:
        return {"kind": "words", "vocabulary": list(self.vocabulary)}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Texts that another program has read, of which nothing but its states is known.

    Of their words only ``MIRRORED`` are tokens, 1 and 2, so that captions know which of them depend
    on left and right.
    """

    size = 1 + len(MIRRORED)
    start = 0
    end = None
    pad = 0
    sides = (1, 2)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See ``TextTokens``, as for those below."""
        said = (_SIDES.findall(text) for text in texts)
        return [[1 + MIRRORED.index(word.lower()) for word in words] for words in said]

    def rest(self, text: str, kept: int) -> str:
        return ""

    def identity(self) -> dict[str, Any]:
        return {"kind": "stored"}


_SIDES = re.compile(rf"\b(?:{'|'.join(MIRRORED)})\b", re.IGNORECASE)


def mirrored_text(text: str) -> str:
    """Returns what a text says of the mirrored picture: left and right change places."""

    def other(found: re.Match[str]) -> str:
        word = found[0]
        swapped = MIRRORED[1 - MIRRORED.index(word.lower())]
        return swapped.capitalize() if word[0].isupper() else swapped

    return _SIDES.sub(other, text)


def shortened(text: str, limit: int = 80) -> str:
    """Returns a text as messages show it: in quotes, on one line, of ``limit`` characters."""
    return repr(text if len(text) <= limit else f"{text[: limit - 3]}...")


def added(kind: TextTokens) -> int:
    """Returns how many tokens a text has beside those of ``encode``: its start, and its end."""
    return 1 + (kind.end is not None)


def window(kind: TextTokens, texts: Sequence[str], context: int) -> Window:
    """Returns texts in a window of ``context`` tokens, see ``framed``; raises as ``encode`` does.

    Args:
        kind: of the tokens.
        texts: any; "" is the empty text.
        context: p. Of a longer text the first tokens stay.
    """
    found = kind.encode(texts)
    ids, lengths = framed_lists(kind, found, context)
    room = context - added(kind)
    both = zip(texts, found, strict=True)
    rests = (kind.rest(text, room) if len(tokens) > room else "" for text, tokens in both)
    return Window(ids, lengths, tuple(rests))


def framed_lists(
    kind: TextTokens, texts: Sequence[Sequence[int]], context: int
) -> tuple[Int[np.ndarray, "n {context}"], Int[np.ndarray, " n"]]:
    """Returns windows and lengths of texts that are lists of tokens, see ``framed``."""
    counts = np.array([len(ids) for ids in texts], np.int64)
    flat = np.array([token for ids in texts for token in ids], np.int64)
    return framed(kind, flat, np.cumsum(counts) - counts, counts, context)


def framed(
    kind: TextTokens,
    ids: Int[np.ndarray, " n"],
    firsts: Int[np.ndarray, " b"],
    counts: Int[np.ndarray, " b"],
    context: int,
) -> tuple[Int[np.ndarray, "b {context}"], Int[np.ndarray, " b"]]:
    """Cuts texts out of a row of tokens, into windows with start, end and padding.

    Args:
        kind: of the tokens.
        ids: tokens of many texts, one after the other, without start and end.
        firsts: places in ``ids`` where the texts begin.
        counts: numbers of their tokens in ``ids``.
        context: p, tokens of a window. Of a longer text the first ones stay.

    Returns:
        Windows and lengths, both int32; start and end count.

    Raises:
        ValueError: the window has no room for start and end.
    """
    if context < added(kind):
        raise ValueError(f"a text of {context} tokens is too short: at least {added(kind)}")
    kept = np.minimum(counts, context - added(kind))
    text = np.full((len(kept), context), kind.pad, np.int32)
    text[:, 0] = kind.start
    columns = np.arange(context - 1)
    inside = columns < kept[:, None]
    text[:, 1:][inside] = ids[(np.asarray(firsts)[:, None] + columns)[inside]]
    if kind.end is not None:
        text[np.arange(len(kept)), kept + 1] = kind.end
    return text, (kept + added(kind)).astype(np.int32)


def mirrored(kind: TextTokens) -> Int[np.ndarray, " size"]:
    """Returns for every token the one that stands for it in a picture that is mirrored."""
    table = np.arange(kind.size, dtype=np.int32)
    table[list(kind.sides)] = kind.sides[::-1]
    return table


def of_identity(identity: Mapping[str, Any]) -> Clip | Words | Stored:
    """Returns the tokenizer of an ``identity``.

    Raises:
        ValueError: there is no such tokenizer.
    """
    for known_kind in (Clip(), Stored()):
        if identity == known_kind.identity():
            return known_kind
    words = identity.get("vocabulary")
    known = identity.keys() == {"kind", "vocabulary"} and identity["kind"] == "words"
    if not known or not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise ValueError(f"{shortened(str(identity))} names no tokens of texts")
    return Words(tuple(words))


def read_vocabulary(name: str) -> Words:
    """Returns the words of "scenes", or of a UTF-8 file with a word on each line.

    Raises:
        ValueError: the file is no vocabulary.
        OSError: it cannot be read.
    """
    if name == "scenes":
        from enat_jax.data import scenes  # late: it draws pictures, which few need

        return Words(scenes.WORDS)
    lines = files.read_text(paths.local(name)).split("\n")
    try:
        return Words(tuple(line.strip() for line in lines if line.strip()))
    except ValueError as error:
        raise ValueError(f"{name}: {error}: a vocabulary has a word on each line") from error
