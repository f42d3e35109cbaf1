"""Conversion of the PyTorch reference's tensors to our parameters and back, by tables.

A table maps the name of a reference tensor to the path of our parameter and the transform between
the two layouts:

    {"encoder.conv_in.weight": ("encoder/conv_in/kernel", CONV)}

In place of a name there may be a regular expression that matches whole names, to whose groups the
path may refer (``\\1``). A path that ends in an index, ``blocks/mlp/kernel[3]``, names one slice
along axis 0 of a parameter that stacks the same tensor of all layers. The path ``None`` drops a
tensor on purpose; a tensor that has no entry is an error.

The way back, ``enat_state_dict`` and ``vqgan_state_dict``, follows the same tables: every tensor
comes back bit for bit. MaskGIT's own JAX tokenizer and MaskBit's VQGAN+ have tables, too.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from enat_jax.models import enat, vqgan


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout: ``forward`` from the reference's to ours, ``inverse`` back."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


Table = Mapping[str, tuple[str | None, Transform]]

COPY = Transform(lambda a: a, lambda a: a)
DENSE = Transform(np.transpose, np.transpose)  # [out, in] <-> [in, out]
CONV = Transform(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))  # OIHW, HWIO

PACKED = Transform(  # [2 out, in] <-> [in, 2, out]
    lambda a: a.T.reshape(a.shape[1], 2, -1), lambda a: a.reshape(a.shape[0], -1).T
)
PACKED_BIAS = Transform(lambda a: a.reshape(2, -1), np.ravel)


def convert(state_dict: Mapping[str, np.ndarray], table: Table, target: Any) -> dict:
    """Returns the parameters that the reference's tensors make, as numpy arrays.

    Args:
        state_dict: the tensors by the reference's names.
        table: of the model.
        target: nested dict of anything with the shape and dtype of our parameters, such as
            ``jax.eval_shape`` gives.

    Raises:
        ValueError: with a list of everything that is wrong: tensors without an entry in the table,
            entries that lead nowhere or twice to the same place, wrong shapes, whole numbers, and
            parameters (or layers of stacked ones) that were not filled.
    """
    leaves = traverse_util.flatten_dict(target, sep="/")
    found: dict[str, dict[int | None, np.ndarray]] = {path: {} for path in leaves}
    claimed = set()  # also what a tensor of a wrong shape leads to, lest it be reported twice
    errors = []
    for name, array in state_dict.items():
        try:
            place = _place(name, table)
            if place is None:
                continue
            path, index, transform = place
            claimed.add(path)
            value = transform.forward(np.asarray(array))
            _check(path, index, value, leaves, found)
            found[path][index] = value
        except ValueError as error:
            errors.append(f"{name}: {error}")
    for path, leaf in leaves.items():
        if path not in claimed:
            errors.append(f"{path}: nothing in the state dict leads here")
        elif None not in found[path]:
            lost = [i for i in range(leaf.shape[0]) if i not in found[path]]
            if lost and found[path]:
                errors.append(f"{path}: layers {lost} of {leaf.shape[0]} are missing")
    if errors:
        raise ValueError(
            "the state dict does not fit the model (is its configuration the right one?):\n  "
            + "\n  ".join(errors)
        )
    return traverse_util.unflatten_dict(
        {path: _assemble(found[path], leaf) for path, leaf in leaves.items()}, sep="/"
    )


def revert(params: Mapping, table: Table, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns the tensors with the given reference names: the inverse of ``convert``.

    Raises:
        ValueError: the table does not have one of the names, or drops it.
    """
    leaves = traverse_util.flatten_dict(params, sep="/")
    tensors = {}
    for name in names:
        place = _place(name, table)
        if place is None:
            raise ValueError(f"{name}: the table drops this tensor, so it cannot be given back")
        path, index, transform = place
        leaf = np.asarray(leaves[path])
        tensors[name] = transform.inverse(leaf if index is None else leaf[index])
    return tensors


def _place(name: str, table: Table) -> tuple[str, int | None, Transform] | None:
    """Returns our path, the index along a stacked axis and the transform; None to drop it."""
    if name in table:
        path, transform = table[name]
    else:
        matches = [m for pattern in table if (m := re.fullmatch(pattern, name))]
        if not matches:
            raise ValueError("unknown to the table")
        if len(matches) > 1:
            raise ValueError(f"matched by {[m.re.pattern for m in matches]}, which is ambiguous")
        path, transform = table[matches[0].re.pattern]
        path = path and matches[0].expand(path)
    if path is None:
        return None
    stacked = re.fullmatch(r"(.*)\[(\d+)\]", path)
    return (stacked[1], int(stacked[2]), transform) if stacked else (path, None, transform)


