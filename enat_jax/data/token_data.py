"""The section ``data`` of a config that trains on tokens, and what these tokens must fit."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Protocol

from enat_jax.data import imagenet, tokens


@dataclasses.dataclass(frozen=True)
class Data:
    """The section ``data`` of a config that trains on tokens.

    Attributes:
        tokens: directory of the token set to train on, or a feature file (.npy) of the reference.
        tokenizer: directory of the tokenizer, for pictures and the finished model.
        held_out_tokens: as ``tokens``, of what to evaluate on; None: no evaluation.
        captions: directory of the captions of ``tokens``, what tokenize_captions wrote, for a model
            of text; None: no text.
        held_out_captions: those of ``held_out_tokens``.
        text_encoder: directory of the encoder whose states the texts become, what import_torch
            --clip wrote; None: captions are words, which the model learns by itself, or have stored
            states.
        in_memory: whether to read the training tokens once and keep them, for slow disks.
    """

    tokens: str
    tokenizer: str
    held_out_tokens: str | None = None
    captions: str | None = None
    held_out_captions: str | None = None
    text_encoder: str | None = None
    in_memory: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "tokenizer"):
            if not getattr(self, name):
                raise ValueError(
                    f"data.{name} is not set: give --config.data.{name}=DIR, what "
                    f"{'tokenize_images' if name == 'tokens' else 'train'} wrote"
                )
        for name in ("held_out_captions", "text_encoder"):
            if getattr(self, name) and not self.captions:
                raise ValueError(f"data.{name} has no use without data.captions")
        if self.held_out_captions and not self.held_out_tokens:
            raise ValueError("data.held_out_captions has no use without data.held_out_tokens")


class Codec(Protocol):
    """What ``check`` compares of a tokenizer."""

    @property
    def model(self) -> Any:
        """Its network, which has ``codebook_size``."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""

    @property
    def fingerprint(self) -> str:
        """Identity of its weights."""


def open_tokens(
    path: str | os.PathLike, settings: Mapping[str, Any], codec: Codec
) -> tokens.TokenSet:
    """Opens a token set, or a feature file of the reference, which says little of itself.

    Args:
        path: of its directory, or of the file (.npy).
        settings: of the model, of which a feature file needs ``num_classes``.
        codec: the tokenizer that made the tokens.

    Raises:
        FileNotFoundError: there is no such set or file.
        ValueError: it is damaged, or the number of classes is not known.
    """
    if not str(path).endswith(".npy"):
        return tokens.TokenSet.open(path)
    num_classes = settings["num_classes"]
    if num_classes is None:
        raise ValueError(f"{path} does not say how many classes it has: set model.num_classes")
    ilsvrc = num_classes == len(imagenet.NAMES)
    names = imagenet.NAMES if ilsvrc else [str(i) for i in range(num_classes)]
    return tokens.TokenSet.open_reference(path, codec.model.codebook_size, names)


def sizes(token_set: tokens.TokenSet) -> dict[str, int]:
    """Returns what the settings of a model may leave to its tokens."""
    rows, columns = token_set.grid
    return {
        "num_tokens": rows * columns,
        "codebook_size": token_set.codebook_size,
        "num_classes": len(token_set.class_names),
    }


def check(
    token_set: tokens.TokenSet,
    directory: object,
    model: object,
    codec: Codec,
    tokenizer_directory: object,
) -> None:
    """Checks that tokens, model and tokenizer fit together.

    Args:
        token_set: the tokens.
        directory: that they come from, for the message.
        model: a transformer, which has ``sizes`` as attributes; without classes, 0, it ignores
            those of the tokens.
        codec: the tokenizer.
        tokenizer_directory: that it comes from, for the message.

    Raises:
        ValueError: what differs.
    """
    for name, found in sizes(token_set).items():
        if name == "num_classes" and getattr(model, name) == 0:
            continue
        if found != getattr(model, name):
            raise ValueError(
                f"{directory} has {name}={found}, but model.{name}={getattr(model, name)}: name "
                "other tokens or change the config"
            )
    if (token_set.codebook_size, token_set.grid) != (codec.model.codebook_size, tuple(codec.grid)):
        raise ValueError(
            f"{directory} has a grid of {token_set.grid} and {token_set.codebook_size} codes, the "
            f"tokenizer in {tokenizer_directory} {tuple(codec.grid)} and "
            f"{codec.model.codebook_size}: name the tokenizer that made the tokens"
        )
    # A feature file of the reference does not say which tokenizer made it.
    if token_set.tokenizer not in (None, codec.fingerprint):
        raise ValueError(
            f"{directory} was not made by the tokenizer in {tokenizer_directory} (fingerprints "
            f"{token_set.tokenizer[:12]}... and {codec.fingerprint[:12]}...): make the tokens "
            "again or name the right tokenizer"
        )
