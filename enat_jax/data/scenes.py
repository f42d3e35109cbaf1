"""Scenes of one or two handwritten digits with captions: a test of whether a model reads.

A scene is a square of 2x2 cells. Two digits lie side by side or one above the other, in a row or a
column that no caption tells; a digit alone lies in any cell. The captions are a small grammar, in
which the order of words is not the order of places: "a three left of a seven" and "a seven right of
a three" are the same scene. Some combinations never occur in training, but their reversals all do.
"""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int

from enat_jax.data import decoding
from enat_jax.data.digits import Digits
from enat_jax.runtime import files

SPLITS = ("train", "test", "unseen")
AXES = ("row", "column")
NUMERALS = tuple("zero one two three four five six seven eight nine".split())
RELATIONS = {"row": ("left of", "right of"), "column": ("above", "below")}
WORDS = ("a", "an", "left", "right", "of", "above", "below", *NUMERALS)
NUM_UNSEEN = 40  # of the 180 combinations of two different digits and an axis
_UNSEEN_SEED = 0  # never change it: every measurement of unseen combinations rests on it


class Scene(NamedTuple):
    """What a scene shows.

    Attributes:
        first: the digit, or the left or upper one of two.
        second: the right or lower one of two; None: there is one.
        axis: of ``AXES``; of one digit "row", which means nothing.
    """

    first: int
    second: int | None = None
    axis: str = "row"

    @property
    def captions(self) -> tuple[str, ...]:
        """All texts that say this and no more: one for one digit, two for two."""
        if self.second is None:
            return (_noun(self.first),)
        there, back = RELATIONS[self.axis]
        one, other = _noun(self.first), _noun(self.second)
        return f"{one} {there} {other}", f"{other} {back} {one}"

    @property
    def reversal(self) -> "Scene":
        """The same digits with their places exchanged; of one digit itself."""
        return self if self.second is None else Scene(self.second, self.first, self.axis)

    def cells(self, place: int) -> tuple[int, ...]:
        """Returns the cells of the digits, 0 to 3 in raster order.

        Args:
            place: the row or column of two digits, 0 or 1; the cell of one, 0 to 3.
        """
        if self.second is None:
            return (place,)
        return (2 * place, 2 * place + 1) if self.axis == "row" else (place, place + 2)


def _noun(digit: int) -> str:
    return f"{'an' if digit == 8 else 'a'} {NUMERALS[digit]}"


@functools.cache
def unseen() -> frozenset[Scene]:
    """Returns the combinations that never occur in training; the reversal of each does.

    Every digit occurs in training at both places of both axes.
    """
    rng = np.random.default_rng(_UNSEEN_SEED)
    pairs = [Scene(i, j, axis) for axis in AXES for i in range(10) for j in range(i)]
    chosen = rng.permutation(len(pairs))[:NUM_UNSEEN]
    turned = rng.random(NUM_UNSEEN) < 0.5
    return frozenset(
        pairs[i].reversal if turn else pairs[i] for i, turn in zip(chosen, turned, strict=True)
    )


