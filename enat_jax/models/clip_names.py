"""CLIP's tensors by the names of Hugging Face, OpenAI and OpenCLIP: sizes and conversion.

Shapes tell all sizes: heads of published models have 64 channels, but for those of OpenCLIP's large
vision towers, which are known by their width. They tell neither the activation nor what a text is
padded with.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from enat_jax.models import clip, conversion
from enat_jax.models.conversion import CONV, COPY, DENSE, Transform

HEAD_CHANNELS = 64
VISION_HEADS = dict.fromkeys((1280, 1408, 1664, 1792), 16)  # by width: OpenCLIP's H, g, bigG, e

Tensors = Mapping[str, np.ndarray]

# OpenAI's names, which OpenCLIP has kept, and those of Hugging Face.
_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_VISION = {
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelt so
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}
_UNUSED = re.compile(r"(.*\.)?(position_ids|logit_scale|logit_bias|attn_mask)")
_LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\..*")


def towers(tensors: Tensors) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the tensors of the text and of the vision tower, by the names of Hugging Face.

    Args:
        tensors: of a whole model or of one tower, by any of the names; what is missing stays so.

    Raises:
        ValueError: a tensor has a name that no CLIP has, or keys and values are packed otherwise.
    """
    text: dict[str, np.ndarray] = {}
    vision: dict[str, np.ndarray] = {}
    unknown = []
    for name, array in tensors.items():
        if _UNUSED.fullmatch(name):
            continue
        of_vision = name.startswith(("visual.", "vision_model.", "visual_projection."))
        found = _hugging_face(name, array, of_vision)
        if not found:
            unknown.append(name)
        (vision if of_vision else text).update(found)
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors have names that no CLIP has, such as {unknown[0]!r}"
        )
    return text, vision


def _hugging_face(name: str, array: np.ndarray, of_vision: bool) -> dict[str, np.ndarray]:
    """Returns what one tensor is by the names of Hugging Face; nothing if the name is unknown."""
    tower, renamed = ("vision_model", _VISION) if of_vision else ("text_model", _TEXT)
    if name in ("text_projection.weight", "visual_projection.weight"):
        return {name: array}
    if name.startswith(f"{tower}."):
        return {name: array}
    if re.match(r"(embeddings|encoder\.layers|final_layer_norm)\.", name):
        return {f"{tower}.{name}": array}  # of a text tower that was saved alone
    inner = name.removeprefix("visual.")
    if inner in renamed:
        return {renamed[inner]: array}
    if name == "text_projection":  # [e, proj], where Hugging Face has a dense layer's
        return {"text_projection.weight": array.T}
    if name == "visual.proj":
        return {"visual_projection.weight": array.T}
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)", inner)
    if layer is None:
        return {}
    number, part, end = layer[1], layer[2].rstrip("."), layer[3]
    prefix = f"{tower}.encoder.layers.{number}"
    if part == "attn.in_proj_":
        if array.shape[0] % 3:
            raise ValueError(f"{name} has {array.shape[0]} rows, which are not three times as many")
        thirds = np.split(array, 3)
        return {
            f"{prefix}.self_attn.{kind}_proj.{end}": third
            for kind, third in zip("qkv", thirds, strict=True)
        }
    return {f"{prefix}.{_BLOCK[part]}.{end}": array} if part in _BLOCK else {}


def text_tower_of(
    tensors: Tensors, activation: str, *, hidden_layer: int = -1, num_heads: int | None = None
) -> clip.TextTower:
    """Returns the text tower with these tensors, of ``towers``.

    Args:
        tensors: by the names of Hugging Face.
        activation: a key of ``clip.ACTIVATIONS``.
        hidden_layer: -1: the states after the last norm; -2: the input of the last layer.
        num_heads: None: of 64 channels each.

    Raises:
        ValueError: a tensor is missing or has no sensible shape.
    """
    if hidden_layer not in (-1, -2):
        raise ValueError(f"{hidden_layer=} must be -1 or -2")
    sizes = _sizes(tensors, "text_model", num_heads)
    vocabulary, _ = _shape(tensors, "text_model.embeddings.token_embedding.weight", 2)
    context, _ = _shape(tensors, "text_model.embeddings.position_embedding.weight", 2)
    last = hidden_layer == -1
    projection = None
    if last and "text_projection.weight" in tensors:
        projection = _shape(tensors, "text_projection.weight", 2)[0]
    sizes["num_layers"] -= not last
    return clip.TextTower(
        vocabulary=vocabulary,
        context=context,
        activation=activation,
        projection=projection,
        final_norm=last,
        **sizes,
    )


