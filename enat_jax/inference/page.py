"""What the page of ``python -m enat_jax.demo`` does, without Gradio: limits, pictures and files.

``page_layout.py`` puts the components around it.
"""

import dataclasses
import math
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from enat_jax.data import decoding, text_tokens
from enat_jax.inference import editing, generator, image_directory, reveal_pictures
from enat_jax.runtime import png

MAX_IMAGES = 64  # of one click
MAX_STEPS = 64  # that the slider offers, if the model's own are no more
MAX_SCALE = 10.0  # likewise, of guidance and temperatures
MAX_GROW = 8  # tokens
MAX_SEED = 2**32 - 1
BATCH_SIZE = 16  # images per call of the network at most
FIRST_CLASSES = 10  # that are chosen at the start, if there are no more
REVEALED = 8  # images that are shown step by step
KEPT = 20  # clicks whose files are kept
CANVAS = 448  # least pixels of the shorter side of the picture that is painted over


class Range(NamedTuple):
    """What a number on the page may be, and is at the start; ``step`` 1 means whole numbers."""

    name: str
    low: float
    high: float
    step: float
    start: float

    def checked(self, value: Any) -> Any:
        """Returns a number as int or float; raises ValueError in words for the page."""
        whole = "whole " if self.step == 1 else ""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if (
            not number
            or not self.low <= value <= self.high  # which no nan is
            or (whole and value != int(value))
        ):
            raise ValueError(
                f"{self.name} must be a {whole}number from {self.low:,.10g} to {self.high:,.10g}"
            )
        return int(value) if whole else float(value)