def _check(
    path: str, index: int | None, value: np.ndarray, leaves: Mapping, found: Mapping
) -> None:
    """Raises ValueError if a tensor cannot be put into the place that the table names."""
    if path not in leaves:
        raise ValueError(f"leads to {path}, which the model does not have")
    shape = leaves[path].shape
    if index is not None:
        if index >= shape[0]:
            raise ValueError(f"leads to layer {index} of {path}, which has {shape[0]}")
        shape = shape[1:]
    if value.shape != shape:
        raise ValueError(f"has shape {value.shape} for {path}, which needs {shape}")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"holds {value.dtype}, not floating point numbers")
    if index in found[path]:
        raise ValueError(f"leads to {path}{'' if index is None else [index]}, which is taken")


def _assemble(parts: Mapping[int | None, np.ndarray], leaf: Any) -> np.ndarray:
    value = parts[None] if None in parts else np.stack([parts[i] for i in range(leaf.shape[0])])
    return np.ascontiguousarray(value, dtype=leaf.dtype)


def vqgan_table(model: vqgan.VQGAN) -> Table:
    """Returns the table of the reference's VQGAN."""
    return {
        **_named(model, _vqgan_name),
        # The discriminator and the perceptual network of a training checkpoint.
        r"loss\..*": (None, COPY),
    }


def vqgan_params(state_dict: Mapping[str, np.ndarray], model: vqgan.VQGAN) -> dict:
    """Returns parameters, which ``apply`` takes as {"params": ...}, from the reference's tensors.

    Raises:
        ValueError: the state dict is not that of such a model; with a list of everything wrong.
    """
    return convert(state_dict, vqgan_table(model), _vqgan_shapes(model))


def vqgan_state_dict(params: Mapping, model: vqgan.VQGAN) -> dict[str, np.ndarray]:
    """Returns all tensors by the reference's names: the inverse of ``vqgan_params``.

    A model with convolutions of stride 2 or with bits as codes, neither of which the reference has,
    gets MaskBit's names: the inverse of ``maskbit_params``.

    Raises:
        ValueError: it has another quantizer than the programs that read such tensors.
    """
    if model.quantizer == "fsq" or model.normalize or model.projection:
        raise ValueError(
            f"the reference has no tokenizer with quantizer={model.quantizer!r}, normalize="
            f"{model.normalize} and projection={model.projection}: leave it out"
        )
    if model.quantizer == "lfq":
        bits = {
            "quantize.bits_to_indices": 2 ** np.arange(model.embed_dim, dtype=np.int32),
            "quantize.codebook": np.asarray(model.apply({}, method="code_table"), np.float32),
        }
        return _revert_all(params, maskbit_table(model)) | bits
    table = maskbit_table(model) if model.conv_downsampling else vqgan_table(model)
    return _revert_all(params, table)


def _revert_all(params: Mapping, table: Table) -> dict[str, np.ndarray]:
    """Returns the tensors of all entries, names and no expressions, that are not dropped."""
    return revert(params, table, [name for name, (path, _) in table.items() if path is not None])


