"""CLIP's weights as others publish them, with what the weights do not say.

Hugging Face, OpenAI and OpenCLIP give the same tensors other names, and none of them says in its
tensors which activation a tower has and what follows a text in its window. Wrong ones leave states
that look right and pictures that are worse. They are known for some files by their checksum, or
stand in a ``config.json`` beside the file, or must be said.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from enat_jax.checkpoints import torch_files, weight_files
from enat_jax.data import text_tokens
from enat_jax.inference import clip_model, clip_towers, reference_weights
from enat_jax.models import clip, clip_names, reference_sizes
from enat_jax.runtime import files


class Published(NamedTuple):
    """Weights that are known by the SHA-256 of their file."""

    name: str
    activation: str
    pad: int


_END = text_tokens.Clip.end
_L14 = "openai/clip-vit-large-patch14"
KNOWN = {
    "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb": Published(
        _L14, "quick_gelu", _END
    ),
    "d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334": Published(
        f"{_L14}, the text encoder of Stable Diffusion 1.5", "quick_gelu", _END
    ),
    "660c6f5b1abae9dc498ac2d21e1347d2abdb0cf6c0c0c8576cd796491d9a6cdd": Published(
        f"{_L14}, the first text encoder of Stable Diffusion XL", "quick_gelu", _END
    ),
    "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f": Published(
        "openai/clip-vit-base-patch32", "quick_gelu", _END
    ),
    "9a78ef8e8c73fd0df621682e7a8e8eb36c6916cb3c16b291a082ecd52ab79cc4": Published(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "gelu", 0
    ),
}
NO_PAD = 1  # what old configs say, and no program does


def read(
    path: str | os.PathLike,
    *,
    activation: str | None = None,
    pad: int | None = None,
    hidden_layer: int = -1,
    num_heads: int | None = None,
    vision_heads: int | None = None,
    part: str | None = None,
) -> tuple[clip_towers.Clip, list[str]]:
    """Reads the towers that are in a file of CLIP's weights.

    Args:
        path: of the file. ``config.json`` beside it is read, too, if it is there.
        activation: of both towers, a key of ``clip.ACTIVATIONS``; None: what is known of the file.
        pad: the token that follows a text; None: what is known of the file.
        hidden_layer: see ``clip_names.text_tower_of``.
        num_heads, vision_heads: of the text and of the vision tower; None: what is known of the
            file, or of heads of that width.
        part: see ``weight_files.read``.

    Returns:
        The towers, which compute in float32, and sentences on where their settings come from.

    Raises:
        OSError: the file or its ``config.json`` cannot be read.
        ValueError: it holds no text tower of CLIP, is damaged, or not all is known.
    """
    path = pathlib.Path(path)
    try:
        tensors = reference_sizes.without_prefixes(weight_files.read(path, part))
    except ValueError as error:
        if isinstance(error.__cause__, torch_files.TorchScript):
            raise ValueError(
                f"{path} is a TorchScript program, as OpenAI publishes CLIP, and no program is run "
                f"here: use the safetensors of {_L14} or of the like"
            ) from error
        raise
    sha256 = reference_weights.sha256_of(path)
    settings = _Settings(path, KNOWN.get(sha256))
    try:
        text, vision = clip_names.towers(tensors)
        model = clip_names.text_tower_of(
            text,
            settings.activation(activation),
            hidden_layer=hidden_layer,
            num_heads=num_heads or settings.heads("text_config"),
        )
        if model.vocabulary != text_tokens.Clip.size:
            raise ValueError(
                f"this tower has {model.vocabulary:,} tokens, and CLIP has "
                f"{text_tokens.Clip.size:,}: its texts cannot be read"
            )
        params = reference_weights.finite(clip_names.text_params(text, model))
        seeing = None
        if vision:
            vision_model = clip_names.vision_tower_of(
                vision,
                settings.activation(activation, "vision_config"),
                vision_heads or settings.heads("vision_config"),
            )
            vision_params = clip_names.vision_params(vision, vision_model)
            seeing = clip_towers.ClipVision(vision_model, reference_weights.finite(vision_params))
    except ValueError as error:
        raise ValueError(f"{path}: {reference_weights.first_errors(error)}") from error
    named = next((x for x in ("Hugging Face", "OpenAI") if _is_of(x, tensors)), "Hugging Face")
    origin = f"CLIP, by the names of {named}"
    provenance = reference_weights.provenance_of(path, part, origin, model, sha256)
    reading = clip_model.ClipText(model, params, settings.pad(pad), provenance)
    return clip_towers.Clip(reading, seeing), settings.said


def _is_of(names: str, tensors: Mapping[str, Any]) -> bool:
    layers = "transformer.resblocks." if names == "OpenAI" else "encoder.layers."
    return any(layers in name for name in tensors)


class _Settings:
    """What is known of a file beside its tensors, and where from.

    Args:
        path: of the file.
        published: what its checksum says; None: nothing.

    Raises:
        ValueError: its ``config.json`` is damaged.
    """

    def __init__(self, path: pathlib.Path, published: Published | None) -> None:
        self._published = published
        self._config = path.with_name("config.json")
        self._values: Mapping[str, Any] = {}
        self.said: list[str] = []
        if self._config.is_file():
            advice = "remove it, and say what it should by --activation and --pad"
            values = files.read_json(self._config, advice)
            if not isinstance(values, dict):
                raise ValueError(f"{self._config} holds no settings: {advice}")
            self._values = values

    def activation(self, given: str | None, tower: str = "text_config") -> str:
        """Returns the activation of a tower, a key of ``clip.ACTIVATIONS``."""
        config, published = self._get("hidden_act", tower), self._published
        if config is None and tower == "vision_config":
            config = self._get("hidden_act", "text_config")
        if published is not None:
            name, known = published.name, published.activation
            if given not in (None, known):
                raise ValueError(
                    f"these are the weights of {name}, whose activation is {known} and not "
                    f"{given}: leave --activation out"
                )
            if config not in (None, known):
                self._say(
                    f"{self._config} says hidden_act {config!r}, which is wrong: these are the "
                    f"weights of {name}, whose activation is {known}; that is taken"
                )
            return known
        if given is not None:
            if config not in (None, given):
                self._say(
                    f"{self._config} says hidden_act {config!r}; {given}, of --activation, is taken"
                )
            return given
        if config is None:
            raise ValueError(
                "the weights do not say which activation they have, and no config.json beside "
                "them does (hidden_act): give --activation quick_gelu (OpenAI, DFN, MetaCLIP) or "
                "--activation gelu (most of OpenCLIP)"
            )
        if config not in clip.ACTIVATIONS:
            raise ValueError(
                f"{self._config} says hidden_act {config!r}, which CLIP does not have: give "
                f"--activation, one of {', '.join(clip.ACTIVATIONS)}"
            )
        return config

    def pad(self, given: int | None) -> int:
        """Returns the token that follows a text."""
        config = self._get("pad_token_id", "text_config")
        if given is not None:
            if not 0 <= given < text_tokens.Clip.size:
                raise ValueError(
                    f"--pad {given} is no token of CLIP: they are 0 to {text_tokens.Clip.size - 1}"
                )
            if config not in (None, given, NO_PAD):
                self._say(f"{self._config} says pad_token_id {config}; {given}, of --pad, is taken")
            return given
        if self._published is not None:
            return self._published.pad
        usable = type(config) is int and 0 <= config < text_tokens.Clip.size and config != NO_PAD
        if not usable:
            found = f"{self._config} says {config!r}" if config is not None else "nothing says it"
            raise ValueError(
                "which token follows a text is not known, as the weights do not say it and "
                f"{found}: give --pad {_END} (as Hugging Face reads OpenAI's weights) or --pad 0 "
                "(as OpenAI's own program and OpenCLIP do)"
            )
        return config

    def heads(self, tower: str) -> int | None:
        """Returns how many heads the tower has as ``config.json`` says; None: it does not."""
        found = self._get("num_attention_heads", tower)
        return found if type(found) is int and found > 0 else None

    def _get(self, name: str, tower: str) -> Any:
        section = self._values.get(tower)
        if isinstance(section, dict) and name in section:
            return section[name]
        # Only the config of a text tower alone has its settings at the top.
        return self._values.get(name) if tower == "text_config" else None

    def _say(self, sentence: str) -> None:
        if sentence not in self.said:
            self.said.append(sentence)
