"""Images in an .npz file, as ADM's programs write their samples and read them.

The file (github.com/openai/guided-diffusion) holds ``arr_0``, uint8 ``[n, h, w, 3]``, and of a
model with classes ``arr_1``, their labels. ADM's references hold statistics beside them, see
``statistics``.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from enat_jax.evaluation import npz_files
from enat_jax.runtime import paths

IMAGES, LABELS = "arr_0", "arr_1"
MAX_CLASSES = 10**6
ADVICE = (
    "ADM's samples are arr_0, uint8 [n, height, width, 1 or 3], and perhaps arr_1, whole numbers "
    "[n], the labels"
)


class NpzImages:
    """The images of such a file, which are read in order, a part at a time.

    Args:
        path: of the file.

    Attributes:
        image_shape: height, width and channels.
        labels: of the images; all 0 if the file has none.
        num_classes: one more than the largest label.

    Raises:
        OSError: if there is no such file or it cannot be read.
        ValueError: if it is damaged, or holds something else.
    """

    def __init__(self, path: str) -> None:
        self._path = paths.local(path)
        with npz_files.open_npz(self._path, ADVICE) as archive:
            if IMAGES not in archive:
                names = ", ".join(archive) or "no arrays"
                raise ValueError(
                    f"{path} holds {names} and no images: statistics go to --reference; {ADVICE}"
                )
            shape, dtype = archive.header(IMAGES)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
                raise ValueError(f"{path}: {IMAGES} is {dtype} {list(shape)}: {ADVICE}")
            self._length, self.image_shape = shape[0], (shape[1], shape[2], shape[3])
            self.labels = self._read_labels(archive)
            # All of it is read once: what is damaged should not be found after hours.
            self._checksums = [archive.checksum(x) for x in (IMAGES, LABELS) if x in archive]
        self.num_classes = int(self.labels.max()) + 1
        self._parts: Iterator[UInt8[np.ndarray, "b h w c"]] = iter(())
        self._next = 0  # the image that the parts go on with

    def __len__(self) -> int:
        return self._length

    def identity(self) -> dict[str, Any]:
        """Returns JSON values that decide images and labels."""
        return {
            "source": "npz",
            "num_images": len(self),
            "shape": list(self.image_shape),
            "crc32": [f"{checksum:08x}" for checksum in self._checksums],
        }

    def read(self, start: int, stop: int) -> UInt8[np.ndarray, "b h w c"]:
        """Returns the images start to stop - 1, soonest if they follow the last ones.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is damaged.
        """
        part = next(self._parts, None) if start == self._next else None
        if part is None or len(part) != stop - start:
            self._parts = self._read_from(start, stop - start)
            part = next(self._parts)
        self._next = stop
        return part

    def _read_from(self, start: int, number: int) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        with npz_files.open_npz(self._path, ADVICE) as archive:
            yield from archive.rows(IMAGES, number, start)

    def _read_labels(self, archive: npz_files.Archive) -> Int[np.ndarray, " n"]:
        if LABELS not in archive:
            return np.zeros(len(self), np.int32)
        shape, dtype = archive.header(LABELS)
        labels = archive.read(LABELS) if shape == (len(self),) and dtype.kind in "iu" else None
        if labels is None or not ((labels >= 0) & (labels < MAX_CLASSES)).all():
            raise ValueError(
                f"{self._path}: {LABELS}, {dtype} {list(shape)}, are no labels of {len(self):,} "
                f"images, whole numbers from 0: {ADVICE}"
            )
        return labels.astype(np.int32)
