"""Weights of other programs become names and arrays; hostile and damaged files one clear line."""

import collections
import errno
import json
import os
import pickle
import struct
import zipfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import torch_writer as writer
from flax import serialization

from enat_jax.checkpoints import pickles, torch_files, weight_files
from enat_jax.runtime import files

BFLOAT16 = np.dtype(jnp.bfloat16)
ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.bias": np.array([0.5, -2.0], np.float16),
    "b.weight": np.array([[1.0, -3.5]]).astype(BFLOAT16),
    "b.count": np.array(7, np.int64),
    "c.table": np.linspace(0, 1, 5),
    "c.mask": np.array([True, False]),
    "d.empty": np.zeros((0, 3), np.float32),
}
WRITERS = {"zip": writer.zip_bytes, "legacy": writer.legacy_bytes}
# A training checkpoint of Lightning: objects of its classes, optimizer state, numbers.
LIGHTNING = {
    "epoch": 3,
    "pytorch-lightning_version": "1.6.4",
    "state_dict": ARRAYS,
    "callbacks": {
        "ModelCheckpoint": {"best": writer.call(writer.name("pathlib", "PosixPath"), "a", "b")},
        "EMA": {"weights": {"a.bias": ARRAYS["a.bias"]}},
    },
    "optimizer_states": [{"state": {"0": {"exp_avg": ARRAYS["a.weight"]}}}],
    "hyper_parameters": writer.call(writer.name("lightning.parsing", "AttributeDict"), {"lr": 0.1}),
}


def written(tmp_path, content, name="file"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def refused(path, words=None, part=None):
    """The one line that refuses a file."""
    with pytest.raises(ValueError, match=words) as error:
        weight_files.read(path, part)
    line = str(error.value)
    assert str(path) in line and "\n" not in line and len(line) < 900
    return line


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "U4"])
def test_types_that_are_not_read_are_named(kind, tmp_path):
    entries = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "w": {"dtype": kind, "shape": [2], "data_offsets": [4, 5 if "4" == kind[1] else 6]},
    }
    header = json.dumps(entries).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(6)
    path = written(tmp_path, content)
    assert "damaged" not in refused(path, f"weights of type {kind}, .* convert them to float32")


def test_what_the_system_says_is_no_damage(tmp_path, monkeypatch):
    path = written(tmp_path, writer.zip_bytes(ARRAYS))
    for error, words in (
        (OSError(errno.EIO, "Input/output error"), f"Input/output error: '{path}'"),
        (ValueError("UNAVAILABLE: reading: Stale file handle"), f"Stale file handle: '{path}'"),
    ):
        monkeypatch.setattr(torch_files, "read_zip", mock.Mock(side_effect=error))
        with pytest.raises(OSError, match=words):
            weight_files.read(path)
    monkeypatch.setattr(torch_files, "read_zip", mock.Mock(side_effect=MemoryError("1 TiB")))
    assert "damaged" not in refused(path, "needs more memory than there is")


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(
    "container",
    [
        ARRAYS,
        {"state_dict": ARRAYS},
        {"model": ARRAYS, "optimizer": {"state": {"0": ARRAYS}}, "step": 5, "args": None},
        {"a": {"b": {"c": ARRAYS}}},
        LIGHTNING,
        {**ARRAYS, "note": "numbers and texts are left out", "epoch": 2},
    ],
    ids=["plain", "state_dict", "model", "deep", "lightning", "mixed"],
)
def test_files_of_torch(write, container, tmp_path):
    same(weight_files.read(written(tmp_path, write(container), "x.safetensors")), ARRAYS)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_with_several_sets_of_weights_asks_which(write, tmp_path):
    path = written(tmp_path, write({"model": ARRAYS, "ema": {"x": ARRAYS["a.bias"]}}))
    assert "'model'" in refused(path, "several sets") and "'ema'" in refused(path, "several sets")
    same(weight_files.read(path, part="ema"), {"x": ARRAYS["a.bias"]})
    refused(path, "no part 'emma' with tensors; it has", part="emma")


def test_views_of_a_shared_storage(tmp_path):
    base = np.arange(12, dtype=np.float32)
    make = lambda *args: writer.tensor(base, "0", *args)  # noqa: E731
    tensors = {
        "whole": make(0, (3, 4)),
        "transposed": make(0, (4, 3), (1, 4)),
        "slice": make(5, (2, 2), (4, 2)),
        "last": make(11, (), ()),
        "parameter": writer.call(
            writer.name("torch._utils", "_rebuild_parameter"), make(0, (12,)), True, None
        ),
    }
    found = weight_files.read(written(tmp_path, writer.zip_bytes(tensors, {"0": base})))
    np.testing.assert_array_equal(found["whole"], base.reshape(3, 4))
    np.testing.assert_array_equal(found["transposed"], base.reshape(3, 4).T)
    np.testing.assert_array_equal(found["slice"], [[5, 7], [9, 11]])
    np.testing.assert_array_equal(found["last"], 11)
    np.testing.assert_array_equal(found["parameter"], base)