@functools.cache  # tracing the network takes a second, and both directions ask
def _vqgan_shapes(model: vqgan.VQGAN) -> dict:
    side = model.downsampling
    images = jax.ShapeDtypeStruct((1, side, side, model.image_channels), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def _named(model: vqgan.VQGAN, name_of: Callable[[str], str]) -> dict[str, tuple[str, Transform]]:
    """Returns the table that leads from a PyTorch program's names to all our parameters.

    Args:
        model: ours.
        name_of: puts that program's names of blocks and of changes of size into one of our paths.
    """
    leaves = traverse_util.flatten_dict(_vqgan_shapes(model), sep="/")
    entries = {}
    for path, leaf in leaves.items():
        name = name_of(path).replace("shortcut", "nin_shortcut").replace("/", ".")
        name = re.sub(r"\.(kernel|scale)$", ".weight", name)
        name = "quantize.embedding.weight" if path == "codebook" else name
        entries[name] = (path, CONV if leaf.ndim == 4 else COPY)
    return entries


def _vqgan_name(path: str) -> str:
    """Puts the reference's names of blocks and enlargements into one of our paths."""
    name = re.sub(r"/(down|up)_(\d+)_(\d+)/", r".\1.\2.block.\3.", path)
    name = re.sub(r"/mid_(\d+)/", lambda m: f".mid.block_{int(m[1]) + 1}.", name)
    return re.sub(r"/upsample_(\d+)/", r".up.\1.upsample.conv.", name)


def maskgit_table(model: vqgan.VQGAN) -> Table:
    """Returns the table of MaskGIT's JAX tokenizer, which numbers layers as its program calls them.

    Its layouts are ours. Source of the names: ``maskgit/nets/vqgan_tokenizer.py`` of its release.
    """
    levels, blocks = range(len(model.channel_multipliers)), range(model.num_res_blocks)
    down = [f"down_{level}_{block}" for level in levels for block in blocks]
    up = [f"up_{level}_{block}" for level in reversed(levels) for block in blocks]
    mid = ["mid_0", "mid_1"]
    upsample = [f"upsample_{level}" for level in reversed(levels[1:])]
    called = {  # residual blocks and convolutions
        "encoder": (down + mid, ["conv_in", "conv_out"]),
        "decoder": (mid + up, ["conv_in", *upsample, "conv_out"]),
    }
    modules = {}
    for part, (residual, convolutions) in called.items():
        modules[f"{part}/GroupNorm_0"] = f"{part}/norm_out"
        modules |= {f"{part}/Conv_{i}": f"{part}/{ours}" for i, ours in enumerate(convolutions)}
        for i, ours in enumerate(residual):
            for name, layer in _MASKGIT_BLOCK.items():
                modules[f"{part}/ResBlock_{i}/{name}"] = f"{part}/{ours}/{layer}"
    leaves = {rf"{name}/(\w+)": (rf"{ours}/\1", COPY) for name, ours in modules.items()}
    return {"quantizer/codebook": ("codebook", COPY)} | leaves


def maskgit_params(state_dict: Mapping[str, np.ndarray], model: vqgan.VQGAN) -> dict:
    """Returns parameters as ``vqgan_params`` does, from MaskGIT's tensors.

    Their names are such as "encoder/ResBlock_0/Conv_0/kernel".
    """
    return convert(state_dict, maskgit_table(model), _vqgan_shapes(model))


def maskbit_table(model: vqgan.VQGAN, *, deepest_first: bool = True) -> Table:
    """Returns the table of MaskBit's VQGAN+ (arXiv:2409.16211), with a codebook or with bits.

    Source of the names: ``modeling/conv_vqgan.py`` and ``modeling/modules/autoencoder.py`` of the
    program of its authors.

    Args:
        model: ours.
        deepest_first: whether the decoder's levels are numbered in the order in which they run, as
            in VQGAN+. That program's copy of MaskGIT's tokenizer numbers them the other way round.
    """
    last = len(model.channel_multipliers) - 1

    def up(level: str) -> str:
        return f".up.{last - int(level) if deepest_first else level}"

    def name_of(path: str) -> str:
        name = re.sub(r"/up_(\d+)_(\d+)/", lambda m: f"{up(m[1])}.res_blocks.{m[2]}.", path)
        name = re.sub(r"/upsample_(\d+)/", lambda m: f"{up(m[1])}.upsample_conv.", name)
        name = re.sub(r"/down_(\d+)_(\d+)/", r".down.\1.res_blocks.\2.", name)
        name = re.sub(r"/downsample_(\d+)/", r".down.\1.down_conv.", name)
        return re.sub(r"/mid_(\d+)/", r".mid.res_blocks.\1.", name)

    # What each bit adds to the number of a code, and the vectors of all codes, are not learnt.
    constants = {r"quantize\.(bits_to_indices|codebook)": (None, COPY)}
    return _named(model, name_of) | (constants if model.quantizer == "lfq" else {})


def maskbit_params(state_dict: Mapping[str, np.ndarray], model: vqgan.VQGAN) -> dict:
    """Returns parameters as ``vqgan_params`` does, from tensors by MaskBit's names."""
    # All levels of the decoder but the finest end in an enlargement.
    deepest_first = "decoder.up.0.upsample_conv.weight" in state_dict
    table = maskbit_table(model, deepest_first=deepest_first)
    return convert(state_dict, table, _vqgan_shapes(model))


_MASKGIT_BLOCK = {
    "GroupNorm_0": "norm1",
    "GroupNorm_1": "norm2",
    "Conv_0": "conv1",
    "Conv_1": "conv2",
    "Conv_2": "shortcut",
}

# Ends of the names of a layer's tensors: the reference's, ours, and the transform.
_Ends = tuple[tuple[str, str, Transform], ...]
_HEAD_BIAS = Transform(lambda a: a.reshape(a.shape[-1]), lambda a: a.reshape(1, 1, -1))
_LAYER: _Ends = (("weight", "kernel", DENSE), ("bias", "bias", COPY))
_PACKED_LAYER: _Ends = (("weight", "kernel", PACKED), ("bias", "bias", PACKED_BIAS))
_NORM: _Ends = (("weight", "scale", COPY), ("bias", "bias", COPY))
_ENAT_BLOCK = {
    "attn.q": ("query", _LAYER),
    "attn.kv.A": ("key_value_context", _PACKED_LAYER),
    "attn.kv.B": ("key_value_self", _PACKED_LAYER),
    "attn.proj": ("out", _LAYER),
    "mlp.fc1": ("mlp/up", _LAYER),
    "mlp.fc2": ("mlp/down", _LAYER),
}
_ENAT_LAYERS = {
    "prev_proj.mlp.fc1": ("project/mlp/up", _LAYER),
    "prev_proj.mlp.fc2": ("project/mlp/down", _LAYER),
    "mlm_layer.fc": ("head/dense", _LAYER),
    "x_embedder.LayerNorm": ("embed/norm", _NORM),
    "prev_proj.norm": ("project/norm", _NORM),
    "norm": ("head/norm_in", _NORM),
    "mlm_layer.ln": ("head/norm_out", _NORM),
}


def enat_table(model: enat.ENAT) -> Table:
    """Returns the table of an ENAT, whose blocks the reference has in one list, encoder first."""
    layers = [(name, ours, "", ends) for name, (ours, ends) in _ENAT_LAYERS.items()]
    places = [("encoder", i) for i in range(model.encoder_layers)]
    places += [("decoder", i) for i in range(model.decoder_layers)]
    for number, (part, i) in enumerate(places):
        block = f"blocks.{number}"
        layers.append((f"{block}.adaLN_modulation.1", "modulation", f"[{number}]", _LAYER))
        for name, (ours, ends) in _ENAT_BLOCK.items():
            layers.append((f"{block}.{name}", f"{part}/{ours}", f"[{i}]", ends))
    return {
        "x_embedder.word_embeddings.weight": ("embed/word", COPY),
        "x_embedder.position_embeddings.weight": ("embed/position", COPY),
        "y_embedder.embedding_table.weight": ("modulation/label_table", COPY),
        "mlm_layer.bias": ("head/bias", _HEAD_BIAS),
        **{
            f"{name}.{end}": (f"{ours}/{leaf}{index}", transform)
            for name, ours, index, ends in layers
            for end, leaf, transform in ends
        },
        # Never used by the reference's forward pass: its gradient is zero.
        r"prev_embedder\..*": (None, COPY),
    }


def enat_params(state_dict: Mapping[str, np.ndarray], model: enat.ENAT) -> dict:
    """Returns parameters from the reference's tensors; raises as ``vqgan_params``."""
    return convert(state_dict, enat_table(model), _enat_shapes(model))


@functools.cache
def _enat_shapes(model: enat.ENAT) -> dict:
    ids = jax.ShapeDtypeStruct((1, model.num_tokens), np.int32)
    labels = jax.ShapeDtypeStruct((1,), np.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids, labels)["params"]


def enat_state_dict(params: Mapping, model: enat.ENAT) -> dict[str, np.ndarray]:
    """Returns all tensors of the reference's model: the inverse of ``enat_params``.

    That includes ``prev_embedder``, which the reference has but never uses and ``enat_params``
    drops: zeros, so that the reference loads the state dict strictly and computes the same.

    Raises:
        ValueError: the model does not reuse features, which the reference's always do.
    """
    if not model.reuse:
        raise ValueError("the reference has no model without reuse of features: nothing to convert")
    tensors = _revert_all(params, enat_table(model))
    wide = model.mlp_ratio * model.width
    unused = {"fc1.weight": (wide, model.width), "fc1.bias": (wide,)}
    unused |= {"fc2.weight": (model.width, wide), "fc2.bias": (model.width,)}
    zeros = {f"prev_embedder.{end}": np.zeros(shape, np.float32) for end, shape in unused.items()}
    return tensors | zeros
