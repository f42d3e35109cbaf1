"""States of texts in an .npz file, as any text encoder may have computed them.

The file holds ``embeddings``, floats ``[n, p, e]``, ``lengths``, whole numbers ``[n]``, how many of
the p are of the text and not of padding, ``prompts``, the n texts, and ``null``, floats
``[p0, e]``, the states of the empty text, which may be among the prompts instead.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float16, Int, Shaped

from enat_jax.data.text_tokens import shortened
from enat_jax.evaluation import npz_files
from enat_jax.runtime import paths

STATES, LENGTHS, TEXTS, NULL = "embeddings", "lengths", "prompts", "null"
ADVICE = (
    "states of texts are embeddings, floats [n, p, e], lengths, whole numbers [n], prompts, n "
    "texts, and null, floats [p0, e], of the empty text"
)
PART = 256  # texts that are read at a time
_SHOWN = 3  # texts in a message


class NpzStates:
    """The states in such a file, which are read in order, a part at a time.

    Args:
        path: of the file.

    Attributes:
        texts: the number of each text; of equal ones that of the first.
        lengths: states of each text, int32.
        null: states of the empty text, float16.

    Raises:
        OSError: if there is no such file or it cannot be read.
        ValueError: if it is damaged, or holds something else.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = paths.local(path)
        with npz_files.open_npz(self._path, ADVICE) as archive:
            if absent := [name for name in (STATES, LENGTHS, TEXTS) if name not in archive]:
                names = ", ".join(archive) or "no arrays"
                raise ValueError(f"{path} has no {absent[0]}, but {names}: {ADVICE}")
            shape, dtype = archive.header(STATES)
            if dtype.kind != "f" or len(shape) != 3 or 0 in shape:
                raise ValueError(f"{path}: {STATES} is {dtype} {list(shape)}: {ADVICE}")
            n, self.context, self.width = shape
            # All of it is read once: what is damaged should not be found after hours.
            self._checksums = [archive.checksum(name) for name in (STATES, LENGTHS)]
            self.lengths = self._of_texts(archive, LENGTHS, n, "iu").astype(np.int32)
            texts = self._of_texts(archive, TEXTS, n, "U").tolist()
            null = archive.read(NULL) if NULL in archive else None
        if len(wrong := np.flatnonzero((self.lengths < 1) | (self.lengths > self.context))):
            raise ValueError(
                f"{path}: lengths[{wrong[0]}] is {self.lengths[wrong[0]]}, and not within 1 to "
                f"{self.context}"
            )
        self.texts: dict[str, int] = {}
        for i, text in enumerate(texts):
            self.texts.setdefault(" ".join(text.split()), i)
        self.null = self._null(null)

    def _of_texts(
        self, archive: npz_files.Archive, name: str, n: int, kinds: str
    ) -> Shaped[np.ndarray, " n"]:
        shape, dtype = archive.header(name)
        if shape != (n,) or dtype.kind not in kinds:
            raise ValueError(
                f"{self._path}: {name}, {dtype} {list(shape)}, are none of {n:,} texts: {ADVICE}"
            )
        return archive.read(name)

    def _null(self, null: Shaped[np.ndarray, "..."] | None) -> Float16[np.ndarray, "p e"]:
        if null is None:
            if "" not in self.texts:
                raise ValueError(
                    f"{self._path} has no states of the empty text, which guidance needs: add null "
                    'or the prompt ""'
                )
            place = self.texts[""]
            return next(self.read(np.array([place]), self.lengths[[place]], [slice(1)]))
        if null.dtype.kind != "f" or null.ndim != 2 or null.shape[1] != self.width or not len(null):
            raise ValueError(f"{self._path}: {NULL} is {null.dtype} {list(null.shape)}: {ADVICE}")
        return self._halves(null[: self.context], NULL)

    def _halves(self, states: Shaped[np.ndarray, "n e"], name: str) -> Float16[np.ndarray, "n e"]:
        with np.errstate(over="ignore"):
            found = states.astype("<f2")
        if not np.isfinite(found).all():
            raise ValueError(f"{self._path}: {name} has a value that is not finite in float16")
        return found

    def identity(self) -> dict[str, Any]:
        """Returns JSON values that decide the states of all texts."""
        return {"crc32": [f"{checksum:08x}" for checksum in self._checksums]}

    def find(self, texts: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Returns the numbers of texts; raises ValueError, which names some that are not there."""
        found = np.array([self.texts.get(text, -1) for text in texts], np.int64)
        if not (found < 0).any():
            return found
        missing = list(dict.fromkeys(t for t, i in zip(texts, found, strict=True) if i < 0))
        shown = ", ".join(shortened(text) for text in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN:,} more" if len(missing) > _SHOWN else ""
        raise ValueError(
            f"{self._path} has no states of {len(missing):,} texts, such as {shown}{more}: add "
            "them, as captions.jsonl or the captions of mirrored pictures have them"
        )

    def read(
        self,
        places: Int[np.ndarray, " texts"],
        sizes: Int[np.ndarray, " texts"],
        parts: Sequence[slice],
    ) -> Iterator[Float16[np.ndarray, "rows e"]]:
        """Yields the states of the texts of each part, one after the other.

        Args:
            places: rising numbers of texts.
            sizes: how many states of each of them are wanted.
            parts: of these texts, in their order.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is damaged, or a state is not finite in float16.
        """
        with npz_files.open_npz(self._path, ADVICE) as archive:
            first = stop = int(places[parts[0].start or 0]) if parts else 0
            chunks = archive.rows(STATES, PART, first)
            for part in parts:
                rows = []
                for place, size in zip(places[part].tolist(), sizes[part].tolist(), strict=True):
                    while place >= stop:
                        states = next(chunks)
                        first, stop = stop, stop + len(states)
                    rows.append(self._halves(states[place - first, :size], f"{STATES}[{place}]"))
                yield np.concatenate(rows)
