"""Classes and splits of pictures, as the names of the folders that they lie in say."""

import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from enat_jax.data import decoding, imagenet

CLASSES = ("first", "parent", "none")
SPLIT_FOLDERS = ("train", "test", "val", "validation")
ONLY_CLASS = "image"  # of pictures without classes


@dataclasses.dataclass(frozen=True)
class Layout:
    """The pictures of a split."""

    class_names: tuple[str, ...]
    rows: Int[np.ndarray, " n"]  # int64, ascending: places of the split's pictures among all
    labels: Int[np.ndarray, " n"]  # int32, of these pictures


def arrange(
    keys: Sequence[str],
    folders: frozenset[str],
    split: str,
    *,
    where: object,
    packed: bool,
    classes: str = "first",
    class_names: str | os.PathLike | None = None,
    held_out: float = 0.0,
) -> Layout:
    """Finds the pictures of a split, and their classes.

    Root: in an archive (``packed``) a single folder at the top that holds nothing but folders
    is descended into, again and again, because archives mostly are made from outside: in a zip file
    with ``pets/cat/1.jpg`` and ``pets/dog/1.jpg`` the classes are cat and dog. Files that are no
    pictures do not count; a folder with the name of a split is not descended into.

    Splits: if the root's folders are all called train, test, val or validation, each is a split:
    "train" is train, "test" is test, or else val, or else validation, and each goes by its own name
    as well. Otherwise, and within train if it is alone, ``held_out`` is the share of "test", in
    [0, 1): the pictures the SHA-256 of whose keys, as fractions, lie below it. So adding files
    moves none. "all" is everything.

    Classes: with "first" the first folder below the root, or below the split's folder, is the class
    of a picture, with "parent" it is the path of the folder that the picture lies in. With "none"
    all are of the one class "image", as are pictures that all lie in no folder. Labels number the
    sorted names of all splits. Names of ImageNet's folders become readable; the UTF-8 file
    ``class_names`` gives others, one line ``FOLDER<TAB>NAME`` for each class.

    Args:
        keys: sorted paths of all pictures, with "/".
        folders: all folders that were seen.
        split: its name.
        where: what the messages call the place of the pictures.
        packed: whether that is an archive.
        classes: "first", "parent" or "none".
        class_names: path of a file with other names of the classes.
        held_out: share of "test" in what is not split by folders.

    Raises:
        ValueError: a setting is out of its range, a split is not there or is empty, a class has no
            pictures, pictures lie both in class folders and outside of them, or the file of class
            names does not fit.
        OSError: that file cannot be read.
    """
    if classes not in CLASSES:
        raise ValueError(f"classes={classes!r} is unknown: choose one of {CLASSES}")
    if not decoding.is_number(held_out) or not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out!r} must be a share in [0, 1)")
    if not keys:
        raise ValueError(f"{where} holds no pictures (.jpg, .jpeg, .png, .webp, .gif, .bmp)")
    tree = _Tree(keys, folders)
    top = tree.single_top() if packed else ""
    parts = tree.split_folders(top)
    names, labels, part_of = _classify(keys, top, parts, classes, where)
    if names == ("",):
        names = (ONLY_CLASS,)
    elif classes != "none":
        _refuse_empty_folders(tree, top, parts, classes, where)
    for i, part in enumerate(parts):
        missing = np.setdiff1d(np.arange(len(names)), labels[part_of == i])
        if len(missing):
            raise ValueError(
                f"{where}: class {names[missing[0]]!r} has no picture in the folder {part!r}: "
                "every split must have pictures of every class"
            )
    chosen = _members(split, keys, parts, part_of, held_out, where)
    readable = read_names(class_names, names) if class_names else imagenet.readable_names(names)
    rows = np.flatnonzero(chosen)
    return Layout(readable, rows, labels[rows])


class _Tree:
    """Folders, and which of them hold pictures."""

    def __init__(self, keys: Sequence[str], folders: frozenset[str]) -> None:
        holders = {key.rpartition("/")[0] for key in keys}
        self.holders = holders  # of a picture, directly; "" is the root
        self.with_pictures = {above for folder in holders for above in _upwards(folder)}
        self.all = self.with_pictures | {above for f in folders for above in _upwards(f)}

    def children(self, top: str) -> set[str]:
        """Returns names of the folders directly below ``top``, which is "" or ends in "/"."""
        below = (f[len(top) :] for f in self.all if f.startswith(top))
        return {name for name in below if name and "/" not in name}

    def single_top(self) -> str:
        """Returns the folder that an archive was made from, ending in "/"; "" if there is none."""
        top = ""
        while len(children := self.children(top)) == 1 and top[:-1] not in self.holders:
            (child,) = children
            inner = f"{top}{child}/"
            if child in SPLIT_FOLDERS or inner[:-1] in self.holders or not self.children(inner):
                break
            top = inner
        return top

    def split_folders(self, top: str) -> tuple[str, ...]:
        """Returns the sorted names of the folders below ``top`` if all are named as splits."""
        children = self.children(top)
        if top[:-1] in self.holders or not children <= set(SPLIT_FOLDERS):
            return ()
        return tuple(sorted(children))


