"""PyTorch's files of tensors, read without PyTorch and without running anything in them.

Two formats (PyTorch's serialization notes and ``torch/serialization.py``): since 1.6 an
uncompressed .zip with a pickle ``data.pkl`` and a member ``data/KEY`` for each storage; before, a
row of pickles with the storages behind them. In both a tensor is a call of a function that the
pickle names, of which those in ``_PLAIN`` are understood.

A pickle is a program that may call any function of any module. ``pickles`` reads it as data.
"""

import functools
import math
import pathlib
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from enat_jax.checkpoints import pickles
from enat_jax.checkpoints.pickles import Call, Global, Persistent

MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the old format
_PROTOCOL = 1001  # second one
_MAX_DEPTH = 8  # of dictionaries in dictionaries
_COPIES = 4  # of the file's size that its tensors may take together: tied weights count twice

_TYPES: dict[str, np.dtype] = {
    "Double": np.dtype(np.float64),
    "Float": np.dtype(np.float32),
    "Half": np.dtype(np.float16),
    "BFloat16": np.dtype(jnp.bfloat16),
    "Long": np.dtype(np.int64),
    "Int": np.dtype(np.int32),
    "Short": np.dtype(np.int16),
    "Char": np.dtype(np.int8),
    "Byte": np.dtype(np.uint8),
    "Bool": np.dtype(np.bool_),
}
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _TYPES.items()}
_PLAIN = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_PARAMETERS = {
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
}
# What Lightning and others keep beside the weights; some of it has tensors of its own.
_NOT_WEIGHTS = ("optimizer", "lr_scheduler", "callbacks", "loops", "hyper_parameters", "scaler")

Storages = Callable[[str], bytes | memoryview]


class TorchScript(ValueError):
    """A file is a program, and not one of tensors."""


