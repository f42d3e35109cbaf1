"""Captions of every kind of source, and whose they are."""

import io
import json
import tarfile
import unicodedata
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from enat_jax.data import caption_sources, images
from enat_jax.data.caption_sources import Found

KEYS = ["cat/1.jpg", "cat/2.JPG", "dog/1.jpg", "dog/v1.3.png", "schön/☃ \u202e.webp"]


def joined(source, keys=KEYS, **settings):
    found = caption_sources.join(caption_sources.read(str(source), **settings), keys)
    return found.texts, dict(found.unknown)


def said(*pairs):
    return [Found(name, f"of {name}", f"line {i}") for i, name in enumerate(pairs)]


@pytest.mark.parametrize(
    ("name", "image"),
    {
        "cat/1.jpg": 0,
        "cat/1": 0,
        "./cat//1.png": 0,  # of other pictures than these, that were converted
        "C:\\pictures\\cat\\1.jpg": 0,
        "pets/train/dog/1.jpg": 2,
        "2": 1,
        "2.jpg": 1,
        "v1.3": 3,
        "dog/v1.3.png": 3,
        unicodedata.normalize("NFD", "schön/☃ \u202e.webp"): 4,
        "bird/2.jpg": None,  # an end of no path
        "at/1.jpg": None,
        "3.jpg": None,
        "": None,
        "/": None,
    }.items(),
)
def test_a_name_is_a_path_or_its_end(name, image):
    found = caption_sources.join(said(name), KEYS)
    assert [i for i, texts in enumerate(found.texts) if texts] == ([] if image is None else [image])
    assert (name in found.unknown) == (image is None)


def test_names_of_several_pictures_are_refused():
    with pytest.raises(
        ValueError, match=r"line 0: 2 pictures are called '1', 'cat/1.jpg' and 'dog"
    ):
        caption_sources.join(said("1"), KEYS)
    with pytest.raises(ValueError, match=r"line 1: 'b/2.jpg' and 'a/2.jpg' are both the picture"):
        caption_sources.join(said("a/2.jpg", "b/2.jpg"), ["2.jpg"])
    same = ["a/1.jpg", "a/1.png", "1.png"]
    found = caption_sources.join(said("a/1.png", "1.png"), same)
    assert found.texts == [[], ["of a/1.png"], ["of 1.png"]]
    with pytest.raises(ValueError, match="2 pictures are called .a/1., .a/1.jpg. and .a/1.png."):
        caption_sources.join(said("a/1"), same)


def test_lines(tmp_path):
    lines = [
        {"file_name": "cat/1.jpg", "text": " a  cat\n"},
        {"file_name": "2.JPG", "captions": ["two", "cats"], "width": 3},
        {"file_name": "cat/1.jpg", "caption": "another"},
        {"file_name": "zebra.jpg", "text": "none"},
    ]
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(json.dumps(x) for x in lines) + "\n\n", encoding="utf-8-sig"
    )
    expected = [["a cat", "another"], ["two", "cats"], [], [], []]
    for source in (tmp_path, tmp_path / "metadata.jsonl"):
        assert joined(source) == (expected, {"zebra.jpg": 1})
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"file_name": "2", "prompt": "a", "text": "b"}))
    assert joined(path, field="prompt")[0][1] == ["a"]


def test_columns(tmp_path):
    path = tmp_path / "cc3m.tsv"
    rows = ["a dog\tdog/1.jpg", "a cat\thttps://example.org/x/2.jpg?w=3#a", "\tcat/1.jpg"]
    path.write_text("\r\n".join(rows))
    found = caption_sources.join(caption_sources.read(str(path)), KEYS)
    assert found.texts == [[], ["a cat"], ["a dog"], [], []] and found.empty == 1


FILES = {
    "cat/1.jpg": b"picture",
    "cat/1.txt": b"\xef\xbb\xbfa cat\r\n\r\nthe  cat\r\n",
    "cat/1.json": b'{"caption": "not this one"}',
    "cat/2.txt": b" \n",
    "dog/v1.3.txt": "ein Hund, schön".encode(),
    "schön/☃ \u202e.txt": b"snow",
    "README.txt": b"\xff\xfe of no picture" + b"." * 2**21,
    "dog/1.caption": b"of another kind",
}
TEXTS = [["a cat", "the cat"], [], [], ["ein Hund, schön"], ["snow"]]