@functools.cache
def combinations(split: str) -> tuple[Scene, ...]:
    """Returns the scenes of two digits that a split has, in order.

    "train" has all but the unseen ones. "test" has those of two different digits whose reversal is
    seen as well, to compare the unseen ones with: what is known of the one is known of the other.

    Raises:
        ValueError: the split is unknown.
    """
    every = [Scene(i, j, axis) for axis in AXES for i in range(10) for j in range(10)]
    if split == "unseen":
        return tuple(scene for scene in every if scene in unseen())
    if split == "train":
        return tuple(scene for scene in every if scene not in unseen())
    if split == "test":
        known = [scene for scene in every if not {scene, scene.reversal} & unseen()]
        return tuple(scene for scene in known if scene.first != scene.second)
    raise ValueError(f"{split=} is unknown: choose one of {SPLITS}")


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Scenes of the digits of scikit-learn, as a source of images.

    ``split`` is "train", of the digits to train on; "test" and "unseen", of the digits held out,
    have scenes of two digits alone, each combination as often as any other. A scene of "train"
    keeps what it shows, while ``seed`` draws which handwritten digits show it, where, and how they
    are turned and moved; without a seed they are drawn by its number.

    Raises:
        ValueError: the split is unknown, or a setting is out of its range.
    """

    class_names: ClassVar[tuple[str, ...]] = ("scene",)
    mirrored: ClassVar[bool] = False  # mirrored digits are none, and left becomes right
    ignored: ClassVar[dict[str, int]] = {}
    missing: ClassVar[dict[str, int]] = {}

    split: str
    num: int = 6000  # scenes
    size: int = 32  # pixels of a side
    single: float = 0.2  # share of scenes of one digit, in training
    fill: float = 1.0  # share of a cell that a digit takes up; this and what follows: ``Digits``
    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        combinations(self.split)
        if type(self.num) is not int or self.num < 1:
            raise ValueError(f"num={self.num!r} is not a whole number of at least 1")
        if type(self.size) is not int or self.size < 16 or self.size % 2:
            raise ValueError(f"size={self.size!r} is not an even number of at least 16 pixels")
        if not decoding.is_number(self.single) or not 0 <= self.single <= 1:
            raise ValueError(f"single={self.single!r} must be a share in [0, 1]")
        assert self.digits.image_shape[0] == self.size // 2  # whose settings are checked

    @functools.cached_property
    def digits(self) -> Digits:
        """The digits that scenes are made of, in the size of a cell."""
        names = ("fill", "rotation", "scale", "shear", "shift")
        split = "train" if self.split == "train" else "test"
        settings = {name: getattr(self, name) for name in names}
        return Digits(split=split, size=self.size // 2, **settings)

    @functools.cached_property
    def _of_digit(self) -> list[Int[np.ndarray, " n"]]:
        return [np.flatnonzero(self.digits.labels == digit) for digit in range(10)]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of all images."""
        return (self.size, self.size, 1)

    def __len__(self) -> int:
        return self.num

    def identity(self) -> dict[str, object]:
        """Returns all settings as JSON values."""
        return {"source": "scenes"} | files.as_json(dataclasses.asdict(self))

    def key(self, index: int) -> str:
        """Returns a name such as "scenes/17"."""
        return f"scenes/{decoding.checked(index, self.num)}"

    def scene(self, index: int) -> Scene:
        """Returns what the scene of this number shows."""
        index = decoding.checked(index, self.num)
        of_two = combinations(self.split)
        if self.split != "train":
            return of_two[index % len(of_two)]
        rng = np.random.default_rng((SPLITS.index(self.split), index))
        if rng.random() < self.single:
            return Scene(int(rng.integers(10)))
        return of_two[rng.integers(len(of_two))]

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the texts of a scene."""
        return self.scene(index).captions

    def load(self, index: int, seed: int | None = None) -> decoding.Example:
        """Returns one example of label 0."""
        scene = self.scene(index)
        number = (SPLITS.index(self.split), index, 1) if seed is None else (int(seed), 2)
        rng = np.random.default_rng(number)
        place = int(rng.integers(4 if scene.second is None else 2))
        shown = [digit for digit in scene[:2] if digit is not None]
        which = np.array([rng.choice(self._of_digit[digit]) for digit in shown])
        # Where nothing asks for augmentation a digit is as it was written.
        seeds = None if seed is None else rng.integers(2**31, size=len(shown))
        digits = self.digits.gather(which, seeds)["images"]
        side = self.size // 2
        image = np.zeros((self.size, self.size, 1), np.uint8)
        for cell, pixels in zip(scene.cells(place), digits, strict=True):
            top, left = (cell // 2) * side, (cell % 2) * side
            image[top : top + side, left : left + side] = pixels
        return decoding.Example(image, 0, self.key(index))

    def gather(
        self, indices: Int[np.ndarray, " b"], seeds: Int[np.ndarray, " b"] | None = None
    ) -> decoding.Batch:
        """Returns {"images": uint8 ``[b, size, size, 1]``, "labels": int32 ``[b]``}, all 0."""
        return decoding.gather(self.load, self.image_shape, indices, seeds)