def read_zip(path: pathlib.Path, part: str | None) -> dict[str, np.ndarray]:
    """Reads the tensors of a file of PyTorch 1.6 or later; see ``weight_files.read``."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        size = path.stat().st_size
        if len(members) < len(archive.infolist()):
            raise ValueError("two members have the same name: not a file of torch.save, or damaged")
        if any(name.split("/")[1:] == ["constants.pkl"] for name in members):
            raise TorchScript("a TorchScript program: load it in PyTorch and save its state_dict()")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("it is compressed inside, which torch.save never does: save it anew")
        if sum(member.file_size for member in members.values()) > size:
            raise ValueError("its members claim more bytes than the file has: damaged")
        named = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
        if len(named) != 1:
            raise ValueError("a .zip without a `data.pkl`: not a file of torch.save")
        root = named[0].removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("written on a big-endian machine: save it anew on another one")
        if members[named[0]].file_size > pickles.MAX_PICKLE:
            raise ValueError(f"its pickle is larger than {pickles.MAX_PICKLE:,} bytes")
        weights = _weights(pickles.load(archive.read(named[0])).value, part)

        @functools.cache  # tied weights have one
        def storage(key: str) -> bytes:
            if f"{root}data/{key}" not in members:
                raise ValueError(f"its storage {key[:40]!r} is missing: damaged")
            return archive.read(f"{root}data/{key}")

        return _arrays(weights, storage, size)


def is_legacy(head: bytes) -> bool:
    """Says whether a file that starts so is of PyTorch before 1.6."""
    try:
        return pickles.load(head).value == MAGIC
    except ValueError:
        return False


def read_legacy(path: pathlib.Path, part: str | None) -> dict[str, np.ndarray]:
    """Reads the tensors of a file from before PyTorch 1.6; see ``weight_files.read``."""
    data = np.memmap(path, np.uint8, mode="r").data
    position, found = 0, []
    for _ in range(5):
        found.append(pickles.load(bytes(data[position : position + pickles.MAX_PICKLE])))
        position += found[-1].end
    _, protocol, system, value, keys = (each.value for each in found)
    if protocol != _PROTOCOL or not isinstance(system, dict) or not isinstance(keys, list):
        raise ValueError("damaged, or of a PyTorch that is too old")
    if system.get("little_endian") is not True:
        raise ValueError("written on a big-endian machine: save it anew on another one")
    weights = _weights(value, part)
    itemsizes = {}
    for reference in found[3].persistent:
        if not (isinstance(reference.id, tuple) and reference.id[:1] == ("module",)):
            dtype, key, _ = _storage_of(reference)
            itemsizes[key] = dtype.itemsize
    storages = {}
    for key in keys:
        if not isinstance(key, str) or key not in itemsizes or key in storages:
            raise ValueError("its list of storages is damaged")
        (count,) = struct.unpack("<q", data[position : position + 8])
        end = position + 8 + count * itemsizes[key]
        if count < 0 or end > len(data):
            raise ValueError("it ends within its tensors: copy or download it again")
        storages[key] = data[position + 8 : end]
        position = end
    return _arrays(weights, storages.__getitem__, len(data))


# --- tensors ------------------------------------------------------------------------------------


def _weights(value: Any, part: str | None) -> dict[str, Any]:
    """Returns the dictionary of tensors in what a file holds, or the named part of it."""
    if isinstance(value, Call):
        raise ValueError(
            f"a whole object, {_shown(value.function)}, which only its own program could rebuild: "
            "load it there and save its state_dict()"
        )
    found = dict(_parts(value)) if isinstance(value, dict) else {}
    if part is not None:
        if part not in found:
            raise ValueError(f"no part {part!r} with tensors; it has {_listed(found)}")
        return found[part]
    wanted = {k: v for k, v in found.items() if not k.split("/")[0].startswith(_NOT_WEIGHTS)}
    if not wanted:
        raise ValueError("no dictionary of tensors in it: save a model's state_dict()")
    if len(wanted) > 1:
        raise ValueError(f"several sets of tensors, {_listed(wanted)}: say which one is meant")
    return next(iter(wanted.values()))


def _parts(value: dict) -> Iterator[tuple[str, dict]]:
    """Yields all dictionaries with tensors, and the keys that lead to them, joined by "/"."""
    waiting, seen = [("", value, 0)], set()
    while waiting:
        path, found, depth = waiting.pop()
        if id(found) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(found))
        if any(_is_tensor(x) for x in found.values()):
            yield path, found
        for key, x in found.items():
            if isinstance(x, dict):
                waiting.append((f"{path}/{key}" if path else key, x, depth + 1))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Call) and value.function in _PLAIN | _PARAMETERS


def _arrays(weights: Mapping, storage: Storages, size: int) -> dict[str, np.ndarray]:
    """Returns the tensors of a dictionary as views of their storages, without the rest of it."""
    arrays, total = {}, 0
    for name, value in weights.items():
        if isinstance(value, Call) and value.function.startswith("torch._"):
            try:
                arrays[name] = _tensor(value, storage)
            except ValueError as error:
                raise ValueError(f"tensor {_shown(name)}: {error}") from error
            total += arrays[name].nbytes
            if total > _COPIES * size:
                raise ValueError("its tensors overlap so often that they are larger than the file")
    return arrays


def _tensor(call: Call, storage: Storages) -> np.ndarray:
    arguments = call.arguments
    if call.function in _PARAMETERS and arguments and isinstance(arguments[0], Call):
        call, arguments = arguments[0], arguments[0].arguments
    if call.function not in _PLAIN or len(arguments) < 4:
        raise ValueError(f"made by {_shown(call.function)}, which only PyTorch could run")
    reference, offset, shape, strides = arguments[:4]
    dtype, key, count = _storage_of(reference)
    _check(offset, shape, strides, count)
    content = storage(key)
    if len(content) != count * dtype.itemsize:
        raise ValueError(f"its storage has {len(content)} bytes, not {count} of {dtype}: damaged")
    elements = np.frombuffer(content, dtype)[offset:]
    strides = tuple(step * dtype.itemsize for step in strides)
    return np.lib.stride_tricks.as_strided(elements, shape, strides, writeable=False)


def _check(offset: Any, shape: Any, strides: Any, count: int) -> None:
    """Raises ValueError unless every element lies within a storage of ``count`` elements.

    Strides that lead outside would read other memory.
    """
    whole = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    if not whole or len(shape) > 32 or not all(_is_size(x) for x in (offset, *shape, *strides)):
        raise ValueError("its shape or strides are damaged")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    elements = math.prod(shape)
    if offset > count or elements > count or (elements and last >= count):
        raise ValueError(f"shape {shape} reaches beyond its storage of {count}: damaged")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _storage_of(reference: Any) -> tuple[np.dtype, str, Any]:
    """Returns type, key and number of elements of the storage that a pickle refers to."""
    found = reference.id if isinstance(reference, Persistent) else None
    if not isinstance(found, tuple) or len(found) not in (5, 6) or found[0] != "storage":
        raise ValueError("its reference to a storage is damaged")
    kind, key, count = found[1], found[2], found[4]
    if len(found) == 6 and found[5] is not None:
        raise ValueError("it is a view of another storage, of a PyTorch that is too old")
    if not isinstance(kind, Global) or kind.name not in _STORAGES:
        name = _shown(kind.name) if isinstance(kind, Global) else "something unnamed"
        raise ValueError(f"a storage of type {name} is unknown: save it as float32 or bfloat16")
    if not isinstance(key, str) or not _is_size(count):
        raise ValueError("its reference to a storage is damaged")
    return _STORAGES[kind.name], key, count


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def _listed(parts: Mapping) -> str:
    return ", ".join(_shown(name) for name in list(parts)[:5]) or "none"
