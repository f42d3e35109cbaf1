"""Conversion of the PyTorch reference's tensors to our parameters and back, by tables.

A table maps a regular expression, which must match the whole name of a reference tensor, to the
path of our parameter and the transform between the two layouts:

    {r"encoder\\.conv_in\\.weight": ("encoder/conv_in/kernel", CONV)}

The path may refer to groups of the expression (``\\1``), or be a function of the match where the
place depends on the number of a layer. A path that ends in an index, ``blocks/mlp/kernel[3]``,
names one slice along axis 0 of a parameter that stacks the same tensor of all layers. The path
``None`` drops a tensor on purpose; a tensor that no expression matches is an error.

The way back, ``enat_state_dict`` and ``vqgan_state_dict``, follows the same tables: every tensor
comes back bit for bit. MaskGIT's own JAX tokenizer has a table, too.
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

Path = str | Callable[[re.Match], str] | None


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout: ``forward`` from the reference's to ours, ``inverse`` back."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


Table = Mapping[str, tuple[Path, Transform]]

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
    matches = [
        (m, *entry) for pattern, entry in table.items() if (m := re.fullmatch(pattern, name))
    ]
    if not matches:
        raise ValueError("unknown to the table")
    if len(matches) > 1:
        raise ValueError(f"matched by {[m.re.pattern for m, *_ in matches]}, which is ambiguous")
    match, path, transform = matches[0]
    if path is None:
        return None
    path = path(match) if callable(path) else match.expand(path)
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


_PART = r"(encoder|decoder)"
_BLOCK = {  # the last part of a residual block's name: ours and the transform
    r"norm([12])\.weight": (r"norm{}/scale", COPY),
    r"norm([12])\.bias": (r"norm{}/bias", COPY),
    r"conv([12])\.weight": (r"conv{}/kernel", CONV),
    r"nin_shortcut(\b)\.weight": (r"shortcut{}/kernel", CONV),
}


def _mid(match: re.Match, path: str) -> str:
    # The reference counts the two middle blocks from 1.
    return f"{match[1]}/mid_{int(match[2]) - 1}/" + path.format(match[3])


VQGAN_TABLE: Table = {
    r"quantize\.embedding\.weight": ("codebook", COPY),
    # The discriminator and the perceptual network of a training checkpoint.
    r"loss\..*": (None, COPY),
    _PART + r"\.(conv_in|conv_out)\.weight": (r"\1/\2/kernel", CONV),
    _PART + r"\.(conv_in|conv_out)\.bias": (r"\1/\2/bias", COPY),
    _PART + r"\.norm_out\.weight": (r"\1/norm_out/scale", COPY),
    _PART + r"\.norm_out\.bias": (r"\1/norm_out/bias", COPY),
    r"decoder\.up\.(\d+)\.upsample\.conv\.weight": (r"decoder/upsample_\1/kernel", CONV),
    r"decoder\.up\.(\d+)\.upsample\.conv\.bias": (r"decoder/upsample_\1/bias", COPY),
    **{
        _PART + r"\.(down|up)\.(\d+)\.block\.(\d+)\." + end: (
            r"\1/\2_\3_\4/" + path.format(r"\5"),
            transform,
        )
        for end, (path, transform) in _BLOCK.items()
    },
    **{
        _PART + r"\.mid\.block_([12])\." + end: (
            functools.partial(_mid, path=path),
            transform,
        )
        for end, (path, transform) in _BLOCK.items()
    },
}


def vqgan_params(state_dict: Mapping[str, np.ndarray], model: vqgan.VQGAN) -> dict:
    """Returns parameters, which ``apply`` takes as {"params": ...}, from the reference's tensors.

    Raises:
        ValueError: the state dict is not that of such a model; with a list of everything wrong.
    """
    return convert(state_dict, VQGAN_TABLE, _vqgan_shapes(model))


def vqgan_state_dict(params: Mapping, model: vqgan.VQGAN) -> dict[str, np.ndarray]:
    """Returns all tensors of the reference's model: the inverse of ``vqgan_params``."""
    names = map(_vqgan_name, traverse_util.flatten_dict(_vqgan_shapes(model), sep="/"))
    return revert(params, VQGAN_TABLE, names)


