"""Captions of pictures, as people keep them, brought together with the pictures of a token set.

    .json       MS-COCO's ``captions_*.json``
    .jsonl      an object with "file_name" and "text", "caption" or "captions" on each line
    .tsv        a caption, a tab and a file name on each line; of a URL, as in CC3M, its last part
    a folder    a .txt file of the picture's name beside each picture, a caption on each line; or
                the file metadata.jsonl; or .tar files
    .zip        as a folder
    .tar        as a folder, or a .json file with "caption" beside each picture (webdataset)
    tfds:NAME   a feature of a prepared TFDS data set
    scenes      the scenes that the tokens were made of

A name of a picture is its path or an end of it, with or without extension, if only one picture of
the set has this name.
"""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import tarfile
import unicodedata
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from enat_jax.data import coco, decoding, readers, scenes, tfds_records
from enat_jax.data.text_tokens import shortened
from enat_jax.runtime import files, paths

KINDS = (
    "captions are the path of a .json file of COCO, of a .jsonl, .tsv, .zip or .tar file or of a "
    "folder of .txt files, or tfds:NAME, or 'scenes'"
)
FIELDS = ("text", "caption", "captions")  # of a .jsonl file; the first that is there
TFDS_FEATURE = "captions/text"
MAX_BYTES = 2**20  # of a file beside a picture


class Found(NamedTuple):
    """What a source says.

    Attributes:
        name: of the picture.
        said: a caption, a list of captions, or the bytes of a file with a caption on each line.
        place: where it stands, for messages.
        whole: whether these are all captions of the picture.
    """

    name: str
    said: Any
    place: str
    whole: bool = False


@dataclasses.dataclass
class Captions:
    """Captions of the pictures of a token set.

    Attributes:
        texts: of each picture; blanks are single, and there are none at the ends.
        empty: number of captions without a character, which are left out.
        unknown: number of captions by name that are of no picture of the set.
    """

    texts: list[list[str]]
    empty: int = 0
    unknown: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def read(
    source: str,
    *,
    field: str | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    tokenized: Mapping[str, Any] | None = None,
) -> Iterator[Found]:
    """Yields what a source of captions says, in its order.

    Args:
        source: see above.
        field: that holds the captions in .jsonl and TFDS; None: ``FIELDS``, ``TFDS_FEATURE``.
        split: of TFDS; None: that of the tokens.
        data_dir: where TFDS keeps its data; None: where it was for the tokens.
        tokenized: what the metadata of the token set say.

    Raises:
        ValueError: the source is unknown or damaged; the message names file and line.
        OSError: it cannot be read.
    """
    tokenized = tokenized or {}
    if source == "scenes":
        return _scenes(tokenized.get("preprocessing", {}).get("source", {}))
    if source.startswith(tfds_records.PREFIX):
        location = {"split": split, "data_dir": data_dir}
        known = tokenized.get("location", {})
        location = {name: value or known.get(name) for name, value in location.items()}
        return _tfds(source, field or TFDS_FEATURE, location)
    path = paths.local(source)
    if path.is_dir():
        return _folder(path, field)
    if not path.is_file():
        reason = "is none of these" if path.exists() else "does not exist"
        raise ValueError(f"{source!r} {reason}: {KINDS}")
    name = path.name.lower()
    if name.endswith(readers.COMPRESSED_TARS):
        raise ValueError(f"{source!r} is a compressed tar file: unpack it")
    match os.path.splitext(name)[1]:
        case ".json":
            return itertools.starmap(Found, coco.captions(path, _json(path, files.read_text(path))))
        case ".jsonl":
            return _lines(path, field)
        case ".tsv":
            return _tsv(path)
        case ".zip":
            return _zip(path)
        case ".tar":
            return _tar(path)
    raise ValueError(f"{source!r} is none of these: {KINDS}")


