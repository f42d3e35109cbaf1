"""Classes and splits of pictures, as the names of the folders that they lie in say."""

import dataclasses
import decimal
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from enat_jax.data import decoding, imagenet, split_folders
from enat_jax.runtime import files, paths

CLASSES = ("first", "parent", "none")
CLASS_ORDERS = ("numeric", "text")
ONLY_CLASS = "image"  # of pictures without classes


@dataclasses.dataclass(frozen=True)
class Layout:
    """The pictures of a split."""

    class_names: tuple[str, ...]
    rows: Int[np.ndarray, " n"]  # int64, ascending: places of the split's pictures among all
    labels: Int[np.ndarray, " n"]  # int32, of these pictures
    # JSON values, to be recorded with the pictures where earlier versions, whose rules were others,
    # would have arranged them otherwise.
    new: dict[str, Any]


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
    splits: str = "folders",
    class_order: str = "numeric",
) -> Layout:
    """Finds the pictures of a split, and their classes.

    Root: in an archive (``packed``) a single folder at the top that holds nothing but folders
    is descended into, again and again, because archives mostly are made from outside: in a zip file
    with ``pets/cat/1.jpg`` and ``pets/dog/1.jpg`` the classes are cat and dog. Files that are no
    pictures do not count; a folder with the name of a split is not descended into.

    Splits: if the root's folders are called after splits, by the names in ``split_folders.NAMES``
    in any capitals, each is a split: "train" is the one of these names, "test" is that of
    "test", or else the first of ``split_folders.TO_TEST_ON``, and each goes by its own name as
    well. Folders without pictures beside them do not count. With the setting ``splits`` of "none"
    these names mean nothing. Otherwise, and within train if it is alone, ``held_out`` is the share
    of "test", in [0, 1): the pictures the SHA-256 of whose keys, as fractions, lie below it. So
    adding files moves none. Of a class that would have none left to train on, the last one stays.
    "all" is everything.

    Classes: with "first" the first folder below the root, or below the split's folder, is the class
    of a picture, with "parent" it is the path of the folder that the picture lies in. With "none"
    all are of the one class "image", as are pictures that all lie in no folder. Labels number the
    sorted names of all splits, by ``class_order``: "numeric", where all are numbers in decimals, is
    by these numbers, so that 2 comes before 10; "text" is by code points, as are all other names.
    Names of ImageNet's folders become readable; the UTF-8 file ``class_names`` gives others, one
    line ``FOLDER<TAB>NAME`` for each class.

    Args:
        keys: sorted paths of all pictures, with "/".
        folders: all folders that were seen.
        split: its name.
        where: what the messages call the place of the pictures.
        packed: whether that is an archive.
        classes: "first", "parent" or "none".
        class_names: path of a file with other names of the classes.
        held_out: share of "test" in what is not split by folders.
        splits: "folders" or "none".
        class_order: "numeric" or "text".

    Raises:
        ValueError: a setting is out of its range, a split is not there or is empty, a class has no
            pictures, pictures lie both in class folders and outside of them, or beside split
            folders, two classes have one name, or the file of class names does not fit.
        OSError: that file cannot be read.
    """
    choices = {
        "classes": (classes, CLASSES),
        "splits": (splits, split_folders.SPLITS),
        "class_order": (class_order, CLASS_ORDERS),
    }
    for setting, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{setting}={value!r} is unknown: choose one of {known}")
    if not decoding.is_number(held_out) or not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out!r} must be a share in [0, 1)")
    if not keys:
        raise ValueError(f"{where} holds no pictures ({', '.join(decoding.EXTENSIONS)})")
    tree = split_folders.Tree(keys, folders)
    top, parts, as_before = split_folders.find(tree, packed, splits, where)
    names, labels, part_of = _classify(keys, top, parts, classes, class_order, where)
    if names == ("",):
        names = (ONLY_CLASS,)
    elif classes != "none":
        _refuse_empty_folders(tree, top, parts, classes, where)
    for i, part in enumerate(parts):
        missing = np.setdiff1d(np.arange(len(names)), labels[part_of == i])
        if len(missing):
            raise ValueError(
                f"{where}: class {names[missing[0]]!r} has no picture in the folder {part!r}: "
                "every split must have pictures of every class; if these folders are no splits, "
                "set splits to 'none'"
            )
    chosen, kept = split_folders.choose(split, keys, labels, parts, part_of, held_out, where)
    readable = read_names(class_names, names) if class_names else imagenet.readable_names(names)
    rows = np.flatnonzero(chosen)
    new: dict[str, Any] = {} if as_before else {"splits": list(parts)}
    if names != tuple(sorted(names)):
        new["class_order"] = class_order
    if kept:
        new["kept_to_train_on"] = kept
    return Layout(readable, rows, labels[rows], new)


