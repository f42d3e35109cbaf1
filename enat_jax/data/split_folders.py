"""Splits of pictures: folders that are called after them, or a share that is held out."""

import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

SPLITS = ("folders", "none")

# The names of each split. They are compared in lower case, without "-", "_", blanks and a last
# "set", "data" or "images", so that "Training_Set" is one of "train".
NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "evaluation": ("eval", "evaluation"),
    "held_out": ("heldout", "holdout"),
    "validation": ("val", "valid", "validate", "validation"),
    "dev": ("dev", "development"),
}
TO_TEST_ON = ("test", "evaluation", "held_out", "validation", "dev")  # the first one there is it
_OF_BEFORE = ("train", "test", "val", "validation")  # all names that earlier versions knew


def of_name(folder: str) -> str | None:
    """Returns the split that a folder is called after; None if it is called after none."""
    plain = re.sub(r"[-_\s]", "", folder.lower())
    plain = re.sub(r"(?<=.)(set|data|images)$", "", plain)
    return next((split for split, names in NAMES.items() if plain in names), None)


def _of_name_before(folder: str) -> str | None:
    return of_name(folder) if folder in _OF_BEFORE else None


def _upwards(folder: str) -> list[str]:
    """Returns a folder and those it lies in, without the root."""
    names = folder.split("/") if folder else []
    return ["/".join(names[: i + 1]) for i in range(len(names))]


class Tree:
    """Folders, and which of them hold pictures.

    Args:
        keys: paths of all pictures, with "/".
        folders: all folders that were seen.
    """

    def __init__(self, keys: Sequence[str], folders: frozenset[str]) -> None:
        holders = {key.rpartition("/")[0] for key in keys}
        self.holders = holders  # of a picture, directly; "" is the root
        self.with_pictures = {above for folder in holders for above in _upwards(folder)}
        self.all = self.with_pictures | {above for f in folders for above in _upwards(f)}

    def children(self, top: str) -> set[str]:
        """Returns names of the folders directly below ``top``, which is "" or ends in "/"."""
        below = (f[len(top) :] for f in self.all if f.startswith(top))
        return {name for name in below if name and "/" not in name}

    def single_top(self, split_of: Callable[[str], str | None]) -> str:
        """Returns the folder that an archive was made from, ending in "/"; "" if there is none.

        ``split_of`` gives the split that a folder is called after; such a folder is not the top.
        """
        top = ""
        while len(children := self.children(top)) == 1 and top[:-1] not in self.holders:
            (child,) = children
            inner = f"{top}{child}/"
            if split_of(child) or inner[:-1] in self.holders or not self.children(inner):
                break
            top = inner
        return top


def find(tree: Tree, packed: bool, splits: str, where: object) -> tuple[str, tuple[str, ...], bool]:
    """Finds the folders that are splits.

    Args:
        tree: all folders.
        packed: whether they lie in an archive.
        splits: the setting, "folders" or "none".
        where: what the messages call the place of the pictures.

    Returns:
        The folder that all lie in, "" or ending in "/"; the sorted names of the split folders in
        it; and whether earlier versions found the same.

    Raises:
        ValueError: there are split folders, but also something else beside them, or two for a
            split, or they lie below the folders of classes.
    """
    by_name = of_name if splits == "folders" else _never
    top = tree.single_top(by_name) if packed else ""
    children = tree.children(top)
    found = {name: split for name in sorted(children) if (split := by_name(name))}
    if _is_one_class(tree, top, found):
        found = {}
    if splits == "folders":
        _refuse_mixtures(tree, top, found, where)
    before = tree.single_top(_of_name_before) if packed else ""
    split_before = tree.children(before) <= set(_OF_BEFORE) and before[:-1] not in tree.holders
    parts_before = sorted(tree.children(before)) if split_before else []
    return top, tuple(found), (top, list(found)) == (before, parts_before)


def _never(_: str) -> None:
    """Takes no folder for a split."""


def _is_one_class(tree: Tree, top: str, found: dict[str, str]) -> bool:
    """Says whether the only split folder is a class of trains beside other classes."""
    beside = {name for name in tree.children(top) if top + name in tree.with_pictures} - {*found}
    return (
        bool(beside)
        and [x.lower() for x in found] == ["train"]
        and top + min(found) in tree.holders
    )


