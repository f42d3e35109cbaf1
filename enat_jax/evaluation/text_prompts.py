"""The texts of images that are evaluated: prompts of a list, or one caption of each picture.

    FILE.txt, FILE.jsonl    prompts of a list, see ``prompt_files``
    a folder of `sample`    the prompts that its images were drawn of
    captions of pictures    what ``tokenize_captions`` wrote, or what it reads, see
                            ``caption_sources``; a .jsonl file whose lines have a "file_name" is one

Of captions as many pictures as are wanted are drawn without replacement, always in the same order,
and one caption of each.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from enat_jax.data import caption_sources, drawn, images, prompt_files
from enat_jax.runtime import files, paths

FILE = "prompts.jsonl"  # beside the card
NUM = 30_000  # pictures, by the convention of FID-30K on MS-COCO
SEED = 0  # of the choice of pictures and captions


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A text for each image.

    Attributes:
        path: where they come from.
        texts: of the images.
        pictures: that the texts are captions of; empty: they are of no pictures.
        out_of: the number of pictures that these were drawn of.
        drawn_of: texts that images were drawn of, each in a row, by ``sample``: they belong to
            images by their numbers.
    """

    path: str
    texts: tuple[str, ...]
    pictures: tuple[str, ...] = ()
    out_of: int = 0
    drawn_of: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    @functools.cached_property
    def different(self) -> tuple[tuple[str, ...], Int[np.ndarray, " n"]]:
        """The different texts in the order of their first images, and which each image has."""
        numbers = {text: i for i, text in enumerate(dict.fromkeys(self.texts))}
        return tuple(numbers), np.array([numbers[text] for text in self.texts], np.int64)

    @functools.cached_property
    def sha256(self) -> str:
        """Of the file that ``write`` writes, hexadecimal."""
        return hashlib.sha256(self._content).hexdigest()

    @property
    def _content(self) -> bytes:
        names = self.pictures or [None] * len(self)
        lines = [
            json.dumps({"text": text} if name is None else {"file_name": name, "text": text})
            for name, text in zip(names, self.texts, strict=True)
        ]
        return "".join(f"{line}\n" for line in lines).encode()

    def write(self, directory: pathlib.Path) -> None:
        """Writes ``FILE``, a line for each image."""
        files.write_atomically(directory / FILE, self._content)

    def repeated(self, num: int) -> "Prompts":
        """Returns ``num`` texts of a list, again from its beginning where it is shorter."""
        texts = tuple(self.texts[i % len(self)] for i in range(num))
        return dataclasses.replace(self, texts=texts)

    def of_images(self, source: images.Source | None, num: int) -> "Prompts":
        """Returns the texts of given images in their order.

        Args:
            source: of the images; None: they have no names.
            num: of the images.

        Raises:
            ValueError: they are the texts of other images.
        """
        if source is not None and self.pictures:
            texts = self.by_picture([source.key(i) for i in range(num)])
            if missing := [source.key(i) for i in range(num) if not texts[i]]:
                raise ValueError(
                    f"{len(missing):,} of {num:,} images have no caption in {self.path}, such as "
                    f"{missing[0]!r}: give the captions of these images"
                )
            found = tuple(of_image[0] for of_image in texts)
            keys = tuple(source.key(i) for i in range(num))
            return dataclasses.replace(self, texts=found, pictures=keys, out_of=num)
        if source is not None and self.drawn_of:
            names = [pathlib.PurePath(source.key(i)).name for i in range(num)]
            numbers = [int(name.split("_")[0]) if name[:5].isdecimal() else -1 for name in names]
            if all(0 <= number < len(self) for number in numbers):
                return dataclasses.replace(self, texts=tuple(self.texts[i] for i in numbers))
        if num != len(self):
            raise ValueError(
                f"{self.path} has {len(self):,} prompts and there are {num:,} images: give the "
                "prompts that they were drawn of, one for each image in their order"
            )
        return self

    def by_picture(self, keys: Sequence[str]) -> list[list[str]]:
        """Returns the text of each picture, in a list, which is empty if there is none.

        Args:
            keys: names of the pictures.
        """
        named = zip(self.pictures, self.texts, strict=True)
        found = [caption_sources.Found(name, text, self.path) for name, text in named]
        return caption_sources.join(found, keys).texts


