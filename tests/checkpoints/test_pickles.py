"""A pickle is read as data; whatever it asks for is noted and never done."""

import collections
import copyreg
import os
import pickle
import struct
import time
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import torch_writer as writer

from enat_jax.checkpoints import pickles, weight_files


class Evil:
    """Unpickling one calls a function."""

    def __init__(self, function, *arguments):
        self.made_by = function, arguments

    def __reduce__(self):
        return self.made_by


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_every_protocol(protocol):
    value = {
        "numbers": [0, -1, 255, 70_000, 2**40, -(2**70), 0.5, True, False, None],
        "texts": ("", "é", "x" * 300, b"bytes"),
        "ordered": collections.OrderedDict(a=1, b=[(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]),
    }
    found = pickles.load(pickle.dumps(value, protocol) + b"what follows")
    assert found.value["numbers"] == value["numbers"]
    assert found.value["texts"][:3] == value["texts"][:3]
    assert found.value["ordered"] == value["ordered"]
    assert found.end == len(pickle.dumps(value, protocol))


def test_what_is_shared_stays_shared():
    shared = ["x"]
    a, b = pickles.load(pickle.dumps([shared, shared])).value
    assert a is b == ["x"]


@pytest.mark.parametrize("protocol", range(6))
def test_a_call_is_noted_and_not_made(protocol, tmp_path):
    target = tmp_path / "made"
    data = pickle.dumps([Evil(open, str(target), "w"), Evil(eval, "1 / 0")], protocol)
    first, second = pickles.load(data).value
    assert first.function.endswith(".open") and first.arguments == (str(target), "w")
    assert second.function.endswith(".eval") and second.arguments == ("1 / 0",)
    assert not target.exists()


def test_keys_that_are_no_names_are_left_out():
    # The hash of a tuple nested so deep would take longer than anybody lives.
    nested = b"(t" + b"2\x86" * 100
    data = b"}(" + nested + b"NX\x01\x00\x00\x00aK\x01u."
    start = time.monotonic()
    assert pickles.load(data).value == {"a": 1}
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02N",
        b".",
        b"0.",
        b"t.",
        b"h\x05.",
        b"K\x01K\x02a.",
        b"](X\x01\x00\x00\x00ae",
        b"}(K\x01u.",
        b"K\x01(K\x01K\x02u.",
        b"\x8c\x01aK\x01\x93.",
        b"X\xff\xff\xff\x7fabc.",  # a text of 2 GiB, which is not there
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x00.",  # bytes, 72 PB of them
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff.",
        b"\x8b\xff\xff\xff\x7f\x01.",
        b"\x82\x01.",  # a registered extension
        b"\x97.",  # a buffer from outside
        b"\xff.",
        b"I" + b"9" * 10_000 + b"\n.",
    ],
)
def test_damaged_pickles_are_errors(data):
    with pytest.raises(ValueError):
        pickles.load(data)


def test_a_large_number_in_the_memo_needs_no_memory():
    assert pickles.load(b"Nr\xff\xff\xff\x7f.").value is None


def test_deep_nesting_is_no_recursion():
    value = pickles.load(b"]" * 100_000 + b"a" * 99_999 + b".").value
    assert len(value) == 1


def test_one_list_makes_one_dictionary():
    """Otherwise a small pickle could make many large ones."""
    pairs = writer.instructions([("a", 1)] * 90)
    again = b"0ccollections\nOrderedDict\n(h\x00tR" * 10
    assert pickles.load(pairs + b"q\x00" + again + b".").value == {}


def test_memory_is_bounded_by_the_size():
    """A tuple of many is named as the arguments of many calls, and not copied."""
    data = b"(" + b"N" * 100_000 + b"tq\x000" + b"cos\nsystem\nh\x00R0" * 10_000 + b"N."
    tracemalloc.start()
    assert pickles.load(data).value is None
    assert tracemalloc.get_traced_memory()[1] < 10**8
    tracemalloc.stop()


def test_registered_extensions_are_not_looked_up(monkeypatch):
    monkeypatch.setitem(copyreg._inverted_registry, 1, ("os", "system"))
    monkeypatch.setitem(copyreg._extension_cache, 1, print)
    with pytest.raises(ValueError, match="extension"):
        pickles.load(b"\x82\x01.")


# --- trees of numpy's arrays --------------------------------------------------------------------

TREE = {
    "a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.float16([1, -2])},
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": np.array([1, 2], ">i4"),
    "bfloat16": np.array([1.5, -3]).astype(jnp.bfloat16),
    "rows": [np.uint8([[1, 2]]), (np.zeros((0, 4), np.int64),)],
    "scalar": np.float32(2.5),
    "mask": np.array([True, False]),
}
FLAT = {
    "a/kernel": TREE["a"]["kernel"],
    "a/bias": TREE["a"]["bias"],
    "rows/0": TREE["rows"][0],
    "rows/1/0": TREE["rows"][1][0],
    **{name: TREE[name] for name in ("fortran", "big endian", "bfloat16", "scalar", "mask")},
}


def stored(tmp_path, content):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(content)
    return path


def of_numpy_1(content):
    return content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


# From protocol 4 on, names have their length before them and cannot be shortened so.
@pytest.mark.parametrize(
    ("protocol", "change"),
    [*((n, bytes) for n in range(2, 6)), (2, of_numpy_1), (3, of_numpy_1)],
)
def test_arrays_of_every_protocol(protocol, change, tmp_path):
    value = {"params": TREE, "step": 3, "note": "x", "best": None}
    found = weight_files.read(stored(tmp_path, change(pickle.dumps(value, protocol))))
    assert found.keys() == FLAT.keys()
    for name, array in FLAT.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype.newbyteorder("=")
    part = weight_files.read(tmp_path / "weights.ckpt", part="params/a")
    assert part.keys() == {"kernel", "bias"}


