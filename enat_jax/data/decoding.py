"""Pixels from the bytes of one picture file: decoding, crops, augmentation, and their errors.

Colour profiles are ignored, as in the literature.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import math
import numbers
import operator
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from enat_jax.data import metadata
from enat_jax.runtime import files, os_errors

try:
    from PIL import AvifImagePlugin
except ImportError:  # Pillow before 11.3
    AvifImagePlugin = None  # type: ignore[assignment]

# Pillow's class for each format that is read.
FORMATS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
# Extensions of pictures, in any case.
EXTENSIONS: tuple[str, ...] = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
)
if AvifImagePlugin and AvifImagePlugin.SUPPORTED:
    FORMATS["AVIF"] = AvifImagePlugin.AvifImageFile
    EXTENSIONS += (".avif",)
NEW_EXTENSIONS = (".jpe", ".jfif", ".tif", ".tiff", ".avif")  # earlier versions passed them over
MAX_PIXELS = 89_478_485  # of one picture: a quarter of a GiB of RGB
MAX_BYTES = 64 * 2**20  # of one encoded picture
PLAIN_CROP = "centre, halved by a box filter, then bicubic (ADM)"  # what identities say
SQUARE_CROP = "centre square, then Lanczos (U-ViT)"
# Pixels whose white is known to nobody, or that Pillow cannot turn into RGB.
_WITHOUT_RANGE = ("F", "I", "LAB", "HSV")
MODES = {1: "L", 3: "RGB"}  # Pillow's name for so many channels

Batch = dict[str, np.ndarray]  # arrays whose first axis counts the examples


class UnreadableImage(ValueError):
    """A picture that cannot be read; as text "KEY: REASON".

    Attributes:
        key: names it for people.
        reason: says why.
        place: what ``Source.key`` calls it, mostly ``key``.
    """

    def __init__(self, key: str, reason: str, place: str | None = None):
        super().__init__(key, reason, place)
        self.key = key
        self.reason = reason
        self.place = key if place is None else place

    def __str__(self) -> str:
        # A name may hold line breaks, and signs that turn the rest of the line round.
        key = "".join(c if c.isprintable() else repr(c)[1:-1] for c in self.key)
        return f"{key}: {self.reason}"


@contextlib.contextmanager
def naming(key: str, place: str | None = None) -> Iterator[None]:
    """Turns an OSError or ValueError about a picture into an ``UnreadableImage`` that names it.

    Raises:
        OSError: the fault is not the picture's, see ``os_errors.OF_PROCESS``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in os_errors.OF_PROCESS:
            raise OSError(error.errno, error.strerror, error.filename or key) from error
        what_to_do = f": {advice}" if (advice := os_errors.ADVICE.get(error.errno or 0)) else ""
        reason = f"cannot be read ({error.strerror}){what_to_do}"
        raise UnreadableImage(key, reason, place) from error
    except ValueError as error:
        raise UnreadableImage(key, str(error), place) from error


class Example(NamedTuple):
    """One example of a source."""

    image: UInt8[np.ndarray, "height width c"]
    label: int
    key: str


