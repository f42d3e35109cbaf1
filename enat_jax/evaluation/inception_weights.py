"""The weights of FID's Inception-v3: from pytorch-fid's file, given or downloaded."""

import hashlib
import http.client
import os
import pathlib
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from enat_jax.checkpoints import weight_files
from enat_jax.models import conversion, inception
from enat_jax.runtime import files, numerics, paths

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
# Its name ends in the first digits, as is the custom for PyTorch's weights.
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

EPSILON = 1e-3  # of the graph's batch normalisation
NORM = ("weight", "bias", "running_mean", "running_var")

TABLE: conversion.Table = {
    r"(Conv2d\w+)\.weight": (r"\1/conv/kernel", conversion.CONV),
    r"(Conv2d\w+)\.bias": (r"\1/conv/bias", conversion.COPY),
    r"(Mixed\w+)\.(\w+)\.weight": (r"\1/\2/conv/kernel", conversion.CONV),
    r"(Mixed\w+)\.(\w+)\.bias": (r"\1/\2/conv/bias", conversion.COPY),
    r"fc\.weight": ("fc/kernel", conversion.DENSE),
    r"fc\.bias": (None, conversion.COPY),  # see `inception.Inception`
    r".*\.num_batches_tracked": (None, conversion.COPY),
}


def params(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns parameters of ``inception.Inception`` from tensors under the names of torchvision.

    Raises:
        ValueError: if they are not those of this network; one line.
    """
    images = jax.ShapeDtypeStruct((1, inception.SIZE, inception.SIZE, 3), np.float32)
    target = numerics.eval_shape(inception.Inception().init, numerics.key(0), images)["params"]
    try:
        return conversion.convert(fold(state_dict), TABLE, target)
    except ValueError as error:
        raise ValueError(
            f"these are not the weights of FID's Inception-v3, {FILE_NAME} of pytorch-fid: "
            f"{mismatches(error)}"
        ) from error


def mismatches(error: ValueError) -> str:
    """Returns in one line what ``conversion.convert`` found wrong, which may be a list."""
    first, *wrong = str(error).splitlines()
    return f"{len(wrong)} mismatches, such as {wrong[0].strip()}" if wrong else first


def fold(state_dict: Mapping[str, np.ndarray], epsilon: float = EPSILON) -> dict[str, np.ndarray]:
    """Returns the same network without batch normalisation.

    ``NAME.conv.weight`` ``[o, i, h, w]`` and the four tensors ``NAME.bn.*`` ``[o]`` become a
    convolution ``NAME.weight`` and ``NAME.bias``, float32; all other tensors stay.

    Args:
        state_dict: tensors by name.
        epsilon: that is added to variances.

    Raises:
        ValueError: if a convolution lacks one of the four.
    """
    folded = dict(state_dict)
    for name in state_dict:
        if not name.endswith(".conv.weight"):
            continue
        module = name.removesuffix(".conv.weight")
        missing = [f"{module}.bn.{part}" for part in NORM if f"{module}.bn.{part}" not in folded]
        if missing:
            raise ValueError(f"{name} has no {missing[0]}")
        kernel = np.asarray(folded.pop(name), np.float64)
        gain, bias, mean, variance = (
            np.asarray(folded.pop(f"{module}.bn.{part}"), np.float64) for part in NORM
        )
        shapes = {x.shape for x in (gain, bias, mean, variance)}
        if kernel.ndim != 4 or shapes != {kernel.shape[:1]}:
            raise ValueError(f"the shapes of {name} and {module}.bn.* do not fit each other")
        gain = gain / np.sqrt(variance + epsilon)
        folded[f"{module}.weight"] = (kernel * gain[:, None, None, None]).astype(np.float32)
        folded[f"{module}.bias"] = (bias - mean * gain).astype(np.float32)
    return folded


def read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads parameters of ``inception.Inception`` from a file that ``weight_files`` can read.

    Returns:
        The parameters, and their origin as JSON values: ``file`` (its name), ``sha256``, and
        ``published``, whether by its SHA-256 it is pytorch-fid's file.

    Raises:
        OSError: if the file cannot be read; one line that names it.
        ValueError: if it holds something else; one line that names it.
    """
    path = paths.local(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}: give the path of {FILE_NAME}, or 'download'"
        )
    sha256 = _sha256(path)
    try:
        found = params(weight_files.read(path))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from error
    return found, {"file": path.name, "sha256": sha256, "published": sha256 == SHA256}


def download(
    directory: pathlib.Path, url: str = URL, sha256: str = SHA256, timeout: float = 60.0
) -> pathlib.Path:
    """Downloads a file (91 MiB) unless it is there, and returns its path.

    The file is whole or not there. Its SHA-256 is checked before it is kept, and whenever it is
    used again.

    Args:
        directory: to keep it in.
        url: of the file.
        sha256: that it must have.
        timeout: seconds without an answer before it gives up.

    Raises:
        OSError: if it cannot be downloaded; one line.
        ValueError: if its SHA-256 is another; one line.
    """
    path = directory / re.sub(r".*/", "", url)
    if path.is_file() and _sha256(path) == sha256:
        return path
    advice = f"download it elsewhere and give the path of {path.name}"
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise OSError(f"{url} could not be downloaded ({error}): try again, or {advice}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{url} has SHA-256 {found[:16]}... instead of {sha256[:16]}...; it was not kept: "
            f"try again, or {advice}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, content)
    return path


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
