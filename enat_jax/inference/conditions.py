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
from enat_jax.runtime import sharding

Prompts = Sequence[str] | Prompt


@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """Labels and texts of n images.

    Attributes:
        labels: int32, ``num_classes`` for no class.
        prompts: of each image; None: the model takes no text.
        negative_prompts: what the unconditional branch of guidance reads; None: the empty text.
        encoder: of the texts.
    """

    labels: Int[np.ndarray, " n"]
    prompts: Prompts | None = None
    negative_prompts: Prompts | None = None
    encoder: text_encoder.TextEncoder | None = None

    def part(self, start: int, stop: int) -> "Conditions":
        """Returns those of images ``start`` to ``stop`` - 1."""
        negative = _part(self.negative_prompts, start, stop)
        positive = _part(self.prompts, start, stop)
        return Conditions(self.labels[start:stop], positive, negative, self.encoder)

    def placed(self, mesh: jax.sharding.Mesh, rows: int) -> dict[str, Any]:
        """Returns the arguments of the sampler that say what to read; texts are encoded here.

        Args:
            mesh: to place them on.
            rows: at least as many as there are images; they are filled up by repetition.

        Raises:
            ValueError: a text cannot be read.
        """
        if self.encoder is None or self.prompts is None:
            return {}
        found: dict[str, Any] = {"null_prompt": self.encoder.null_prompt}
        for name, given in (("prompt", self.prompts), ("null_prompt", self.negative_prompts)):
            if given is not None:
                prompt = [np.asarray(x) for x in _encoded(self.encoder, given)]
                resized = (np.resize(x, (rows, *x.shape[1:])) for x in prompt)
                found[name] = Prompt(*(sharding.place(x, mesh) for x in resized))
        return found


def make(
    encoder: text_encoder.TextEncoder | None,
    num_classes: int,
    labels: Int[np.ndarray, " n"] | None,
    prompts: Prompts | None,
    negative_prompts: Prompts | None,
) -> Conditions:
    """Returns conditions of labels, texts or both.

    Args:
        encoder: of the model; None: it takes no text.
        num_classes: of the model.
        labels: None: no class.
        prompts: None: the empty text.
        negative_prompts: see ``Conditions``.

    Raises:
        ValueError: they do not fit together, or the model does not take them.
    """
    if encoder is None:
        if prompts is not None or negative_prompts is not None:
            raise ValueError("this model reads no texts: give labels and no prompts")
        if labels is None:
            raise ValueError("neither labels nor prompts: say what the images are to show")
        return Conditions(labels)
    if labels is None and prompts is None:
        raise ValueError("neither labels nor prompts: say what the images are to show")
    if isinstance(prompts, str) or isinstance(negative_prompts, str):
        raise ValueError("prompts must be a list of texts, one for each image")
    num = len(labels) if labels is not None else _number(prompts)
    prompts = [""] * num if prompts is None else prompts
    for name, found in (("prompts", prompts), ("negative_prompts", negative_prompts)):
        if found is not None and _number(found) != num:
            raise ValueError(f"{_number(found)} {name} of {num} images: give one for each image")
    if labels is None:
        labels = np.full(num, num_classes, np.int32)
    if isinstance(prompts, Prompt):
        prompts = encoder.checked(prompts)
    if isinstance(negative_prompts, Prompt):
        negative_prompts = encoder.checked(negative_prompts)
    return Conditions(labels, prompts, negative_prompts, encoder)


def _number(prompts: Prompts | None) -> int:
    if prompts is None:
        return 0
    return len(np.asarray(prompts.tokens) if isinstance(prompts, Prompt) else prompts)


def _part(prompts: Prompts | None, start: int, stop: int) -> Prompts | None:
    if isinstance(prompts, Prompt):
        return Prompt(*(np.asarray(x)[start:stop] for x in prompts))
    return None if prompts is None else list(prompts[start:stop])


def _encoded(encoder: text_encoder.TextEncoder, given: Prompts) -> Prompt:
    if isinstance(given, Prompt):
        return given
    prompt, dropped = encoder.prompt(given)
    for text, rest in zip(given, dropped, strict=True):
        if rest:
            shown = text_tokens.shortened(text)
            warnings.warn(
                f"the text {shown} is longer than the {encoder.context} tokens that the model "
                f"reads: {text_tokens.shortened(rest)} is left out",
                stacklevel=2,
            )
    return prompt
