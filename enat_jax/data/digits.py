"""The handwritten digits of scikit-learn as a source of images."""

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int, UInt8

from enat_jax.data import decoding
from enat_jax.runtime import files

SPLITS = ("train", "test")
_TEST_SHARE = 0.2
_SPLIT_SEED = 0  # never change it: every measurement on held-out digits rests on this split


@dataclasses.dataclass(frozen=True)
class Digits:
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels, enlarged smoothly.

    The 8x8 values are counts of ink in a scan of 32x32 black and white pixels, so a cubic spline
    through them followed by a soft threshold comes near to the scan again. The augmentation moves
    the grid on which the spline is read; nothing is interpolated twice.

    ``split`` is "train", 1,438 images, or "test", the 359 held out: a fixed fifth of each class.
    All other settings may be chosen freely; the augmentation draws uniformly from plus or minus the
    given bounds.

    Raises:
        ValueError: the split is unknown, or a setting is out of its range.
    """

    class_names: ClassVar[tuple[str, ...]] = tuple("0123456789")
    mirrored: ClassVar[bool] = False  # a mirrored 2 is no 2
    ignored: ClassVar[dict[str, int]] = {}
    missing: ClassVar[dict[str, int]] = {}

    split: str
    size: int = 32  # pixels of a side of the result
    fill: float = 0.8125  # share of the side that the 8x8 pixels take up, the rest is margin
    threshold: tuple[float, float] = (0.1, 0.85)  # ink that becomes 0 and 1, smooth in between
    rotation: float = 0.0  # degrees
    scale: float = 0.0  # of the logarithm of the size, width and height apart
    shear: float = 0.0  # horizontal shift per height
    shift: float = 0.0  # share of the side, both ways

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r} is unknown: choose one of {SPLITS}")
        if type(self.size) is not int or self.size < 8:
            raise ValueError(f"size={self.size!r} is not a whole number of at least 8 pixels")
        for name in ("fill", "rotation", "scale", "shear", "shift"):
            value = getattr(self, name)
            if not decoding.is_number(value) or value <= 0 and name == "fill":
                raise ValueError(f"{name}={value!r} is not a number that makes sense here")
        ends = self.threshold
        if not decoding.is_range(ends) or ends[0] == ends[1]:
            raise ValueError(f"threshold={ends!r} must be two numbers, the lower one first")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of all images."""
        return (self.size, self.size, 1)

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def labels(self) -> Int[np.ndarray, " n"]:
        """Classes of the split's images, int32."""
        return _digits()[1][_split(self.split)].astype(np.int32)

    @functools.cached_property
    def _splines(self) -> Float[np.ndarray, "n 16 16"]:
        """Cubic spline coefficients of the images in a margin of zeros."""
        from scipy import ndimage  # late: who only draws images need not wait for it

        padded = np.pad(_digits()[0][_split(self.split)], ((0, 0), (4, 4), (4, 4)))
        return np.stack([ndimage.spline_filter(image, order=3) for image in padded])

    def identity(self) -> dict[str, object]:
        """Returns all settings as JSON values."""
        return {"source": "digits"} | files.as_json(dataclasses.asdict(self))

    def key(self, index: int) -> str:
        """Returns the digit's place in scikit-learn's data, such as "digits/17"."""
        return f"digits/{_split(self.split)[decoding.checked(index, len(self))]}"

    def load(self, index: int, seed: int | None = None) -> decoding.Example:
        """Returns one example; ``seed`` decides its augmentation."""
        batch = self.gather(np.array([index]), None if seed is None else np.array([seed]))
        return decoding.Example(batch["images"][0], int(batch["labels"][0]), self.key(index))

    def gather(
        self, indices: Int[np.ndarray, " b"], seeds: Int[np.ndarray, " b"] | None = None
    ) -> decoding.Batch:
        """Returns {"images": uint8 ``[b, size, size, 1]``, "labels": int32 ``[b]``}.

        Args:
            indices: in [0, n).
            seeds: not negative; the same seed gives the same image. None: no augmentation.
        """
        indices = np.asarray(indices)
        draws = np.zeros((len(indices), 6))
        if seeds is not None:
            draws = np.stack([np.random.default_rng(int(s)).uniform(-1, 1, 6) for s in seeds])
        return {
            "images": np.stack(
                [self._render(self._splines[i], u) for i, u in zip(indices, draws, strict=True)]
            ),
            "labels": self.labels[indices],
        }

    def _render(
        self, spline: Float[np.ndarray, "16 16"], draw: Float[np.ndarray, " 6"]
    ) -> UInt8[np.ndarray, "size size 1"]:
        """Returns one image; ``draw`` holds numbers in [-1, 1]."""
        from scipy import ndimage  # late, as in `_splines`

        angle = math.radians(self.rotation) * draw[0]
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        slant = np.array([[1.0, 0.0], [self.shear * draw[1], 1.0]])
        # From centred pixels of the result to centred pixels of the 8x8 image, rows first.
        step = 8 / (self.fill * self.size)
        matrix = np.diag(np.exp(self.scale * draw[2:4]) * step) @ slant @ turn
        centre = (self.size - 1) / 2
        middle = (spline.shape[0] - 1) / 2
        offset = middle - matrix @ (centre + self.shift * self.size * draw[4:6])
        ink = ndimage.affine_transform(
            spline, matrix, offset, (self.size, self.size), order=3, prefilter=False
        )
        low, high = self.threshold
        t = np.clip((ink - low) / (high - low), 0, 1)
        return np.rint(255 * t * t * (3 - 2 * t)).astype(np.uint8)[..., None]


@functools.cache
def _digits() -> tuple[Float[np.ndarray, "1797 8 8"], Int[np.ndarray, " 1797"]]:
    """Returns all images, float64 in [0, 1], and their labels."""
    from sklearn import datasets  # here: slow to import, and only the digits need it

    data = datasets.load_digits()
    return data.images / 16, data.target


@functools.cache
def _split(split: str) -> Int[np.ndarray, " n"]:
    """Returns ascending indices: the same share of each class, drawn once and for all."""
    labels = _digits()[1]
    rng = np.random.default_rng(_SPLIT_SEED)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cut = round(len(members) * _TEST_SHARE)
        parts["test"].append(members[:cut])
        parts["train"].append(members[cut:])
    return np.sort(np.concatenate(parts[split]))
