"""Captions of the pictures of a token set on disk, as the tokens of a text.

A directory holds

    ids.npy         uint16, the tokens of all captions one after the other, without start and end
    offsets.npy     int64 [captions + 1], where each caption begins
    first.npy       int64 [pictures + 1], the first caption of each picture
    captions.jsonl  {"file_name", "text"} of each caption, for people and as prompts
    metadata.json   what was made of what, with checksums; written last: without it nothing counts

A picture may have any number of captions, none included. All of this is read into memory: the
captions of MS-COCO are 10 MB. The states of a text encoder may stand beside it, see
``text_states``; captions whose encoder is not CLIP have no tokens but those of left and right.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from enat_jax.data import records, text_states, text_tokens
from enat_jax.data.decoding import Batch
from enat_jax.runtime import buckets, files

FORMAT = "enat_jax captions 1"
MADE_BY = "python -m enat_jax.tokenize_captions"
MIRROR_WORDS = ("swap", "keep", "unflipped")
_ARRAYS: dict[str, np.dtype] = {
    "ids": np.dtype("<u2"),
    "offsets": np.dtype("<i8"),
    "first": np.dtype("<i8"),
}
_FILES = (*(f"{name}.npy" for name in _ARRAYS), "captions.jsonl")


def identity(
    texts: Sequence[Sequence[str]],
    kind: text_tokens.TextTokens,
    plan: str,
    mirror_words: str,
    states: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns JSON values that decide what ``write`` writes.

    Args:
        texts: captions of each picture.
        kind: what turns them into tokens.
        plan: ``digest`` of the token set.
        mirror_words: of "left" and "right" in captions of mirrored pictures: "swap" them, "keep"
            them, or take the picture "unflipped".
        states: what decides the states that are stored beside: "encoder", "context" and
            "padding" as of ``text_states.States``, and of which file they are; None: there are
            none.

    Raises:
        ValueError: ``mirror_words`` is unknown.
    """
    if mirror_words not in MIRROR_WORDS:
        raise ValueError(f"mirror_words={mirror_words!r} is unknown: choose of {MIRROR_WORDS}")
    digest = hashlib.sha256()
    for of_picture in texts:
        digest.update(json.dumps(list(of_picture)).encode())
    return {
        "format": FORMAT,
        "tokens": plan,
        "text_tokens": kind.identity(),
        "mirror_words": mirror_words,
        "num_images": len(texts),
        "num_captions": sum(map(len, texts)),
        "texts": digest.hexdigest(),
        **({} if states is None else {"states": files.as_json(states)}),
    }


def write(
    directory: pathlib.Path,
    made_of: dict[str, Any],
    texts: Sequence[Sequence[str]],
    keys: Sequence[str],
    ids: Sequence[Sequence[int]],
    of_states: Mapping[str, str] | None = None,
) -> None:
    """Writes captions, whole or not at all: what was begun and not finished is written anew.

    Args:
        directory: of the captions; see ``begin``.
        made_of: see ``identity``.
        texts: captions of each picture.
        keys: of the pictures.
        ids: tokens of the captions in their order, without start and end.
        of_states: checksums of the files that ``text_states.write`` wrote; None: there are none.

    Raises:
        OSError: a file cannot be written.
    """
    lines = [
        json.dumps({"file_name": key, "text": text}, ensure_ascii=False)
        for key, of_picture in zip(keys, texts, strict=True)
        for text in of_picture
    ]
    arrays = {
        "ids": np.array([token for caption in ids for token in caption], np.int64),
        "offsets": np.cumsum([0, *(len(caption) for caption in ids)]),
        "first": np.cumsum([0, *(len(of_picture) for of_picture in texts)]),
    }
    contents = {
        f"{name}.npy": records.npy_bytes(arrays[name].astype(dtype))
        for name, dtype in _ARRAYS.items()
    }
    contents["captions.jsonl"] = "".join(f"{line}\n" for line in lines).encode()
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        files.write_atomically(directory / name, content)
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    checksums |= of_states or {}
    files.write_json(directory / "metadata.json", made_of | {"sha256": checksums})
    for path in directory.iterdir():
        if files.is_unfinished(path):
            path.unlink(missing_ok=True)  # of a process that was killed


def begin(directory: pathlib.Path, made_of: dict[str, Any]) -> bool:
    """Says whether ``write`` has still to be called.

    Raises:
        ValueError: the directory holds something else, or these captions damaged.
        OSError: it cannot be read.
    """
    if not directory.exists():
        return True
    inside = sorted(directory.iterdir()) if directory.is_dir() else [directory]
    if "metadata.json" not in [path.name for path in inside]:
        ours = lambda p: p.name in _FILES or text_states.is_ours(p.name) or files.is_unfinished(p)  # noqa: E731
        if others := [path for path in inside if not ours(path)]:
            raise ValueError(
                f"{directory} holds {others[0].name!r} and no captions: choose another directory"
            )
        begun = directory / text_states.PLAN
        if begun.exists():
            again = f"remove {directory} and start again"
            _compare(directory, made_of, files.read_description(begun, FORMAT, again), "has begun")
        return True
    files.read_description(directory / "metadata.json", FORMAT, "choose another directory")
    _compare(directory, made_of, Captions.open(directory).made_of, "holds")
    text_states.verify(directory, files.read_json(directory / "metadata.json", "")["sha256"])
    return False