@dataclasses.dataclass(frozen=True)
class Framing:
    """How pictures of any size become pixels ``[size, size, channels]``.

    Without augmentation a picture goes through the function of ``CROPS`` that ``crop`` names, with
    it through ``random_resized_crop``, and half of the pictures are mirrored.

    Raises:
        ValueError: a setting is out of its range.
    """

    size: int  # pixels of a side of the result
    channels: int = 3  # or 1, grey
    crop_area: tuple[float, float] = (0.8, 1.0)  # share of the picture's area
    crop_ratio: tuple[float, float] = (0.75, 1.3333)  # width to height
    flip: bool = True  # mirror left to right
    crop: str = "adm"  # a key of ``CROPS``

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise ValueError(f"size={self.size!r} is not a whole number of pixels of at least 1")
        if type(self.channels) is not int or self.channels not in MODES:
            raise ValueError(f"channels={self.channels!r} is neither 1 (grey) nor 3 (RGB)")
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip={self.flip!r} is neither True nor False")
        if self.crop not in CROPS:
            raise ValueError(f"crop={self.crop!r} is unknown: choose one of {', '.join(CROPS)}")
        for name, least, most in (("crop_area", 0.0, 1.0), ("crop_ratio", 1e-3, 1e3)):
            value = getattr(self, name)
            if not is_range(value) or value[0] <= 0 or value[0] < least or value[1] > most:
                raise ValueError(
                    f"{name}={value!r} must be two numbers, the lower one first, above 0, "
                    f"within {least:g} to {most:g}"
                )
            object.__setattr__(self, name, tuple(map(float, value)))  # from JSON it is a list

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the result."""
        return (self.size, self.size, self.channels)

    def identity(self) -> dict[str, object]:
        """Returns the settings as JSON values."""
        settings = files.as_json(dataclasses.asdict(self))
        del settings["crop"]  # which has a name in words
        return {"plain_crop": CROPS[self.crop][0]} | settings

    def check(self, data: bytes) -> None:
        """Raises ValueError if ``pixels`` would; without crops it is several times as fast."""
        _refuse_elongated(decode(data, self.channels), self.size)

    def pixels(self, data: bytes, seed: int | None = None) -> UInt8[np.ndarray, "size size c"]:
        """Returns the pixels of an encoded picture.

        Args:
            data: of the file.
            seed: decides the augmentation, not negative; None: no augmentation.

        Raises:
            ValueError: what is wrong with the picture.
        """
        image = decode(data, self.channels)
        if seed is None:
            return CROPS[self.crop][1](image, self.size)
        rng = np.random.default_rng(int(seed))
        # Drawn first: how many tries a crop takes must not decide which way the picture faces.
        mirror = rng.random() < 0.5 and self.flip
        cut = random_resized_crop(image, self.size, self.crop_area, self.crop_ratio, rng)
        return cut[:, ::-1] if mirror else cut


def checked(index: int, n: int) -> int:
    """Returns ``index`` as an int; raises IndexError if it is not in [0, n)."""
    index = operator.index(index)
    if not 0 <= index < n:
        raise IndexError(f"{index=} is not in [0, {n})")
    return index


def gather(
    load: Callable[[int, int | None], Example],
    shape: tuple[int, int, int],
    indices: Int[np.ndarray, " b"],
    seeds: Int[np.ndarray, " b"] | None = None,
) -> Batch:
    """Calls ``load(index, seed)`` in threads, and collects what it returns.

    Returns:
        {"images": uint8 ``[b, *shape]``, "labels": int32 ``[b]``}.

    Raises:
        UnreadableImage: the first one, with what to do about it.
        ValueError: the number of seeds is not that of indices.
    """
    drawn = [None] * len(indices) if seeds is None else [int(s) for s in seeds]
    if len(indices) != len(drawn):
        raise ValueError(f"{len(indices)} indices, but {len(drawn)} seeds")
    images = np.empty((len(indices), *shape), np.uint8)
    labels = np.empty(len(indices), np.int32)
    threads = max(1, min(os.cpu_count() or 1, len(indices)))
    try:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for i, example in enumerate(pool.map(load, map(int, indices), drawn)):
                images[i], labels[i] = example.image, example.label
    except UnreadableImage as error:
        reason = error.reason
        if not (isinstance(error.__cause__, OSError) and error.__cause__.errno in os_errors.ADVICE):
            reason += "; remove this picture or replace it by a good copy"
        raise UnreadableImage(error.key, reason, error.place) from error
    return {"images": images, "labels": labels}


def decode(data: bytes, channels: int = 3) -> Image.Image:
    """Returns a picture as RGB, or as grey ("L") for one channel: the first frame, upright.

    The orientation in the EXIF data is applied. Transparent parts show white. Of 16 bits the upper
    8 are taken. CMYK is read as Adobe's programs write it.

    Raises:
        ValueError: ``data`` is no whole picture of ``FORMATS``, or has more than ``MAX_PIXELS``.
    """
    if not data:
        raise ValueError("is empty (0 bytes)")
    with _reasons():
        kind, data, exif = metadata.strip(data)
        if kind not in FORMATS:
            raise UnidentifiedImageError
        image = _open(kind, data)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    with _reasons():
        if kind == "PNG":
            _open(kind, data).verify()  # the decoder itself passes over the checksums of pixels
        image.load()
        # Of AVIF, Pillow makes an EXIF block from how its pixels are turned.
        turn = _TURNS.get(metadata.orientation(exif or image.info.get("exif", b"")))
    if image.mode in _WITHOUT_RANGE:
        raise ValueError(
            f"has pixels of the kind {image.mode}, not of 1, 8 or 16 bits: save as PNG"
        )
    with _reasons():
        converted = _converted(image, MODES[channels])
        return converted if turn is None else converted.transpose(turn)


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size c"]:
    """Returns the middle square of a picture, its shorter side resized to ``size``.

    The preprocessing of "Diffusion Models Beat GANs on Image Synthesis" (arXiv:2105.05233): halved
    by a box filter while the shorter side is at least 2 * size, then bicubic.

    Raises:
        ValueError: the picture is so elongated that resized it exceeds ``MAX_PIXELS``.
    """
    _refuse_elongated(image, size)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    pixels = _array(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def square_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size c"]:
    """Returns the middle square of a picture, resized at once by Lanczos' filter.

    The preprocessing of MS-COCO in U-ViT (arXiv:2209.12152).
    """
    side = min(image.size)
    left, top = ((whole - side) // 2 for whole in image.size)
    square = image.crop((left, top, left + side, top + side))
    return _array(square.resize((size, size), Image.Resampling.LANCZOS))


# What cuts a picture without augmentation, by its setting; and what identities say.
CROPS: dict[str, tuple[str, Callable[[Image.Image, int], UInt8[np.ndarray, "size size c"]]]] = {
    "adm": (PLAIN_CROP, center_crop),
    "square-lanczos": (SQUARE_CROP, square_crop),
}


def random_resized_crop(
    image: Image.Image,
    size: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "size size c"]:
    """Returns a random rectangle of a picture, resized.

    Its share of the picture's area is uniform in ``area``, its width to height log-uniform in
    ``ratio``. If ten such rectangles do not fit in, it is the largest one in the middle whose
    proportions are the nearest ones within ``ratio``.

    Raises:
        ValueError: the picture is one that ``center_crop`` refuses.
    """
    _refuse_elongated(image, size)
    box = _random_box(image.width, image.height, area, ratio, rng)
    return _array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _random_box(
    width: int,
    height: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    for _ in range(10):
        pixels = width * height * rng.uniform(*area)
        proportion = math.exp(rng.uniform(*np.log(ratio)))
        w, h = round(math.sqrt(pixels * proportion)), round(math.sqrt(pixels / proportion))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return (left, top, left + w, top + h)
    proportion = min(max(width / height, ratio[0]), ratio[1])
    w = max(1, min(width, round(height * proportion)))
    h = max(1, min(height, round(width / proportion)))
    left, top = (width - w) // 2, (height - h) // 2
    return (left, top, left + w, top + h)


def is_number(value: Any) -> bool:
    """Says whether a setting is a real and finite number."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def is_range(value: Any) -> bool:
    """Says whether a setting is two numbers, the lower one first."""
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return pair and all(map(is_number, value)) and value[0] <= value[1]


