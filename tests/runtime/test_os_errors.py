"""What the system says is told apart from damage, wherever it stands in a chain of errors."""

import errno
import os
import resource

import pytest

from enat_jax.runtime import os_errors

TENSORSTORE = (
    'Error opening "zarr" driver: Error reading local file "/m/manifest.ocdbt": Failed to open'
)


def raised(error, cause):
    """``error`` as a reader raises it while it handles ``cause``."""
    try:
        try:
            raise cause
        except type(cause):
            raise error  # noqa: B904 # as a library that does not say from what
    except type(error) as found:
        return found


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EMFILE, "Too many open files"), errno.EMFILE),
        (PermissionError(errno.EACCES, "Permission denied", "other"), errno.EACCES),
        (raised(ValueError("bad"), OSError(errno.EIO, "Input/output error")), errno.EIO),
        (ValueError(f"RESOURCE_EXHAUSTED: {TENSORSTORE}: Too many open files"), errno.EMFILE),
        (ValueError(f'UNKNOWN: {TENSORSTORE}: "/m": Too many levels of symbolic links'), 40),
        (ValueError(f"UNAVAILABLE: {TENSORSTORE}: Stale file handle [x='y']"), errno.ESTALE),
        (ValueError("PERMISSION_DENIED: Error reading a file"), errno.EACCES),
    ],
)
def test_an_error_of_the_system_is_found(error, number):
    found = os_errors.behind(error, "file")
    assert isinstance(found, OSError) and found.errno == number
    assert found.filename == (getattr(error, "filename", None) or "file")
    with pytest.raises(type(found)):
        os_errors.pass_on(error, "file")


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        OSError("image file is truncated"),
        OSError(errno.EINVAL, "Invalid argument"),  # a position that no file has
        ValueError("NOT_FOUND: Metadata does not exist"),
        ValueError("DATA_LOSS: Error decoding manifest"),
        ValueError("a class called Permission denied"),
        EOFError(),
    ],
)
def test_what_a_file_holds_is_no_error_of_the_system(error):
    assert os_errors.behind(error, "file") is None
    os_errors.pass_on(error, "file")


def test_a_lack_of_memory_is_one():
    error = raised(ValueError("cannot be read"), MemoryError("3 GiB"))
    with pytest.raises(MemoryError, match="file: 3 GiB"):
        os_errors.pass_on(error, "file")
    assert os_errors.behind(raised(KeyError(1), MemoryError()), "file").args == ("file",)


def test_the_words_say_what_to_do():
    error = OSError(errno.EMFILE, "Too many open files", b"a")
    assert os_errors.words(error) == (
        "Too many open files: a: raise the limit of open files (ulimit -n 4096), then start again"
    )
    assert os_errors.words(OSError("no number")) is None


def test_the_limit_of_open_files_is_raised_where_it_may_be(monkeypatch):
    limits = [256, 1024]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: limits.__setitem__(0, new[0]))
    os_errors.allow_open_files(100, "set")
    assert limits[0] == 256  # enough
    os_errors.allow_open_files(600, "set")
    assert limits[0] == 856
    os_errors.allow_open_files(800, "set")
    assert limits[0] == 1024
    with pytest.raises(OSError, match="1024 files are needed, 1024 allowed") as caught:
        os_errors.allow_open_files(1024, "set")
    assert (caught.value.errno, caught.value.filename) == (errno.EMFILE, "set")
    assert os.strerror(errno.EMFILE) in os_errors.words(caught.value)