def array(shape=(2,), content=b"12345678", code="f4", order="<", state=True, fortran=False):
    """Instructions for an array, of whatever is said of it."""
    name, call, instructions = writer.name, writer.call, writer.instructions
    dtype = call(name("numpy", "dtype"), code, False, True)
    if order is not None:
        about = (3, order, None, None, None, -1, -1, 0)
        dtype = writer.Raw(dtype + instructions(about) + b"b")
    content = raw(content) if type(content) is bytes else content
    empty = call(
        *(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray")),
        *((0,), raw(b"b")),
    )
    if not state:
        return empty
    return writer.Raw(empty + instructions((1, shape, dtype, fortran, content)) + b"b")


def raw(content):
    return writer.Raw(b"B" + struct.pack("<I", len(content)) + content)


def test_such_instructions_make_an_array(tmp_path):
    content = np.array([1.0, 2.0], "<f4").tobytes()
    path = stored(tmp_path, writer.pickled({"x": array(content=content)}))
    np.testing.assert_array_equal(weight_files.read(path)["x"], np.float32([1, 2]))


def system(command):
    return writer.call(writer.name(os.system.__module__, "system"), command)


def hostile_arrays(command="x"):
    """Pickles that would run a command, take other memory, or far too much of it."""
    run = system(command)
    ones = (1,) * 9
    shared = b"".join(writer.instructions(str(i)) + b"h\x01" for i in range(60))
    levels = b"}q\x01(" + writer.instructions("x") + b"Nu"
    for _ in range(8):  # a dictionary of sixty times the one before
        levels = levels + b"0" + b"}(" + shared + b"uq\x01"
    return {
        "objects": (array(code="O8"), "type 'O8' is not read"),
        "a list of objects": (array(code="O8", content=[run]), "type 'O8' is not read"),
        "structures": (array(code="V8"), "type 'V8' is not read"),
        "texts": (array(code="U2"), "type 'U2' is not read"),
        "a type that is called": (array(code=run), "is not read"),
        "too few bytes": (array((3,)), "has 8 bytes, not those of"),
        "too many bytes": (array((1,)), "has 8 bytes, not those of"),
        "far too few": (array((2**62, 2**62)), "has 8 bytes, not those of"),
        "no bytes": (array(content=[1, 2]), "has no bytes"),
        "bytes that are called": (array(content=run), "has no bytes"),
        "negative sizes": (array((-2, -1)), "no tuple of at most 8 sizes"),
        "sizes that are no integers": (array((2.0,)), "no tuple of at most 8 sizes"),
        "a shape that is no tuple": (array([2]), "no tuple of at most 8 sizes"),
        "a shape that is called": (array(run), "no tuple of at most 8 sizes"),
        "nine dimensions": (array((2, *ones[1:])), "no tuple of at most 8 sizes"),
        "no state": (array(state=False), "array 'x': "),
        "something called beside": ({"a": array(), "b": run}, "system"),
        "something called as state": (
            writer.Raw(bytes(array()) + bytes(run) + b"b"),
            "array 'x': ",
        ),
        "one array in many places": (
            writer.Raw(
                b"](" + bytes(array((4096,), bytes(16384))) + b"q\x01" + b"h\x01" * 99 + b"e"
            ),
            "larger than the file",
        ),
        "many dictionaries of one": (writer.Raw(levels), "too many entries"),
        "itself": (writer.Raw(b"}q\x02(" + writer.instructions("x") + b"h\x02u"), "too deep ones"),
        "a long name": ({"n" * 300: array()}, "a name of 300 characters"),
    }


@pytest.mark.parametrize("kind", hostile_arrays())
def test_hostile_arrays_are_refused(kind, tmp_path):
    target = tmp_path / "made"
    value, words = hostile_arrays(f"touch {target}")[kind]
    path = stored(tmp_path, writer.pickled({"x": value}))
    with pytest.raises(ValueError, match=words) as error:
        weight_files.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not target.exists()


def test_instructions_are_counted_and_long_values_are_not(tmp_path, monkeypatch):
    path = stored(tmp_path, pickle.dumps({"x": np.zeros(100_000, np.float32)}, 3))
    monkeypatch.setattr(pickles, "MAX_PICKLE", 5_000)
    assert weight_files.read(path)["x"].shape == (100_000,)
    for protocol in (3, 4):  # of which the second has its instructions in one long frame
        path = stored(tmp_path, pickle.dumps({"x": list(range(10_000))}, protocol))
        with pytest.raises(ValueError, match="more than 5,000 bytes of instructions"):
            weight_files.read(path)


def test_arrays_that_are_cut_off_or_damaged(tmp_path):
    content = pickle.dumps(TREE, 3)
    rng = np.random.default_rng(0)
    for tenth in range(1, 10):
        with pytest.raises(ValueError):
            weight_files.read(stored(tmp_path, content[: len(content) * tenth // 10]))
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.integers(2, len(content))] ^= 1 << int(rng.integers(8))
        try:
            found = weight_files.read(stored(tmp_path, bytes(damaged)))
        except ValueError as error:
            assert "weights.ckpt" in str(error)
        else:
            assert sum(x.nbytes for x in found.values()) <= 4 * len(content)
