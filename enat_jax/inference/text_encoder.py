"""What a model reads: texts to prompts, by the words of a vocabulary or by the states of CLIP.

A prompt is the argument of the model's ``read``: words, which the model has a table of, or states
of a text encoder that was not trained with it. The encoder's weights may be elsewhere; its states
of the empty text are always at hand, so that stored states will do in place of texts.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, PyTree, Shaped

from enat_jax.checkpoints import model_files
from enat_jax.data import records, text_tokens
from enat_jax.inference import clip_model
from enat_jax.models.blocks import Prompt
from enat_jax.runtime import files

FOLDER = "text_encoder"  # of a model directory that has the encoder with it


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """Turns texts into the prompts of a model.

    Attributes:
        kind: of the tokens of a text.
        context: p, tokens of a prompt; the first ones of a longer text are read.
        encoder: ``identity`` of the encoder whose states prompts are; None: prompts are words.
        clip: the encoder; None: there is none, or its weights are not at hand.
        null_states: float16, of the empty text; None for words.

    Raises:
        ValueError: the encoder is another one, or the prompt has no room for a text.
    """

    kind: text_tokens.TextTokens
    context: int
    encoder: Mapping[str, Any] | None = None
    clip: clip_model.ClipText | None = None
    null_states: Float16[np.ndarray, "p e"] | None = None

    def __post_init__(self) -> None:
        least = text_tokens.added(self.kind)
        if self.context < least:
            raise ValueError(f"a text of {self.context} tokens is too short: at least {least}")
        if self.clip is None:
            return
        if self.clip.identity() != self.encoder:
            raise ValueError("the text encoder is not the one that the model was trained with")
        if self.context > self.clip.model.context:
            raise ValueError(
                f"a text of {self.context} tokens is longer than the {self.clip.model.context} "
                "that its encoder reads"
            )

    def __repr__(self) -> str:
        read = "words" if self.encoder is None else f"states of {self.width}"
        return f"TextEncoder({self.context} {read})"

    @property
    def width(self) -> int | None:
        """e, width of the states; None for words."""
        return None if self.null_states is None else self.null_states.shape[-1]

    def prompt(self, texts: Sequence[str]) -> tuple[Prompt, tuple[str, ...]]:
        """Returns the prompts of texts, equal ones computed once, and what of each is not read.

        Returns:
            Arrays of NumPy: words, int32 ``[n, p]``, or states, float16 ``[n, p, e]``, with the
            lengths; and of each text the words that had no room, "" mostly.

        Raises:
            ValueError: a word is not in the vocabulary, or the encoder is not at hand.
            ImportError: the packages that read texts are not installed.
        """
        window = text_tokens.window(self.kind, texts, self.context)
        return self.of_tokens(window.ids, window.lengths), window.dropped

    def of_tokens(self, ids: Int[np.ndarray, "n p"], lengths: Int[np.ndarray, " n"]) -> Prompt:
        """Returns the prompts of texts in a window, arrays of NumPy; raises as ``prompt``."""
        if self.encoder is None:
            return Prompt(ids, lengths)
        if self.clip is None:
            raise ValueError(
                "the text encoder that this model was trained with is not at hand: name its "
                f"directory by --text-encoder ({clip_model.MADE_BY}), or give the states of the "
                f"prompts instead of their texts; it is {dict(self.encoder)}"
            )
        different, which = np.unique(ids, axis=0, return_inverse=True)
        return Prompt(self.clip.states(different)[which.reshape(-1)], lengths)

    @functools.cached_property
    def null_ids(self) -> tuple[Int[np.ndarray, " p"], int]:
        """Tokens of the empty text, in the window of a prompt, and its length."""
        ids = np.full(self.context, self.kind.pad, np.int32)
        ids[0] = self.kind.start
        if self.kind.end is not None:
            ids[1] = self.kind.end
        return ids, text_tokens.added(self.kind)

    @property
    def null_prompt(self) -> Prompt:
        """The prompt of the empty text, arrays of NumPy of one row."""
        ids, length = self.null_ids
        lengths = np.array([length], np.int32)
        if self.null_states is None:
            return Prompt(ids[None], lengths)
        return Prompt(self.null_states[None, : self.context], lengths)

    def checked(self, prompt: Prompt) -> Prompt:
        """Returns a prompt that was made elsewhere, as arrays of NumPy with lengths.

        Raises:
            ValueError: it is none of this model.
        """
        tokens = np.asarray(prompt.tokens)
        shape = (len(tokens), *tokens.shape[1:2], *([] if self.width is None else [self.width]))
        kinds = "iu" if self.width is None else "f"
        if tokens.shape != shape or tokens.dtype.kind not in kinds or len(shape) < 2:
            wanted = "whole numbers [n, p]" if self.width is None else f"[n, p, {self.width}]"
            raise ValueError(
                f"a prompt of {tokens.dtype} {tokens.shape}: this model takes {wanted}"
            )
        if shape[1] > self.context:
            raise ValueError(
                f"a prompt of {shape[1]} tokens: this model takes {self.context} at most"
            )
        if not np.isfinite(tokens).all():
            raise ValueError("a prompt has a value that is not finite")
        if self.width is None and not 0 <= tokens.min(initial=0) <= tokens.max(initial=0) < (
            self.kind.size
        ):
            raise ValueError(f"a prompt has a word that is not in [0, {self.kind.size})")
        given = shape[1] if prompt.length is None else prompt.length
        lengths = np.broadcast_to(np.asarray(given, np.int32), (len(tokens),))
        if not 1 <= lengths.min(initial=1) <= lengths.max(initial=1) <= shape[1]:
            raise ValueError(f"lengths of prompts must lie in [1, {shape[1]}]")
        return Prompt(tokens, lengths)

    # --- in a training step -----------------------------------------------------------------

    @property
    def frozen(self) -> PyTree:
        """Weights that ``read`` needs and no training changes; {} for words."""
        return {} if self.clip is None else self.clip.params

    def read(
        self, frozen: PyTree, text: Shaped[Array, "b p"]
    ) -> Int[Array, "b p"] | Float[Array, "b p e"]:
        """Returns the tokens of a prompt from those of the texts of a batch; pure.

        Args:
            frozen: as the property.
            text: tokens with start, end and padding.
        """
        if self.clip is None:
            return jnp.asarray(text)
        return clip_model.text_states(self.clip.model, frozen, text)

    # --- on disk ----------------------------------------------------------------------------

    def description(self) -> dict[str, Any]:
        """Returns what ``model.json`` says of the texts."""
        known: dict[str, Any] = {"tokens": self.kind.identity(), "context": self.context}
        if self.encoder is None:
            return known
        null = model_files.fingerprint({"null": self.null_states})
        return known | {"encoder": dict(self.encoder), "null": null}

    def save(self, directory: pathlib.Path) -> None:
        """Writes what ``load`` needs beside the description; the encoder's weights are not."""
        if self.null_states is not None:
            null = records.npy_bytes(self.null_states)
            files.write_atomically(directory / clip_model.NULL, null)


