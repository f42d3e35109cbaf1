"""Folders of images that ``sample`` drew: what the files are called, and which are the samples."""

import dataclasses
import json
import pathlib
import re
import unicodedata
from collections.abc import Collection
from typing import Self

SETTINGS = "settings.json"  # says what was drawn
BESIDE = ("grid.png", "reveal.png", "reveal.gif")  # pictures of several samples
LEFT_OUT = "beside the samples"  # what listings call pictures that are none of them
MAX_NAME = 180  # bytes of a class or prompt in a file's name, which has 255 and needs some more
_NUMBERED = re.compile(r"[0-9]{5,8}_.*\.png", re.DOTALL)


def file_name(number: int, name: str) -> str:
    """Returns what the file of an image is called, by its class or the first words of its prompt.

    Whatever the name holds, the file's has letters, digits, "-" and "_" alone.
    """
    name = re.sub(r"[^\w-]+", "_", name)[:60]
    # A letter takes up to 4 bytes.
    return f"{number:05d}_{name.encode()[:MAX_NAME].decode(errors='ignore')}.png"


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a folder's ``settings.json`` says.

    Attributes:
        num: images per label or prompt, in a row.
        shown: class names of the labels, or the prompts, or of edits the pictures' names.
    """

    num: int
    shown: tuple[str, ...]

    @classmethod
    def read(cls, content: bytes) -> Self | None:
        """Reads the file; None if ``sample`` did not write it."""
        try:
            values = json.loads(content)
            names = values["prompts"] if "prompts" in values else values["class_names"]
            if "images" in values:
                names = [pathlib.PurePath(name).stem for name in values["images"]]
            num = values["num"]
            of_sample = values["software"].startswith("enat_jax ") and num >= 1
            found = cls(int(num), tuple(map(str, names)))
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
            return None
        return found if of_sample else None

    def __len__(self) -> int:
        return self.num * len(self.shown)

    def names(self, name: str) -> bool:
        """Says whether the file is one of the samples."""
        number = int(name[: name.index("_")]) if _NUMBERED.fullmatch(name) else len(self)
        if number >= len(self):
            return False
        expected = file_name(number, self.shown[number // self.num])
        # macOS gives names back in another form of Unicode.
        return unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", expected)


def pictures_beside(names: Collection[str], drawn: Drawn | None) -> list[str]:
    """Returns which pictures of a folder are no samples.

    Args:
        names: of all pictures in the folder.
        drawn: what its ``settings.json`` says. None: there is none of ``sample``, and only where
            all other pictures are called like samples, those called like ``BESIDE`` are none.
    """
    if drawn is not None:
        return [name for name in names if not drawn.names(name)]
    beside = [name for name in BESIDE if name in names]
    others = (name for name in names if name not in BESIDE)
    like_samples = beside and len(beside) < len(names) and all(map(_NUMBERED.fullmatch, others))
    return beside if like_samples else []