def vision_tower_of(
    tensors: Tensors, activation: str, num_heads: int | None = None
) -> clip.VisionTower:
    """Returns the vision tower with these tensors, of ``towers``; raises as ``text_tower_of``."""
    sizes = _sizes(tensors, "vision_model", num_heads)
    *_, patch_size, _ = _shape(tensors, "vision_model.embeddings.patch_embedding.weight", 4)
    places, _ = _shape(tensors, "vision_model.embeddings.position_embedding.weight", 2)
    side = round((places - 1) ** 0.5)
    if side * side != places - 1:
        raise ValueError(f"{places - 1} patches are no square: this is no vision tower of CLIP")
    projection, _ = _shape(tensors, "visual_projection.weight", 2)
    return clip.VisionTower(
        image_size=side * patch_size,
        patch_size=patch_size,
        activation=activation,
        projection=projection,
        **sizes,
    )


def _sizes(tensors: Tensors, tower: str, num_heads: int | None) -> dict[str, Any]:
    hidden, width = _shape(tensors, f"{tower}.encoder.layers.0.mlp.fc1.weight", 2)
    numbers = {int(m[2]) for name in tensors if (m := _LAYER.fullmatch(name)) and m[1] == tower}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"layers {sorted(numbers)} of {tower} are not all there")
    if num_heads is None and tower == "vision_model":
        num_heads = VISION_HEADS.get(width)
    if num_heads is None and width % HEAD_CHANNELS:
        raise ValueError(
            f"a width of {width} is not divisible by the {HEAD_CHANNELS} channels of a head that "
            "every published CLIP has: say how many heads there are"
        )
    heads = num_heads or width // HEAD_CHANNELS
    return {"width": width, "num_layers": len(numbers), "num_heads": heads, "hidden": hidden}


def _shape(tensors: Tensors, name: str, ndim: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"not a CLIP with this tower: {name!r} is not among its tensors")
    if np.ndim(tensors[name]) != ndim:
        raise ValueError(f"not a CLIP: {name!r} has the shape {np.shape(tensors[name])}")
    return np.shape(tensors[name])


def text_params(tensors: Tensors, model: clip.TextTower) -> dict:
    """Returns the parameters of a text tower from its tensors.

    Tensors of layers that the tower does not run, of its norm and projection are left out where it
    has none; anything else that does not fit raises ValueError, see ``conversion.convert``.
    """
    ids = jax.ShapeDtypeStruct((1, model.context), np.int32)
    unused = [] if model.final_norm else [r"text_model\.final_layer_norm\..*"]
    unused.append(rf"text_model\.encoder\.layers\.{model.num_layers}\..*")
    if model.projection is None:
        unused.append(r"text_projection\.weight")
    used = {k: v for k, v in tensors.items() if not re.fullmatch("|".join(unused), k)}
    table = _layers("text_model") | _norm("text_model.final_layer_norm", "norm")
    table |= {
        "text_model.embeddings.token_embedding.weight": ("token", COPY),
        "text_model.embeddings.position_embedding.weight": ("position", COPY),
        "text_projection.weight": ("project/kernel", DENSE),
    }
    return _convert(used, table, model, ids)


def vision_params(tensors: Tensors, model: clip.VisionTower) -> dict:
    """Returns the parameters of a vision tower from its tensors; raises as ``text_params``."""
    size = model.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    table = _layers("vision_model") | {
        "vision_model.embeddings.patch_embedding.weight": ("patches/kernel", CONV),
        "vision_model.embeddings.class_embedding": ("class", COPY),
        "vision_model.embeddings.position_embedding.weight": ("position", COPY),
        **_norm("vision_model.pre_layrnorm", "norm_in"),
        **_norm("vision_model.post_layernorm", "norm"),
        "visual_projection.weight": ("project/kernel", DENSE),
    }
    return _convert(tensors, table, model, images)


def _convert(tensors: Tensors, table: conversion.Table, model: Any, inputs: Any) -> dict:
    target = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    return conversion.convert(tensors, table, target)


def _norm(name: str, ours: str) -> dict[str, tuple[str | None, Transform]]:
    return {f"{name}.weight": (f"{ours}/scale", COPY), f"{name}.bias": (f"{ours}/bias", COPY)}


def _layers(tower: str) -> dict[str, tuple[str | None, Transform]]:
    """Returns the entries of all layers, by regular expressions."""
    prefix = rf"{tower}\.encoder\.layers\.(\d+)\."
    layers = {f"self_attn.{x[0]}_proj": x for x in ("query", "key", "value")}
    layers |= {"self_attn.out_proj": "out", "mlp.fc1": "up", "mlp.fc2": "down"}
    table: dict[str, tuple[str | None, Transform]] = {}
    for name, ours in layers.items():
        table[rf"{prefix}{re.escape(name)}\.weight"] = (rf"blocks/{ours}/kernel[\1]", DENSE)
        table[rf"{prefix}{re.escape(name)}\.bias"] = (rf"blocks/{ours}/bias[\1]", COPY)
    for i in (1, 2):
        table[rf"{prefix}layer_norm{i}\.weight"] = (rf"blocks/norm{i}/scale[\1]", COPY)
        table[rf"{prefix}layer_norm{i}\.bias"] = (rf"blocks/norm{i}/bias[\1]", COPY)
    return table
