"""What is kept in buckets: access to them, and copies of what is read from there.

Paths that act like those of this machine are made by ``paths.place``; ``files`` writes to both. An
object appears whole or not at all, as a file of ``files.write_atomically`` does. It cannot be added
to or mapped into memory, a directory cannot be renamed at once, and nothing can be locked: that two
processes do not write the same run is up to the user.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import shutil
import sys
import traceback
from collections.abc import Iterator
from typing import IO, Any

from enat_jax.runtime import exits, files, paths

# What is raised by these is of a bucket, and no bug here.
_LIBRARIES = ("etils", "fsspec", "gcsfs", "google", "aiohttp", "s3fs", "botocore")


def fetched(path: str | os.PathLike) -> pathlib.Path:
    """Returns a path of this machine; of an address, a copy of what is there.

    The copy is made once for each content: the names and versions of all objects decide its folder
    below ``paths.cache_directory``. Each file there is whole, so that after an interruption only
    the rest is fetched. Weights that lie beside their safetensors file are left out.

    Args:
        path: of a file or directory, or an address that fsspec knows, such as gs://bucket/model.

    Raises:
        FileNotFoundError: there is nothing at the address.
        OSError: it cannot be read.
        ValueError: its store is not known here, or a package is missing.
    """
    address = paths.address(path)
    if address is None or address.startswith(paths.HUB):
        return paths.local(path)
    with explained(address):
        system, root = _file_system(address)
        system.invalidate_cache()
        found = _objects(system, root)
        if not found:
            raise FileNotFoundError(f"there is nothing at {address}, or this user may not see it")
        versions = [(name, sorted(about.items())) for name, about in sorted(found.items())]
        version = hashlib.sha256(repr((address, versions)).encode()).hexdigest()[:20]
        copy = paths.cache_directory() / "buckets" / version / root.rpartition("/")[2]
        missing = [name for name in found if not (copy / name).is_file()]
        if missing:
            size = sum(found[name]["size"] for name in missing) / 2**20
            print(
                f"fetching {len(missing)} files, {size:,.1f} MiB, of {address} to {copy}",
                file=sys.stderr,
            )
        for name in missing:
            source, file = f"{root}/{name}" if name else root, copy / name
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(file, functools.partial(_copy, system, source), sync=False)
    return copy


def require(place: Any) -> None:
    """Raises an OSError of one line if a place is in a bucket and this user may not write there."""
    if isinstance(place, pathlib.Path):
        return
    with explained(place):
        files.require_writable(place)


@contextlib.contextmanager
def explained(address: Any) -> Iterator[None]:
    """Within, what the libraries of buckets raise becomes one line that names the address.

    Of a path of this machine nothing changes.

    Raises:
        ValueError: a package is missing, or nobody knows such addresses.
        OSError: of all else that such a library raises.
    """
    if isinstance(address, pathlib.Path):
        yield
        return
    try:
        yield
    except ImportError as error:
        if not _of_libraries(error):
            raise
        package = "enat_jax[gcs]" if str(address).startswith(paths.BUCKET) else "what it asks for"
        raise ValueError(
            f"{address} needs a package that is not installed ({exits.one_line(error)}): "
            f"pip install '{package}'"
        ) from error
    except Exception as error:
        if not _of_libraries(error) or str(address) in str(error):
            raise  # it is of something else, or says already where it comes from
        raise OSError(f"{address}: {_reason(error)}") from error


def _of_libraries(error: Exception) -> bool:
    frames = (frame.f_globals for frame, _ in traceback.walk_tb(error.__traceback__))
    names = [str(names.get("__name__")) for names in frames] + [type(error).__module__]
    return any(name.partition(".")[0] in _LIBRARIES for name in names)


def _reason(error: Exception) -> str:
    said, code = exits.one_line(error), getattr(error, "code", None)
    if isinstance(error, FileNotFoundError):
        return f"there is no such bucket, or nothing of this name in it ({said})"
    lower = said.lower()
    if "credential" in lower or "anonymous" in lower or str(code) == "401":
        return (
            f"this machine has no credentials for it ({said}): run 'gcloud auth "
            "application-default login', or give the machine a service account"
        )
    if isinstance(error, PermissionError) or "forbidden" in lower or str(code) == "403":
        return f"this user may not do that there ({said}): ask for the role Storage Object Admin"
    return said


def _file_system(address: str) -> tuple[Any, str]:
    """Returns fsspec's file system of an address, and the name there without a slash at its end."""
    import fsspec  # late: most programs read from no bucket

    try:
        system, root = fsspec.core.url_to_fs(address)
    except ValueError as error:
        raise ValueError(f"{address}: {exits.one_line(error)}") from error
    return system, root.rstrip("/")


def _objects(system: Any, root: str) -> dict[str, dict[str, Any]]:
    """Returns what is known of objects by their names below ``root``; of an object itself by ""."""
    found = {}
    for path, about in system.find(root, detail=True).items():
        name = path.removeprefix(root).lstrip("/")
        if about["type"] != "file" or path.endswith("/") or not f"{path}/".startswith(f"{root}/"):
            continue
        if ".." in name.split("/"):
            raise ValueError(f"{root} has an object of the name {name!r}, which is not copied")
        found[name] = about
    twice = tuple(
        name.removesuffix(".safetensors") + "/" for name in found if name.endswith(".safetensors")
    )
    return {name: about for name, about in found.items() if not name.startswith(twice)}


def _copy(system: Any, source: str, file: IO[bytes]) -> None:
    with system.open(source, "rb") as content:
        shutil.copyfileobj(content, file, 2**24)