def of_classes(
    templates: Sequence[str], class_names: Sequence[str], labels: Iterable[int]
) -> list[list[str]]:
    """Returns captions of pictures that say their class, by templates such as "a photo of a {}".

    Of a class with several names, "tench, Tinca tinca", the first one counts.

    Args:
        templates: each with one "{}"; every picture has a caption of each.
        class_names: by label.
        labels: of the pictures; -1 of one that is not in the set.

    Raises:
        ValueError: a template has no "{}", or several.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"the template {template!r} needs one {{}}, where the class stands")
    names = [name.split(",")[0].strip() for name in class_names]
    of_class = [[_single(t.replace("{}", name)) for t in templates] for name in names]
    return [of_class[label] if label >= 0 else [] for label in labels]


def join(found: Iterable[Found], keys: Sequence[str]) -> Captions:
    """Brings captions and pictures together by their names.

    Args:
        found: what sources say.
        keys: of the pictures; see ``tokens.image_keys``.

    Raises:
        ValueError: a caption is no text, or a name is not that of one picture alone; the message
            names the place.
    """
    names = _Names(keys)
    captions = Captions([[] for _ in keys])
    called: dict[int, str] = {}
    whole: dict[int, str] = {}
    for name, said, place, is_whole in found:
        image = names.find(name, place)
        if image is None:
            captions.unknown[name] += 1
            continue
        if called.setdefault(image, name) != name:
            raise ValueError(
                f"{place}: {shortened(name)} and {shortened(called[image])} are both the picture "
                f"{shortened(keys[image])}: give captions of one of them alone, or names with "
                "their folders"
            )
        if is_whole and whole.setdefault(image, place) != place:
            raise ValueError(
                f"{place}: {whole[image]} holds captions of the same picture, "
                f"{shortened(keys[image])}: leave one of them out"
            )
        for text in _texts(said, place):
            if text:
                captions.texts[image].append(text)
            else:
                captions.empty += 1
    return captions


class _Names:
    """Finds pictures by an end of their path, with or without extension."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys
        self._exact = {_path(key): image for image, key in enumerate(keys)}
        self._stems = [f"/{_stem(key)}" for key in keys]
        self._by_end: dict[str, list[int]] = collections.defaultdict(list)
        for image, stem in enumerate(self._stems):
            self._by_end[stem.rpartition("/")[2]].append(image)
        self._known: dict[str, int | None] = {}  # most names come several times

    def find(self, name: str, place: str) -> int | None:
        if name not in self._known:
            self._known[name] = self._find(name, place)
        return self._known[name]

    def _find(self, name: str, place: str) -> int | None:
        if (image := self._exact.get(_path(name))) is not None:
            return image
        wanted = f"/{_stem(name)}"
        ends = [
            image
            for image in self._by_end.get(wanted.rpartition("/")[2], ())
            if self._stems[image].endswith(wanted) or wanted.endswith(self._stems[image])
        ]
        alike = [image for image in ends if self._stems[image] == wanted] or ends
        if len(alike) > 1:
            alike = [i for i in alike if _extension(self._keys[i]) == _extension(name)] or alike
        if len(alike) > 1:
            raise ValueError(
                f"{place}: {len(alike)} pictures are called {shortened(name)}, "
                f"{shortened(self._keys[alike[0]])} and {shortened(self._keys[alike[1]])}: give "
                "whole names, with folder and extension"
            )
        return alike[0] if alike else None


def _path(name: str) -> str:
    parts = unicodedata.normalize("NFC", name.replace("\\", "/")).split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def _extension(name: str) -> str:
    extension = os.path.splitext(name)[1].lower()
    return extension if extension in decoding.EXTENSIONS else ""


def _stem(name: str) -> str:
    return _path(name).removesuffix(os.path.splitext(name)[1] if _extension(name) else "")


def _texts(said: Any, place: str) -> list[str]:
    if isinstance(said, bytes):
        if len(said) > MAX_BYTES:
            raise ValueError(f"{place} is no caption: it has more than {MAX_BYTES:,} bytes")
        lines = _decoded(said, place).split("\n")
        # Of a file that holds nothing but blanks one caption is left, the empty one.
        said = [line for line in lines if line.strip()] or [""]
    texts = said if isinstance(said, list) else [said]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{place}: the caption {shortened(str(text))} is no text")
        if "\0" in text:
            raise ValueError(f"{place}: a caption holds a zero byte: save it as UTF-8 text")
        if any(0xD800 <= ord(c) < 0xE000 for c in text):
            raise ValueError(
                f"{place}: a caption holds half of a surrogate pair: mend or remove it"
            )
    return [_single(text) for text in texts]


def _single(text: str) -> str:
    return " ".join(text.split())


def _decoded(data: bytes, place: object) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 ({error}): save it as UTF-8") from error


def _json(place: object, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}:{error.lineno}: this is not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise ValueError(f"{place}: this is not JSON ({error})") from error


def numbered(name: object, lines: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Yields place and text of each line of a file that is not blank.

    Args:
        name: of the file.
        lines: of the file, opened in binary mode.

    Raises:
        ValueError: a line is not UTF-8.
    """
    for number, line in enumerate(lines, 1):
        place = f"{name}:{number}"
        text = _decoded(line, place).rstrip("\r\n")
        if text.strip():
            yield place, text


def parsed(place: str, line: str) -> Any:
    """Returns the JSON values of a line; raises ValueError, which names the place."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: this line is not JSON ({error})") from error