def test_safetensors_and_back(tmp_path):
    path = tmp_path / "new" / "x.pth"
    weight_files.write_safetensors(path, {**ARRAYS, "t": ARRAYS["a.weight"].T}, {"from": "here"})
    same(weight_files.read(path), {**ARRAYS, "t": np.ascontiguousarray(ARRAYS["a.weight"].T)})
    assert b"__metadata__" in path.read_bytes()[:100]
    assert [p.name for p in path.parent.iterdir()] == ["x.pth"]
    with pytest.raises(ValueError, match="x.pth cannot hold these"):
        weight_files.write_safetensors(path, {"x": np.array(["text"])})
    refused(path, "has no parts", part="ema")


def test_equal_tensors_and_metadata_make_equal_bytes(tmp_path):
    """The library writes metadata in another order at each call."""
    metadata = {f"key {i}": 'é"\x7f' for i in range(8)}
    written = []
    for order in (sorted, lambda x: sorted(x, reverse=True)):
        path = tmp_path / f"{len(written)}.safetensors"
        chosen = {key: metadata[key] for key in order(metadata)}
        weight_files.write_safetensors(path, ARRAYS, chosen)
        written.append(path.read_bytes())
    assert written[0] == written[1]
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == metadata
    same(weight_files.read(path), ARRAYS)


def test_msgpack_of_flax(tmp_path):
    arrays = {
        "a": {"kernel": ARRAYS["a.weight"], "bias": ARRAYS["b.weight"]},
        "c": ARRAYS["c.mask"],
    }
    flat = {"a/kernel": ARRAYS["a.weight"], "a/bias": ARRAYS["b.weight"], "c": ARRAYS["c.mask"]}
    packed = serialization.msgpack_serialize({"params": arrays, "step": 4})
    path = written(tmp_path, packed)
    same(weight_files.read(path), flat)
    same(
        weight_files.read(path, part="params/a"),
        {"kernel": flat["a/kernel"], "bias": flat["a/bias"]},
    )
    refused(path, "no part 'ema'; it has", part="ema")
    same(weight_files.read(written(tmp_path, serialization.msgpack_serialize(arrays))), flat)


def test_msgpack_whose_names_become_equal(tmp_path):
    tree = {"a": {"b": ARRAYS["a.weight"]}, "a/b": ARRAYS["b.weight"]}
    refused(
        written(tmp_path, serialization.msgpack_serialize(tree)), "two tensors are called 'a/b'"
    )


class Payload:
    """What a hostile pickle runs when Python's own unpickler reads it."""

    def __init__(self, *made_by):
        self.made_by = made_by[0], made_by[1:]

    def __reduce__(self):
        return self.made_by


def hostile_values(command):
    system = writer.name(os.system.__module__, "system")
    run = writer.call(system, command)
    evaluate = writer.call(writer.name("builtins", "eval"), f"__import__('os').system({command!r})")
    tensor = writer.tensor(ARRAYS["a.bias"], "0")
    rebuild = writer.name("torch._utils", "_rebuild_tensor_v2")
    return {
        "system": run,
        "eval": {"state_dict": evaluate},
        "beside a tensor": {"x": tensor, "y": run},
        "as a tensor": {"x": writer.call(rebuild, run, 0, (2,), (1,))},
        "as a size": {"x": writer.call(rebuild, writer.reference("HalfStorage", "0", 2), run)},
        "chain": writer.call(
            writer.call(writer.name("builtins", "getattr"), writer.name("os", "x"), "system"),
            command,
        ),
        "state": writer.Raw(writer.instructions({"x": tensor}) + run + b"b"),
        "object": writer.Raw(b"(" + bytes(system) + writer.instructions(command) + b"o"),
        "instance": writer.Raw(b"(" + writer.instructions(command) + b"iposix\nsystem\n"),
        "reference": writer.Raw(writer.instructions(("storage", run, run, "cpu", 1)) + b"Q"),
    }


@pytest.mark.parametrize("kind", hostile_values("x"))
def test_hostile_pickles_never_run(kind, tmp_path):
    target = tmp_path / "made"
    value = hostile_values(f"touch {target}")[kind]
    storages = {"0": ARRAYS["a.bias"]}
    for number, content in enumerate(
        [
            writer.zip_bytes(value, storages),
            writer.legacy_bytes(value),
            writer.pickled(value),
            writer.instructions(value) + b".",
        ]
    ):
        path = written(tmp_path, content, f"{kind} {number}")
        try:
            same(weight_files.read(path), {"x": ARRAYS["a.bias"]})
            assert kind in ("beside a tensor", "state") and number == 0
        except ValueError as error:
            assert str(path) in str(error)
    assert not target.exists()