def _upwards(folder: str) -> list[str]:
    """Returns a folder and those it lies in, without the root."""
    names = folder.split("/") if folder else []
    return ["/".join(names[: i + 1]) for i in range(len(names))]


def _classify(
    keys: Sequence[str], top: str, parts: tuple[str, ...], classes: str, where: object
) -> tuple[tuple[str, ...], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Returns the classes' sorted folder names, labels, and the number of each split folder.

    A picture that lies in no class folder has the name "".
    """
    found = []
    part_of = np.zeros(len(keys), np.int32)
    for i, key in enumerate(keys):
        rest = key[len(top) :]
        if parts:
            part, _, rest = rest.partition("/")
            part_of[i] = parts.index(part)
        found.append(sys.intern(_class_folder(rest, classes)))
    names = tuple(sorted(set(found)))
    number = {name: i for i, name in enumerate(names)}
    labels = np.array([number[folder] for folder in found], np.int32)
    if "" in names and len(names) > 1:
        inside, outside = (keys[int(np.argmax(x))] for x in (labels > 0, labels == 0))
        raise ValueError(
            f"{where} holds pictures in class folders, such as {inside}, and outside of them, such "
            f"as {outside}: move the latter into the folders of their classes, or set classes to "
            "'none'"
        )
    return names, labels, part_of


def _class_folder(path: str, classes: str) -> str:
    """Returns the folder that names the class of a picture; "" if it lies in none."""
    if classes == "none":
        return ONLY_CLASS
    folder, slash, _ = path.partition("/") if classes == "first" else path.rpartition("/")
    return folder if slash else ""


def _refuse_empty_folders(
    tree: _Tree, top: str, parts: tuple[str, ...], classes: str, where: object
) -> None:
    depth = top.count("/") + bool(parts)  # of the folder that holds the class folders
    for folder in sorted(tree.all - tree.with_pictures):
        below = folder.startswith(top) and folder.count("/") >= depth
        if below and (classes == "parent" or folder.count("/") == depth):
            raise ValueError(
                f"{where}: there are no pictures in the folder {folder!r}, which would be a class: "
                "add some or remove it"
            )


def _members(
    split: str,
    keys: Sequence[str],
    parts: tuple[str, ...],
    part_of: Int[np.ndarray, " n"],
    held_out: float,
    where: object,
) -> Bool[np.ndarray, " n"]:
    """Says of each picture whether it is of the split."""
    tests = [name for name in ("test", "val", "validation") if name in parts]
    if tests and held_out:
        raise ValueError(
            f"{where} has a folder {tests[0]!r} to test on, so held_out={held_out} must be 0"
        )
    named = {"test": tests[0]} | {part: part for part in parts} if tests else {}
    possible = sorted({"all", *(named or ("train", "test"))})
    if split not in possible:
        raise ValueError(f"{where} has no split {split!r}: choose one of {possible}")
    if split == "all":
        return np.ones(len(keys), bool)
    if tests:
        return part_of == parts.index(named[split])
    if split == "test" and not held_out:
        raise ValueError(
            f"{where} has no pictures to test on: set held_out to the share to hold out, such as "
            "0.1, or add a folder 'test' beside a folder 'train'"
        )
    held = _held_out(keys, held_out)
    chosen = held if split == "test" else ~held
    if not chosen.any():
        raise ValueError(
            f"{where}: held_out={held_out} of {len(keys)} pictures leaves none for {split!r}: "
            "choose another share"
        )
    return chosen


def _held_out(keys: Sequence[str], share: float) -> Bool[np.ndarray, " n"]:
    if not share:
        return np.zeros(len(keys), bool)
    digests = (hashlib.sha256(key.encode()).digest() for key in keys)
    return np.array([int.from_bytes(d[:8], "big") < share * 2**64 for d in digests])


def read_names(path: str | os.PathLike, folders: Sequence[str]) -> tuple[str, ...]:
    """Returns the names that a file of lines ``FOLDER<TAB>NAME`` gives; see ``arrange``."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"class_names={path!r} is not the path of a file")
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
    known = set(folders)
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        folder, _, name = (item.strip() for item in line.partition("\t"))
        if not folder or not name:
            raise ValueError(f"{place}: {line!r} is not FOLDER<TAB>NAME")
        if folder not in known:
            raise ValueError(f"{place}: there is no class folder {folder!r}")
        if folder in names or name in names.values():
            raise ValueError(f"{place}: {folder!r} or {name!r} stands in the file twice")
        names[folder] = name
    if not names:
        raise ValueError(f"{path} is empty: it needs a line FOLDER<TAB>NAME for each class")
    if missing := [folder for folder in folders if folder not in names]:
        raise ValueError(f"{path} has no line for the class folder {missing[0]!r}")
    return tuple(names[folder] for folder in folders)