def _numbered(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    with open(path, "rb") as file:
        yield from numbered(path, file)


def _lines(path: pathlib.Path, field: str | None) -> Iterator[Found]:
    for place, line in _numbered(path):
        values = parsed(place, line)
        name = values.get("file_name") if isinstance(values, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f'{place}: this line is no object with a "file_name"')
        fields = [field] if field else FIELDS
        said = [values[key] for key in fields if key in values]
        if not said:
            raise ValueError(
                f"{place}: there is none of {list(fields)}, but {sorted(values)}: say by "
                "--caption-key which holds the caption"
            )
        yield Found(name, said[0], place)


def _tsv(path: pathlib.Path) -> Iterator[Found]:
    for place, line in _numbered(path):
        parts = line.split("\t")
        if len(parts) != 2 or not parts[1].strip():
            raise ValueError(f"{place}: this line is not CAPTION<TAB>FILE NAME")
        caption, name = parts[0], parts[1].strip()
        if name.startswith(("http://", "https://")):
            name = urllib.parse.unquote(urllib.parse.urlsplit(name).path.rpartition("/")[2])
        yield Found(name, caption, place)


def _folder(path: pathlib.Path, field: str | None) -> Iterator[Found]:
    if (path / "metadata.jsonl").is_file():
        yield from _lines(path / "metadata.jsonl", field)
        return
    seen = set()
    for top, folders, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(top)) in seen:  # links may go round in circles
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(names):
            file = pathlib.Path(top, name)
            stem, extension = os.path.splitext(name)
            if name.startswith(".") or not file.is_file():
                continue
            if extension.lower() == ".tar":
                yield from _tar(file)
            elif extension.lower() == ".txt":
                with open(file, "rb") as opened:
                    content = opened.read(MAX_BYTES + 1)
                key = os.path.relpath(os.path.join(top, stem), path)
                yield Found(readers.as_utf8(key), content, str(file), whole=True)


def _zip(path: pathlib.Path) -> Iterator[Found]:
    try:
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=readers.zip_name):
                name = readers.zip_name(info)
                stem, extension = os.path.splitext(name)
                if extension.lower() == ".txt" and not info.is_dir():
                    with archive.open(info) as file:
                        content = file.read(MAX_BYTES + 1)
                    yield Found(readers.as_utf8(stem), content, f"{path}: {name!r}", whole=True)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        # RuntimeError is what the module raises of encrypted files.
        raise ValueError(f"{path} cannot be read as a zip file ({error}): pack it again") from error


def _tar(path: pathlib.Path) -> Iterator[Found]:
    """Reads what stands beside pictures: KEY.txt, or else "caption" of KEY.json."""
    found: dict[str, Found] = {}
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as archive:
            for member in archive:
                stem, extension = os.path.splitext(member.name)
                file = archive.extractfile(member) if member.isreg() else None
                if file is None or extension.lower() not in (".txt", ".json"):
                    continue
                stem, place = readers.as_utf8(stem), f"{path}: {member.name!r}"
                content = file.read(MAX_BYTES + 1)
                if extension.lower() == ".txt":
                    found[stem] = Found(stem, content, place, whole=True)
                elif stem not in found and (said := _caption(place, content)) is not None:
                    found[stem] = Found(stem, said, place, whole=True)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a whole tar file ({error}): copy it again") from error
    yield from found.values()


def _caption(place: str, content: bytes) -> Any:
    """Returns what a .json file beside a picture calls its caption, None if it has none."""
    values = _json(place, _decoded(content, place))
    return values.get("caption") if isinstance(values, dict) else None


def _tfds(source: str, feature: str, location: Mapping[str, Any]) -> Iterator[Found]:
    split = location["split"]
    if not split:
        raise ValueError(f"{source}: say by --split which split the captions are of")
    records = tfds_records.Records(
        source, split, decoding.Framing(size=8), data_dir=location["data_dir"]
    )
    for key, said in records.feature(feature):
        texts = said if isinstance(said, list) else [said]
        yield Found(key, [_as_text(text) for text in texts], f"{source}: {key}")


def _as_text(value: Any) -> Any:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def _scenes(identity: Mapping[str, Any]) -> Iterator[Found]:
    if identity.get("source") != "scenes":
        raise ValueError("the tokens were not made of the source 'scenes', which has its captions")
    settings = {name: value for name, value in identity.items() if name != "source"}
    try:
        made = scenes.Scenes(**settings)
    except TypeError as error:
        raise ValueError(f"the tokens are of scenes with other settings ({error})") from error
    for index in range(len(made)):
        yield Found(made.key(index), list(made.captions(index)), made.key(index))
