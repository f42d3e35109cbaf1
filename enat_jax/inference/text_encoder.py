"""What a model reads: texts to prompts, by the words of a vocabulary or by the states of CLIP.

A prompt is the argument of the model's ``read``: words, which the model has a table of, or states
of a text encoder that was not trained with it. The encoder's weights may be elsewhere; its states
of the empty text are always at hand, so that stored states will do in place of texts.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, PyTree, Shaped

from enat_jax.checkpoints import model_files
from enat_jax.data import records, text_states, text_tokens
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

    def check_model(self, model: Any) -> None:
        """Raises ValueError unless a transformer takes such prompts."""
        words = self.kind.size if self.width is None else None
        found = (self.context, words, self.width)
        needed = (model.text_tokens, model.text_vocabulary, model.text_width)
        if found != needed:
            raise ValueError(
                f"tokens of a text, words and width of states are {found}, of the transformer "
                f"{needed}: they do not belong together"
            )

    @property
    def width(self) -> int | None:
        """e, width of the states; None for words."""
        return None if self.null_states is None else self.null_states.shape[-1]

    def window(self, texts: Sequence[str]) -> text_tokens.Window:
        """Returns the tokens of texts, and what of each is not read.

        Raises:
            ValueError: a text is none, a word is not in the vocabulary, or the encoder is not at
                hand.
            ImportError: the packages that read texts are not installed.
        """
        self._check_at_hand()
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"prompts must be a list of texts, and {text!r} is none")
            if any(0xD800 <= ord(c) < 0xE000 for c in text):
                shown = text_tokens.shortened(text)
                raise ValueError(f"the text {shown} holds half of a surrogate pair: remove it")
        return text_tokens.window(self.kind, texts, self.context)

    def prompt(self, texts: Sequence[str]) -> Prompt:
        """Returns the prompts of texts: words, or states of the encoder; raises as ``window``."""
        window = self.window(texts)
        return self.of_tokens(window.ids, window.lengths)

    def of_tokens(
        self, ids: Int[np.ndarray, "n p"] | Float16[np.ndarray, "n p e"], lengths: Any
    ) -> Prompt:
        """Returns the prompts of texts in a ``window``, equal ones computed once.

        Args:
            ids: of the window, or states that were stored, which stay as they are.
            lengths: of the texts.

        Returns:
            Arrays of NumPy: words, int32 ``[n, p]``, or states, float16 ``[n, p, e]``.

        Raises:
            ValueError: the encoder is not at hand.
        """
        if ids.dtype.kind == "f":
            return Prompt(ids, lengths)
        self._check_at_hand()
        if self.clip is None:
            return Prompt(ids, lengths)
        different, which = np.unique(ids, axis=0, return_inverse=True)
        return Prompt(self.clip.states(different)[which.reshape(-1)], lengths)

    def _check_at_hand(self) -> None:
        if isinstance(self.kind, text_tokens.Stored):
            raise ValueError(
                "this model was trained on states that another program computed: give the states "
                "of the prompts (--embeddings) instead of their texts"
            )
        if self.encoder is not None and self.clip is None:
            raise ValueError(
                "the text encoder that this model was trained with is not at hand: name its "
                f"directory by --text-encoder ({clip_model.MADE_BY}), or give the states of the "
                f"prompts instead of their texts; it is {dict(self.encoder)}"
            )

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
        states = self.null_states[: self.context]
        if isinstance(self.kind, text_tokens.Stored):
            lengths[:] = len(states)
        rest = self.context - len(states)
        return Prompt(np.pad(states, ((0, rest), (0, 0)))[None], lengths)

    def checked(self, prompt: Prompt) -> Prompt:
        """Returns a prompt that was made elsewhere, as arrays of NumPy with lengths.

        Args:
            prompt: words or states; the latter become float16, as those of ``prompt`` are.

        Raises:
            ValueError: it is none of this model.
        """
        tokens = np.asarray(prompt.tokens)
        rank, kinds = (2, "iu") if self.width is None else (3, "f")
        wanted = "whole numbers [n, p]" if self.width is None else f"floats [n, p, {self.width}]"
        if tokens.ndim != rank or tokens.dtype.kind not in kinds:
            raise ValueError(f"prompts are {wanted}, and not {tokens.dtype} {tokens.shape}")
        if self.width not in (None, tokens.shape[-1]):
            raise ValueError(
                f"prompts are {wanted}, and not {tokens.dtype} {tokens.shape}: they are of another "
                "text encoder"
            )
        if tokens.shape[1] > self.context:
            raise ValueError(
                f"a prompt of {tokens.shape[1]} tokens: this model reads {self.context} at most"
            )
        if self.width is None:
            if not 0 <= tokens.min(initial=0) <= tokens.max(initial=0) < self.kind.size:
                raise ValueError(f"a prompt has a word that is not in [0, {self.kind.size})")
            tokens = tokens.astype(np.int32)
        else:
            with np.errstate(over="ignore"):
                tokens = tokens.astype(np.float16)
            if len(wrong := np.flatnonzero(~np.isfinite(tokens).all(axis=(1, 2)))):
                raise ValueError(f"prompt {wrong[0]} has a value that is not finite in float16")
        given = tokens.shape[1] if prompt.length is None else prompt.length
        lengths = np.asarray(given)
        if lengths.dtype.kind not in "iu" or lengths.shape not in ((), (len(tokens),)):
            raise ValueError(
                f"lengths of prompts are a whole number for each, and not {lengths.dtype} "
                f"{lengths.shape}"
            )
        lengths = np.broadcast_to(lengths, (len(tokens),))
        if len(wrong := np.flatnonzero((lengths < 1) | (lengths > tokens.shape[1]))):
            raise ValueError(
                f"prompt {wrong[0]} has the length {lengths[wrong[0]]}: it must lie in "
                f"[1, {tokens.shape[1]}]"
            )
        return Prompt(tokens, lengths.astype(np.int32))

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

    def with_encoder(
        self, directory: str | os.PathLike, devices: Sequence[jax.Device] | None = None
    ) -> "TextEncoder":
        """Returns the same with the weights of its encoder, which are in a directory.

        Raises:
            OSError: a file is missing or cannot be read.
            ValueError: it is damaged, another encoder than that of the model, or of no use.
        """
        if self.encoder is None:
            raise ValueError("this model reads words and needs no text encoder: leave it out")
        clip = clip_model.ClipText.load(directory, devices=devices or None)
        if clip.identity() != self.encoder:
            raise ValueError(
                f"{directory} is not the text encoder that the model was trained with, which is "
                f"{dict(self.encoder)}"
            )
        return dataclasses.replace(self, clip=clip)

    def save_encoder(self, directory: pathlib.Path, formats: Collection[str]) -> None:
        """Writes the encoder with its weights into a model directory, in ``FOLDER``.

        Raises:
            ValueError: there is none at hand.
            OSError: it cannot be written.
        """
        if self.clip is None:
            words = self.encoder is None
            reason = (
                "reads words and has none" if words else "has none at hand: give --text-encoder"
            )
            raise ValueError(f"no text encoder can be written: this model {reason}")
        self.clip.save(directory / FOLDER, formats)

    def save(self, directory: pathlib.Path) -> None:
        """Writes what ``load`` needs beside the description; the encoder's weights are not."""
        if self.null_states is not None:
            null = records.npy_bytes(self.null_states)
            files.write_atomically(directory / clip_model.NULL, null)


def of_clip(clip: clip_model.ClipText, context: int) -> TextEncoder:
    """Returns the encoder whose prompts are states of CLIP; raises as ``TextEncoder``."""
    return TextEncoder(clip.kind, context, clip.identity(), clip, clip.null_states)


def of_states(stored: text_states.States, context: int) -> TextEncoder:
    """Returns the encoder of prompts that are stored, without its weights."""
    of_clip = stored.encoder["kind"] == "clip"
    kind = text_tokens.Clip(stored.encoder["pad"]) if of_clip else text_tokens.Stored()
    return TextEncoder(kind, context, stored.encoder, None, stored.null)


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
        found = TextEncoder(kind, context)
        return found if given is None else found.with_encoder(given)
    if not isinstance(kind, text_tokens.Stored):
        kind = text_tokens.Clip(identity["pad"])
    null = clip_model.read_null(directory, identity["width"], described["null"])
    own = directory / FOLDER
    place = given if given is not None else own if own.is_dir() else None
    found = TextEncoder(kind, context, identity, None, null)
    return found if place is None else found.with_encoder(place, devices)