def _classify(
    keys: Sequence[str],
    top: str,
    parts: tuple[str, ...],
    classes: str,
    class_order: str,
    where: object,
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
    if class_order == "numeric" and all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", x) for x in names):
        names = tuple(sorted(names, key=lambda name: (decimal.Decimal(name), name)))
    number = {name: i for i, name in enumerate(names)}
    labels = np.array([number[folder] for folder in found], np.int32)
    if "" in names and len(names) > 1:
        inside, outside = (keys[int(np.argmax(x))] for x in (labels > 0, labels == 0))
        raise ValueError(
            f"{where} holds pictures in class folders, such as {inside}, and outside of them, such "
            f"as {outside}: move the latter into the folders of their classes, or set classes to "
            "'none'"
        )
    _refuse_two_forms(names, where)
    return names, labels, part_of


def _refuse_two_forms(names: Sequence[str], where: object) -> None:
    """Raises ValueError if two names look alike, because Unicode has two forms of a letter."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise ValueError(
                f"{where}: the class folders {ascii(other)} and {ascii(name)} have one name, "
                f"{name!r}, in two forms of Unicode: move the pictures of one into the other"
            )


def _class_folder(path: str, classes: str) -> str:
    """Returns the folder that names the class of a picture; "" if it lies in none."""
    if classes == "none":
        return ONLY_CLASS
    folder, slash, _ = path.partition("/") if classes == "first" else path.rpartition("/")
    return folder if slash else ""


def _refuse_empty_folders(
    tree: split_folders.Tree, top: str, parts: tuple[str, ...], classes: str, where: object
) -> None:
    depth = top.count("/") + bool(parts)  # of the folder that holds the class folders
    for folder in sorted(tree.all - tree.with_pictures):
        below = folder.startswith(top) and folder.count("/") >= depth
        if parts and folder[len(top) :].partition("/")[0] not in parts:
            continue
        if below and (classes == "parent" or folder.count("/") == depth):
            raise ValueError(
                f"{where}: there are no pictures in the folder {folder!r}, which would be a class: "
                "add some or remove it"
            )


def read_names(path: str | os.PathLike, folders: Sequence[str]) -> tuple[str, ...]:
    """Returns the names that a file of lines ``FOLDER<TAB>NAME`` gives; see ``arrange``."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"class_names={path!r} is not the path of a file")
    lines = files.read_text(paths.local(path)).splitlines()
    known = {unicodedata.normalize("NFC", folder): folder for folder in folders}
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        folder, _, name = (item.strip() for item in line.partition("\t"))
        if not folder or not name:
            raise ValueError(f"{place}: {line!r} is not FOLDER<TAB>NAME")
        if (normal := unicodedata.normalize("NFC", folder)) not in known:
            raise ValueError(f"{place}: there is no class folder {folder!r}")
        folder = known[normal]  # a file typed today, of folders that a Mac packed
        if folder in names or name in names.values():
            raise ValueError(f"{place}: {folder!r} or {name!r} stands in the file twice")
        names[folder] = name
    if not names:
        raise ValueError(f"{path} is empty: it needs a line FOLDER<TAB>NAME for each class")
    if missing := [folder for folder in folders if folder not in names]:
        raise ValueError(f"{path} has no line for the class folder {missing[0]!r}")
    return tuple(names[folder] for folder in folders)
