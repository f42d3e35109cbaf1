"""States of captions, computed once by a text encoder and stored beside the captions.

A directory of captions then holds, beside the files that ``captions`` names,

    plan.json                     what is being made; written first, to go on after an interruption
    states-00000-of-00101.npy     float16 [rows, e], the states of the texts, one after the other
    texts.npy                     int64 [captions, 2], the text of each caption, and the one that
                                  says the same of the mirrored picture
    rows.npy                      int64 [texts + 1], where the states of each text begin
    lengths.npy                   int32 [texts], the states of each text that are not of padding
    null_text.npy                 float16 [p, e], the states of the empty text

Equal texts are stored once, and padding only on request. States are read by index and never whole
into memory: those of MS-COCO by CLIP ViT-L/14 are 8.6 GB.
"""

import dataclasses
import hashlib
import io
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float16, Int, Shaped

from enat_jax.data import records
from enat_jax.runtime import files

PLAN = "plan.json"
MIN_TEXTS = 1024  # of a shard, or a small set would be many tiny files
_ARRAYS: dict[str, np.dtype] = {
    "texts": np.dtype("<i8"),
    "rows": np.dtype("<i8"),
    "lengths": np.dtype("<i4"),
    "null_text": np.dtype("<f2"),
}
_RANKS = {"texts": 2, "null_text": 2}  # of the others 1
_SHARD = re.compile(r"states-\d{5}-of-\d{5}\.npy")


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """The texts that differ, whose states are to be stored.

    Attributes:
        of_captions: the text of each caption, and of its mirrored one.
        sizes: states to store of each text.
        lengths: states of each text that are not of padding.
        null: states of the empty text.
    """

    of_captions: Int[np.ndarray, "captions 2"]
    sizes: Int[np.ndarray, " texts"]
    lengths: Int[np.ndarray, " texts"]
    null: Float16[np.ndarray, "p e"]

    @property
    def shards(self) -> list[slice]:
        """The texts of each file."""
        n = len(self.sizes)
        size = max(MIN_TEXTS, -(-n // records.MAX_OPEN))
        return [slice(first, min(first + size, n)) for first in range(0, n, size)]

    def arrays(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Returns what the files beside the states hold."""
        rows = np.cumsum([0, *self.sizes])
        found = (self.of_captions, rows, self.lengths, self.null)
        return {k: x.astype(d) for (k, d), x in zip(_ARRAYS.items(), found, strict=True)}


def is_ours(name: str) -> bool:
    """Says whether a file of a directory of captions is one of those above."""
    return name == PLAN or name.removesuffix(".npy") in _ARRAYS or bool(_SHARD.fullmatch(name))


def write(
    directory: pathlib.Path,
    made_of: Mapping[str, Any],
    texts: Texts,
    encode: Callable[[Sequence[slice]], Iterator[Float16[np.ndarray, "rows e"]]],
) -> dict[str, str]:
    """Writes states file by file; what is there of the same plan stays.

    Args:
        directory: of the captions.
        made_of: see ``captions.identity``; ``captions.begin`` has compared it with ``PLAN``.
        texts: whose states they are.
        encode: for each part of the texts yields their states, ``texts.sizes`` of each.

    Returns:
        The SHA-256 of all files.

    Raises:
        OSError: a file cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files.write_json(directory / PLAN, made_of)
    shards = texts.shards
    names = [f"states-{i:05d}-of-{len(shards):05d}.npy" for i in range(len(shards))]
    missing = [i for i, name in enumerate(names) if not (directory / name).exists()]
    for i, states in zip(missing, encode([shards[i] for i in missing]), strict=True):
        assert len(states) == texts.sizes[shards[i]].sum()
        content = records.npy_bytes(states.astype("<f2", copy=False))
        files.write_atomically(directory / names[i], content)
    for name, array in texts.arrays().items():
        files.write_atomically(directory / f"{name}.npy", records.npy_bytes(array))
    names += [f"{name}.npy" for name in _ARRAYS]
    return {name: _sha256(directory / name) for name in names}


def verify(directory: pathlib.Path, checksums: Mapping[str, str]) -> None:
    """Reads all stored states; raises ValueError if a byte of them is wrong."""
    for name in filter(_SHARD.fullmatch, checksums):
        if _sha256(directory / name) != checksums[name]:
            raise ValueError(
                f"{directory / name} is damaged: remove the captions in {directory} and make them "
                "again"
            )


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file, files.naming(path):
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_array(
    path: pathlib.Path, dtype: np.dtype, checksum: str, rank: int = 1
) -> Shaped[np.ndarray, "..."]:
    """Reads a .npy file as it was written; raises ValueError if it is damaged."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != checksum:
        raise ValueError(f"{path.name} is not what was written")
    found = np.load(io.BytesIO(content), allow_pickle=False)
    if found.dtype != dtype or found.ndim != rank:
        raise ValueError(f"{path.name} holds {found.dtype} {found.shape}")
    return found


def ascends(places: Int[np.ndarray, " n"], end: int) -> bool:
    """Says whether places rise from 0 to ``end``."""
    return places[0] == 0 and places[-1] == end and bool((np.diff(places) >= 0).all())


@dataclasses.dataclass(frozen=True, eq=False)
class States:
    """The states of captions on disk.

    Attributes:
        states: of all texts, one after the other.
        rows: where the states of each text begin, and the end.
        lengths: states of each text that are not of padding.
        texts: the text of each caption, and of its mirrored one.
        null: states of the empty text.
        encoder: JSON values that say whose states they are, see ``TextEncoder.encoder``.
        context: states of a text, at most.
        padding: whether the states of padding are stored, too, ``context`` of each text.
    """

    states: records.Files
    rows: Int[np.ndarray, " texts+1"]
    lengths: Int[np.ndarray, " texts"]
    texts: Int[np.ndarray, "captions 2"]
    null: Float16[np.ndarray, "p e"]
    encoder: dict[str, Any]
    context: int
    padding: bool

    @property
    def longest(self) -> int:
        """States of the longest text, padding included."""
        return int(np.diff(self.rows).max())

    def window(
        self,
        captions: Int[np.ndarray, " b"],
        context: int,
        flips: Bool[np.ndarray, " b"] | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns {"text": float16 ``[b, context, e]``, "lengths": int32 ``[b]``} of captions.

        Args:
            captions: their numbers.
            context: p, states of the window, zeros behind those that are stored.
            flips: which captions are of mirrored pictures; None: none.

        Raises:
            ValueError: a text has more states, or a file was cut off.
            OSError: a file cannot be read.
        """
        mirrored = 0 if flips is None else np.asarray(flips, np.int64)
        texts = self.texts[captions, mirrored]
        firsts, counts = self.rows[texts], self.rows[texts + 1] - self.rows[texts]
        if counts.max(initial=0) > context:
            raise ValueError(f"a text has {counts.max()} states, and not {context} at most")
        found = np.zeros((len(texts), context, self.null.shape[1]), np.float16)
        columns = np.arange(context)
        inside = columns < counts[:, None]
        found[inside] = self.states[(firsts[:, None] + columns)[inside]]
        return {"text": found, "lengths": self.lengths[texts]}

    @classmethod
    def open(cls, directory: pathlib.Path, metadata: Mapping[str, Any]) -> Self:
        """Opens the states of a directory of captions, whose metadata names them.

        Raises:
            FileNotFoundError, KeyError, TypeError, ValueError: they are damaged.
        """
        checksums, made_of = metadata["sha256"], metadata["states"]
        texts, rows, lengths, null = (
            read_array(
                directory / f"{name}.npy", dtype, checksums[f"{name}.npy"], _RANKS.get(name, 1)
            )
            for name, dtype in _ARRAYS.items()
        )
        names = sorted(filter(_SHARD.fullmatch, checksums))
        found = Texts(texts, np.diff(rows), lengths, null)
        sizes = [int(rows[part.stop] - rows[part.start]) for part in found.shards]
        record = np.dtype(("<f2", null.shape[1:]))
        encoder, context, padding = (made_of[x] for x in ("encoder", "context", "padding"))
        fitting = (
            len(names) == len(sizes)
            and ascends(rows, sum(sizes))
            and texts.shape == (metadata["num_captions"], 2)
            and 0 <= texts.min() <= texts.max() < len(lengths) == len(rows) - 1
            and bool(((lengths >= 1) & (lengths <= np.diff(rows))).all())
            and encoder["width"] == null.shape[1]
        )
        if not fitting:
            raise ValueError("its states do not fit together")
        states = records.Files([directory / name for name in names], sizes, record)
        return cls(states, rows, lengths, texts, null, encoder, context, padding)
