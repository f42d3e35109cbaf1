import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from enat_jax.checkpoints import checksums

M = 2**32


def mixed(x):
    x = (x ^ x >> 16) * 0x85EBCA6B % M
    x = (x ^ x >> 13) * 0xC2B2AE35 % M
    return x ^ x >> 16


def by_hand(words):
    return sum(mixed(word ^ mixed(position + 1)) for position, word in enumerate(words)) % M


def checksum(array):
    (value,) = checksums.of_tree([array])
    assert value.shape == () and value.dtype == jnp.uint32
    return int(value)


def test_it_is_the_sum_of_mixed_words_and_positions():
    words = [7, 0, 2**32 - 1, 12345, 7, 1]
    assert checksum(jnp.array(words, jnp.uint32)) == by_hand(words)
    assert checksum(jnp.array(words, jnp.uint32).reshape(1, 3, 2)) == by_hand(words)
    assert checksum(jnp.array([1.0, -0.0])) == by_hand([0x3F800000, 0x80000000])
    assert checksum(jnp.array([1.0, -2.0], jnp.bfloat16)) == by_hand([0x3F80, 0xC000])
    assert checksum(jnp.array([True, False, True])) == by_hand([1, 0, 1])
    assert checksum(jnp.array([-1, 5], jnp.int8)) == by_hand([255, 5])


def test_scalars_and_empty_arrays_have_one_too():
    assert checksum(jnp.uint32(9)) == by_hand([9])
    assert checksum(jnp.zeros((3, 0))) == 0


def test_the_order_is_that_of_the_leaves():
    tree = {"b": jnp.uint32(2), "a": (jnp.uint32(0), jnp.uint32(1))}
    assert list(map(int, checksums.of_tree(tree))) == [by_hand([n]) for n in (0, 1, 2)]


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "int32", "uint32", "int16", "int8", "uint8", "bool"]
)
def test_every_single_bit_counts(dtype):
    """Of every type, for bits that are numbers, NaNs, denormal numbers and zeros of either sign."""
    bits = 1 if dtype == "bool" else 8 * jnp.dtype(dtype).itemsize
    unsigned = np.dtype(f"uint{max(bits, 8)}")
    patterns = np.array([0, 1, 1 << bits - 1, 2**bits - 1, 0x7F81 % 2**bits], unsigned)
    whole = checksum(jnp.asarray(patterns.view(jnp.dtype(dtype))))
    assert whole == by_hand(map(int, patterns))
    for element, bit in itertools.product(range(len(patterns)), range(bits)):
        changed = patterns.copy()
        changed[element] ^= unsigned.type(1 << bit)
        assert checksum(jnp.asarray(changed.view(jnp.dtype(dtype)))) != whole


def test_both_halves_of_64_bits_count():
    with jax.enable_x64(True):
        number = jnp.float64(1.0)
        words = np.float64(1.0).view(np.uint64)
        assert checksum(number) == by_hand([int(words) % M, int(words) // M])
        assert checksum(jnp.array([2**40 + 3])) == by_hand([3, 2**8])


def test_exchanged_elements_rows_and_shifted_contents_count():
    array = jnp.arange(24, dtype=jnp.float32).reshape(4, 6)
    others = [
        array[::-1],
        array[:, ::-1],
        jnp.roll(array, 1),
        array.at[0, 0].set(array[0, 1]).at[0, 1].set(array[0, 0]),
        jnp.zeros_like(array),
    ]
    assert len({checksum(x) for x in [array, *others]}) == 6


def test_small_integers_do_not_cancel_against_their_positions():
    arrays = [jnp.array(p, jnp.int32) for p in itertools.permutations(range(5))]
    assert len({checksum(array) for array in arrays}) == 120


def shardings():
    for shape, spec in [
        ((8,), ("x",)),
        ((8,), (None, "x")),
        ((8,), (None, None, "x")),
        ((4, 2), ("y", None, "x")),
        ((4, 2), (("x", "y"),)),
        ((2, 2), (None, "y")),
        ((1,), ()),
        ((8,), ()),
    ]:
        devices = jax.devices()[: int(np.prod(shape))]
        names = ("x", "y")[: len(shape)]
        mesh = jax.make_mesh(
            shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices
        )
        yield NamedSharding(mesh, PartitionSpec(*spec))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_it_is_the_same_under_every_sharding(dtype):
    array = jax.random.normal(jax.random.key(0), (16, 8, 24)).astype(dtype)
    found = {checksum(jax.device_put(array, sharding)) for sharding in shardings()}
    assert found == {checksum(array)}


def test_no_array_is_moved_between_devices():
    for sharding in shardings():
        array = jax.ShapeDtypeStruct((16, 8, 24), jnp.float32, sharding=sharding)
        text = checksums.of_tree.lower([array, array]).compile().as_text()
        for moving in ("all-gather", "all-to-all", "collective-permute"):
            assert moving not in text


def test_each_device_counts_its_own_copy():
    """A replicated array whose copies differ, as after a fault of one device."""
    *_, sharding = shardings()
    copies = [jax.device_put(jnp.full(4, float(i == 5)), d) for i, d in enumerate(jax.devices())]
    array = jax.make_array_from_single_device_arrays((4,), sharding, copies)
    (value,) = checksums.of_tree([array])
    values = [int(shard.data) for shard in value.addressable_shards]
    assert len(values) == 8 and len(set(values)) == 2
    assert values.count(checksum(jnp.zeros(4))) == 7


def test_compiled_once_for_a_kind_of_tree():
    tree = {"a": jnp.ones((3, 5)), "b": jnp.int32(1)}
    checksums.of_tree(tree)
    before = checksums.of_tree.jitted._cache_size()
    checksums.of_tree(jax.tree.map(lambda x: x + 1, tree))
    assert checksums.of_tree.jitted._cache_size() == before
