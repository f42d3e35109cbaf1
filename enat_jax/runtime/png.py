"""Pictures as PNG files, and many in one grid."""

import functools
import io
import os
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin

from enat_jax.runtime import files, paths


def grid(
    images: UInt8[np.ndarray, "n h w c"], columns: int, pad: int = 2, background: int = 255
) -> UInt8[np.ndarray, "height width c"]:
    """Lays out images in rows, ``pad`` pixels of ``background`` between and around them.

    Args:
        images: n > 0.
        columns: images in a row, positive.
        pad: pixels, not negative.
        background: also of the places that the last row leaves empty.

    Raises:
        ValueError: there are no images, or an argument is out of range.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(f"{images.dtype=}, {images.shape=}: need uint8 [n, h, w, c], n > 0")
    if columns < 1 or pad < 0:
        raise ValueError(f"{columns=} must be positive and {pad=} not negative")
    n, height, width, channels = images.shape
    fill = functools.partial(np.pad, constant_values=background)
    cells = fill(images, ((0, -n % columns), (pad, 0), (pad, 0), (0, 0)))
    rows = cells.reshape(-1, columns, height + pad, width + pad, channels).swapaxes(1, 2)
    canvas = rows.reshape(-1, columns * (width + pad), channels)
    return fill(canvas, ((0, pad), (0, pad), (0, 0)))


def write_png(
    path: str | os.PathLike,
    image: UInt8[np.ndarray, "h w c"],
    text: Mapping[str, str] | None = None,
) -> None:
    """Writes a picture whole or not at all. The same arguments make the same bytes.

    Args:
        path: of the file; its parents are created.
        image: c = 1 or 3.
        text: content of the file's text chunks.

    Raises:
        OSError: the file cannot be written; the error names ``path``.
        ValueError: ``image`` is no such picture.
    """
    content, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    Image.fromarray(as_pillow(checked(image))).save(content, "PNG", pnginfo=chunks)
    path = paths.place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Thousands of pictures would feel waiting for the disk.
    files.write_atomically(path, content.getvalue(), sync=False)


def checked(picture: np.ndarray) -> UInt8[np.ndarray, "h w c"]:
    """Returns the picture; raises ValueError unless it is uint8 ``[h, w, c]`` with c = 1 or 3."""
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] not in (1, 3):
        raise ValueError(
            f"a picture of {picture.dtype} {picture.shape}: need uint8 [h, w, c] with c = 1 or 3"
        )
    return picture


def as_pillow(picture: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w ..."]:
    """Returns a picture as Pillow and W&B take it: grey without an axis of channels."""
    return picture[..., 0] if picture.shape[-1] == 1 else picture