@functools.cache  # tracing the network takes a second, and both directions ask
def _vqgan_shapes(model: vqgan.VQGAN) -> dict:
    side = model.downsampling
    images = jax.ShapeDtypeStruct((1, side, side, model.image_channels), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def _vqgan_name(path: str) -> str:
    """Returns the reference's name of one of our parameters."""
    if path == "codebook":
        return "quantize.embedding.weight"
    name = re.sub(r"/(down|up)_(\d+)_(\d+)/", r".\1.\2.block.\3.", path)
    name = re.sub(r"/mid_(\d+)/", lambda m: f".mid.block_{int(m[1]) + 1}.", name)
    name = re.sub(r"/upsample_(\d+)/", r".up.\1.upsample.conv.", name)
    name = name.replace("shortcut", "nin_shortcut").replace("/", ".")
    return re.sub(r"\.(kernel|scale)$", ".weight", name)


def maskgit_table(model: vqgan.VQGAN) -> Table:
    """Returns the table of MaskGIT's JAX tokenizer, which numbers blocks as its program calls them.

    Its layouts are ours. Source of the names: ``maskgit/nets/vqgan_tokenizer.py`` of its release.
    """
    levels, blocks = len(model.channel_multipliers), model.num_res_blocks

    def down(match: re.Match, end: str) -> str:
        level, block = divmod(int(match[1]), blocks)
        name = (
            f"down_{level}_{block}" if level < levels else f"mid_{int(match[1]) - levels * blocks}"
        )
        return f"encoder/{name}/" + match.expand(end)

    def up(match: re.Match, end: str) -> str:
        level, block = divmod(int(match[1]) - 2, blocks)
        name = f"up_{levels - 1 - level}_{block}" if level >= 0 else f"mid_{match[1]}"
        return f"decoder/{name}/" + match.expand(end)

    def decoder_conv(match: re.Match) -> str:
        number = int(match[1])
        name = {0: "conv_in", levels: "conv_out"}.get(number, f"upsample_{levels - number}")
        return f"decoder/{name}/{match[2]}"

    table: dict[str, tuple[Path, Transform]] = {
        r"quantizer/codebook": ("codebook", COPY),
        r"encoder/Conv_0/kernel": ("encoder/conv_in/kernel", COPY),
        r"encoder/Conv_1/(kernel|bias)": (r"encoder/conv_out/\1", COPY),
        r"decoder/Conv_(\d+)/(kernel|bias)": (decoder_conv, COPY),
        r"(encoder|decoder)/GroupNorm_0/(scale|bias)": (r"\1/norm_out/\2", COPY),
    }
    for part, place in (("encoder", down), ("decoder", up)):
        ends = {
            r"GroupNorm_0/(scale|bias)": r"norm1/\2",
            r"GroupNorm_1/(scale|bias)": r"norm2/\2",
            r"Conv_0/kernel": "conv1/kernel",
            r"Conv_1/kernel": "conv2/kernel",
            r"Conv_2/kernel": "shortcut/kernel",
        }
        for end, ours in ends.items():
            table[part + r"/ResBlock_(\d+)/" + end] = (functools.partial(place, end=ours), COPY)
    return table


def maskgit_params(tensors: Mapping[str, np.ndarray], model: vqgan.VQGAN) -> dict:
    """Returns parameters as ``vqgan_params`` does, from MaskGIT's tensors.

    Their names are such as "encoder/ResBlock_0/Conv_0/kernel".
    """
    return convert(tensors, maskgit_table(model), _vqgan_shapes(model))


_ENAT_BLOCK = {
    r"attn\.q": "query",
    r"attn\.kv\.A": "key_value_context",
    r"attn\.kv\.B": "key_value_self",
    r"attn\.proj": "out",
    r"mlp\.fc1": "mlp/up",
    r"mlp\.fc2": "mlp/down",
}
_ENAT_DENSE = {
    r"prev_proj\.mlp\.fc1": "project/mlp/up",
    r"prev_proj\.mlp\.fc2": "project/mlp/down",
    r"mlm_layer\.fc": "head/dense",
}
_ENAT_NORM = {
    r"x_embedder\.LayerNorm": "embed/norm",
    r"prev_proj\.norm": "project/norm",
    r"norm": "head/norm_in",
    r"mlm_layer\.ln": "head/norm_out",
}
_HEAD_BIAS = Transform(lambda a: a.reshape(a.shape[-1]), lambda a: a.reshape(1, 1, -1))


def enat_table(encoder_layers: int) -> Table:
    """Returns the table of an ENAT, whose blocks the reference has in one list, encoder first."""

    def block(match: re.Match, part: str) -> str:
        layer = int(match[1])
        if layer < encoder_layers:
            return f"encoder/{part}[{layer}]"
        return f"decoder/{part}[{layer - encoder_layers}]"

    kinds = {r"\.weight": ("kernel", DENSE), r"\.bias": ("bias", COPY)}
    packed = {r"\.weight": ("kernel", PACKED), r"\.bias": ("bias", PACKED_BIAS)}
    norms = {r"\.weight": "scale", r"\.bias": "bias"}
    return {
        r"x_embedder\.word_embeddings\.weight": ("embed/word", COPY),
        r"x_embedder\.position_embeddings\.weight": ("embed/position", COPY),
        r"y_embedder\.embedding_table\.weight": ("modulation/label_table", COPY),
        r"blocks\.(\d+)\.adaLN_modulation\.1\.weight": (r"modulation/kernel[\1]", DENSE),
        r"blocks\.(\d+)\.adaLN_modulation\.1\.bias": (r"modulation/bias[\1]", COPY),
        r"mlm_layer\.bias": ("head/bias", _HEAD_BIAS),
        # Never used by the reference's forward pass: its gradient is zero.
        r"prev_embedder\..*": (None, COPY),
        **{
            r"blocks\.(\d+)\." + name + end: (
                functools.partial(block, part=f"{ours}/{leaf}"),
                transform,
            )
            for name, ours in _ENAT_BLOCK.items()
            for end, (leaf, transform) in (packed if "kv" in name else kinds).items()
        },
        **{
            name + end: (f"{ours}/{leaf}", transform)
            for name, ours in _ENAT_DENSE.items()
            for end, (leaf, transform) in kinds.items()
        },
        **{
            name + end: (f"{ours}/{leaf}", COPY)
            for name, ours in _ENAT_NORM.items()
            for end, leaf in norms.items()
        },
    }


def enat_params(state_dict: Mapping[str, np.ndarray], model: enat.ENAT) -> dict:
    """Returns parameters from the reference's tensors; raises as ``vqgan_params``."""
    return convert(state_dict, enat_table(model.encoder_layers), _enat_shapes(model))


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
    layers = range(model.encoder_layers + model.decoder_layers)
    parts = [*_ENAT_BLOCK, r"adaLN_modulation\.1"]
    names = [
        *("x_embedder.word_embeddings.weight", "x_embedder.position_embeddings.weight"),
        *("y_embedder.embedding_table.weight", "mlm_layer.bias"),
        *(name + end for name in [*_ENAT_DENSE, *_ENAT_NORM] for end in (".weight", ".bias")),
        *(
            f"blocks.{i}.{part}{end}"
            for i in layers
            for part in parts
            for end in (".weight", ".bias")
        ),
    ]
    names = [name.replace("\\", "") for name in names]  # of the expressions that match them
    tensors = revert(params, enat_table(model.encoder_layers), names)
    wide = model.mlp_ratio * model.width
    unused = {"fc1.weight": (wide, model.width), "fc1.bias": (wide,)}
    unused |= {"fc2.weight": (model.width, wide), "fc2.bias": (model.width,)}
    zeros = {f"prev_embedder.{end}": np.zeros(shape, np.float32) for end, shape in unused.items()}
    return tensors | zeros
