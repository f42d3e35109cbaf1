"""Weights of others as models of ours, and ours by the names of others' PyTorch programs."""

import hashlib
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

import enat_jax
from enat_jax.checkpoints import model_files, weight_files
from enat_jax.inference import generator, sampling, tokenizer
from enat_jax.models import conversion, enat, reference_sizes
from enat_jax.runtime import files

# The reference's settings for its released models, by tokens of an image (its README).
SETTINGS = {
    256: sampling.Settings(),
    1024: sampling.Settings(guidance_scale=3.5, token_temperature=4.0, mask_temperature=1.5),
}
MAX_ERRORS = 5  # of a list, that a message shows


def read_tokenizer(
    path: str | os.PathLike,
    *,
    image_size: tuple[int, int] | None = None,
    num_tokens: int | None = None,
    num_groups: int | None = None,
    part: str | None = None,
) -> tokenizer.Tokenizer:
    """Reads the tokenizer in a file of the reference's, MaskGIT's or MaskBit's weights.

    Args:
        path: of the file.
        image_size: (height, width) in pixels; None: the square that has ``num_tokens`` tokens.
        num_tokens: of an image.
        num_groups: of its norms; None: 32, as in all released ones.
        part: see ``weight_files.read``.

    Returns:
        A tokenizer that computes in float32.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such tokenizer, or does not suit images of that size.
    """
    if image_size is None and num_tokens is None:
        raise ValueError("a tokenizer suits images of many sizes: say which by --image-size")
    tensors = reference_sizes.without_prefixes(weight_files.read(path, part))
    convert, origin = conversion.vqgan_params, "the reference's VQGAN"
    if reference_sizes.is_maskgit(tensors):
        convert, origin = conversion.maskgit_params, "MaskGIT's JAX tokenizer"
    elif reference_sizes.is_maskbit(tensors):
        convert, origin = conversion.maskbit_params, "a tokenizer of MaskBit's program"
    try:
        model = reference_sizes.vqgan_of(tensors, num_groups)
        params = finite(convert(tensors, model))
    except ValueError as error:
        raise ValueError(f"{path}: {first_errors(error)}") from error
    if image_size is None:
        assert num_tokens is not None  # or it would have been refused above
        image_size = _square(num_tokens, model.downsampling)
    if any(side % model.downsampling for side in image_size):
        raise ValueError(
            f"images of {image_size[0]}x{image_size[1]} pixels cannot be cut into this tokenizer's "
            f"tokens of {model.downsampling}x{model.downsampling}: choose another --image-size"
        )
    provenance = provenance_of(path, part, origin, model)
    return tokenizer.Tokenizer(model, params, image_size, provenance)


def read_enat(
    path: str | os.PathLike,
    *,
    num_heads: int | None = None,
    encoder_layers: int | None = None,
    part: str | None = None,
) -> tuple[enat.ENAT, PyTree, dict[str, Any]]:
    """Reads the transformer in a file of the reference's weights.

    Args:
        path: of the file.
        num_heads, encoder_layers: None: those of the paper's model of this width and depth.
        part: see ``weight_files.read``.

    Returns:
        The model, its parameters and their provenance.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no ENAT.
    """
    tensors = reference_sizes.without_prefixes(weight_files.read(path, part))
    try:
        model = reference_sizes.enat_of(tensors, num_heads, encoder_layers)
        params = finite(conversion.enat_params(tensors, model))
    except ValueError as error:
        raise ValueError(f"{path}: {first_errors(error)}") from error
    return model, params, provenance_of(path, part, "the reference's ENAT", model)


def write(model: generator.Generator | tokenizer.Tokenizer, directory: pathlib.Path) -> None:
    """Writes ``vqgan.safetensors``, and of a generator ``enat.safetensors``, with its names.

    A tokenizer with convolutions of stride 2, or with bits as codes, gets MaskBit's names.

    Raises:
        ValueError: the reference has no such model.
        OSError: they cannot be written.
    """
    codec = model.tokenizer if isinstance(model, generator.Generator) else model
    by_model = {"vqgan": conversion.vqgan_state_dict(jax.device_get(codec.params), codec.model)}
    if isinstance(model, generator.Generator):
        if not isinstance(model.model, enat.ENAT):
            raise ValueError("the reference has no names for the NAT baseline: leave it out")
        by_model["enat"] = conversion.enat_state_dict(jax.device_get(model.params), model.model)
    for name, tensors in by_model.items():
        weight_files.write_safetensors(directory / f"{name}.safetensors", tensors)


def _square(num_tokens: int, downsampling: int) -> tuple[int, int]:
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(
            f"{num_tokens} tokens are no square grid: say how large images are by --image-size"
        )
    return side * downsampling, side * downsampling


def finite(params: PyTree) -> PyTree:
    """Returns parameters; raises ValueError if a value is not finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not np.isfinite(leaf).all():
            where = "/".join(str(entry.key) for entry in path)
            raise ValueError(f"{where} has values that are no finite numbers: damaged weights")
    return params


def provenance_of(
    path: str | os.PathLike,
    part: str | None,
    origin: str,
    model: Any,
    sha256: str | None = None,
) -> dict[str, Any]:
    """Returns JSON values that say which file the weights of ``model`` were read from.

    Args:
        path: of the file.
        part: see ``weight_files.read``.
        origin: whose weights they are, for people.
        model: a Linen module.
        sha256: of the file; None: it is computed.
    """
    provenance = {
        "imported": origin,
        "file": pathlib.Path(path).name,
        "part": part,
        "sha256": sha256 or sha256_of(path),
        "model": model_files.settings_of(model),
        "enat_jax": enat_jax.__version__,
    }
    return files.as_json(provenance)  # as it will be read again


def sha256_of(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_errors(error: ValueError) -> str:
    """Returns the first lines of a list of errors, and how many more there are."""
    lines = [line.strip() for line in str(error).splitlines()]
    more = len(lines) - 1 - MAX_ERRORS
    return " ".join([*lines[: 1 + MAX_ERRORS], *([f"and {more} more"] if more > 0 else [])])
