"""The trained VQ tokenizer as one thing: images to tokens and back, in a directory of its own.

A tokenizer directory holds ``tokenizer.json`` (settings and provenance) and the weights, as
``params/`` (Orbax), ``params.safetensors``, or both.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped, UInt8

from enat_jax.checkpoints import model_files
from enat_jax.models import vqgan
from enat_jax.runtime import buckets, files, numerics, paths, sharding

FORMAT = "enat_jax tokenizer 1"
BATCH_SIZE = 64  # images per call of the network and device


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer(model_files.TrainedModel):
    """A VQGAN with its weights, which turns images into tokens and back.

    Attributes:
        image_size: (height, width) in pixels of the images it was trained for.
        provenance: JSON values that say where the weights come from.
    """

    model: vqgan.VQGAN
    image_size: tuple[int, int]
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        (rows, columns), (height, width) = self.grid, self.image_size
        codes = f"{rows}x{columns} tokens of {self.model.codebook_size:,} codes"
        return self.described(codes, f"{height}x{width} pixels")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        height, width = self.image_size
        return height // self.model.downsampling, width // self.model.downsampling

    @property
    def code_table(self) -> Float[Array, "v d"]:
        """The vectors of all codes, as the decoder takes them, whatever the quantizer."""
        table: Any = self.model.apply({"params": self.params}, method="code_table")
        return table

    def encode(self, images: UInt8[np.ndarray, "n h w c"]) -> Int[np.ndarray, "n l"]:
        """Turns images into int32 tokens in raster order.

        Raises:
            ValueError: the images are of another size or type.
        """
        return self._in_batches(_encode, self.checked(images))

    def checked(self, images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w c"]:
        """Returns the images as an array; raises as ``encode``."""
        images = np.asarray(images)
        needed = (*self.image_size, self.model.image_channels)
        if images.dtype != np.uint8 or images.shape[1:] != needed:
            raise ValueError(
                f"images of {images.dtype} {images.shape[1:]} do not suit this tokenizer: it takes "
                f"uint8 images of {needed}: height, width, channels"
            )
        return images

    def decode(self, codes: Int[np.ndarray, "n l"]) -> UInt8[np.ndarray, "n h w c"]:
        """Turns tokens in raster order, 0 <= token < v, into images.

        Raises:
            ValueError: they are out of range, or not as many as an image has.
        """
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
        return self._in_batches(_decode, codes.reshape(-1, rows, columns).astype(np.int32))

    def _in_batches(
        self, function: Callable[..., Array], rows: Shaped[np.ndarray, "n ..."]
    ) -> Shaped[np.ndarray, "n ..."]:
        """Applies it to batches of one size: one compiled shape serves any number of rows."""
        mesh, params = self.placed
        calls = max(1, -(-len(rows) // (BATCH_SIZE * mesh.size)))
        # A device that has one image alone rounds otherwise than one that has several.
        size = max(2 * mesh.size, -(-len(rows) // calls))
        parts = []
        for start in range(0, calls * size, size):
            part = rows[start : start + size]
            spare = np.zeros((size - len(part), *rows.shape[1:]), rows.dtype)
            placed = sharding.place(np.concatenate([part, spare]), mesh)
            parts.append(np.asarray(function(self.model, params, placed))[: len(part)])
        return np.concatenate(parts)

    def save(
        self, directory: str | os.PathLike, formats: Collection[str] = model_files.WEIGHTS
    ) -> None:
        """Writes the tokenizer; ``tokenizer.json`` comes last: a directory that has it is whole.

        Args:
            directory: created if missing; weights there are replaced.
            formats: of the weights, of ``model_files.WEIGHTS``.

        Raises:
            ValueError: the weights were loaded in another dtype than they were saved in.
            OSError: it cannot be written.
        """
        directory = paths.place(directory)
        self.save_weights(directory / "params", formats, FORMAT)
        if jax.process_index() == 0:
            files.write_json(directory / "tokenizer.json", self.description)

    @property
    def description(self) -> dict[str, Any]:
        """The content of ``tokenizer.json``."""
        return {
            "format": FORMAT,
            "model": model_files.settings_of(self.model),
            "image_size": list(self.image_size),
            "fingerprint": self.fingerprint,
            "provenance": self.provenance,
        }

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        dtype: str | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> Self:
        """Reads what ``save`` wrote.

        Args:
            directory: of the tokenizer.
            dtype: of weights and computation, "float32" or "bfloat16"; None: weights in float32
                and the computation as trained.
            devices: of this process, to divide images over; None: all.

        Raises:
            FileNotFoundError: there is no tokenizer in the directory.
            ValueError: it is damaged or not a tokenizer of ours.
        """
        directory = buckets.fetched(directory)
        advice = "train one with python -m enat_jax.train"
        if (directory / "model.json").is_file():
            advice = f"this is a whole model, its tokenizer is {directory / 'tokenizer'}"
        description = files.read_description(directory / "tokenizer.json", FORMAT, advice)
        with model_files.parsing(directory / "tokenizer.json"):
            model = vqgan.VQGAN(**model_files.settings_from(description["model"]))
            image_size = tuple(description["image_size"])
            provenance, fingerprint = description["provenance"], description["fingerprint"]
        params = model_files.load_weights(directory / "params", fingerprint)
        devices = tuple(jax.local_devices() if devices is None else devices)
        found = cls(
            *(model, params, image_size, provenance),
            devices=devices,
            saved_fingerprint=fingerprint,
        )
        return found.on_devices(dtype)


def to_float(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Returns images as the network takes them: float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def to_uint8(images: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """Returns the network's images, which are in about [0, 1], clipped and rounded."""
    return jnp.rint(255 * jnp.clip(images, 0, 1)).astype(jnp.uint8)


def encode(
    model: vqgan.VQGAN, params: PyTree, images: UInt8[Array, "b h w c"]
) -> Int[Array, "b l"]:
    """Turns images into int32 tokens in raster order; pure, to be jitted."""
    variables = {"params": params}
    z = model.apply(variables, to_float(images), method="encode")
    ids, _ = model.apply(variables, z, method="quantize")
    return ids.reshape(ids.shape[0], -1)


def decode(
    model: vqgan.VQGAN, params: PyTree, grids: Int[Array, "b rows columns"]
) -> UInt8[Array, "b h w c"]:
    """Turns int32 tokens into images; pure, to be jitted."""
    images: Any = model.apply({"params": params}, grids, method="decode_codes")
    return to_uint8(images)


_encode = numerics.jit(encode, static_argnums=0)
_decode = numerics.jit(decode, static_argnums=0)