def read(
    path: str,
    num: int | None = None,
    most: int | None = NUM,
    *,
    split: str | None = None,
    data_dir: str | None = None,
) -> Prompts:
    """Reads prompts of a list or captions of pictures, see the head of this module.

    Args:
        path: of any of them.
        num: of pictures whose captions are drawn; None: of all, at most ``most``. A list is read
            whole.
        most: None: no limit.
        split, data_dir: of captions in TFDS, see ``caption_sources.read``.

    Raises:
        ValueError: there are none, not as many, or they are damaged; the message names the place.
        OSError: they cannot be read.
    """
    file = paths.local(path)
    if (file / drawn.SETTINGS).is_file() and (found := _drawn_of(path, file)) is not None:
        return found
    if (file / "captions.jsonl").is_file() and (file / "metadata.json").is_file():
        return _drawn(path, str(file / "captions.jsonl"), num, most)
    kind = file.suffix.lower()
    listed = kind == ".txt" or (kind == ".jsonl" and not _named(file))
    if listed or (not kind and file.is_file()):
        return Prompts(path, tuple(prompt_files.read(path)))
    if path == "scenes":
        raise ValueError(
            "scenes have the captions that tokenize_captions wrote for their tokens: name these, "
            "TOKENS/captions"
        )
    return _drawn(path, path, num, most, split=split, data_dir=data_dir)


def is_drawn_of(path: str) -> bool:
    """Says whether it is a folder of images that ``sample`` drew of prompts."""
    directory = paths.local(path)
    return (directory / drawn.SETTINGS).is_file() and _drawn_of(path, directory) is not None


def _drawn_of(path: str, directory: pathlib.Path) -> Prompts | None:
    """Returns the prompts that ``sample`` drew a folder of; None if it drew classes."""
    settings = directory / drawn.SETTINGS
    values = files.read_json(settings, "name a file of prompts by --prompts")
    if not isinstance(values, dict) or "prompts" not in values:
        return None
    texts, num = values["prompts"], values.get("num")
    whole = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    if not whole or type(num) is not int or num < 1 or not texts:
        raise ValueError(f"{settings} is damaged: name a file of prompts by --prompts")
    return Prompts(path, tuple(text for text in texts for _ in range(num)), drawn_of=True)


def _named(file: pathlib.Path) -> bool:
    """Says whether the first line of a .jsonl file names a picture."""
    with open(file, "rb") as lines:
        for place, line in caption_sources.numbered(file, lines):
            values = caption_sources.parsed(place, line)
            return isinstance(values, dict) and "file_name" in values
    return False


def _drawn(path: str, source: str, num: int | None, most: int | None, **location: Any) -> Prompts:
    """Draws pictures and one caption of each, the same ones whatever ``num`` is."""
    found = list(caption_sources.read(source, **location))
    names = list(dict.fromkeys(one.name for one in found))
    texts = caption_sources.join(found, names).texts
    pairs = [(name, of_one) for name, of_one in zip(names, texts, strict=True) if of_one]
    if not pairs:
        raise ValueError(f"{path} holds no captions")
    if num is not None and num > len(pairs):
        raise ValueError(
            f"--num {num}, but {path} has captions of {len(pairs):,} pictures alone, each of which "
            "is drawn once: leave --num out, or lower it"
        )
    rng = np.random.RandomState(SEED)  # whose numbers no version of NumPy changes
    order, which = rng.permutation(len(pairs)), rng.random_sample(len(pairs))
    chosen = order[: num or most].tolist()
    return Prompts(
        path,
        tuple(pairs[i][1][int(which[i] * len(pairs[i][1]))] for i in chosen),
        tuple(pairs[i][0] for i in chosen),
        len(pairs),
    )


def description(prompts: Prompts) -> dict[str, Any]:
    """Returns what a card says of them."""
    return {
        "path": prompts.path,
        "sha256": prompts.sha256,
        "num": len(prompts),
        "different": len(prompts.different[0]),
        "pictures": prompts.out_of or None,
    }
