"""Files of weights, of whatever program: safetensors, PyTorch's, Flax's. Nothing is run.

What a file is decides its content, not its name. All formats become the same: names and arrays.
"""

import json
import os
import pathlib
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import serialization

from enat_jax.checkpoints import pickles, torch_files
from enat_jax.runtime import exits, files, os_errors, paths

# What the readers of damaged and hostile files raise, beside ValueError.
_DAMAGE = (
    *(zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, struct.error),
    *(safetensors.SafetensorError, KeyError, IndexError, TypeError, AttributeError),
    *(AssertionError, OverflowError),
    SyntaxError,  # of numpy, about the name of a type in a msgpack file
)
_MAX_HEADER = 100_000_000  # bytes of JSON, the limit of the safetensors format
_SAFETENSORS_TYPES = "F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64".split()


def read(path: str | os.PathLike, part: str | None = None) -> dict[str, np.ndarray]:
    """Reads the tensors of a file of weights, by name.

    It may be safetensors; what torch.save wrote, in its .zip format or the one before, be it a
    ``state_dict()`` or a checkpoint that contains one, such as Lightning's; and Flax's msgpack, or
    a pickle of numpy's arrays, whose nested dictionaries give names like "encoder/Conv_0/kernel".
    Numbers and texts beside the tensors are left out.

    Args:
        path: of the file.
        part: the set of tensors to read where a file has several, by its keys, such as "ema" or
            "model/params"; None: the only one (of nested dictionaries "params", or everything).

    Returns:
        Arrays, which may be read-only views of one another or of the file. bfloat16 is that of
        jax.numpy.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is of no such format, damaged, hostile, or has no or several sets of tensors.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():  # a pipe would wait for a writer
        raise ValueError(f"{path} is no regular file: name a file of weights")
    with open(path, "rb") as file:
        head = file.read(64)
    try:
        reader = _reader(head, path.stat().st_size)
        tensors = reader(path, part)
        if not tensors:
            raise ValueError("it holds no tensors")
    except ValueError as error:
        os_errors.pass_on(error, path)
        raise ValueError(f"{path}: {exits.one_line(error, 500)}") from error
    except MemoryError as error:  # there is not as much, or a damaged file claims too much
        raise ValueError(
            f"{path} needs more memory than there is ({exits.one_line(error)}): free some, and "
            "see that the file is whole"
        ) from error
    except (*_DAMAGE, OSError) as error:  # of the system, or a position that no file has
        os_errors.pass_on(error, path)
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(
            f"{path} is damaged: copy or download it again ({exits.one_line(error)})"
        ) from error
    return tensors


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, whole or not at all, and reads it; its directory is created.

    Equal tensors and metadata make equal bytes.

    Args:
        path: of the file.
        tensors: arrays by name, of any layout in memory.
        metadata: texts for the file's header.

    Raises:
        OSError: it cannot be written, or not be read back as it was.
        ValueError: an array is of a type that the format does not have.
    """
    path = paths.place(path)
    dense = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    try:
        content = safetensors.numpy.save(dense, dict(metadata) if metadata else None)
        content = _with_sorted_metadata(content) if metadata else content
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot hold these tensors ({exits.one_line(error)})") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, content)
    try:
        if isinstance(path, pathlib.Path):
            found = _read_safetensors(path, None)
        else:
            found = safetensors.numpy.load(path.read_bytes())
        same = all(found[name].tobytes() == array.tobytes() for name, array in dense.items())
    except (safetensors.SafetensorError, KeyError):
        same = False
    if not same:
        raise OSError(f"{path} cannot be read back as it was written: see to the disk")


def _with_sorted_metadata(content: bytes) -> bytes:
    """Returns a safetensors file whose metadata are in order: the library's order is random."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _reader(head: bytes, size: int) -> Callable[[pathlib.Path, str | None], dict[str, np.ndarray]]:
    """Returns the function that reads a file of ``size`` bytes which starts with ``head``."""
    if not head:
        raise ValueError("the file is empty: copy or download it again")
    if head.startswith(b"PK\x03\x04"):
        return torch_files.read_zip
    # A pickle starts with its protocol; as msgpack the same byte is an empty dictionary.
    if head[0] == 0x80 and len(head) > 1 and head[1] <= 5:
        return torch_files.read_legacy if torch_files.is_legacy(head) else _read_pickle
    if 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):
        return _read_msgpack
    if len(head) > 8 and head[8] == ord("{"):
        (header,) = struct.unpack("<Q", head[:8])
        if header > min(_MAX_HEADER, size - 8):
            raise ValueError("its header is cut off: copy or download it again")
        return _read_safetensors
    start = head.lstrip()[:20]
    if start.isascii() and start.decode().isprintable():
        raise ValueError(
            f"a text that starts with {start.decode()!r}, no weights: a download that failed, or a "
            "pointer of Git LFS?"
        )
    raise ValueError("not a safetensors file, nor one of torch.save, nor Flax's msgpack")


def _read_safetensors(path: pathlib.Path, part: str | None) -> dict[str, np.ndarray]:
    if part is not None:
        raise ValueError(f"a safetensors file has no parts, so there is no {part!r} in it")
    try:
        return safetensors.numpy.load_file(path)
    except Exception:
        if unknown := sorted(_types(path) - {*_SAFETENSORS_TYPES}):
            raise ValueError(
                f"it holds weights of type {', '.join(unknown)}, which are not read here: convert "
                "them to float32 or bfloat16 with the program that wrote them"
            ) from None
        raise


def _types(path: pathlib.Path) -> set[str]:
    """Returns the types that the header of a safetensors file names; empty if it is damaged."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        try:
            header = json.loads(file.read(length))
            return {str(x["dtype"]) for name, x in header.items() if name != "__metadata__"}
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
            return set()


def _read_msgpack(path: pathlib.Path, part: str | None) -> dict[str, np.ndarray]:
    return _flat(serialization.msgpack_restore(path.read_bytes()), part)


def _read_pickle(path: pathlib.Path, part: str | None) -> dict[str, np.ndarray]:
    return _flat(pickles.read_arrays(path), part)


def _flat(tree: Any, part: str | None) -> dict[str, np.ndarray]:
    """Returns the arrays of nested dictionaries by their keys, joined by "/"."""
    if part is None and isinstance(tree, dict) and "params" in tree:
        tree = tree["params"]
    for key in part.split("/") if part else ():
        if not isinstance(tree, dict) or key not in tree:
            raise ValueError(f"no part {part!r}; it has {sorted(map(str, tree))[:5]}")
        tree = tree[key]
    tensors, waiting = {}, [("", tree)]
    while waiting:
        path_, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{path_}/{k}" if path_ else str(k), v) for k, v in value.items()]
        elif isinstance(value, np.ndarray | np.generic) and (
            value.dtype.kind in "biuf" or value.dtype == jnp.bfloat16
        ):
            if path_ in tensors:
                raise ValueError(f"two tensors are called {path_[:80]!r}")
            tensors[path_] = np.asarray(value)
        elif not isinstance(value, str | int | float | None):
            raise ValueError(f"{path_[:80]!r} is no tensor but {type(value).__name__}")
    return tensors
