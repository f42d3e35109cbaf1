"""MS-COCO: captions of its annotation files, and which pictures its two splits share.

COCO was cut twice. The pictures of 2014 and of 2017 are the same, but training and validation are
divided anew: train2017 holds train2014 and 35,000 pictures of val2014. Whoever trains on train2017
and evaluates on val2014 evaluates on what was trained on.
"""

import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_NAME = re.compile(r"(?:.*/)?(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})(?:\.\w+)?", re.IGNORECASE)


def image_id(key: str) -> int | None:
    """Returns COCO's number of a picture, the same in 2014 and 2017; None: it has no such name."""
    match = _NAME.fullmatch(key)
    return int(match[1]) if match else None


def shared(training: Iterable[str], evaluation: Iterable[str]) -> list[int]:
    """Returns the numbers of COCO's pictures that two sets have in common, sorted.

    Names alone tell: ``COCO_val2014_000000000042.jpg`` and ``000000000042.jpg`` are one picture.
    Pictures with other names are not found.

    Args:
        training: keys of the pictures to train on.
        evaluation: keys of the pictures to evaluate on.
    """
    found = [{image_id(key) for key in keys} - {None} for keys in (training, evaluation)]
    return sorted(number for number in found[0] & found[1] if number is not None)


def refuse_shared(
    training: Iterable[str], evaluation: Iterable[str], names: tuple[object, object]
) -> None:
    """Checks that no picture of COCO is both trained and evaluated on.

    Args:
        training: keys of the pictures to train on.
        evaluation: keys of the pictures to evaluate on.
        names: what the message calls the two sets.

    Raises:
        ValueError: there are such pictures.
    """
    if both := shared(training, evaluation):
        raise ValueError(
            f"{len(both):,} pictures of {names[1]} are in {names[0]} as well, such as COCO's "
            f"{', '.join(str(number) for number in both[:3])}: an evaluation on them says nothing. "
            "train2017 holds most of val2014: evaluate on val2017, or train on train2014"
        )


def captions(path: pathlib.Path, values: Any) -> Iterator[tuple[str, Any, str]]:
    """Yields file name, caption and place of every annotation of a ``captions_*.json``.

    Args:
        path: of the file, for the messages.
        values: its JSON values.

    Raises:
        ValueError: it is no such file, or an annotation is of no picture of the file.
    """
    what = "no captions of COCO (captions_train2014.json and the like)"
    if not isinstance(values, dict) or not {"images", "annotations"} <= values.keys():
        raise ValueError(f"{path} has no lists 'images' and 'annotations', it holds {what}")
    names: dict[int, str] = {}
    for number, image in enumerate(_objects(path, values, "images")):
        identity, name = image.get("id"), image.get("file_name")
        if type(identity) is not int or not isinstance(name, str) or not name:
            raise ValueError(f"{path}: images[{number}] has no 'id' and 'file_name'")
        if identity in names:
            raise ValueError(f"{path}: images[{number}] has the id {identity}, as another one has")
        names[identity] = name
    for number, annotation in enumerate(_objects(path, values, "annotations")):
        place = f"{path}: annotations[{number}]"
        if "caption" not in annotation:
            raise ValueError(f"{place} has no 'caption', it holds {what}")
        identity = annotation.get("image_id")
        if type(identity) is not int or identity not in names:
            raise ValueError(
                f"{place} is of the picture {identity!r}, which 'images' does not have"
            )
        yield names[identity], annotation["caption"], place


def _objects(path: pathlib.Path, values: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = values[name]
    if not isinstance(found, list):
        raise ValueError(f"{path}: {name!r} is no list")
    for number, item in enumerate(found):
        if not isinstance(item, dict):
            raise ValueError(f"{path}: {name}[{number}] is no object")
    return found
