"""Errors of the operating system, which say nothing about what a file holds.

A lack of descriptors, of memory or of permission and a file system that does not answer are no
damage: the data are good, and whoever removed them would lose them. Readers that turn what they
find wrong with a file into "is damaged" call ``pass_on`` first.
"""

import errno
import os
import re
import resource
from collections.abc import Iterator
from typing import NoReturn

_DISK = "see to the disk or the network, then start again"
_PERMISSION = "let this user have it (chmod, chown), then start again"
_ROOM = "make room there, then start again"

# What to do about each. What is not here, such as a file that is missing, may well be damage.
ADVICE = {
    errno.EMFILE: "raise the limit of open files (ulimit -n 4096), then start again",
    errno.ENFILE: "the whole machine has too many files open: close some, then start again",
    errno.ENOMEM: "free memory, then start again",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EFBIG: "raise the limit of the size of files (ulimit -f unlimited), then start again",
    errno.EROFS: "mount it for writing or name another directory",
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.ELOOP: "it is a link to itself: mend or remove the link",
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys(
        (
            *(errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT),
            *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
            *(errno.ECONNRESET, errno.ECONNABORTED, errno.EBUSY),
        ),
        _DISK,
    ),
}
# They concern a process and not the one file that it wanted: no reason to leave a file out.
OF_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN)

# TensorStore, and so Orbax, puts the system's words into the text of a ValueError.
_STATUS = re.compile(r"[A-Z_]+: ")
_WORDS = {os.strerror(number): number for number in ADVICE}
_CODES = {"PERMISSION_DENIED": errno.EACCES, "RESOURCE_EXHAUSTED": errno.ENOMEM}


def behind(error: BaseException, path: str | os.PathLike) -> OSError | MemoryError | None:
    """Returns the error of the operating system behind an exception, or None if there is none.

    Args:
        error: an exception, whose causes are looked at, too.
        path: that was being read, named by an error that names no file itself.
    """
    for one in _chain(error):
        if isinstance(one, MemoryError):
            return MemoryError(f"{os.fspath(path)}: {one}" if str(one) else os.fspath(path))
        if isinstance(one, OSError) and one.errno in ADVICE:
            return OSError(one.errno, one.strerror, one.filename or os.fspath(path))
        if not isinstance(one, OSError) and (number := _in_text(str(one))):
            return OSError(number, os.strerror(number), os.fspath(path))
    return None


def pass_on(error: BaseException, path: str | os.PathLike) -> None:
    """Raises what ``behind`` returns, if it returns an error."""
    if found := behind(error, path):
        raise found from error


def below(directory: str | os.PathLike) -> OSError | None:
    """Returns the first error of the system over opening the files below a directory, if any.

    A library that asks whether a file exists takes one that it may not see for one that is missing,
    and then complains of something else.
    """
    try:
        for top, _, names in os.walk(os.fspath(directory), onerror=_raise):
            for name in names:
                os.close(os.open(os.path.join(top, name), os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        return error if error.errno in ADVICE else None
    return None


def words(error: OSError | MemoryError) -> str | None:
    """Returns one line with the system's reason, the file and what to do; None if it has none."""
    if isinstance(error, MemoryError):
        said = f" ({error})" if str(error) else ""
        return f"not enough memory{said}: {ADVICE[errno.ENOMEM]}"
    if not error.strerror:
        return None
    places = (error.filename, error.filename2)  # of a renaming both
    named = " and ".join(os.fsdecode(x) for x in places if isinstance(x, str | bytes))
    return ": ".join(filter(None, [error.strerror, named, ADVICE.get(error.errno or 0)]))


def allow_open_files(count: int, path: str | os.PathLike) -> None:
    """Raises this process's own limit of open files if ``count`` more of them need it.

    Args:
        count: files that a library is going to open and to keep open.
        path: their directory, for the message.

    Raises:
        OSError: the limit cannot be raised as far.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or count <= soft // 2:
        return
    wanted = soft + count
    if hard != resource.RLIM_INFINITY and wanted > hard:
        if count > hard - 64:  # what else a process has open, at least
            reason = f"{count} files are needed, {hard} allowed"
            raise OSError(errno.EMFILE, f"{os.strerror(errno.EMFILE)} ({reason})", os.fspath(path))
        wanted = hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _raise(error: OSError) -> NoReturn:
    raise error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _in_text(text: str) -> int | None:
    """Returns the number of the system's error that a status of TensorStore tells of, if any."""
    if not _STATUS.match(text):
        return None
    if found := [number for said, number in _WORDS.items() if f": {said}" in text]:
        return found[0]
    return _CODES.get(text.partition(":")[0])
