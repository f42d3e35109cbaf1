"""Files as torch.save writes them, made without PyTorch; and ones that it would never write.

A pickle is put together from its instructions, so that it may say anything.
"""

import io
import struct
import zipfile

import jax.numpy as jnp
import numpy as np

STORAGES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(jnp.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}


class Raw(bytes):
    """Instructions that leave one value on the stack."""


def name(module, attribute):
    return Raw(f"c{module}\n{attribute}\n".encode())


def call(function, *arguments):
    return Raw(function + instructions(tuple(arguments)) + b"R")


def reference(storage_type, key, count):
    """To a storage."""
    found = ("storage", name("torch", storage_type), key, "cpu", count)
    return Raw(instructions(found) + b"Q")


def tensor(array, key, offset=0, shape=None, strides=None, count=None):
    """Of the storage ``key``, which has ``count`` elements; by default all of ``array``."""
    shape = array.shape if shape is None else shape
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        reference(STORAGES[array.dtype], key, array.size if count is None else count),
        *(offset, tuple(shape), tuple(strides), False),
        call(name("collections", "OrderedDict")),
    )


def instructions(value):
    if isinstance(value, Raw):
        return bytes(value)
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(instructions, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(instructions, value)) + b"e"
    assert isinstance(value, dict)
    pairs = b"".join(instructions(k) + instructions(v) for k, v in value.items())
    return b"}(" + pairs + b"u"


def pickled(value):
    return b"\x80\x02" + instructions(value) + b"."


def with_tensors(tree, storages):
    """The tree with its arrays replaced by tensors, whose storages are put into the dictionary."""
    if isinstance(tree, np.ndarray):
        key = str(len(storages))
        storages[key] = np.array(tree, order="C")
        return tensor(tree, key)
    if isinstance(tree, dict):
        return {k: with_tensors(v, storages) for k, v in tree.items()}
    return [with_tensors(x, storages) for x in tree] if isinstance(tree, list) else tree


def zip_bytes(tree, storages=None, compression=zipfile.ZIP_STORED):
    """The format since 1.6, of a tree of dictionaries and arrays, or of instructions."""
    storages = {} if storages is None else storages
    content = pickled(with_tensors(tree, storages))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("weights/data.pkl", content)
        archive.writestr("weights/byteorder", "little")
        for key, array in storages.items():
            archive.writestr(f"weights/data/{key}", array.tobytes())
        archive.writestr("weights/version", "3\n")
    return file.getvalue()


def legacy_bytes(tree):
    """The format before 1.6."""
    storages = {}
    content = pickled(with_tensors(tree, storages))
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    head = [pickled(0x1950A86A20F9469CFC6C), pickled(1001), pickled(system)]
    body = [struct.pack("<q", a.size) + a.tobytes() for a in storages.values()]
    return b"".join([*head, content, pickled(list(storages)), *body])
