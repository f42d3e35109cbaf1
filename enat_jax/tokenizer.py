"""The trained VQ tokenizer as one thing: images to tokens and back, in a directory of its own.

A tokenizer directory holds `tokenizer.json` (settings and provenance) and `params/` (Orbax).
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enat_jax import checkpoint, model_files
from enat_jax.data import tokens
from enat_jax.models import vqgan

FORMAT = "enat_jax tokenizer 1"
BATCH_SIZE = 64  # images per call of the network


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A VQGAN with its weights.

    Attributes:
        model: the Linen module.
        params: its parameters, a nested dict of arrays.
        image_size: (height, width) in pixels of the images it was trained for.
        provenance: JSON values that say where the weights come from.
    """

    model: vqgan.VQGAN
    params: Any
    image_size: tuple[int, int]
    provenance: dict = dataclasses.field(default_factory=dict)

    @property
    def grid(self):
        """Rows and columns of tokens."""
        height, width = self.image_size
        return height // self.model.downsampling, width // self.model.downsampling

    @functools.cached_property
    def fingerprint(self):
        """SHA-256 of the weights, hexadecimal."""
        return tokens.fingerprint(self.params)

    def encode(self, images):
        """uint8 images [n, h, w, c] to int32 tokens [n, l] in raster order."""
        images = np.asarray(images)
        needed = (*self.image_size, self.model.image_channels)
        if images.dtype != np.uint8 or images.shape[1:] != needed:
            raise ValueError(
                f"images of {images.dtype} {images.shape[1:]} do not suit this tokenizer: it takes "
                f"uint8 images of {needed}: height, width, channels"
            )
        return _in_batches(functools.partial(_encode, self.model, self.params), images)

    def decode(self, codes):
        """Tokens [n, l], 0 <= token < v, to uint8 images [n, h, w, c]."""
        codes = np.asarray(codes)
        rows, columns = self.grid
        if codes.dtype.kind not in "iu":
            raise ValueError(f"tokens of {codes.dtype}: need whole numbers")
        if codes.ndim != 2 or codes.shape[1] != rows * columns:
            raise ValueError(f"tokens of shape {codes.shape}: need [n, {rows * columns}]")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.model.codebook_size:
            raise ValueError(
                f"tokens from {codes.min()} to {codes.max()}: the codebook has "
                f"{self.model.codebook_size}"
            )
        grids = codes.reshape(-1, rows, columns).astype(np.int32)
        return _in_batches(functools.partial(_decode, self.model, self.params), grids)

    def save(self, directory):
        """Write the tokenizer; `tokenizer.json` comes last: a directory that has it is whole."""
        directory = pathlib.Path(directory)
        checkpoint.save_params(directory / "params", self.params)
        description = {
            "format": FORMAT,
            "model": model_files.settings_of(self.model),
            "image_size": list(self.image_size),
            "fingerprint": self.fingerprint,
            "provenance": self.provenance,
        }
        if jax.process_index() == 0:
            model_files.write_json(directory / "tokenizer.json", description)

    @classmethod
    def load(cls, directory):
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no tokenizer in the directory.
            ValueError: it is damaged or not a tokenizer of ours.
        """
        directory = pathlib.Path(directory)
        description = model_files.read_json(
            directory / "tokenizer.json", FORMAT, "train one with python -m enat_jax.train"
        )
        try:
            model = vqgan.VQGAN(**model_files.settings_from(description["model"]))
            image_size = tuple(description["image_size"])
            provenance, fingerprint = description["provenance"], description["fingerprint"]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{directory / 'tokenizer.json'} is damaged: {error!r}") from error
        # To the device once, not anew with every batch.
        params = jax.device_put(checkpoint.load_params(directory / "params"))
        found = cls(model, params, image_size, provenance)
        if found.fingerprint != fingerprint:
            raise ValueError(f"the weights in {directory} are not those that were saved: damaged")
        return found


def to_float(images):
    """uint8 images -> float32 in [0, 1], what the network takes."""
    return images.astype(jnp.float32) / 255


def to_uint8(images):
    """The network's images, about [0, 1] -> uint8, clipped and rounded."""
    return jnp.rint(255 * jnp.clip(images, 0, 1)).astype(jnp.uint8)


def encode(model, params, images):
    """uint8 images [b, h, w, c] -> int32 tokens [b, l] in raster order; pure, to be jitted."""
    variables = {"params": params}
    z = model.apply(variables, to_float(images), method="encode")
    ids, _ = model.apply(variables, z, method="quantize")
    return ids.reshape(ids.shape[0], -1)


_encode = jax.jit(encode, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _decode(model, params, grids):
    return to_uint8(model.apply({"params": params}, grids, method="decode_codes"))


def _in_batches(function, rows):
    """Apply to batches of one size, so that one compiled shape serves any number of rows."""
    size = min(BATCH_SIZE, max(len(rows), 1))
    parts = []
    for start in range(0, max(len(rows), 1), size):
        part = rows[start : start + size]
        padded = np.concatenate([part, np.zeros((size - len(part), *rows.shape[1:]), rows.dtype)])
        parts.append(np.asarray(function(padded))[: len(part)])
    return np.concatenate(parts)
