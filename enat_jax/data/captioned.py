"""Token sets with captions, as the loader takes them, and what they must fit."""

import dataclasses
import os
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Int, Shaped

from enat_jax.data import coco, text_tokens, tokens
from enat_jax.data.captions import MADE_BY, Captions
from enat_jax.data.decoding import Batch

_CHUNK = 1 << 16  # records that are read at a time


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Captioned(tokens.TokenSet):
    """A token set whose batches have a caption for each record.

    Records of pictures without a caption are left out.

    Attributes:
        captions: of its pictures.
        context: p, tokens of a text in a batch.
        kept: the records that have captions; None: all.
    """

    captions: Captions
    context: int
    kept: Int[np.ndarray, " n"] | None

    def __len__(self) -> int:
        return len(self.rows) if self.kept is None else len(self.kept)

    def gather(
        self, indices: Int[np.ndarray, " b"], seeds: Int[np.ndarray, " b"] | None = None
    ) -> Batch:
        """Returns {"tokens", "labels", "text": int32 ``[b, p]``, "lengths": int32 ``[b]``}.

        Of captions with stored states the text is float16 ``[b, p, e]``.

        Args:
            indices: in [0, n).
            seeds: each chooses the caption of its example, among those of the picture; None: the
                first caption of each.

        Raises:
            ValueError: a record is damaged.
        """
        indices = np.asarray(indices, np.int64)
        indices = indices if self.kept is None else self.kept[indices]
        rows = self.read(indices)
        chosen = self.captions.choose(rows["image"], seeds)
        flips = rows["flip"].astype(bool)
        if self.captions.mirror_words == "unflipped":
            rows = self._unflipped(rows, indices, flips & self.captions.has_side[chosen])
        swap = flips if self.captions.mirror_words == "swap" else None
        return tokens.as_batch(rows) | self.captions.window(chosen, self.context, swap)

    def _unflipped(
        self,
        rows: Shaped[np.ndarray, " b"],
        indices: Int[np.ndarray, " b"],
        turned: Bool[np.ndarray, " b"],
    ) -> Shaped[np.ndarray, " b"]:
        """Returns the records with those of ``turned`` in place that are not mirrored."""
        if turned.any():
            plain = self.read(indices[turned] - 1)  # stands before the mirrored one of each item
            if plain["flip"].any() or (plain["image"] != rows["image"][turned]).any():
                raise ValueError("the token set has mirrored records that follow no other record")
            rows[turned] = plain
        return rows

    def without_text(self) -> tokens.TokenSet:
        """Returns the token set alone, all of its records."""
        return tokens.TokenSet(**_fields(self))

    @classmethod
    def of(cls, token_set: tokens.TokenSet, captions: Captions, context: int) -> Self:
        """Brings a token set and its captions together.

        Raises:
            ValueError: no record has a caption, or a text has no room in ``context``.
        """
        least = text_tokens.added(captions.kind)
        if context < least:
            raise ValueError(f"a text of {context} tokens is too short: at least {least}")
        kept = None
        has_caption = np.diff(captions.first) > 0
        if not has_caption.all():
            kept = np.flatnonzero(has_caption[images(token_set)])
            if not len(kept):
                raise ValueError("no record of the token set has a caption")
        return cls(**_fields(token_set), captions=captions, context=context, kept=kept)


def _fields(token_set: tokens.TokenSet) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(tokens.TokenSet)]
    return {name: getattr(token_set, name) for name in names}


def images(token_set: tokens.TokenSet) -> Int[np.ndarray, " n"]:
    """Returns the number of the image of every record, which reads all of them."""
    n = len(token_set.rows)
    found = np.empty(n, np.int64)
    for start in range(0, n, _CHUNK):
        part = np.arange(start, min(start + _CHUNK, n))
        found[part] = token_set.rows[part]["image"]
    return found


def open_captions(directory: str | os.PathLike, token_directory: str | os.PathLike) -> Captions:
    """Opens captions, and checks that they are of a token set.

    Args:
        directory: of the captions.
        token_directory: of the token set.

    Raises:
        FileNotFoundError: there are no captions.
        ValueError: they are damaged, or of another token set.
    """
    if str(token_directory).endswith(".npy"):
        raise ValueError(
            f"{token_directory} does not say which pictures its tokens are of, so it can have no "
            f"captions: make tokens with {tokens.MADE_BY}"
        )
    found = Captions.open(directory)
    if found.plan != tokens.read_metadata(token_directory)["digest"]:
        raise ValueError(
            f"the captions in {directory} are not of the tokens in {token_directory}: make them "
            f"with {MADE_BY} --tokens {token_directory}"
        )
    return found


def _stored(captions: Captions) -> tuple[dict[str, Any], int | None] | None:
    """Whose states are stored, and how many of each text where those of padding are."""
    if captions.states is None:
        return None
    return captions.states.encoder, captions.states.context if captions.states.padding else None


def open_both(
    token_directory: str | os.PathLike,
    directory: str | os.PathLike,
    held_out_tokens: str | os.PathLike,
    held_out_captions: str | os.PathLike,
) -> tuple[Captions, Captions]:
    """Opens the captions to train on and those to evaluate on, and checks that they fit.

    Raises:
        FileNotFoundError: there are no captions.
        ValueError: captions are damaged, of other tokens, or made by another tokenizer of texts;
            or pictures of MS-COCO are both trained and evaluated on.
    """
    training = open_captions(directory, token_directory)
    held_out = open_captions(held_out_captions, held_out_tokens)
    if training.kind.identity() != held_out.kind.identity():
        raise ValueError(
            f"{held_out_captions} and {directory} were made with different text tokens: make one "
            f"of them again ({MADE_BY}) with the vocabulary of the other"
        )
    if _stored(training) != _stored(held_out):
        raise ValueError(
            f"{held_out_captions} and {directory} do not have stored states of one text encoder: "
            f"make one of them again ({MADE_BY}) with --embed or --embeddings, and --padding, as "
            "the other"
        )
    if training.plan != held_out.plan:
        names = str(token_directory), str(held_out_tokens)
        coco.refuse_shared(tokens.image_keys(names[0]), tokens.image_keys(names[1]), names)
    return training, held_out
