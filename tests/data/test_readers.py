"""Folders, zip and tar files: one listing for all of them, and a clear word on what is wrong."""

import concurrent.futures
import io
import os
import pickle
import random
import struct
import tarfile
import zipfile

import pytest

from enat_jax.data import decoding, readers
from enat_jax.data.decoding import UnreadableImage

FILES = {
    "cat/b.jpg": b"b" * 3000,
    "cat/a.JPEG": b"a" * 10,
    "dog/deep/c.png": bytes(range(256)) * 40,
    "dog/é.webp": b"",
    "notes.txt": b"text",
    "cat/LICENSE": b"text",
    "cat/.hidden.jpg": b"x",
    ".git/d.jpg": b"x",
    "__MACOSX/cat/a.JPEG": b"x",
    "cat/Thumbs.db": b"x",
    "cat/.DS_Store": b"x",
}
KEYS = ["cat/a.JPEG", "cat/b.jpg", "dog/deep/c.png", "dog/é.webp"]


def make_folder(path, files=FILES):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def make_zip(path, files=FILES, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def make_tar(path, files=FILES, prefix="./", mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def open_any(path):
    return readers.kind(path)(path)


MAKERS = {
    "folder": lambda tmp, files: make_folder(tmp / "folder", files),
    "zip": lambda tmp, files: make_zip(tmp / "x.zip", files),
    "stored zip": lambda tmp, files: make_zip(tmp / "x.ZIP", files, zipfile.ZIP_STORED),
    "tar": lambda tmp, files: make_tar(tmp / "x.tar", files),
}


@pytest.fixture(params=MAKERS)
def make(request, tmp_path):
    tmp_path.joinpath("folder").mkdir()
    return lambda files: open_any(MAKERS[request.param](tmp_path, files))


def test_all_kinds_list_the_same(make):
    for seed in range(3):  # whatever the order of the files
        files = list(FILES.items())
        random.Random(seed).shuffle(files)
        reader = make(dict(files))
        assert reader.keys == KEYS
        assert reader.sizes.tolist() == [10, 3000, 10240, 0]
        assert reader.folders == {"cat", "dog", "dog/deep"}
        hidden = {"hidden files": 3, "hidden folders '.git'": 1, "hidden folders '__MACOSX'": 1}
        assert reader.ignored == {"": 1, ".txt": 1} | hidden
        assert [reader.read(i) for i in range(4)] == [FILES[key] for key in KEYS]


def test_every_file_that_is_not_listed_is_counted_by_reason(make):
    used = ["a/1.JFIF", "a/2.jpe", "a/3.Tif", "a/4.tiff", "a/5.PNG"]
    unused = [
        "a/x.heic",
        "a/y.jp2",
        "README",
        "a/.z.jpg",
        "a/._1.JFIF",
        "Thumbs.db",
        "a/Desktop.ini",
    ]
    hidden = [
        ".git/1.jpg",
        ".git/refs/2.jpg",
        "a/.cache/3.jpg",
        "b/.cache/4.jpg",
        "__MACOSX/a/5.jpg",
    ]
    reader = make({key: b"1" for key in [*used, *unused, *hidden, "b/6.bmp"]})
    assert reader.keys == sorted([*used, "b/6.bmp"])
    assert reader.ignored == {
        **{"": 1, ".heic": 1, ".jp2": 1, "hidden files": 4},
        **{
            "hidden folders '.git'": 1,
            "hidden folders '.cache'": 2,
            "hidden folders '__MACOSX'": 1,
        },
    }
    assert reader.folders == {"a", "b"}


def test_nothing_is_a_listing_too(make):
    reader = make({})
    assert (reader.keys, len(reader.sizes), reader.folders) == ([], 0, frozenset())


def test_a_reader_can_be_sent_to_a_worker_and_shared_by_threads(make):
    files = {f"{i % 7}/{i}.jpg": bytes([i % 256]) * (i * 37) for i in range(200)}
    reader = make(files)
    assert len(pickle.dumps(reader)) < 40_000  # the listing, not the files
    for shared in (reader, pickle.loads(pickle.dumps(reader))):
        order = list(range(200)) * 5
        random.Random(0).shuffle(order)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for i, data in zip(order, pool.map(shared.read, order), strict=True):
                assert data == files[reader.keys[i]]


def test_no_file_stays_open(make):
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    if opened is None:
        pytest.skip("open files cannot be counted here")
    for _ in range(5):
        reader = make(FILES)
        reader.read(1)
        pickle.loads(pickle.dumps(reader)).read(1)
        del reader
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_file_above_the_limit_is_not_read(make, monkeypatch):
    reader = make(FILES)
    monkeypatch.setattr(decoding, "MAX_BYTES", 2999)
    assert reader.read(0) == b"a" * 10
    with pytest.raises(UnreadableImage, match="cat/b.jpg: is too large: 3,000 bytes"):
        reader.read(1)


# Folders.


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = make_folder(tmp_path / "data", {"cat/1.jpg": b"1"})
    make_folder(tmp_path / "elsewhere", {"2.jpg": b"2", "deep/3.jpg": b"3"})
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat/up").symlink_to(root)
    (tmp_path / "elsewhere/deep/again").symlink_to(tmp_path / "elsewhere")
    (root / "cat/4.jpg").symlink_to(root / "cat/1.jpg")
    reader = readers.Folder(root)
    assert reader.keys == ["cat/1.jpg", "cat/4.jpg", "dog/2.jpg", "dog/deep/3.jpg"]
    assert [reader.read(i) for i in range(4)] == [b"1", b"1", b"2", b"3"]


def test_a_link_to_nothing_is_a_picture_that_cannot_be_read(tmp_path):
    """Left out it would be a gap that nobody notices: links are how large sets are shared."""
    (tmp_path / "1.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "2.jpg").symlink_to(tmp_path / "2.jpg")
    reader = readers.Folder(tmp_path)
    assert reader.keys == ["1.jpg", "2.jpg"] and reader.sizes.tolist() == [-1, -1]
    for i in range(2):
        with pytest.raises(UnreadableImage, match=f"{i + 1}.jpg: cannot be read"):
            reader.read(i)


def test_pipes_and_folders_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    make_folder(tmp_path, {"folder.jpg/1.png": b"1", "empty.jpg/x.txt": b""})
    reader = readers.Folder(tmp_path)
    assert reader.keys == ["folder.jpg/1.png"]
    assert reader.ignored == {readers.IRREGULAR: 1, ".txt": 1}
    assert reader.folders == {"folder.jpg", "empty.jpg"}


def test_what_changed_since_the_listing_is_unreadable(tmp_path):
    make_folder(tmp_path, {f"{i}.jpg": b"12345" for i in range(4)})
    reader = readers.Folder(tmp_path)
    for i in range(4):
        (tmp_path / f"{i}.jpg").unlink()
    (tmp_path / "1.jpg").write_bytes(b"123456")
    os.mkfifo(tmp_path / "2.jpg")  # must not be waited for
    (tmp_path / "3.jpg").mkdir()
    words = ["No such file", "has changed", "has changed", "directory"]
    for i, reason in enumerate(words):
        with pytest.raises(UnreadableImage, match=reason):
            reader.read(i)


def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / "caf\udce9").mkdir()
    (tmp_path / "caf\udce9" / "\udcff.jpg").write_bytes(b"1")
    (tmp_path / "plain.jpg").write_bytes(b"2")
    reader = pickle.loads(pickle.dumps(readers.Folder(tmp_path)))
    assert reader.keys == ["caf\\xe9/\\xff.jpg", "plain.jpg"]
    assert [reader.read(0), reader.read(1)] == [b"1", b"2"]
    (tmp_path / "caf\udce9" / "\\xff.jpg").write_bytes(b"3")
    (tmp_path / "caf\\xe9").symlink_to(tmp_path / "caf\udce9")
    with pytest.raises(ValueError, match="two files named"):
        readers.Folder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path):
    make_folder(tmp_path, {"cat/1.jpg": b"1"})
    (tmp_path / "cat/1.jpg").chmod(0)
    with pytest.raises(UnreadableImage, match="Permission denied"):
        readers.Folder(tmp_path).read(0)
    (tmp_path / "cat").chmod(0)
    with pytest.raises(PermissionError, match="cat"):
        readers.Folder(tmp_path)


# Archives.


def test_macos_zip_files_have_readable_names(tmp_path):
    path = make_zip(tmp_path / "x.zip", {"é/1.jpg": b"1"})
    data = bytearray(path.read_bytes())
    for start in (data.index(b"PK\3\4") + 6, data.index(b"PK\1\2") + 8):
        (flags,) = struct.unpack_from("<H", data, start)
        struct.pack_into("<H", data, start, flags & ~0x800)  # no longer said to be UTF-8
    path.write_bytes(data)
    reader = readers.Zip(path)
    assert reader.keys == ["é/1.jpg"] and reader.read(0) == b"1"


def test_an_archive_behind_other_data(tmp_path):
    path = make_zip(tmp_path / "x.zip")
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    reader = readers.Zip(path)
    assert reader.read(1) == b"b" * 3000


def test_links_in_archives_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
        for i, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    link = zipfile.ZipInfo("1.jpg")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert readers.Tar(tmp_path / "x.tar").ignored == {readers.IRREGULAR: 4}
    assert readers.Zip(tmp_path / "x.zip").ignored == {readers.IRREGULAR: 1}
    assert readers.Tar(tmp_path / "x.tar").keys == readers.Zip(tmp_path / "x.zip").keys == []


def test_folders_in_archives_are_seen_even_if_empty(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("cat/", "")
        archive.writestr("dog/1.jpg", "1")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in (".", "./cat"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("./dog/1.jpg"))
    for reader in (readers.Zip(tmp_path / "x.zip"), readers.Tar(tmp_path / "x.tar")):
        assert reader.folders == {"cat", "dog"} and reader.keys == ["dog/1.jpg"]


def test_long_and_odd_names_in_tar_files(tmp_path):
    long = "/".join(["folder" * 20] * 5) + "/1.jpg"
    for number, kind in enumerate([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=kind, errors="surrogateescape") as archive:
            for name, data in ((long, b"long"), ("\udcff.jpg", b"odd!")):
                info = tarfile.TarInfo(name)
                info.size = 4
                archive.addfile(info, io.BytesIO(data))
        reader = readers.Tar(path)
        assert reader.keys == ["\\xff.jpg", long]
        assert [reader.read(0), reader.read(1)] == [b"odd!", b"long"]


def test_a_rewritten_archive_is_noticed(tmp_path):
    path = make_tar(tmp_path / "x.tar")
    reader = readers.Tar(path)
    sent = pickle.dumps(reader)
    with open(path, "r+b") as file:
        file.write(b"x" * 5000)
    os.utime(path, ns=(1, 1))
    with pytest.raises(UnreadableImage, match="has changed"):
        reader.read(0)
    with pytest.raises(UnreadableImage, match="has changed"):
        pickle.loads(sent).read(0)


JPG = {"cat/1.jpg": b"1" * 4000, "cat/2.jpg": b"2" * 4000}  # in a tar file 2 x 4608 bytes


def encrypted(path):
    data = bytearray(make_zip(path).read_bytes())
    start = data.index(b"PK\1\2")
    while (start := data.find(b"PK\1\2", start)) >= 0:
        data[start + 8] |= 1
        start += 4
    path.write_bytes(data)


def cut(make_it, size):
    return lambda path: os.truncate(make_it(path, JPG), size)


def duplicate(path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.jpg", "1")
        archive.writestr("1.jpg", "2")


def twice(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("1.jpg"))
        archive.addfile(tarfile.TarInfo("./1.jpg"))


def joined(path):
    make_tar(path)
    path.write_bytes(path.read_bytes() * 2)


def garbled(path):
    data = bytearray(make_tar(path, {"1.jpg": b"1" * 600, "2.jpg": b"2"}).read_bytes())
    data[512 + 1024 + 10] ^= 0xFF  # in the second file's header
    path.write_bytes(data)


def sparse(path):
    info = tarfile.TarInfo("1.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(info)


def swallowed(path):
    data = bytearray(make_zip(path, {f"{i}.jpg": b"1" for i in range(3)}).read_bytes())
    data[data.index(b"PK\1\2") + 32] = 51  # a comment as long as the next entry, with its name
    path.write_bytes(data)


REFUSED = {
    "swallowed entry": ("x.zip", swallowed, "x.zip is not a whole zip file .* 2 entries of 3"),
    "climbing": ("x.zip", lambda p: make_zip(p, {"../1.jpg": b""}), r"'\.\./1.jpg'"),
    "absolute": ("x.zip", lambda p: make_zip(p, {"/1.jpg": b""}), "'/1.jpg'"),
    "backslash": ("x.zip", lambda p: make_zip(p, {"a\\1.jpg": b""}), "1.jpg"),
    "encrypted": ("x.zip", encrypted, "'cat/a.JPEG' is encrypted"),
    "duplicate": ("x.zip", duplicate, "two files named '1.jpg'"),
    "truncated": ("x.zip", cut(make_zip, 100), "x.zip is not a whole zip file"),
    "text": ("x.zip", lambda p: p.write_text("zip, I promise"), "x.zip is not a whole zip file"),
    "empty": ("x.zip", lambda p: p.touch(), "x.zip is not a whole zip file"),
    "other method": ("x.zip", lambda p: make_zip(p, JPG, zipfile.ZIP_BZIP2), "unsupported method"),
    "compressed": ("x.tar.gz", lambda p: make_tar(p, JPG, mode="w:gz"), "compressed tar file"),
    "compressed, xz": ("x.txz", lambda p: make_tar(p, JPG, mode="w:xz"), "compressed tar file"),
    "named .tar": ("x.tar", lambda p: make_tar(p, JPG, mode="w:gz"), "compressed tar file"),
    "tar, climbing": ("x.tar", lambda p: make_tar(p, {"1.jpg": b""}, "a/../"), r"a/\.\./1.jpg"),
    "tar, absolute": ("x.tar", lambda p: make_tar(p, {"1.jpg": b""}, "/"), "'/1.jpg'"),
    "tar, duplicate": ("x.tar", twice, "two files named '1.jpg'"),
    "tar, cut in a file": ("x.tar", cut(make_tar, 3000), "x.tar is not a whole"),
    "tar, no end": ("x.tar", cut(make_tar, 2 * 4608), "truncated"),
    "tar, text": ("x.tar", lambda p: p.write_text("tar, I promise"), "x.tar is not a whole tar"),
    "tar, empty": ("x.tar", lambda p: p.touch(), "x.tar is not a whole tar"),
    "tar, garbled": ("x.tar", garbled, "at byte 1536"),
    "tar, joined": ("x.tar", joined, "joined"),
    "tar, sparse": ("x.tar", sparse, "sparse"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_archive_is_refused(kind, tmp_path):
    name, build, words = REFUSED[kind]
    build(tmp_path / name)
    with pytest.raises(ValueError, match=words):
        open_any(tmp_path / name)


def directory_says(field, value):
    """A zip file of one deflated picture in whose directory a field is changed."""

    def make(path):
        data = bytearray(make_zip(path, {"1.jpg": b"1" * 4000}).read_bytes())
        struct.pack_into("<I", data, data.index(b"PK\1\2") + field, value)
        path.write_bytes(data)

    return make


def damaged(place):
    def make(path):
        data = bytearray(make_zip(path, {"1.jpg": os.urandom(4000)}).read_bytes())
        data[place] ^= 0xFF
        path.write_bytes(data)

    return make


UNREADABLE = {
    "more than it says": (directory_says(24, 100), "another size"),
    "less than it says": (directory_says(24, 5000), "another size"),
    "wrong checksum": (directory_says(16, 1), "wrong checksum"),
    "too large": (directory_says(24, 65 * 2**20), "too large: 68,157,440 bytes"),
    "packed too large": (directory_says(20, 65 * 2**20), "too large"),
    "no header": (directory_says(42, 7), "no header"),
    "behind the end": (directory_says(42, 10**6), "cannot be read|no header|ends within"),
    "damaged header": (damaged(0), "no header"),
    "damaged name": (damaged(30), "another name"),
    "damaged data": (damaged(2000), "wrong checksum|damaged"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_member_that_lies_is_unreadable(kind, tmp_path):
    build, words = UNREADABLE[kind]
    build(tmp_path / "x.zip")
    reader = readers.Zip(tmp_path / "x.zip")
    with pytest.raises(UnreadableImage, match=f"1.jpg: .*({words})"):
        reader.read(0)


def test_what_no_reader_reads(tmp_path):
    (tmp_path / "x.jpg").touch()
    assert readers.kind(tmp_path / "x.jpg") is None
    assert readers.kind(tmp_path / "nothing") is None
