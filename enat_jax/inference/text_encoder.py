"""What a model reads: texts to prompts, by the words of a vocabulary or by the states of CLIP.

A prompt is the argument of the model's ``read``: words, which the model has a table of, or states
of a text encoder that was not trained with it. The encoder's weights may be elsewhere; its states
of the empty text are always at hand, so that stored states will do in place of texts.
"""

import dataclasses
import functools
import os
import pathlib
import zipfile
import zlib
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
NULL_TOLERANCE = 0.02  # relative, of the states of the empty text; bfloat16 changes them less


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
        if self.encoder is not None and self.clip is None:
            raise ValueError(
                "the text encoder that this model was trained with is not at hand: name its "
                f"directory by --text-encoder ({clip_model.MADE_BY}), or give the states of the "
                f"prompts instead of their texts; it is {dict(self.encoder)}"
            )
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
        return self.of_tokens(Prompt(window.ids, window.lengths))

    def of_tokens(self, given: Prompt) -> Prompt:
        """Returns the prompts of texts in a ``window``, equal ones computed once.

        Args:
            given: tokens of the window and lengths; states stay as they are.

        Returns:
            Arrays of NumPy: words, int32 ``[n, p]``, or states, float16 ``[n, p, e]``.
        """
        tokens = np.asarray(given.tokens)
        if self.clip is None or tokens.dtype.kind == "f":
            return given
        different, which = np.unique(tokens, axis=0, return_inverse=True)
        return Prompt(self.clip.states(different)[which.reshape(-1)], given.length)

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


def read_states(path: pathlib.Path, encoder: TextEncoder) -> tuple[Prompt, list[str]]:
    """Reads prompts as states that another program has computed.

    Args:
        path: of an .npz file with ``embeddings``, floats ``[n, p, e]``, and ``lengths``, whole
            numbers ``[n]``. It may have ``prompts``, the n texts, and ``null``, floats ``[p0, e]``,
            the states of the empty text, which must be those that the model was trained with.
        encoder: of the model.

    Returns:
        The prompts, of at most ``encoder.context`` tokens, and their texts, "" where the file has
        none.

    Raises:
        ValueError: the file is damaged, or its states are none of this model.
        OSError: it cannot be read.
    """
    if encoder.null_states is None:
        raise ValueError(f"{path}: this model reads words and no states: give prompts")
    arrays = _arrays(path, ("embeddings", "lengths"), ("null", "prompts"))
    states, lengths = arrays["embeddings"], arrays["lengths"]
    if not len(states):
        raise ValueError(f"{path} holds no prompt")
    if states.ndim == 3 and lengths.max(initial=0) <= encoder.context:
        states = states[:, : encoder.context]  # the rest is padding
    try:
        found = encoder.checked(Prompt(states, lengths))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if "null" in arrays:
        _check_null(path, arrays["null"], encoder.null_states)
    texts = arrays.get("prompts", np.full(len(states), ""))
    if texts.dtype.kind != "U" or texts.shape != (len(states),):
        raise ValueError(
            f"{path}: prompts are {texts.dtype} {texts.shape}, and not {len(states)} texts"
        )
    return found, texts.tolist()


def _arrays(
    path: pathlib.Path, needed: Sequence[str], allowed: Sequence[str]
) -> dict[str, Shaped[np.ndarray, "..."]]:
    with open(path, "rb") as file:
        try:
            with np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
                found = {name: archive[name] for name in (*needed, *allowed) if name in archive}
                names = archive.files
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise ValueError(
                f"{path} cannot be read as an .npz file ({error}): write it by numpy.savez"
            ) from error
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"{path} has no array {missing[0]!r}, but {sorted(names)}")
    if wrong := [name for name in found if not isinstance(found[name], np.ndarray)]:
        raise ValueError(f"{path}: {wrong[0]!r} is no array: write it by numpy.savez")
    return found


def _check_null(
    path: pathlib.Path,
    null: Float[np.ndarray, "p0 e"],
    expected: Float16[np.ndarray, "p e"],
) -> None:
    e = expected.shape[1]
    if null.ndim != 2 or null.dtype.kind != "f" or null.shape[1] != e or not len(null):
        raise ValueError(f"{path}: null is {null.dtype} {null.shape}, and no floats [p, {e}]")
    rows = min(len(null), len(expected))
    wanted = expected[:rows].astype(np.float64)
    share = np.linalg.norm(null[:rows] - wanted) / np.linalg.norm(wanted)
    if not share <= NULL_TOLERANCE:
        raise ValueError(
            f"{path}: null differs by {share:.1%} from the states of the empty text that the model "
            "was trained with: take the same encoder, layer and padding"
        )
