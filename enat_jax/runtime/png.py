"""Pictures as PNG files, and many in one grid."""

import io
import os
import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image, PngImagePlugin

from enat_jax.runtime import files


def grid(images: np.ndarray, columns: int, pad: int = 2, background: int = 255) -> np.ndarray:
    """Lays out images in rows, ``pad`` pixels of ``background`` between and around them.

    Args:
        images: uint8 ``[n, h, w, c]``, n > 0.
        columns: images in a row, positive.
        pad: pixels, not negative.
        background: also of the places that the last row leaves empty.

    Returns:
        uint8 ``[H, W, c]``.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(f"{images.dtype=}, {images.shape=}: need uint8 [n, h, w, c], n > 0")
    if columns < 1 or pad < 0:
        raise ValueError(f"{columns=} must be positive and {pad=} not negative")
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    shape = (rows * (height + pad) + pad, columns * (width + pad) + pad, channels)
    canvas = np.full(shape, background, np.uint8)
    for i, image in enumerate(images):
        top = pad + i // columns * (height + pad)
        left = pad + i % columns * (width + pad)
        canvas[top : top + height, left : left + width] = image
    return canvas


def write_png(
    path: str | os.PathLike, image: np.ndarray, text: Mapping[str, str] | None = None
) -> None:
    """Writes a picture, uint8 ``[h, w, c]`` with c = 1 or 3, whole or not at all, creating parents.

    ``text`` goes into text chunks. The same arguments make the same bytes. Does not wait for the
    disk, which thousands of pictures would feel. Raises OSError, which names ``path``.
    """
    content, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    Image.fromarray(as_pillow(checked(image))).save(content, "PNG", pnginfo=chunks)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Thousands of pictures would feel waiting for the disk.
    files.write_atomically(path, content.getvalue(), sync=False)


def checked(picture: np.ndarray) -> np.ndarray:
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] not in (1, 3):
        raise ValueError(
            f"a picture of {picture.dtype} {picture.shape}: need uint8 [h, w, c] with c = 1 or 3"
        )
    return picture


def as_pillow(picture: np.ndarray) -> np.ndarray:
    """As Pillow and W&B want it: grey without an axis of channels."""
    return picture[..., 0] if picture.shape[-1] == 1 else picture
