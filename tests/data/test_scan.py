"""Scans of pictures: all that cannot be read are found at once, and nothing else is called so."""

import errno
import os
import pickle

import hostile
import pytest

from enat_jax.data import decoding, images, scan

FILES = {f"{'ab'[i % 2]}/{i:02d}.png": hostile.noise(i) for i in range(80)}
BAD = {"a/08.png": FILES["a/08.png"][:60], "b/33.png": b"", "b/79.png": b"text"}


def source_of(path, **settings):
    return images.open_source(str(path), "train", **{"size": 8} | settings)


def bad_of(source):
    found = {}
    for part in scan.scan([(source, i) for i in range(len(source))]):
        found |= part
    assert list(found) == [key for key, *_ in source.listing()]
    return {key: reason for key, reason in found.items() if reason is not None}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_all_pictures_that_cannot_be_read_are_found(kind, tmp_path):
    write = getattr(hostile, f"write_{kind}")
    source = source_of(write(tmp_path / f"pictures.{kind}", FILES | BAD))
    found = bad_of(source)
    assert found.keys() == BAD.keys()
    assert "empty" in found["b/33.png"] and "is not a JPEG" in found["b/79.png"]


def test_a_scan_finds_what_loading_finds(tmp_path, monkeypatch):
    """Too many pixels, and too elongated for the size, are no damage, and are found, too."""
    large = {"a/large.png": hostile.noise(0, side=41), "a/long.png": hostile.noise(1, side=40)}
    folder = hostile.write_folder(tmp_path / "pictures", FILES | large)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1600)
    for size, bad in ((8, {"a/large.png"}), (41, FILES.keys() | large.keys())):
        source = source_of(folder, size=size)
        assert bad_of(source).keys() == bad
        for i in range(3):
            if source.key(i) in bad:
                with pytest.raises(images.UnreadableImage):
                    source.load(i)
            else:
                source.load(i)


def test_a_source_without_pictures_is_that_where_they_never_were(tmp_path):
    both = [
        source_of(hostile.write_folder(tmp_path / "bad", FILES | BAD)),
        source_of(
            hostile.write_folder(tmp_path / "few", {k: FILES[k] for k in FILES.keys() - BAD})
        ),
    ]
    lines = []
    both[0] = scan.readable(both[0], lines.append)
    (line,) = lines
    assert line.startswith("left out: 3 of 80 pictures cannot be read: a/08.png: is ")
    assert both[0].identity() == both[1].identity() and len(both[0]) == 77
    assert pickle.loads(pickle.dumps(both[0])).identity() == both[1].identity()
    for i in (0, 8, 76):
        one, other = (source.load(i, 5) for source in both)
        assert (one.key, one.label) == (other.key, other.label) and (one.image == other.image).all()
    assert scan.readable(both[1], lines.append) is both[1] and len(lines) == 1


def test_a_class_is_not_lost_in_silence(tmp_path):
    source = source_of(hostile.write_folder(tmp_path, FILES | {"c/1.png": b""}))
    with pytest.raises(ValueError, match="class 'c' has no picture that can be read"):
        scan.readable(source, print)


def test_digits_are_not_scanned():
    digits = images.open_source("digits", "train")
    assert not isinstance(digits, scan.Scannable) and scan.readable(digits, print) is digits


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE])
def test_what_is_not_the_picture_s_fault_ends_a_scan(tmp_path, monkeypatch, number):
    source = source_of(hostile.write_folder(tmp_path / "pictures", FILES))

    def failing(*arguments):
        raise OSError(number, os.strerror(number), arguments[0])

    monkeypatch.setattr("os.open", failing)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        bad_of(source)
    assert not isinstance(caught.value, images.UnreadableImage)
    assert "pictures/a/" in str(caught.value.filename)
