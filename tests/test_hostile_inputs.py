"""Broken and hostile sources and settings, end to end: one clear line or a listed skip.

Every kind goes through the program as a user starts it. What lies outside of the output directory
is compared byte for byte.
"""

import io
import os
import pathlib
import shutil
import struct
import tarfile
import zlib

import pytest
import tensorflow_datasets as tfds
from hostile import (
    BAD,
    GOOD,
    KEYS,
    command,
    finished,
    model,
    noise,
    one_device,
    records_by_key,
    refused,
    run,
    snapshot,
    untouched,
    write_folder,
    write_tar,
    write_zip,
)

from enat_jax.data import images, tokens

__all__ = ["finished", "model", "one_device", "untouched"]  # fixtures


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, data):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def replaced(data):
    return lambda source: (source / BAD).write_bytes(data)


def link_to_nothing(source):
    (source / BAD).unlink()
    (source / BAD).symlink_to("gone.png")


def too_large(source):
    with open(source / BAD, "wb") as file:
        file.truncate(65 * 2**20)


PNG, JPEG = noise(5, side=40), noise(5, "JPEG", side=40)

UNREADABLE = {  # kind: what is done to one of twelve pictures, words of the reason
    "half a PNG": (replaced(PNG[: len(PNG) // 2]), "truncated"),
    "half a JPEG named .png": (replaced(JPEG[: len(JPEG) // 2]), "truncated"),
    "no bytes at all": (replaced(b""), "empty"),
    "zeros alone": (replaced(bytes(5000)), "is not a JPEG"),
    "a text file": (replaced(b"I am a picture, honestly"), "is not a JPEG"),
    "a page of an error": (replaced(b"<html><h1>404 Not Found</h1></html>"), "is not a JPEG"),
    "a bomb of 60,000 x 60,000": (replaced(png_of(60_000, 60_000, b"")), "pixels"),
    "a bomb behind a small header": (
        replaced(png_of(8, 8, zlib.compress(bytes(2**24)))[:-30]),
        "truncated",
    ),
    "a flipped bit": (
        replaced(PNG[:200] + bytes([PNG[200] ^ 1]) + PNG[201:]),
        "damaged",
    ),
    "a line of pixels": (replaced(png_of(2**21, 1, zlib.compress(bytes(2**21 + 1)))), "elongated"),
    "a link to nothing": (link_to_nothing, "cannot be read"),
    "a file above the limit": (too_large, "too large"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_bad_picture_stops_it_or_is_listed(model, finished, tmp_path, capsys, untouched, kind):
    spoil, words = UNREADABLE[kind]
    source = write_folder(tmp_path / "pictures")
    spoil(source)
    untouched()
    arguments = command(model, tmp_path / "out", "--source", source)
    refused(arguments, [f"{BAD}: ", words, "--on-error skip"], capsys)
    assert not (tmp_path / "out" / "metadata.json").exists()
    assert run([*arguments, "--on-error", "skip"], capsys) == (0, [])
    only_bad_is_missing(tmp_path / "out", finished, BAD, words)


def only_bad_is_missing(directory, finished, key, words):
    (skipped,) = tokens.read_metadata(directory)["skipped"]
    assert skipped["key"] == key and words in skipped["reason"]
    expected = records_by_key(finished)
    expected.pop(BAD)
    assert records_by_key(directory) == expected


def zip_with_wrong_checksum(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "x.zip")
    data = bytearray(path.read_bytes())
    data[data.rindex(BAD.encode()) - 46 + 16] ^= 1  # of the checksum, in the zip file's directory
    path.write_bytes(data)
    return path


def zip_with_a_lie(tmp_path, monkeypatch):
    """Its directory says 77 bytes, and 100 MB would come out."""
    path = write_zip(tmp_path / "x.zip", GOOD | {BAD: bytes(10**8)})
    data = bytearray(path.read_bytes())
    at = data.rindex(BAD.encode()) - 46 + 24
    data[at : at + 4] = struct.pack("<I", 77)
    path.write_bytes(data)
    return path


def tar_with_a_text(tmp_path, monkeypatch):
    return write_tar(tmp_path / "x.tar", GOOD | {BAD: b"not a picture"})


def after_listing(change):
    """A folder in which something happens between the listing and the reading of the pictures."""

    def make(tmp_path, monkeypatch):
        source, begun = write_folder(tmp_path / "pictures"), tokens.begin

        def begin(*arguments):
            if (source / BAD).exists() and (source / BAD).read_bytes() == GOOD[BAD]:
                change(source / BAD)
            return begun(*arguments)

        monkeypatch.setattr(tokens, "begin", begin)
        return source

    return make


PLACES = {  # kind: makes a source of twelve pictures of which one is bad; words of the reason
    "zip, wrong checksum": (zip_with_wrong_checksum, "checksum"),
    "zip, a member larger than it says": (zip_with_a_lie, "another size"),
    "tar, a text": (tar_with_a_text, "is not a JPEG"),
    "vanishes": (after_listing(lambda path: path.unlink()), "No such file"),
    "changes": (after_listing(lambda path: path.write_bytes(noise(99, side=30))), "has changed"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_bad_picture_in_any_place(model, finished, tmp_path, capsys, monkeypatch, kind):
    make, words = PLACES[kind]
    source = make(tmp_path, monkeypatch)
    arguments = command(model, tmp_path / "out", "--source", source)
    assert run([*arguments, "--on-error", "skip"], capsys) == (0, [])
    only_bad_is_missing(tmp_path / "out", finished, BAD, words)
    shutil.rmtree(tmp_path / "out")
    arguments[arguments.index("--source") + 1] = str(make_again(make, tmp_path, monkeypatch))
    refused(arguments, [f"{BAD}: ", words], capsys)


def test_a_folder_that_vanishes_is_not_skipped_through(model, tmp_path, capsys, monkeypatch):
    """As on a network disk that is cut off: thousands of listed skips would help nobody."""
    source = after_listing(lambda path: shutil.rmtree(path.parents[1]))(tmp_path, monkeypatch)
    arguments = command(model, tmp_path / "out", "--source", source, "--on-error", "skip")
    refused(arguments, ["the folder of pictures is gone", str(source)], capsys)


def make_again(make, tmp_path, monkeypatch):
    (tmp_path / "again").mkdir()
    return make(tmp_path / "again", monkeypatch)


def zip_of(files):
    return lambda tmp: ["--source", write_zip(tmp / "x.zip", files)]


def folder_of(files, *arguments):
    return lambda tmp: ["--source", write_folder(tmp / "pictures", files), *arguments]


def class_names_of(data):
    def make(tmp):
        (tmp / "names.txt").write_bytes(data)
        source = write_folder(tmp / "pictures")
        return ["--source", source, "--set", f"class_names={tmp / 'names.txt'}"]

    return make


def empty_class(tmp):
    source = write_folder(tmp / "pictures")
    (source / "dog").mkdir()
    return ["--source", source]


def same_name_twice(tmp):
    source = write_folder(tmp / "pictures")
    os.rename(source / BAD, os.fsencode(source / "cat") + b"/\xff.png")
    (source / "cat" / "\\xff.png").write_bytes(noise(3))
    return ["--source", source]


def zip_with_a_name_twice(tmp):
    path = write_zip(tmp / "x.zip", GOOD | {"cat/aa.png": b"a", "cat/bb.png": b"b"})
    path.write_bytes(path.read_bytes().replace(b"cat/bb.png", b"cat/aa.png"))
    return ["--source", path]


def cut_zip(tmp):
    path = write_zip(tmp / "x.zip")
    path.write_bytes(path.read_bytes()[:-30])
    return ["--source", path]


def cut_tar(tmp):
    path = write_tar(tmp / "x.tar")
    path.write_bytes(path.read_bytes()[:2000])
    return ["--source", path]


def compressed_tar(tmp):
    with tarfile.open(tmp / "x.tar.gz", "w:gz") as archive:
        archive.add(write_folder(tmp / "pictures"), "pictures")
    return ["--source", tmp / "x.tar.gz"]


def out_within(tmp):
    source = write_folder(tmp / "pictures")
    return ["--source", source, "--out", source / "tokens"]


def thesis(tmp):
    (tmp / "out").mkdir()
    (tmp / "out" / "thesis.tex").write_text("years of work")
    return ["--source", write_folder(tmp / "pictures")]


def file_in_the_way(tmp):
    (tmp / "file").write_text("a file")
    return ["--source", write_folder(tmp / "pictures"), "--out", tmp / "file" / "out"]


def link_in_the_way(tmp):
    (tmp / "link").symlink_to("nowhere")
    return ["--source", write_folder(tmp / "pictures"), "--out", tmp / "link"]


def settings(*values):
    more = [x for value in values for x in ("--set", value)]
    return lambda tmp: ["--source", write_folder(tmp / "pictures"), *more]


REFUSED = {  # kind: what the command line gets, words of the message
    "zip that climbs": (zip_of(GOOD | {"../../evil.png": b""}), ["x.zip", "'../../evil.png'"]),
    "zip of Windows": (zip_of(GOOD | {"cat\\evil.png": b""}), ["x.zip", "evil.png"]),
    "zip cut off": (cut_zip, ["x.zip is not a whole zip file"]),
    "zip, a name twice": (zip_with_a_name_twice, ["x.zip", "two files named 'cat/aa.png'"]),
    "zip of text": (zip_of({"a.txt": b"text"}), ["x.zip holds no pictures"]),
    "tar cut off": (cut_tar, ["x.tar", "copied or downloaded"]),
    "tar, compressed": (compressed_tar, ["x.tar.gz", "unpack it"]),
    "a name twice": (same_name_twice, ["two files named"]),
    "empty class": (empty_class, ["'dog'", "add some or remove it"]),
    "no pictures": (folder_of({"readme.txt": b"no"}), ["pictures holds no pictures"]),
    "pictures beside classes": (folder_of(GOOD | {"x.png": GOOD[BAD]}), ["x.png", "move"]),
    "a class that one split lacks": (
        folder_of({"train/cat/1.png": GOOD[BAD], "test/dog/1.png": GOOD[BAD]}),
        ["class 'cat' has no picture in the folder 'test'"],
    ),
    "all pictures broken": (
        folder_of({"cat/1.png": b"", "cat/2.png": b"x"}, "--on-error", "skip"),
        ["none of the 2 images could be read"],
    ),
    "class names of other classes": (class_names_of(b"cat\tCat\nowl\tOwl\n"), ["line 2", "'owl'"]),
    "class names, one twice": (class_names_of(b"cat\tA\nbird\tA\n"), ["line 2", "twice"]),
    "class names, one missing": (class_names_of(b"cat\tCat\n"), ["names.txt", "'bird'"]),
    "class names, a binary": (class_names_of(bytes(range(256))), ["names.txt", "UTF-8"]),
    "class names, a number": (settings("class_names=5"), ["class_names=5"]),
    "out is no token set": (thesis, ["is no token set", "thesis.tex"]),
    "out below a file": (file_in_the_way, ["file"]),
    "out is a link to nothing": (link_in_the_way, ["link"]),
    "out within the source": (out_within, ["pictures/tokens lies within", "outside"]),
    "size, a word": (settings("size=abc"), ["size='abc'"]),
    "size, negative": (settings("size=-1"), ["size=-1"]),
    "size, a fraction": (settings("size=1e9"), ["size=1000000000.0"]),
    "size, enormous": (settings("size=1000000000"), ["do not suit this tokenizer"]),
    "channels, a list": (settings("channels=[1]"), ["channels=[1]"]),
    "channels, true": (settings("channels=true"), ["channels=True"]),
    "channels, two": (settings("channels=2"), ["channels=2"]),
    "held_out, two": (settings("held_out=2"), ["held_out=2"]),
    "held_out, no number": (settings("held_out=NaN"), ["held_out=nan"]),
    "crop_area, reversed": (settings("crop_area=[2,1]"), ["crop_area=[2, 1]"]),
    "crop_ratio, absurd": (settings("crop_ratio=[1e-320,1]"), ["crop_ratio="]),
    "flip, a word": (settings("flip=yes"), ["flip='yes'"]),
    "classes, a list": (settings("classes=[1]"), ["classes=[1]"]),
    "source by --set": (settings("source=5"), ["--source"]),
    "tfds, a number for a folder": (
        lambda tmp: ["--source", "tfds:broken_shades", "--set", "data_dir=5"],
        ["data_dir=5"],
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(model, tmp_path, capsys, untouched, kind):
    make, words = REFUSED[kind]
    arguments = command(model, tmp_path / "out", *make(tmp_path))
    before = snapshot(tmp_path / "out", tmp_path)
    untouched()
    refused(arguments, words, capsys)
    if before:
        assert snapshot(tmp_path / "out", tmp_path) == before
    assert not (tmp_path / "out" / "metadata.json").exists()


def test_names_that_are_not_utf8_are_kept_apart_and_found_again(model, finished, tmp_path, capsys):
    root = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/pictures\xff"))
    names = {b"b\xffrd": "b\\xffrd", b"c\nt": "c\nt", "犬 \U0001f415".encode(): "犬 \U0001f415"}
    for raw in names:
        folder = os.fsencode(root) + b"/" + raw
        os.makedirs(folder)
        with open(folder + b"/-\xfe.png", "wb") as file:
            file.write(GOOD[BAD])
    out = tmp_path / "out"
    assert run(command(model, out, "--source", root), capsys) == (0, [])
    metadata = tokens.read_metadata(out)
    assert metadata["class_names"] == sorted(names.values())
    assert metadata["class_counts"] == [1, 1, 1] and metadata["location"]["source"] == str(root)
    expected = records_by_key(finished)[BAD][1]
    assert [codes for _, codes in records_by_key(out).values()] == [expected] * 3
    assert len(images.open_source(**metadata["location"])) == 3


def test_a_message_stays_one_line_whatever_a_file_is_called(model, tmp_path, capsys):
    """Line breaks, and the sign that turns the rest of a line round."""
    source = write_folder(tmp_path / "pictures", {"c\nt/\u202egnp.\tpng.png": b"nothing"})
    words = ["c\\nt/\\u202egnp.\\tpng.png: is not a JPEG"]
    refused(command(model, tmp_path / "out", "--source", source), words, capsys)


class BrokenShades(tfds.core.GeneratorBasedBuilder):
    """Six pictures, one of which is none, and one without a class."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=["bird", "cat"])
        features = {"image": tfds.features.Image(shape=(None, None, 1)), "label": label}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, key in enumerate(KEYS[:6]):
            data = b"broken" if i == 2 else GOOD[key]
            yield i, {"image": io.BytesIO(data), "label": -1 if i == 4 else i % 2}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    BrokenShades(data_dir=path, file_format="array_record").download_and_prepare()
    return path


def test_records_of_tfds_that_are_broken(model, finished, data_dir, tmp_path, capsys):
    arguments = command(model, tmp_path / "out", "--source", "tfds:broken_shades")
    arguments += ["--set", f"data_dir={data_dir}"]
    refused(arguments, ["train[", "--on-error skip"], capsys)
    assert run([*arguments, "--on-error", "skip"], capsys) == (0, [])
    skipped = tokens.read_metadata(tmp_path / "out")["skipped"]
    assert sorted(entry["reason"][:12] for entry in skipped) == ["has no class", "is not a JPE"]
    found = sorted(records_by_key(tmp_path / "out").values())
    expected = records_by_key(finished)
    assert found == sorted(expected[KEYS[i]] for i in (0, 1, 3, 5))


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", ["", '{"name": "sha', "[]", None])
def test_a_tfds_set_whose_description_is_broken(
    model, data_dir, tmp_path, capsys, untouched, name, content
):
    copied = shutil.copytree(data_dir, tmp_path / "tfds")
    file = copied / "broken_shades" / "1.0.0" / name
    file.unlink()
    if content is not None:
        file.write_text(content)
    untouched()
    arguments = command(model, tmp_path / "out", "--source", "tfds:broken_shades")
    refused([*arguments, "--set", f"data_dir={copied}"], ["broken_shades", "prepare"], capsys)