def of_clip(clip: clip_model.ClipText, context: int) -> TextEncoder:
    """Returns the encoder whose prompts are states of CLIP; raises as ``TextEncoder``."""
    return TextEncoder(clip.kind, context, clip.identity(), clip, clip.null_states)


def load(
    directory: pathlib.Path,
    described: Mapping[str, Any],
    given: str | os.PathLike | None,
    devices: Sequence[jax.Device],
) -> TextEncoder:
    """Returns the text encoder of a model.

    Args:
        directory: of the model. Its ``text_encoder`` is used if it is there.
        described: its ``TextEncoder.description``.
        given: directory of the encoder; None: none but that of the model.
        devices: to divide texts over.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: it is damaged, or the encoder is another one.
    """
    identity, context = described.get("encoder"), described["context"]
    kind = text_tokens.of_identity(described["tokens"])
    if identity is None:
        if given is not None:
            raise ValueError(f"{directory} reads words, so a text encoder has no use")
        return TextEncoder(kind, context)
    kind = text_tokens.Clip(identity["pad"])
    null = clip_model.read_null(directory, identity["width"])
    if model_files.fingerprint({"null": null}) != described["null"]:
        raise ValueError(f"{directory / clip_model.NULL} is not what was saved: damaged")
    own = directory / FOLDER
    place = given if given is not None else own if own.is_dir() else None
    clip = None if place is None else clip_model.ClipText.load(place, devices=devices)
    if clip is not None and clip.identity() != identity:
        raise ValueError(
            f"{place} is not the text encoder that {directory} was trained with, which is "
            f"{dict(identity)}"
        )
    return TextEncoder(kind, context, identity, clip, null)