def write_folder(path, files=FILES):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_zip(path, files=FILES):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files=FILES):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_files_beside_the_pictures(tmp_path, kind):
    write, name = {
        "folder": (write_folder, "pictures"),
        "zip": (write_zip, "pictures.zip"),
        "tar": (write_tar, "00000.tar"),
    }[kind]
    assert joined(write(tmp_path / name)) == (TEXTS, {"README": 1})


def test_webdataset(tmp_path):
    files = {
        "000.json": b'{"caption": "a cat", "url": "x"}',
        "000.jpg": b"picture",
        "001.json": b'{"caption": null}',
        "002.json": b'["no description"]',
        "003.json": b'{"caption": 7}',
    }
    found = caption_sources.read(str(write_tar(tmp_path / "0.tar", files)))
    assert [(x.name, x.said) for x in found] == [("000", "a cat"), ("003", 7)]
    files["000.txt"] = b"the text"
    write_tar(tmp_path / "0.tar", files)
    assert joined(tmp_path, ["000.jpg"])[0] == [["the text"]]  # a folder of .tar files
    write_tar(tmp_path / "1.tar", {"000.txt": b"of another picture"})
    with pytest.raises(ValueError, match=r"1.tar: '000.txt': .*0.tar: '000.txt' holds captions of"):
        joined(tmp_path, ["000.jpg"])


def test_a_folder_of_links(tmp_path):
    write_folder(tmp_path / "elsewhere")
    (tmp_path / "pictures").mkdir()
    for folder in ("cat", "dog", "schön"):
        (tmp_path / "pictures" / folder).symlink_to(tmp_path / "elsewhere" / folder)
    (tmp_path / "elsewhere" / "cat" / "round").symlink_to(tmp_path / "elsewhere" / "cat")
    assert joined(tmp_path / "pictures") == (TEXTS, {})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a cat\xff", "1.txt is not UTF-8"),
        (b"a\0cat", "1.txt: a caption holds a zero byte"),
        ("a cat".encode("utf-16"), "1.txt is not UTF-8"),
        (b"x" * (2**20 + 1), "1.txt is no caption: it has more than 1,048,576 bytes"),
    ],
)
def test_broken_files_beside_the_pictures(tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        joined(write_folder(tmp_path, {"cat/1.txt": content}))


def test_broken_descriptions_in_a_tar(tmp_path):
    path = write_tar(tmp_path / "0.tar", {"1.json": b'{"caption":\n'})
    with pytest.raises(ValueError, match=r"0.tar: '1.json':2: this is not JSON"):
        joined(path)


class CocoLike(tfds.core.GeneratorBasedBuilder):
    """As coco_captions: names of files, several captions, no classes."""

    VERSION = tfds.core.Version("1.1.0")

    def _info(self):
        text = {"id": tfds.features.Scalar(np.int64), "text": tfds.features.Text()}
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "image/filename": tfds.features.Text(),
            "captions": tfds.features.Sequence(text),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        file = io.BytesIO()
        Image.new("RGB", (12, 10)).save(file, "PNG")
        for i in range(3):
            texts = [{"id": j, "text": f"{j} of {i}, schön\n"} for j in range(i)]
            yield (
                i,
                {
                    "image": io.BytesIO(file.getvalue()),
                    "image/filename": f"COCO_train2014_{i:012d}.jpg",
                    "captions": texts,
                },
            )


def test_tfds(tmp_path):
    CocoLike(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    location = {"source": "tfds:coco_like", "split": "train", "data_dir": str(tmp_path)}
    source = images.open_source(**location, size=8)
    assert source.class_names == ("image",)
    keys = sorted(source.load(i).key for i in range(3))
    assert keys == [f"COCO_train2014_{i:012d}.jpg" for i in range(3)]
    assert {source.load(i).label for i in range(3)} == {0}
    tokenized = {"location": location}
    expected = [[], ["0 of 1, schön"], ["0 of 2, schön", "1 of 2, schön"]]
    assert joined("tfds:coco_like", keys, tokenized=tokenized) == (expected, {})
    names = joined("tfds:coco_like", keys, tokenized=tokenized, field="image/filename")
    assert names == ([[key] for key in keys], {})
    for field in ("texts", "captions/words"):
        with pytest.raises(ValueError, match="has no feature "):
            joined("tfds:coco_like", keys, tokenized=tokenized, field=field)
