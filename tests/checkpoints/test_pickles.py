"""A pickle is read as data; whatever it asks for is noted and never done."""

import collections
import copyreg
import pickle
import time
import tracemalloc

import pytest
import torch_writer as writer

from enat_jax.checkpoints import pickles


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
