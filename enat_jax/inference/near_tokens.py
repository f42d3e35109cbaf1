"""Tokens exchanged for near ones, which shows how far a decoder depends on every token being right.

A Frechet distance of pictures that are decoded from such tokens is called pFID (arXiv:2509.12474,
where it foretells how good samples are, and that of plain reconstructions does not).
"""

import dataclasses
import functools
from typing import Self

import numpy as np
from jaxtyping import Int

from enat_jax.inference import tokenizer
from enat_jax.models import quantizers
from enat_jax.runtime import numerics

_neighbours = numerics.jit(quantizers.neighbours, static_argnums=2)


@dataclasses.dataclass(frozen=True, eq=False)
class NearTokens:
    """Exchanges tokens.

    Attributes:
        codec: whose tokens they are.
        share: of the tokens of every image that are exchanged, in (0, 1].
        nearest: codes that one is drawn from, those nearest to the token's own.

    Raises:
        ValueError: one of them is impossible.
    """

    codec: tokenizer.Tokenizer
    share: float
    nearest: int

    def __post_init__(self) -> None:
        v = self.codec.model.codebook_size
        if not 0 < self.share <= 1:
            raise ValueError(f"a share {self.share} of tokens must lie in (0, 1]")
        if not 0 < self.nearest < v:
            raise ValueError(f"{self.nearest} codes near to one: choose 1 to {v - 1} of the {v}")

    @classmethod
    def of(cls, codec: tokenizer.Tokenizer, text: str) -> Self:
        """Reads "SHARE:NEAREST", such as "0.7:280".

        Raises:
            ValueError: it is something else.
        """
        share, _, nearest = text.partition(":")
        try:
            values = float(share), int(nearest)
        except ValueError as error:
            raise ValueError(
                f"{text!r} is no share of tokens and number of near codes: SHARE:NEAREST, such as "
                "0.7:280"
            ) from error
        return cls(codec, *values)

    @property
    def description(self) -> dict[str, float]:
        """What numbers depend on, as JSON values."""
        return {"share": self.share, "nearest": self.nearest}

    @functools.cached_property
    def _neighbours(self) -> Int[np.ndarray, "v n"]:
        codes = np.arange(self.codec.model.codebook_size, dtype=np.int32)
        return np.asarray(_neighbours(codes, self.codec.code_table, self.nearest))

    def __call__(self, tokens: Int[np.ndarray, "n l"], first: int) -> Int[np.ndarray, "n l"]:
        """Returns tokens with a share of them exchanged.

        Args:
            tokens: of images.
            first: number of the first image. What is exchanged of an image depends on its number.
        """
        found = np.array(tokens)
        for index, row in enumerate(found, first):
            rng = np.random.default_rng(index)
            places = np.flatnonzero(rng.random(row.size) < self.share)
            row[places] = self._neighbours[
                row[places], rng.integers(self.nearest, size=len(places))
            ]
        return found
