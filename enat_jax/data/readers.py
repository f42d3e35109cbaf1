"""The bytes of picture files in a folder, a zip file or a tar file, with a sorted listing of them.

Readers are thread-safe and picklable; an archive is opened again where it is unpickled. Archives
are never unpacked. Hidden files and folders and what macOS and Windows add are passed over.
"""

import collections
import errno
import os
import pathlib
import stat
import struct
import tarfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, NoReturn, Protocol

import numpy as np
from jaxtyping import Int

from enat_jax.data import decoding, drawn
from enat_jax.runtime import os_errors

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tar.zst", ".tzst")
_COMPRESSED = (b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")  # gzip, xz, bzip2, zstandard
_COMPRESSED_TAR = (
    "is a compressed tar file, in which no picture can be read without all before it: unpack it (a "
    "folder and an uncompressed .tar will do) or pack it as a .zip"
)
# Reasons that files are not listed for, beside their extension.
HIDDEN = "hidden files"
HIDDEN_FOLDERS = "hidden folders"
IRREGULAR = "links, pipes or devices"
_LITTER = ("__macosx", "thumbs.db", "desktop.ini")  # beside what begins with a dot
# What zipfile raises of damaged files, and of versions and names that it cannot read.
_NOT_ZIP = (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error)


class Reader(Protocol):
    """Picture files of one place, numbered by their sorted keys."""

    keys: list[str]  # sorted by code points: relative paths with "/", unique, encodable as UTF-8
    sizes: Int[np.ndarray, " n"]  # int64, bytes of each file; -1 for a link to nothing
    folders: frozenset[str]  # that were seen; there may be no pictures in them
    ignored: dict[str, int]  # number of files that are not listed, by extension or another reason
    missing: dict[str, int]  # number of images that ``sample`` did not finish, by folder
    places: Int[np.ndarray, "n items"]  # what reading a file needs, beginning with its size
    packed: bool  # whether it is an archive

    def read(self, i: int) -> bytes:
        """Returns the content of file ``i``; raises UnreadableImage."""


class _Listing:
    """Collects files; the result does not depend on the order they come in."""

    def __init__(self, source: object) -> None:
        self._source = source
        self._found: dict[str, tuple[int, ...]] = {}
        self._settings: dict[str, tuple[int, ...]] = {}  # files that ``sample`` may have written
        self._folders: set[str] = set()
        self._ignored: collections.Counter[str] = collections.Counter()
        self._hidden_folders: set[str] = set()  # but those within others

    def add_folder(self, key: str) -> None:
        if key and not self._is_hidden(f"{key}/"):
            self._folders.add(key)

    def _is_hidden(self, key: str) -> bool:
        """Says whether a file or, ending in "/", a folder is passed over, and counts it."""
        if not _is_litter(key):
            return False
        parts = key.split("/")
        first = next(i for i, part in enumerate(parts) if _is_litter(part))
        if first < len(parts) - 1:
            self._hidden_folders.add("/".join(parts[: first + 1]))
        else:
            self._ignored[HIDDEN] += 1
        return True

    def add(self, key: str, where: tuple[int, ...], regular: bool = True) -> bool:
        """Takes a file and says whether it is a picture.

        ``where`` is what reading it needs, beginning with its size.

        Raises:
            ValueError: there is a picture of this key already.
        """
        if self._is_hidden(key):
            return False
        folder, _, name = key.rpartition("/")
        if folder:
            self._folders.add(folder)
        extension = os.path.splitext(name)[1].lower()
        if regular and name == drawn.SETTINGS:
            self._settings[key] = where
        if not regular or extension not in decoding.EXTENSIONS:
            self._ignored[extension if regular else IRREGULAR] += 1
            return False
        if key in self._found:
            raise ValueError(f"{self._source} holds two files named {key!r}: rename or remove one")
        self._found[key] = where
        return True

    def finish(self, reader: Reader, items: int) -> None:
        """Gives ``reader`` its attributes; ``items`` is the length of each ``where``."""
        reader.missing = {}
        if self._settings or any(key.endswith(drawn.BESIDE) for key in self._found):
            self._leave_samples_alone(reader, items)
        self._list(reader, self._found, items)
        reader.folders = frozenset(self._folders)
        for folder in self._hidden_folders:
            self._ignored[f"{HIDDEN_FOLDERS} {os.path.basename(folder)!r}"] += 1
        reader.ignored = dict(sorted(self._ignored.items()))

    def _list(self, reader: Reader, found: Mapping[str, tuple[int, ...]], items: int) -> None:
        reader.keys = sorted(found)
        try:
            places = np.array([found[key] for key in reader.keys], np.int64)
        except OverflowError as error:
            raise ValueError(f"{self._source} is damaged: a file in it has no size") from error
        reader.places = places.reshape(-1, items)  # without pictures it has one axis only
        reader.sizes = reader.places[:, 0]

    def _leave_samples_alone(self, reader: Reader, items: int) -> None:
        """Drops what ``sample`` wrote beside its images, and finds images that it did not write."""
        self._list(reader, self._settings, items)
        told: dict[str, drawn.Drawn | None] = {}
        for i, key in enumerate(reader.keys):
            try:
                told[key.rpartition("/")[0]] = drawn.Drawn.read(reader.read(i))
            except decoding.UnreadableImage:  # encrypted, say: it is not ours
                continue
        pictures: dict[str, list[str]] = {}
        for key in self._found:
            folder, _, name = key.rpartition("/")
            pictures.setdefault(folder, []).append(name)
        for folder, names in pictures.items():
            beside = drawn.pictures_beside(names, told.get(folder))
            for name in beside:
                del self._found[f"{folder}/{name}" if folder else name]
                self._ignored[drawn.LEFT_OUT] += 1
            if (said := told.get(folder)) and (lost := len(said) - len(names) + len(beside)):
                reader.missing[folder] = lost


def _is_litter(key: str) -> bool:
    if key.startswith(".") or "/." in key:
        return True
    lower = key.lower()
    return any(name in lower for name in _LITTER) and not {*_LITTER}.isdisjoint(lower.split("/"))


class Folder(Reader):
    """The files below a folder; links to folders are followed, but not round in circles.

    Raises:
        OSError: the folder or one within it cannot be listed. ``read`` raises it if the folder is
            not there any more, as on a network disk that is cut off.
    """

    packed = False

    def __init__(self, path: str | os.PathLike) -> None:
        self._root = os.path.abspath(path)
        listing = _Listing(path)
        self._names = {}  # on disk, of files whose keys are spelled otherwise
        for top, folders, names in os.walk(self._root, onerror=_raise, followlinks=True):
            above = "" if top == self._root else f"{os.path.relpath(top, self._root)}/"
            for name in folders:
                listing.add_folder(as_utf8(above + name))
            folders[:] = [x for x in folders if not _is_litter(x) and not self._in_circle(top, x)]
            for name in names:
                key = as_utf8(above + name)
                if key != above + name:
                    self._names[key] = above + name
                try:
                    status = os.stat(os.path.join(top, name))
                except OSError:  # a link to nothing or to itself, or a file that is gone by now
                    listing.add(key, (-1,))
                else:
                    listing.add(key, (status.st_size,), stat.S_ISREG(status.st_mode))
        listing.finish(self, items=1)

    def _in_circle(self, top: str, name: str) -> bool:
        """Says whether a folder is one that it lies in."""
        folder = pathlib.Path(top, name)
        parents = [x for x in folder.parents if x.is_relative_to(self._root)]
        return any(map(folder.samefile, parents))

    def read(self, i: int) -> bytes:
        key = self.keys[i]
        path = os.path.join(self._root, self._names.get(key, key))
        try:
            # Not to wait for a writer, should it be a pipe by now.
            with (
                decoding.naming(key),
                open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file,
            ):
                status = os.fstat(file.fileno())
                _check_size(status.st_size)
                if not stat.S_ISREG(status.st_mode) or status.st_size != self.sizes[i]:
                    raise ValueError("has changed since the folder was listed")
                return file.read()
        except decoding.UnreadableImage as error:
            if os.path.isdir(self._root):
                raise
            # This is no fault of the picture, and no reason to skip it.
            gone = "the folder of pictures is gone"
            raise FileNotFoundError(errno.ENOENT, gone, self._root) from error


def _raise(error: OSError) -> NoReturn:
    raise error


def as_utf8(name: str) -> str:
    """Returns the name of a file as text that can be written: bytes that are not UTF-8 escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class _File:
    """An open file that is read at any place by any thread; opened again where it is unpickled."""

    def __init__(self, path: str | os.PathLike, stamp: tuple[int, int] | None = None) -> None:
        self._path = os.path.abspath(path)
        self._descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        weakref.finalize(self, os.close, self._descriptor)
        self._stamp = stamp or self._now()

    def __reduce__(self) -> tuple[type["_File"], tuple[str, tuple[int, int]]]:
        return _File, (self._path, self._stamp)

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        """Returns ``size`` bytes; raises ValueError if there are fewer or the file has changed."""
        if self._now() != self._stamp:
            raise ValueError(f"cannot be read: {self._path} has changed since it was opened")
        parts = []
        while size > 0 and (part := os.pread(self._descriptor, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        if size > 0:
            raise ValueError(f"cannot be read: {self._path} ends within it")
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Zip(Reader):
    """The members of a zip file, stored or deflated; several threads read at once.

    Raises:
        ValueError: it is damaged, encrypted or compressed otherwise, or a name in it is unsafe or
            occurs twice.
        OSError: it cannot be opened.
    """

    packed = True

    def __init__(self, path: str | os.PathLike) -> None:
        self._file = _File(path)
        listing = _Listing(path)
        for info in sorted(_zip_members(path), key=zip_name):  # messages name the first one
            name = zip_name(info)
            if "\\" in name:
                raise _unsafe(path, name)
            key = _member_key(path, name)
            if info.is_dir():
                listing.add_folder(key)
                continue
            linked = info.create_system == 3 and stat.S_ISLNK(info.external_attr >> 16)
            method = info.compress_type
            where = (info.file_size, info.header_offset, info.compress_size, method, info.CRC)
            if not listing.add(key, where, not linked):
                continue
            if info.flag_bits & 1:
                raise ValueError(f"{path}: {key!r} is encrypted: pack it without a password")
            if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"{path}: {key!r} is compressed by an unsupported method ({method}): pack it "
                    "again, stored or deflated"
                )
        listing.finish(self, items=5)

    def read(self, i: int) -> bytes:
        size, header, packed, method, crc = map(int, self.places[i])
        with decoding.naming(self.keys[i]):
            _check_size(max(size, packed))
            fixed = self._file.read(header, 30)
            if fixed[:4] != b"PK\3\4":
                raise ValueError("has no header where the zip file's directory says")
            name, extra = struct.unpack("<HH", fixed[26:])
            own_name = _zip_text(self._file.read(header + 30, name))
            if _member_key("the zip file", own_name) != self.keys[i]:
                raise ValueError("has another name than the zip file's directory says")
            data = self._file.read(header + 30 + name + extra, packed)
            if method == zipfile.ZIP_DEFLATED:
                try:
                    # One byte more than there should be: more than that is never unpacked.
                    data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
                except zlib.error as error:
                    raise ValueError(f"is damaged ({error})") from error
            if len(data) != size:
                raise ValueError("has another size than the zip file's directory says")
            if zlib.crc32(data) != crc:
                raise ValueError("is damaged (wrong checksum in the zip file)")
            return data


def _zip_members(path: str | os.PathLike) -> list[zipfile.ZipInfo]:
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                found = archive.infolist()
            _check_number(file, len(found))
            return found
        except _NOT_ZIP as error:
            os_errors.pass_on(error, path)
            raise ValueError(
                f"{path} is not a whole zip file ({error}): was it copied or downloaded completely?"
            ) from error


def _check_number(file: BinaryIO, found: int) -> None:
    """Raises ValueError unless the end of a zip file tells of as many entries as were found."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16) - 22))
    end = file.read()
    (number,) = struct.unpack_from("<H", end, end.rfind(b"PK\5\6") + 10)
    if number not in (found & 0xFFFF, 0xFFFF):  # the last is that of a zip64 file
        raise ValueError(f"its directory lists {found} entries of {number}")


def zip_name(info: zipfile.ZipInfo) -> str:
    """Returns the name of a member of a zip file as it was meant."""
    name = info.orig_filename  # ``filename`` ends at a zero byte
    return name if info.flag_bits & 0x800 else _zip_text(name.encode("cp437"))


def _zip_text(name: bytes) -> str:
    try:  # macOS writes UTF-8 without saying so
        return name.decode("utf-8")
    except UnicodeError:
        return name.decode("cp437")


class Tar(Reader):
    """The members of a tar file that is not compressed; several threads read at once.

    Links, devices and pipes count as no pictures.

    Raises:
        ValueError: it is compressed or damaged or ends early, or a name in it is unsafe or occurs
            twice.
        OSError: it cannot be opened.
    """

    packed = True

    def __init__(self, path: str | os.PathLike) -> None:
        self._file = _File(path)
        listing = _Listing(path)
        for member in _tar_members(path):
            key = _member_key(path, member.name)
            if member.isdir():
                if key:
                    listing.add_folder(key)
                continue
            if member.issparse():
                raise ValueError(f"{path}: {key!r} is stored as a sparse file: pack it without -S")
            listing.add(key, (member.size, member.offset_data), member.isreg())
        listing.finish(self, items=2)

    def read(self, i: int) -> bytes:
        size, offset = map(int, self.places[i])
        with decoding.naming(self.keys[i]):
            _check_size(size)
            return self._file.read(offset, size)


def _tar_members(path: str | os.PathLike) -> Iterator[tarfile.TarInfo]:
    with open(path, "rb") as file:
        if file.read(6).startswith(_COMPRESSED):
            raise ValueError(f"{path} {_COMPRESSED_TAR}")
        file.seek(0)
        try:
            with tarfile.open(
                fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape"
            ) as archive:
                while (member := archive.next()) is not None:
                    yield member
                    # Or a million of them would stay in memory.
                    archive.members.clear()  # type: ignore[attr-defined] # typeshed lacks it
                end = archive.offset
        except (tarfile.TarError, EOFError, struct.error) as error:
            raise ValueError(
                f"{path} is not a whole tar file ({error}): was it copied or downloaded completely?"
            ) from error
        # The module takes whatever it cannot read for the end.
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or any(block):
            raise ValueError(
                f"{path} is damaged or truncated: at byte {end} there is neither a file nor the "
                "archive's end"
            )
        while block := file.read(2**20):
            if block.count(0) != len(block):
                raise ValueError(
                    f"{path} goes on after its end at byte {end}, as archives that were joined by "
                    "cat do: pack the files into one archive, or open the archives one by one"
                )


def _member_key(path: str | os.PathLike, name: str) -> str:
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise _unsafe(path, name)
    return as_utf8("/".join(part for part in parts if part not in ("", ".")))


def _unsafe(path: str | os.PathLike, name: str) -> ValueError:
    return ValueError(
        f"{path} holds a file with the name {name!r}, which is no plain relative path with '/': "
        "pack it again"
    )


def _check_size(size: int) -> None:
    if size > decoding.MAX_BYTES:
        raise ValueError(f"is too large: {size:,} bytes, at most {decoding.MAX_BYTES:,} are read")


def kind(path: pathlib.Path) -> Callable[[pathlib.Path], Reader] | None:
    """Returns the class that reads what is at ``path``, by its name; None if there is none.

    Raises:
        ValueError: it is a compressed tar file.
    """
    if path.is_dir():
        return Folder
    if not path.is_file():
        return None
    name = path.name.lower()
    if name.endswith(COMPRESSED_TARS):
        raise ValueError(f"{path} {_COMPRESSED_TAR}")
    archives: dict[str, Callable[[pathlib.Path], Reader]] = {".zip": Zip, ".tar": Tar}
    return archives.get(os.path.splitext(name)[1])
