"""The classes of ImageNet-2012 (ILSVRC 2012), and its tar files as image-net.org gives them out.

``imagenet_classes.txt`` has a line "n01440764 tench, Tinca tinca" for each class: the id of its
synset in WordNet 3.0 and all lemmas of the synset, sorted by id, so that line i (from 0) is label i
as TFDS and most models number them. In WordNet two synsets have "crane" as their only lemma; here
they are "crane (bird)" and "crane (machine)", so that every class has a name of its own.
"""

import contextlib
import importlib.resources
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, cast

import numpy as np
from jaxtyping import Shaped

_CLASSES: dict[str, str] = dict(
    line.split(" ", maxsplit=1)
    for line in (importlib.resources.files("enat_jax.data") / "imagenet_classes.txt")
    .read_text(encoding="utf-8")
    .splitlines()
)
IDS: tuple[str, ...] = tuple(_CLASSES)
_LABELS = {wordnet_id: label for label, wordnet_id in enumerate(IDS)}
NAMES: tuple[str, ...] = tuple(_CLASSES.values())

TAR_FILES = {
    "train": "ILSVRC2012_img_train.tar",
    "validation": "ILSVRC2012_img_val.tar",
    "test": "ILSVRC2012_img_test.tar",
}
NUM_PICTURES = {"train": 1_281_167, "validation": 50_000, "test": 100_000}
UNKNOWN = -1  # the label of all test pictures: theirs were never published


def readable_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Returns names for people: "n01440764" becomes "tench, Tinca tinca".

    Only if all ``class_names`` are ids of ImageNet-2012's classes; otherwise, as for folders that
    somebody named, all of them stay what they are.
    """
    if all(name in _CLASSES for name in class_names):
        return tuple(_CLASSES[name] for name in class_names)
    return tuple(class_names)


FIELDS = ("names", "labels", "offsets", "sizes")  # of pictures


def pictures(fields: Sequence[Shaped[np.ndarray, " n"]]) -> np.recarray:
    """Returns the pictures of a split and where in its tar file they lie, as records.

    Args:
        fields: the values of ``FIELDS``: the members' names in ASCII (dtype "S"), such as
            "n01440764_10026.JPEG"; labels, int64 in [0, 1000) or UNKNOWN; offsets, int64, of the
            first byte of the encoded picture in the (outer) tar file; int64 numbers of its bytes.
    """
    types = [(name, values.dtype) for name, values in zip(FIELDS, fields, strict=True)]
    return np.rec.fromarrays(fields, dtype=types)


def scan(path: str | os.PathLike, split: str, validation_ids: Sequence[str]) -> np.recarray:
    """Finds the ``pictures`` in the official tar file of a split, reading the headers only.

    They have the order of the file.

    Args:
        path: of the uncompressed tar file. For "train" it holds a tar file for each class.
        split: "train", "validation" or "test".
        validation_ids: the class of each validation picture, by the number in its name from 1 on.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no tar file, is cut short or damaged, or holds something that does not
            belong there: a class that is none of the 1000, a picture that is in none of the
            classes, a name that comes twice, nothing at all.
    """
    with open(path, "rb") as file, _opened(file, str(path)) as tar:
        if split == "train":
            found = list(_of_classes(tar, str(path)))
        else:
            found = list(_of_flat_tar(tar, str(path), split, validation_ids))
    if not found:
        raise ValueError(f"{path} holds no pictures")
    names, *numbers = zip(*found, strict=True)
    made = pictures([np.array(names, "S"), *np.array(numbers, np.int64)])
    unique, counts = np.unique(made.names, return_counts=True)
    if len(unique) < len(made):
        twice = unique[counts > 1][0].decode()
        raise ValueError(f"{path} holds {twice} more than once: get the file again")
    return made


def _of_classes(tar: tarfile.TarFile, called: str) -> Iterator[tuple[str, int, int, int]]:
    for class_tar in list(_files(tar, called)):  # all: a file cut short shows at once
        wordnet_id, extension = posixpath.splitext(posixpath.basename(class_tar.name))
        where = f"{class_tar.name} in {called}"
        if extension != ".tar":
            raise ValueError(f"{where} is in none of the classes: expected one tar file for each")
        if wordnet_id not in _LABELS:
            raise ValueError(f"{where} is none of the 1000 classes of ImageNet-2012")
        content = cast(IO[bytes], tar.extractfile(class_tar))  # as that of every regular file
        with _opened(content, where) as of_class:
            for picture in _files(of_class, where):
                name = posixpath.normpath(picture.name)
                if not re.fullmatch(rf"{wordnet_id}_[0-9]+\.JPEG", name):
                    raise ValueError(f"{picture.name} in {where} is no picture of this class")
                offset = class_tar.offset_data + picture.offset_data
                yield name, _LABELS[wordnet_id], offset, picture.size


def _of_flat_tar(
    tar: tarfile.TarFile, called: str, split: str, validation_ids: Sequence[str]
) -> Iterator[tuple[str, int, int, int]]:
    # Test pictures lie in a folder in some releases of the file.
    form = {
        "validation": r"ILSVRC2012_val_([0-9]{8})\.JPEG",
        "test": r"(?:test/)?ILSVRC2012_test_([0-9]{8})\.JPEG",
    }[split]
    for picture in _files(tar, called):
        name = posixpath.normpath(picture.name)
        matched = re.fullmatch(form, name)
        if not matched:
            raise ValueError(f"{picture.name} in {called} is no {split} picture of ImageNet-2012")
        label = UNKNOWN
        if split == "validation":
            # By the number in the name, so that labels are right in an incomplete file, too.
            number = int(matched[1])
            if not 1 <= number <= len(validation_ids):
                raise ValueError(
                    f"{picture.name} in {called} is in none of the classes: the validation "
                    f"pictures are numbered from 1 to {len(validation_ids)}"
                )
            label = _LABELS[validation_ids[number - 1]]
        yield name, label, picture.offset_data, picture.size


@contextlib.contextmanager
def _opened(file: IO[bytes], called: str) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise ValueError(
            f"{called} is no uncompressed tar file, or is cut short or damaged: {error}"
        ) from error


def _files(tar: tarfile.TarFile, called: str) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise ValueError(f"{member.name} in {called} is no regular file")
        yield member
    # To tarfile, a header that is damaged or missing is the end like any other.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"{called} is cut short or damaged at byte {tar.offset}: get it again")