def test_the_payloads_would_run(tmp_path):
    target = tmp_path / "made"
    for kind in ("system", "eval", "beside a tensor", "instance"):
        value = hostile_values(f"touch {target}")[kind]
        if kind == "beside a tensor":
            value = {"y": value["y"]}
        pickle.loads(writer.pickled(value))
        assert target.exists()
        target.unlink()


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_no_torch_are_refused(protocol, tmp_path):
    target = tmp_path / "made"
    content = pickle.dumps(Payload(os.system, f"touch {target}"), protocol)
    refused(written(tmp_path, content), "not of torch.save|not a safetensors file|a text")
    assert not target.exists()


BASE = np.arange(4, dtype=np.float32)


@pytest.mark.parametrize(
    "value, words",
    [
        (writer.tensor(BASE, "0", 0, (5,)), "beyond its storage of 4"),
        (writer.tensor(BASE, "0", 3, (2,)), "beyond"),
        (writer.tensor(BASE, "0", 0, (2, 2), (4, 1)), "beyond"),
        (writer.tensor(BASE, "0", 0, (2,), (-1,)), "damaged"),
        (writer.tensor(BASE, "0", -1, (2,)), "damaged"),
        (writer.tensor(BASE, "0", 2**61, (0,)), "beyond"),
        (writer.tensor(BASE, "0", 0, (2**40,), (0,)), "beyond"),
        (writer.tensor(BASE, "0", 0, (2**61, 2**61), (0, 0)), "beyond"),
        (writer.tensor(BASE, "0", 0, (2**70,), (0,)), "damaged"),
        (writer.tensor(BASE, "0", 0, (2, 2), (1,)), "damaged"),
        (writer.tensor(BASE, "0", 0, (1,) * 40), "damaged"),
        (writer.tensor(BASE, "0", 0, (2**40,), count=2**40), "16 bytes, not 1099511627776"),
        (writer.tensor(BASE, "1"), "storage '1' is missing"),
        (writer.tensor(BASE, "../../0"), "missing"),
        (writer.tensor(BASE, "0" * 1000), "missing"),
        (writer.call(writer.name("torch._utils", "_rebuild_tensor_v2")), "which only PyTorch"),
        (writer.call(writer.name("torch._utils", "_rebuild_qtensor"), 1), "no dictionary"),
    ],
)
def test_tensors_that_reach_outside_are_errors(value, words, tmp_path):
    refused(written(tmp_path, writer.zip_bytes({"x": value}, {"0": BASE})), words)


def test_a_tensor_of_an_unknown_kind_is_named(tmp_path):
    odd = writer.call(writer.name("torch._utils", "_rebuild_sparse_tensor"), 1)
    good = writer.tensor(BASE, "0")
    path = written(tmp_path, writer.zip_bytes({"x": good, "y": odd}, {"0": BASE}))
    refused(path, "tensor 'y': made by 'torch._utils._rebuild_sparse_tensor'")
    old = writer.call(
        writer.name("torch._utils", "_rebuild_tensor_v2"),
        *(writer.reference("QUInt8Storage", "0", 16), 0, (16,), (1,)),
    )
    refused(
        written(tmp_path, writer.zip_bytes({"y": old}, {"0": BASE})), "QUInt8Storage' is unknown"
    )


def test_many_tensors_on_one_storage_are_refused(tmp_path):
    base = np.zeros(100_000, np.float32)
    tensors = {str(i): writer.tensor(base, "0") for i in range(1000)}
    refused(written(tmp_path, writer.zip_bytes(tensors, {"0": base})), "overlap so often")