def _refuse_elongated(image: Image.Image, size: int) -> None:
    resized = size * size * max(image.size) / min(image.size)
    if resized > MAX_PIXELS:
        raise ValueError(
            f"is too elongated: {image.width} x {image.height} pixels would become more than "
            f"{MAX_PIXELS:,} at size {size}"
        )


def _array(image: Image.Image) -> UInt8[np.ndarray, "height width c"]:
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _open(kind: str, data: bytes) -> Image.Image:
    """Opens a picture as Pillow's class for its format does.

    ``Image.open`` has a limit of pixels of its own, of which it warns.
    """
    try:
        return FORMATS[kind](io.BytesIO(data))
    except (SyntaxError, IndexError, TypeError, struct.error) as error:  # as ``Image.open`` does
        raise UnidentifiedImageError from error


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Turns whatever a decoder raises into a ValueError that says what is wrong."""
    try:
        yield
    except Exception as error:  # decoders of damaged data raise nearly everything
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        *some, last = (name.replace("WEBP", "WebP") for name in FORMATS)
        return f"is not a {', '.join(some)} or {last} file, or its beginning is damaged"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return "is truncated"
    return f"is damaged ({error or type(error).__name__})"


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip at 255
        values = np.asarray(image)
        opaque = values != image.info.get("transparency", -1)
        bits = 12 if getattr(image, "tag_v2", {}).get(258) == (12,) else 16  # in a TIFF file
        image = Image.fromarray(np.where(opaque, values >> bits - 8, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image.convert(mode)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
