"""Both towers of CLIP, to compare pictures with texts, in the directory of ``clip_model``.

Of the vision tower there are, beside the files of the text tower, the weights as ``vision/``
(Orbax), ``vision.safetensors`` or both, and a section of ``encoder.json``.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PyTree, UInt8
from PIL import Image

from enat_jax.checkpoints import model_files
from enat_jax.inference import clip_model
from enat_jax.models import clip
from enat_jax.runtime import buckets, files, numerics, paths

# Of the pixels of CLIP's training, in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipVision(model_files.TrainedModel):
    """CLIP's vision tower with its weights."""

    model: clip.VisionTower

    def __repr__(self) -> str:
        size = self.model.image_size
        return self.described(f"vectors of {self.model.projection} of {size}x{size} pixels")

    def vectors(self, images: UInt8[np.ndarray, "n h w c"]) -> Float32[np.ndarray, "n proj"]:
        """Returns the vectors of pictures, in the space of those of texts; their lengths differ.

        Args:
            images: grey or RGB, see ``prepared``.
        """
        pixels = prepared(images, self.model.image_size)
        empty = np.zeros((0, self.model.projection), np.float32)
        return clip_model.in_batches(self, _vectors, pixels, empty)

    @property
    def description(self) -> dict[str, Any]:
        """The section of ``encoder.json``."""
        return {"model": model_files.settings_of(self.model), "fingerprint": self.fingerprint}


def prepared(
    images: UInt8[np.ndarray, "n h w c"], size: int
) -> UInt8[np.ndarray, "n {size} {size} 3"]:
    """Returns pictures as CLIP takes them: the middle, the shorter side resized to ``size``.

    The resizing is Pillow's bicubic one, with antialiasing. Grey is repeated to three channels.

    Raises:
        ValueError: they are no pictures.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"images of {images.dtype} {images.shape}: need uint8 [n, h, w, 1] or [n, h, w, 3]"
        )
    height, width = images.shape[1:3]
    shorter = min(height, width)
    height, width = (size * side // shorter for side in (height, width))
    top, left = (round((side - size) / 2) for side in (height, width))
    made = np.empty((len(images), size, size, 3), np.uint8)
    for one, image in zip(made, images, strict=True):
        resized = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        one[:] = np.asarray(resized.convert("RGB"))[top : top + size, left : left + size]
    return made


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """Both towers.

    Attributes:
        text: the text tower; its provenance is that of both.
        vision: the vision tower; None: there is none.
    """

    text: clip_model.ClipText
    vision: ClipVision | None = None

    def __repr__(self) -> str:
        towers = [self.text] if self.vision is None else [self.text, self.vision]
        return f"Clip({', '.join(map(repr, towers))})"

    @property
    def description(self) -> dict[str, Any]:
        """The content of ``encoder.json``."""
        vision = {} if self.vision is None else {"vision": self.vision.description}
        return self.text.description | vision

    def save(
        self, directory: str | os.PathLike, formats: Collection[str] = model_files.WEIGHTS
    ) -> None:
        """Writes a directory, which ``ClipText.load`` reads, too; raises as ``ClipText.save``."""
        directory = paths.place(directory)
        if self.vision is not None:
            self.vision.save_weights(directory / "vision", formats, clip_model.FORMAT)
        self.text.save(directory, formats)
        if jax.process_index() == 0:
            files.write_json(directory / "encoder.json", self.description)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        dtype: str | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> Self:
        """Reads what ``save`` wrote; arguments and errors are those of ``ClipText.load``."""
        directory = buckets.fetched(directory)
        text = clip_model.ClipText.load(directory, dtype, devices)
        path = directory / "encoder.json"
        described = files.read_description(path, clip_model.FORMAT, clip_model.MADE_BY)
        if "vision" not in described:
            return cls(text)
        return cls(text, _read_vision(directory, path, described["vision"], text, dtype))


def _read_vision(
    directory: pathlib.Path,
    path: pathlib.Path,
    described: dict[str, Any],
    text: clip_model.ClipText,
    dtype: str | None,
) -> ClipVision:
    with model_files.parsing(path):
        model = clip.VisionTower(**model_files.settings_from(described["model"]))
        expected = described["fingerprint"]
    params = model_files.load_weights(directory / "vision", expected)
    found = ClipVision(model, params, devices=text.devices, saved_fingerprint=expected)
    return found.on_devices(dtype)


def _of_pixels(
    model: clip.VisionTower, params: PyTree, images: UInt8[Array, "b h w 3"]
) -> Float[Array, "b proj"]:
    pixels = (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(DEVIATION)
    apply: Callable[..., Any] = model.apply
    return apply({"params": params}, pixels).astype(jnp.float32)


_vectors = numerics.jit(_of_pixels, static_argnums=0)
