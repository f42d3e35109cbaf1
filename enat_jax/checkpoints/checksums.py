"""A number for each array that changes when its contents do, whatever devices hold it.

A sum over all elements, modulo 2**32, of their bits mixed with their position. Integers sum to the
same in any order, so an array has the same checksum under every sharding; the position makes two
exchanged elements count; and the mixing is one-to-one for a given position, so that no change of a
single 32-bit word goes unseen. Other changes go unseen once in 2**32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree, Shaped, UInt32

from enat_jax.runtime import numerics


@numerics.jit
def of_tree(tree: PyTree) -> list[UInt32[Array, ""]]:
    """Computes the checksum of each array on its devices; compiled once for a kind of tree.

    Args:
        tree: arrays of booleans, integers or floats of 8 to 64 bits.

    Returns:
        Checksums in the order of ``jax.tree.leaves``, each replicated over the array's devices.
    """
    return [_of_array(leaf) for leaf in jax.tree.leaves(tree)]


def _of_array(array: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    words = _words(array)
    # The position is a sum of one term per dimension, because flattening a sharded array would
    # move it between devices.
    position = jnp.zeros(words.shape, np.uint32)
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        position = position + stride * lax.broadcasted_iota(np.uint32, words.shape, axis)
    # Mixed on its own first: words that are small integers would cancel against a plain position.
    return _mixed(words ^ _mixed(position + np.uint32(1))).sum(dtype=np.uint32)


def _words(array: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """Returns the bits of each element: one word, or from 64 bits on two along a new last axis."""
    if array.dtype == bool:
        return array.astype(np.uint32)
    bits = 8 * array.dtype.itemsize
    if bits >= 32:
        return lax.bitcast_convert_type(array, np.uint32)
    return lax.bitcast_convert_type(array, np.dtype(f"uint{bits}")).astype(np.uint32)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Applies the finaliser of MurmurHash3, which is one-to-one."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