def _refuse_mixtures(tree: Tree, top: str, found: dict[str, str], where: object) -> None:
    """Raises ValueError if what lies beside split folders, or above them, leaves a doubt."""
    names = ", ".join(map(repr, found))
    beside = sorted(x for x in tree.children(top) - {*found} if top + x in tree.with_pictures)
    if found and (beside or top[:-1] in tree.holders):
        others = f"the folder {beside[0]!r}" if beside else "pictures in no folder"
        raise ValueError(
            f"{where} holds {names}, which by name are splits, and beside them {others}: move "
            "everything into the split folders, or, if all these folders are classes, set splits "
            "to 'none'"
        )
    for split in sorted(set(found.values())):
        if len(same := [name for name in found if found[name] == split]) > 1:
            raise ValueError(
                f"{where} holds {same[0]!r} and {same[1]!r}, which are names of one split: join "
                "them or rename one, or, if they are classes, set splits to 'none'"
            )
    for outer in sorted(tree.children(top)) if not found else ():
        inner = {name: of_name(name) for name in sorted(tree.children(f"{top}{outer}/"))}
        within = [name for name, split in inner.items() if split]
        if len({inner[name] for name in within}) > 1:
            raise ValueError(
                f"{where}: the folder {top + outer!r} holds {', '.join(map(repr, within))}, which "
                "by name are splits, but those are found at the top alone: name that folder as the "
                "source, or move the split folders above those of classes; if they are no splits, "
                "set splits to 'none'"
            )


def choose(
    split: str,
    keys: Sequence[str],
    labels: Int[np.ndarray, " n"],
    parts: tuple[str, ...],
    part_of: Int[np.ndarray, " n"],
    held_out: float,
    where: object,
) -> tuple[Bool[np.ndarray, " n"], int]:
    """Says of each picture whether it is of the split.

    Args:
        split: its name.
        keys: of all pictures.
        labels: of all pictures.
        parts: names of the split folders.
        part_of: the number of each picture's split folder.
        held_out: share of "test" in what is not split by folders.
        where: what the messages call the place of the pictures.

    Returns:
        That, and how many pictures are not held out so that their class keeps one to train on.

    Raises:
        ValueError: the split is not there or is empty.
    """
    by_split = {of_name(part): part for part in parts}
    tests = [by_split[name] for name in TO_TEST_ON if name in by_split]
    if tests and held_out:
        raise ValueError(
            f"{where} has a folder {tests[0]!r} to test on, so held_out={held_out} must be 0; or, "
            "if its folders are classes, set splits to 'none'"
        )
    wanted = of_name(split)
    if split == "all":
        return np.ones(len(keys), bool), 0
    if tests:
        part = split if split in parts else by_split.get(wanted)
        part = tests[0] if part is None and split == "test" else part
        if part is not None:
            return part_of == parts.index(part), 0
    possible = sorted({"all", "test", *parts} if tests else {"all", "train", "test"})
    if tests or wanted not in ("train", "test"):
        classes = "" if len(parts) > 1 else "; or set splits to 'none' if that folder is no split"
        raise ValueError(
            f"{where} has no split {split!r}: choose one of {possible}{classes if parts else ''}"
        )
    if wanted == "test" and not held_out:
        raise ValueError(
            f"{where} has no pictures to test on: set held_out to the share to hold out, such as "
            "0.1, or add a folder 'test' beside a folder 'train'"
        )
    held, kept = _held_out(keys, labels, held_out)
    chosen = held if wanted == "test" else ~held
    if not chosen.any():
        single = np.bincount(labels).max() == 1
        advice = "add pictures or set classes to 'none'" if single else "choose another share"
        raise ValueError(
            f"{where}: held_out={held_out} of {len(keys)} pictures leaves none for {split!r}, as "
            f"every class keeps at least one to train on: {advice}"
        )
    return chosen, kept


def _held_out(
    keys: Sequence[str], labels: Int[np.ndarray, " n"], share: float
) -> tuple[Bool[np.ndarray, " n"], int]:
    """Says of each picture whether it is held out; also how many stay for the sake of their class.

    Of a class whose pictures all lie below the share, the last one stays.
    """
    if not share:
        return np.zeros(len(keys), bool), 0
    digests = (hashlib.sha256(key.encode()).digest() for key in keys)
    values = [int.from_bytes(digest[:8], "big") for digest in digests]
    held = np.array([value < share * 2**64 for value in values])
    kept = []
    for label in np.setdiff1d(labels, labels[~held]):
        kept.append(max(np.flatnonzero(labels == label), key=values.__getitem__))
    held[kept] = False
    return held, len(kept)
