"""What images are to show: labels, texts, or both, and what guidance leads away from."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from enat_jax.data import text_tokens
from enat_jax.inference import text_encoder
from enat_jax.models.blocks import Prompt
from enat_jax.models.transformers import Transformer
from enat_jax.runtime import sharding

Prompts = Sequence[str] | Prompt


@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """Labels and texts of n images.

    Attributes:
        labels: int32, ``num_classes`` for no class.
        prompts: of each image, arrays of NumPy: the tokens of texts, int32 ``[n, p]``, or states
            of the text encoder; None: the model takes no text.
        negative_prompts: likewise, what the unconditional branch of guidance reads; None: the empty
            text.
        encoder: of the texts.
    """

    labels: Int[np.ndarray, " n"]
    prompts: Prompt | None = None
    negative_prompts: Prompt | None = None
    encoder: text_encoder.TextEncoder | None = None

    def part(self, rows: slice | Int[np.ndarray, " b"]) -> "Conditions":
        """Returns those of some images."""
        prompts, negative = (
            None if found is None else Prompt(*(np.asarray(x)[rows] for x in found))
            for found in (self.prompts, self.negative_prompts)
        )
        return Conditions(self.labels[rows], prompts, negative, self.encoder)

    def placed(self, mesh: jax.sharding.Mesh, rows: int) -> dict[str, Any]:
        """Returns the arguments of the sampler that say what to read; texts are encoded here.

        Args:
            mesh: to place them on.
            rows: at least as many as there are images; they are filled up by repetition.
        """
        if self.encoder is None or self.prompts is None:
            return {}
        found: dict[str, Any] = {"null_prompt": self.encoder.null_prompt}
        for name, given in (("prompt", self.prompts), ("null_prompt", self.negative_prompts)):
            if given is not None:
                tokens, lengths = map(np.asarray, given)
                if tokens.dtype.kind != "f":
                    tokens, lengths = map(np.asarray, self.encoder.of_tokens(tokens, lengths))
                resized = (np.resize(x, (rows, *x.shape[1:])) for x in (tokens, lengths))
                found[name] = Prompt(*(sharding.place(x, mesh) for x in resized))
        return found


def make(
    model: Transformer,
    encoder: text_encoder.TextEncoder | None,
    labels: Int[np.ndarray, " n"] | None,
    prompts: Prompts | None,
    negative_prompts: Prompts | None,
) -> Conditions:
    """Returns conditions of labels, texts or both.

    Args:
        model: the transformer.
        encoder: of its texts; None: it takes none, and prompts have no use.
        labels: None: no class.
        prompts: None: the empty text.
        negative_prompts: see ``Conditions``.

    Raises:
        ValueError: they do not fit together or to the model, or a text cannot be read.
        ImportError: the packages that read texts are not installed.
    """
    if labels is None and prompts is None:
        raise ValueError("neither labels nor prompts: say what the images are to show")
    if encoder is None:
        assert labels is not None
        return Conditions(labels)
    texts = None if prompts is None else _read(model, encoder, prompts)
    negative = None if negative_prompts is None else _read(model, encoder, negative_prompts)
    if labels is None:
        assert texts is not None
        labels = np.full(len(texts.tokens), model.num_classes, np.int32)
    if texts is None:
        null = (np.asarray(x) for x in encoder.null_prompt)
        texts = Prompt(*(np.broadcast_to(x, (len(labels), *x.shape[1:])) for x in null))
    for name, found in (("prompts", texts), ("negative_prompts", negative)):
        if found is not None and len(found.tokens) != len(labels):
            raise ValueError(
                f"{len(found.tokens)} {name} of {len(labels)} images: give one for each image"
            )
    return Conditions(labels, texts, negative, encoder)


def _read(model: Transformer, encoder: text_encoder.TextEncoder, given: Prompts) -> Prompt:
    """Returns the tokens of texts, or the states that were given in their place."""
    if isinstance(given, Prompt):
        found = encoder.checked(given)
        p = found.tokens.shape[1]
        if getattr(model, "attend_padding", False) and p != encoder.context:
            raise ValueError(
                f"a prompt of {p} tokens: this model attends to the padding of a text, too, and "
                f"needs all {encoder.context}"
            )
        return found
    if isinstance(given, str):
        raise ValueError("prompts must be a list of texts, one for each image")
    window = encoder.window(given)
    for text, rest in dict(zip(given, window.dropped, strict=True)).items():
        if rest:
            warnings.warn(
                f"the text {text_tokens.shortened(text)} is longer than the {encoder.context} "
                f"tokens that the model reads: {text_tokens.shortened(rest)} is left out",
                stacklevel=5,  # who called the generator
            )
    return Prompt(window.ids, window.lengths)
