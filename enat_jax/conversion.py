"""From a state dict of the PyTorch reference to our parameters, one table per model.

A table maps a regular expression, which must match the whole name of a reference tensor, to the
path of our parameter and the transform between the two layouts:

    {r"encoder\\.conv_in\\.weight": ("encoder/conv_in/kernel", CONV)}

The path may refer to groups of the expression (`\\1`), or be a function of the match where the
place depends on the number of a layer. A path that ends in an index, `blocks/mlp/kernel[3]`, names
one slice along axis 0 of a parameter that stacks the same tensor of all layers. The path `None`
drops a tensor on purpose; a tensor that no expression matches is an error.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from enat_jax.models import enat, vqgan

Path = str | Callable[[re.Match], str] | None


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout, reference -> ours by `forward` and back by `inverse`."""

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
    """The parameter tree of the reference's tensors, as numpy arrays of the target's dtypes.

    `target` is a nested dict of anything with shape and dtype, such as `jax.eval_shape` gives.
    Raises ValueError with a list of everything that is wrong: tensors without an entry in the
    table, entries that lead nowhere or twice to the same place, wrong shapes, and parameters (or
    layers of stacked ones) that were not filled.
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
    """The tensors of the given reference names from our parameters: the inverse of `convert`.

    Raises ValueError for a name that the table does not have or drops.
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
    """Our path, the index along a stacked axis and the transform; None if it is to be dropped."""
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


def _check(path: str, index: int | None, value: np.ndarray, leaves: Mapping, found: Mapping):
    if path not in leaves:
        raise ValueError(f"leads to {path}, which the model does not have")
    shape = leaves[path].shape
    if index is not None:
        if index >= shape[0]:
            raise ValueError(f"leads to layer {index} of {path}, which has {shape[0]}")
        shape = shape[1:]
    if value.shape != shape:
        raise ValueError(f"has shape {value.shape} for {path}, which needs {shape}")
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

VQGAN_TABLE: Table = {
    r"quantize\.embedding\.weight": ("codebook", COPY),
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
        # The reference counts the two middle blocks from 1.
        _PART + r"\.mid\.block_([12])\." + end: (
            lambda m, path=path: f"{m[1]}/mid_{int(m[2]) - 1}/" + path.format(m[3]),
            transform,
        )
        for end, (path, transform) in _BLOCK.items()
    },
}


def vqgan_params(state_dict: Mapping[str, np.ndarray], model: vqgan.VQGAN) -> dict:
    """Parameters of `model` (what `apply` takes as {"params": ...}) from the reference's tensors.

    Raises ValueError, listing everything, if the state dict is not that of such a model.
    """
    side = model.downsampling
    images = jax.ShapeDtypeStruct((1, side, side, model.image_channels), np.float32)
    target = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return convert(state_dict, VQGAN_TABLE, target)


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
    """The table of an ENAT; in the reference its blocks are one list, the encoder's first."""

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
                lambda match, part=f"{ours}/{leaf}": block(match, part),
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
    """Parameters of `model` from the reference's tensors; as `vqgan_params`."""
    ids = jax.ShapeDtypeStruct((1, model.num_tokens), np.int32)
    labels = jax.ShapeDtypeStruct((1,), np.int32)
    target = jax.eval_shape(model.init, jax.random.key(0), ids, labels)["params"]
    return convert(state_dict, enat_table(model.encoder_layers), target)