def test_zip_bombs_and_other_archives(tmp_path):
    bomb = writer.zip_bytes({"x": np.zeros(10**7, np.float32)}, None, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    refused(written(tmp_path, bomb), "compressed inside")
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", writer.pickled({}))
        archive.writestr("b/data.pkl", writer.pickled({}))
    refused(path, "not a file of torch.save")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../data.pkl", writer.pickled({}))
        archive.writestr("/etc/passwd", "x")
    refused(path, "without a `data.pkl`")
    for member, content, words in (
        ("m/constants.pkl", "", "TorchScript"),
        ("m/byteorder", "big", "big-endian"),
        ("m/x", "", "no dictionary of tensors"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data.pkl", writer.pickled({}))
            archive.writestr(member, content)
        refused(path, words)


def test_a_pickle_that_is_too_large(tmp_path, monkeypatch):
    path = written(tmp_path, writer.zip_bytes(ARRAYS))
    monkeypatch.setattr(pickles, "MAX_PICKLE", 100)
    refused(path, "larger than 100 bytes")


def test_whole_objects_are_refused(tmp_path):
    module = writer.call(writer.name("my.models", "Net"))
    for write in WRITERS.values():
        line = refused(written(tmp_path, write(module)), "a whole object, 'my.models.Net'")
        assert "state_dict()" in line
        refused(written(tmp_path, write([1, 2])), "no dictionary of tensors")


def test_dictionaries_that_contain_themselves(tmp_path):
    # Memo 0 is a dictionary that holds itself under many names.
    inside = b"".join(writer.instructions(f"k{i}") + b"h\x00" for i in range(50))
    refused(written(tmp_path, writer.zip_bytes(writer.Raw(b"}q\x00(" + inside + b"u"))), "no dict")


GOOD = {
    "zip": writer.zip_bytes(LIGHTNING),
    "legacy": writer.legacy_bytes(LIGHTNING),
    "msgpack": serialization.msgpack_serialize(
        {"params": {k: v for k, v in ARRAYS.items() if k != "d.empty"}}
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "x"
    weight_files.write_safetensors(path, ARRAYS)
    return {**GOOD, "safetensors": path.read_bytes()}


@pytest.mark.parametrize("kind", [*GOOD, "safetensors"])
def test_files_that_are_cut_off(kind, good, tmp_path):
    content = good[kind]
    for tenth in range(10):
        cut = content[: len(content) * tenth // 10]
        refused(written(tmp_path, cut))
    refused(written(tmp_path, content[:-1]))


@pytest.mark.parametrize("kind", [*GOOD, "safetensors"])
def test_flipped_bits(kind, good, tmp_path):
    rng = np.random.default_rng(0)
    content = np.frombuffer(good[kind], np.uint8)
    outcomes = collections.Counter()
    path = tmp_path / "file"
    for _ in range(80):
        damaged = content.copy()
        where = rng.integers(0, len(content), rng.integers(1, 4))
        damaged[where] ^= 1 << rng.integers(0, 8, len(where)).astype(np.uint8)
        path.write_bytes(damaged.tobytes())
        try:
            found = weight_files.read(path)
        except ValueError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert all(isinstance(array, np.ndarray) for array in found.values())
        assert sum(array.nbytes for array in found.values()) <= 4 * len(content)
        if kind == "zip":  # which has checksums
            same(found, ARRAYS)
    assert outcomes["refused"] > 8


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "a text that starts with '<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"\x00\x01\x02" * 20, "not a safetensors file"),
        (struct.pack("<Q", 2**62) + b'{"a": 1}', "header is cut off"),
        (struct.pack("<Q", 2) + b"{}", "no tensors"),
        (b"\x81\xa1a\xc0", "no tensors"),
        (b"\x81\xa1a\x81\xa1b\xc4\x01x", "'a/b' is no tensor but bytes"),
        (b"\x81" * 5000, None),
        (b"\xdf\xff\xff\xff\xff" + b"a" * 100, None),
        (b"\x81\xa1a\xc7\x05\x01abcde", None),
        (b"\x81\xa1a\xc7\x08\x01\x93\x91\x01\xa1,\xc4\x00", None),  # the type ","
        (b"\x81\xbb__msgpack_chunked_array__\xc3", None),
    ],
)
def test_other_files(content, words, tmp_path):
    refused(written(tmp_path, content), words)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        weight_files.read(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match=f"{path} is no regular file"):
            weight_files.read(path)


@pytest.mark.torch
def test_files_of_torch_itself(tmp_path):
    import torch

    tensors = {
        "weight": torch.arange(6.0).reshape(2, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "slice": torch.arange(20)[5:9:2],
        "half": torch.linspace(0, 1, 5).half(),
        "bfloat16": torch.linspace(0, 1, 5).bfloat16(),
        "double": torch.tensor(0.1, dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 2),
    }
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pth"
        torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=zipped)
        found = weight_files.read(path)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            expected = tensor.detach()
            if name == "bfloat16":
                assert found[name].dtype == BFLOAT16
                expected, found[name] = expected.float(), found[name].astype(np.float32)
            np.testing.assert_array_equal(found[name], expected.numpy(), strict=True)
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
        found = weight_files.read(path)
        assert found.keys() == model.state_dict().keys()
        np.testing.assert_array_equal(found["0.weight"], model[0].weight.detach().numpy())
        torch.save(model, path, _use_new_zipfile_serialization=zipped)
        refused(path, "a whole object, 'torch.nn.modules.container.Sequential'")


def test_what_was_written_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write = files.write_atomically

    def damaged(path, content):
        write(path, content[:-1] + bytes([content[-1] ^ 1]))

    def cut(path, content):
        write(path, content[:-1])

    for faulty in (damaged, cut):
        monkeypatch.setattr(files, "write_atomically", faulty)
        with pytest.raises(OSError, match="a.safetensors cannot be read back as it was written"):
            weight_files.write_safetensors(path, ARRAYS)