NUMBER = Range("Pictures of each", 1, MAX_IMAGES, 1, 1)
FILLS = Range("Pictures", 1, 16, 1, 6)
SEED = Range("The seed", 0, MAX_SEED, 1, 0)
GROW = Range("Grow the mask by tokens", 0, MAX_GROW, 1, 1)
BLEND = Range("Fade over tokens", 0, MAX_GROW, 0.25, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture to paint over: its file's name and its pixels, of the model's size."""

    name: str
    pixels: UInt8[np.ndarray, "h w c"]


@dataclasses.dataclass(frozen=True, eq=False)
class Page:
    """What the page offers of one model.

    Attributes:
        model: draws.
        folder: for files; each click has a new folder in it, and the newest ``KEPT`` stay.
        batch_size: images per call of the network at most.
    """

    model: generator.Generator
    folder: pathlib.Path
    batch_size: int = BATCH_SIZE

    def ranges(self) -> dict[str, Range]:
        """Returns the settings of the sampler that the page offers, by their names."""
        own = self.model.settings

        def scale(name: str, value: float) -> Range:
            return Range(name, 0, max(MAX_SCALE, 2 * math.ceil(value)), 0.05, value)

        return {
            "num_steps": Range("Steps", 1, max(MAX_STEPS, own.num_steps), 1, own.num_steps),
            "guidance_scale": scale("Guidance", own.guidance_scale),
            "token_temperature": scale("Token temperature", own.token_temperature),
            "mask_temperature": scale("Mask temperature", own.mask_temperature),
        }

    def classes(self) -> list[tuple[str, int]]:
        """Returns names and numbers of the classes; names that are not unique with their number.

        The last one is "no class".
        """
        names = [*self.model.class_names, "no class"]
        return [
            (name if names.count(name) == 1 else f"{name} ({label})", label)
            for label, name in enumerate(names)
        ]

    def words(self) -> str:
        """Returns one sentence about what the model reads, "" if that is any text or none."""
        kind = None if self.model.text is None else self.model.text.kind
        if not isinstance(kind, text_tokens.Words):
            return ""
        some = kind.vocabulary[:60]
        more = ", …" if len(kind.vocabulary) > len(some) else ""
        return f"It knows the words {', '.join(some)}{more}."

    def drawn(
        self,
        labels: Sequence[int],
        prompts: str,
        negative: str,
        num: Any,
        seed: Any,
        settings: Mapping[str, Any],
    ) -> image_directory.Images:
        """Returns what "Draw" asks for.

        Args:
            labels: of the chosen classes, none of a model without.
            prompts: one on each line.
            negative: a prompt that guidance leads away from, "" for none.
            num: pictures of each class or prompt.
            seed: of the noise.
            settings: numbers by the names of ``ranges``.

        Raises:
            ValueError: a sentence for the page.
        """
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not labels and not lines:
            missing = "Choose a class" if self.model.text is None else "Write a prompt"
            both = " or write a prompt" if self.model.text and self.model.class_names else ""
            raise ValueError(f"{missing if not both else 'Choose a class' + both} first")
        chosen = list(labels) or [self.model.model.num_classes]
        texts = None
        if self.model.text is not None:
            texts = image_directory.Texts(lines or [""], negative=negative.strip() or None)
            chosen, texts = image_directory.paired(chosen, texts)
        num = NUMBER.checked(num)
        if num * len(chosen) > MAX_IMAGES:
            raise ValueError(
                f"{num * len(chosen):,} pictures are more than the {MAX_IMAGES} that the page "
                "draws at once: choose fewer, or use python -m enat_jax.sample"
            )
        return self._images(chosen, num, seed, settings, texts)

    def filled(
        self,
        picture: Picture | None,
        mask: Bool[np.ndarray, "h w"],
        label: int,
        prompt: str,
        negative: str,
        num: Any,
        seed: Any,
        settings: Mapping[str, Any],
        grow: Any = GROW.start,
        blend: Any = BLEND.start,
    ) -> image_directory.Images:
        """Returns what "Fill" asks for; the arguments are those of ``drawn``, and of ``edit``.

        Raises:
            ValueError: a sentence for the page.
        """
        if picture is None:
            raise ValueError("Upload a picture first, or draw some and choose one to paint over")
        if not mask.any():
            raise ValueError("Paint over what is to change first")
        grow, blend = GROW.checked(grow), BLEND.checked(blend)
        if editing.token_masks(mask[None], self.model.tokenizer.grid, grow).all():
            smaller = f" or choose less than {grow} to grow the mask by" if grow else ""
            raise ValueError(f"Nothing of the picture would be kept: paint over less{smaller}")
        originals = image_directory.Originals(
            [picture.name], picture.pixels[None], mask[None], grow, blend
        )
        texts = None
        if self.model.text is not None:
            texts = image_directory.Texts([prompt.strip()], negative=negative.strip() or None)
        return self._images([label], FILLS.checked(num), seed, settings, texts, originals)

    def _images(
        self,
        labels: list[int],
        num: int,
        seed: Any,
        settings: Mapping[str, Any],
        texts: image_directory.Texts | None,
        originals: image_directory.Originals | None = None,
    ) -> image_directory.Images:
        """Raises ValueError if a number is out of range or a text cannot be read."""
        seed = SEED.checked(seed)
        values = {
            name: of.checked(settings[name])
            for name, of in self.ranges().items()
            if settings[name] != of.start  # the model's own value may be finer than the slider's
        }
        model = self.model.with_settings(**values)
        if texts is not None:
            image_directory.without_room(model, texts)  # raises
        folder = pathlib.Path(tempfile.mkdtemp(prefix="drawn", dir=self.folder))
        return image_directory.Images(model, labels, num, seed, folder, texts, originals)

    def draw(self, images: image_directory.Images) -> Iterator[list[pathlib.Path]]:
        """Draws batch by batch, and yields the files of all pictures so far.

        The files are those of ``python -m enat_jax.sample`` or ``edit``, with their settings
        inside. Batches are filled up to a power of 2, so that few sizes are compiled.

        Raises:
            ValueError: a batch does not fit into memory.
            OSError: a file cannot be written.
        """
        size = min(self.batch_size, 2 ** math.ceil(math.log2(len(images))))
        paths: list[pathlib.Path] = []
        for start in range(0, len(images), size):
            batch = range(start, min(start + size, len(images)))
            for number, pixels in zip(
                batch, image_directory.draw_batch(images, batch, size), strict=True
            ):
                png.write_png(images.path(number), pixels, images.text(number))
                paths.append(images.path(number))
            yield list(paths)
        self._forget()

    def _forget(self) -> None:
        """Removes the files of all clicks but the newest."""
        folders = sorted(self.folder.glob("drawn*"), key=lambda path: path.stat().st_mtime_ns)
        for old in folders[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def reveal(self, images: image_directory.Images) -> list[pathlib.Path]:
        """Draws some of the pictures again, and writes how they come about: a GIF and a strip.

        There are 1, 2, 4 or 8 of them, so that few sizes are compiled.
        """
        most = 2 ** int(math.log2(min(REVEALED, len(images), self.batch_size)))
        found = reveal_pictures.draw_some(
            images.model, images.labels, images.num, images.seed, images.texts, most
        )
        paths = []
        for name, write in reveal_pictures.KINDS.values():
            paths.append(images.out / name)
            write(paths[-1], found)
        return paths

    def read(self, path: pathlib.Path) -> Picture:
        """Returns a picture file as the model takes it: its middle square, resized.

        Raises:
            ValueError: it is no picture, too large, or of a shape that cannot be made fit.
            OSError: it is not there any more.
        """
        height, width = self.model.tokenizer.image_size
        if path.stat().st_size > decoding.MAX_BYTES:
            raise ValueError(
                f"{path.name} has more than the {decoding.MAX_BYTES >> 20} MiB that a picture may "
                "have: make it smaller"
            )
        with decoding.naming(path.name):
            found = decoding.decode(path.read_bytes(), self.model.tokenizer.model.image_channels)
            if height == width:
                return Picture(path.name, decoding.center_crop(found, width))
            if found.size != (width, height):
                raise ValueError(
                    f"is {found.width}x{found.height} pixels, and this model takes "
                    f"{width}x{height}: resize it"
                )
        pixels = np.asarray(found)
        return Picture(path.name, pixels.reshape(height, width, -1))


def enlarged(pixels: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "height width 3"]:
    """Returns a picture in colour, its pixels repeated until the shorter side has ``CANVAS``."""
    factor = -(-CANVAS // min(pixels.shape[:2]))
    colour = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return colour.repeat(factor, axis=0).repeat(factor, axis=1)


def painted(
    layers: Sequence[Shaped[np.ndarray, "height width 4"]], size: tuple[int, int]
) -> Bool[np.ndarray, "h w"]:
    """Returns which pixels of a picture of ``size`` strokes have touched.

    Args:
        layers: RGBA pictures of any size, transparent where nothing is painted.
        size: height and width.
    """
    mask = np.zeros(size, bool)
    for layer in layers:
        height, width = layer.shape[:2]
        # What is smaller than the picture would leave holes.
        factor = max(1, math.ceil(max(size[0] / height, size[1] / width)))
        alpha = layer[..., 3].repeat(factor, axis=0).repeat(factor, axis=1)
        rows, columns = np.nonzero(alpha)
        mask[rows * size[0] // alpha.shape[0], columns * size[1] // alpha.shape[1]] = True
    return mask


def zipped(paths: Sequence[pathlib.Path]) -> pathlib.Path:
    """Writes the files, which lie in one folder, into an archive beside them."""
    path = paths[0].parent / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for one in paths:
            archive.write(one, one.name)
    return path