def _compare(
    directory: pathlib.Path, made_of: Mapping[str, Any], found: Mapping[str, Any], holds: str
) -> None:
    if different := files.differences(made_of, found):
        name, now, before = different[0]
        raise ValueError(
            f"{directory} {holds} other captions: their {name} is {str(before)[:80]!r}, now it "
            f"would be {str(now)[:80]!r}; remove them or choose another directory"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Captions:
    """Captions in memory.

    Attributes:
        ids: tokens of all captions, one after the other.
        offsets: where each caption begins in ``ids``, and the end.
        first: the first caption of each picture, and the end.
        kind: of the tokens.
        made_of: see ``identity``.
        states: of a text encoder, which then stand in batches in place of tokens; None: there are
            none.
    """

    ids: Int[np.ndarray, " n"]
    offsets: Int[np.ndarray, " captions+1"]
    first: Int[np.ndarray, " pictures+1"]
    kind: text_tokens.TextTokens
    made_of: dict[str, Any]
    states: text_states.States | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest caption, with start and end, or its states."""
        if self.states is not None:
            return self.states.longest
        return int(np.diff(self.offsets).max(initial=0)) + text_tokens.added(self.kind)

    @property
    def plan(self) -> str:
        """The ``digest`` of the token set that they belong to."""
        return self.made_of["tokens"]

    @property
    def mirror_words(self) -> str:
        """See ``identity``."""
        return self.made_of["mirror_words"]

    @functools.cached_property
    def has_side(self) -> Bool[np.ndarray, " captions"]:
        """Which captions have a word that depends on left and right."""
        before = np.concatenate([[0], np.cumsum(np.isin(self.ids, self.kind.sides))])
        return before[self.offsets[1:]] > before[self.offsets[:-1]]

    @functools.cached_property
    def _mirrored(self) -> Int[np.ndarray, " size"]:
        return text_tokens.mirrored(self.kind)

    def choose(
        self, images: Int[np.ndarray, " b"], seeds: Int[np.ndarray, " b"] | None = None
    ) -> Int[np.ndarray, " b"]:
        """Returns the number of one caption of each picture.

        Args:
            images: numbers of the pictures.
            seeds: of the examples, each of which decides alone; None: the first caption.

        Raises:
            ValueError: a picture has no caption.
        """
        images = np.asarray(images, np.int64)
        if images.size and not 0 <= images.min() <= images.max() < len(self.first) - 1:
            raise ValueError(f"there are captions of {len(self.first) - 1} pictures alone")
        first, counts = self.first[images], self.first[images + 1] - self.first[images]
        if not counts.all():
            raise ValueError(f"picture {images[counts == 0][0]} has no caption")
        if seeds is None:
            return first
        return first + (_mixed(np.asarray(seeds)) % counts.astype(np.uint64)).astype(np.int64)

    def window(
        self,
        captions: Int[np.ndarray, " b"],
        context: int,
        flips: Bool[np.ndarray, " b"] | None = None,
    ) -> Batch:
        """Returns {"text": int32 ``[b, context]``, "lengths": int32 ``[b]``} of captions.

        Of captions with states the text is what ``text_states.States.window`` returns.

        Args:
            captions: their numbers.
            context: p, tokens of the window.
            flips: for which left and right change places; None: for none.
        """
        if self.states is not None:
            return self.states.window(captions, context, flips)
        firsts = self.offsets[captions]
        counts = self.offsets[np.asarray(captions) + 1] - firsts
        text, lengths = text_tokens.framed(self.kind, self.ids, firsts, counts, context)
        if flips is not None and self.kind.sides:
            text = np.where(np.asarray(flips, bool)[:, None], self._mirrored[text], text)
        return {"text": text, "lengths": lengths}

    @classmethod
    def open(cls, directory: str | os.PathLike) -> "Captions":
        """Reads captions from disk.

        Raises:
            FileNotFoundError: there are no captions, or they are not finished.
            ValueError: they are damaged or of another format.
            OSError: they cannot be read.
        """
        directory = buckets.fetched(directory)
        advice = f"make captions with {MADE_BY}"
        metadata = files.read_description(directory / "metadata.json", FORMAT, advice)
        try:
            kind = text_tokens.of_identity(metadata["text_tokens"])
            ids, offsets, first = (
                text_states.read_array(
                    directory / f"{name}.npy", dtype, metadata["sha256"][f"{name}.npy"]
                )
                for name, dtype in _ARRAYS.items()
            )
            states = text_states.States.open(directory, metadata) if "states" in metadata else None
            made_of = {k: v for k, v in metadata.items() if k != "sha256"}
            fitting = (
                len(first) == made_of["num_images"] + 1
                and text_states.ascends(first, made_of["num_captions"])
                and len(offsets) == made_of["num_captions"] + 1
                and text_states.ascends(offsets, len(ids))
                and (ids.max(initial=0) < kind.size)
                and made_of["mirror_words"] in MIRROR_WORDS
                and isinstance(made_of["tokens"], str)
            )
            if not fitting:
                raise ValueError("its files do not fit together")
        except (FileNotFoundError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"the captions in {directory} are damaged ({error}): remove them and make them "
                f"again with {MADE_BY}"
            ) from error
        return cls(ids, offsets, first, kind, made_of, states)


def _mixed(seeds: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
    """Returns whole numbers that look random, one of each seed: SplitMix64."""
    x = seeds.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
