"""Quantizers: from an encoder's features to one code of a finite set at every place.

"vq" takes the nearest code of a table that is learnt (arXiv:1711.00937), on request among unit
vectors, or among the products of a frozen table with a learnt matrix (SimVQ, arXiv:2411.02038).
"fsq" rounds each feature to one of a few levels (arXiv:2309.15505), and "lfq" takes its sign
(arXiv:2310.05737): their codes are all combinations and are not learnt. Of either the number of a
code has one digit for each feature, that of the first feature being the lowest.

Sizes beside the dimension letters of the package: d width of a code, which is the number of
features; h, w rows and columns of places.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

KINDS = ("vq", "fsq", "lfq")
GRADIENTS = ("straight_through", "rotation")
LEVELS = (3, 256)  # of "fsq", fewest and most; two levels are what "lfq" has
MOST_BITS = 18  # of "lfq"


def check(
    kind: str,
    *,
    codebook_size: int,
    embed_dim: int,
    normalize: bool,
    projection: bool,
    levels: Sequence[int],
    gradient: str,
) -> None:
    """Refuses settings of a ``vqgan.VQGAN`` that do not fit together.

    Raises:
        ValueError: names the setting and what it must be.
    """
    if kind not in KINDS:
        raise ValueError(f"quantizer={kind!r} is unknown: one of {', '.join(KINDS)}")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r} is unknown: one of {', '.join(GRADIENTS)}")
    for name, value in {"normalize": normalize, "projection": projection}.items():
        if value and kind != "vq":
            raise ValueError(f"{name} is of quantizer='vq', and {kind!r} has no table to learn")
    if (kind == "fsq") != bool(levels):
        raise ValueError(
            f"levels={tuple(levels)} with quantizer={kind!r}: 'fsq' needs them, such as "
            "(8, 5, 5, 5), and the others have none"
        )
    if kind == "vq":
        return
    if kind == "lfq" and not 1 <= embed_dim <= MOST_BITS:
        raise ValueError(f"embed_dim={embed_dim} bits of quantizer='lfq': choose 1 to {MOST_BITS}")
    if any(not LEVELS[0] <= level <= LEVELS[1] for level in levels):
        raise ValueError(f"levels={tuple(levels)} must each be from {LEVELS[0]} to {LEVELS[1]}")
    of = f"levels={tuple(levels)}" if levels else f"{embed_dim} bits of quantizer='lfq'"
    levels = levels or (2,) * embed_dim
    if (math.prod(levels), len(levels)) != (codebook_size, embed_dim):
        raise ValueError(
            f"{of} make {math.prod(levels)} codes of width {len(levels)}, not {codebook_size=} of "
            f"{embed_dim=}: give --config.model.codebook_size={math.prod(levels)} "
            f"--config.model.embed_dim={len(levels)}"
        )


# --- tables that are learnt ------------------------------------------------------------------


def uniform_codes(
    key: Key[Array, ""], shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> Float[Array, "v d"]:
    """Draws uniformly within 1 / codebook_size of zero, as in VQ-VAE (arXiv:1711.00937)."""
    return jax.random.uniform(key, shape, dtype, -1 / shape[0], 1 / shape[0])


def unit_codes(
    key: Key[Array, ""], shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> Float[Array, "v d"]:
    """Draws unit vectors of all directions: a short code would turn too far at its first step."""
    return unit(jax.random.normal(key, shape, dtype))


def frozen_codes(
    key: Key[Array, ""], shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> Float[Array, "v d"]:
    """Draws the table of SimVQ: normal, of standard deviation 1 / sqrt(width)."""
    return jax.random.normal(key, shape, dtype) / math.sqrt(shape[1])


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Returns vectors divided by their lengths; zero stays zero, and its gradient finite."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def nearest(z: Float[Array, "b h w d"], table: Float[Array, "v d"]) -> Int[Array, "b h w"]:
    """Returns the first of the rows of ``table`` at the least squared distance, int32."""
    products = jnp.einsum("bhwd,vd->bhwv", z, table, precision="highest")
    # |z|^2 is the same for all codes of a position and left out.
    distances = jnp.square(table).sum(-1) - 2 * products
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)


# --- digits: "fsq", and "lfq" as two levels of each feature -----------------------------------


def bounded(z: Float[Array, "... d"], levels: Sequence[int]) -> Float[Array, "... d"]:
    """Returns features within the range of their levels, about [-1, 1], as "fsq" rounds them.

    They are tanh of ``z``, shifted by half a level where the number of levels is even, and so that
    zero stays zero.
    """
    count = np.array(levels)
    half, offset = (count - 1) * (1 - 1e-3) / 2, np.where(count % 2, 0.0, 0.5)
    shift = np.arctanh(offset / half).astype(np.float32)
    scaled = jnp.tanh(z + shift) * half.astype(np.float32) - offset.astype(np.float32)
    return scaled / _centre(levels)


def digits_of(features: Float[Array, "... d"], levels: Sequence[int]) -> Int[Array, "... d"]:
    """Returns the level of each feature, counted from 0, int32."""
    centre = _centre(levels)
    # Of two levels, halves are between: the sign decides.
    rounded = jnp.where(centre < 1, features > 0, jnp.rint(features * centre + centre))
    return jnp.clip(rounded, 0, np.array(levels) - 1).astype(jnp.int32)


def of_digits(digits: Int[Array, "... d"], levels: Sequence[int]) -> Float[Array, "... d"]:
    """Returns the vector of a code from its digits, float32 in [-1, 1]."""
    centre = _centre(levels)
    return (digits - centre) / centre


def to_ids(digits: Int[Array, "... d"], levels: Sequence[int]) -> Int[Array, "..."]:
    """Returns the number of a code from its digits, int32."""
    return (digits * _places(levels)).sum(-1).astype(jnp.int32)


def from_ids(ids: Int[Array, "..."], levels: Sequence[int]) -> Int[Array, "... d"]:
    """Returns the digits of a code from its number, int32: the inverse of ``to_ids``."""
    return ids[..., None] // _places(levels) % np.array(levels, np.int32)


def _centre(levels: Sequence[int]) -> Float[np.ndarray, " d"]:
    count = np.array(levels)
    return np.where(count == 2, 0.5, count // 2).astype(np.float32)


def _places(levels: Sequence[int]) -> Int[np.ndarray, " d"]:
    return np.cumprod([1, *levels[:-1]]).astype(np.int32)


# --- training ---------------------------------------------------------------------------------


def passed(
    z: Float[Array, "... d"], codes: Float[Array, "... d"], gradient: str
) -> Float[Array, "... d"]:
    """Returns the codes, whose gradient goes to the features ``z`` instead.

    Args:
        z: features.
        codes: that they were quantized to.
        gradient: "straight_through": as it is. "rotation" (arXiv:2410.06424): turned and scaled as
            the features are to become the codes. Where there is no such turn, between opposite
            directions or to zero, it goes straight through.
    """
    straight = z + jax.lax.stop_gradient(codes - z)
    if gradient == "straight_through":
        return straight
    fixed_z, fixed = jax.lax.stop_gradient(z), jax.lax.stop_gradient(codes)
    from_, to = unit(fixed_z), unit(fixed)
    between = unit(from_ + to)

    def along(direction: Float[Array, "... d"]) -> Float[Array, "... 1"]:
        return (direction * z).sum(-1, keepdims=True)

    def length(x: Float[Array, "... d"]) -> Float[Array, "... 1"]:
        return jnp.linalg.norm(x, axis=-1, keepdims=True)

    before, after = length(fixed_z), length(fixed)
    turned = z - 2 * between * along(between) + 2 * to * along(from_)
    possible = (length(from_ + to) >= 1e-6) & (before >= 1e-12) & (after > 0)
    return jnp.where(possible, after / jnp.maximum(before, 1e-12) * turned, straight)


def losses(
    kind: str, z: Float[Array, "b h w d"], codes: Float[Array, "b h w d"], temperature: float
) -> dict[str, Float[Array, ""]]:
    """Returns the losses by which codes and features come together, without their weights.

    Args:
        kind: of the quantizer.
        z: features, as they are compared with codes.
        codes: that they were quantized to; their gradients reach the table.
        temperature: of "entropy_loss".

    Returns:
        Scalars: of "vq" "codebook_loss" and "commitment_loss", of "lfq" "commitment_loss" and
        "entropy_loss", of "fsq" none.
    """
    if kind == "fsq":
        return {}
    found = {}
    if kind == "vq":
        found["codebook_loss"] = jnp.square(codes - jax.lax.stop_gradient(z)).mean()
    found["commitment_loss"] = jnp.square(z - jax.lax.stop_gradient(codes)).mean()
    if kind == "lfq":
        found["entropy_loss"] = entropy_loss(z, temperature)
    return found


def entropy_loss(z: Float[Array, "... d"], temperature: float) -> Float[Array, ""]:
    """Returns how undecided places are, less how evenly they use the codes of "lfq", in nats.

    The probabilities of codes at a place are the softmax of their negative squared distances over
    ``temperature`` (arXiv:2310.05737). The mean entropy of places less the entropy of the mean
    probabilities is least, ``-d log(2)``, where every place is decided and all codes are as
    frequent. Both are exact: bits are independent at a place, so that its entropy is the sum of
    theirs, and the mean probabilities are a product of two matrices, one for either half of them.
    """
    logits = 4 / temperature * z.reshape(-1, z.shape[-1])
    bits = jax.nn.sigmoid(logits)
    # log(1 + exp(x)) - x sigmoid(x) is the entropy of a bit, without a logarithm of zero.
    of_places = (jax.nn.softplus(logits) - logits * bits).sum(-1).mean()
    half = z.shape[-1] // 2
    joint = jnp.matmul(
        _joint(bits[:, half:]).T / len(bits), _joint(bits[:, :half]), precision="highest"
    )
    logs = jnp.log(jnp.maximum(joint, jnp.finfo(joint.dtype).tiny))
    return of_places + (joint * logs).sum()


def _joint(bits: Float[Array, "n k"]) -> Float[Array, "n c"]:
    """Returns the probabilities of all combinations of independent bits, c = 2 ** k."""
    found = jnp.ones((len(bits), 1))
    for bit in bits.T:
        found = jnp.concatenate([found * (1 - bit)[:, None], found * bit[:, None]], axis=-1)
    return found


def neighbours(
    codes: Int[Array, " n"], table: Float[Array, "v d"], count: int
) -> Int[Array, "n count"]:
    """Returns the ``count`` < v codes nearest to each, the nearest first and without itself."""
    squares = jnp.square(table).sum(-1)

    def others(code: Int[Array, ""]) -> Int[Array, " count"]:
        products = jnp.matmul(table, table[code], precision="highest")
        distances = (squares - 2 * products).at[code].set(jnp.inf)
        return jax.lax.top_k(-distances, count)[1]

    return jax.lax.map(others, codes, batch_size=256)


def near(
    key: Key[Array, ""], ids: Int[Array, "..."], table: Float[Array, "v d"], count: int
) -> Int[Array, "..."]:
    """Returns for each code another one, drawn among the ``count`` codes nearest to it, int32."""
    v = len(table)
    count = min(count, v - 1)
    # Whichever are fewer, codes or places: a row of distances to all codes for each.
    of_places = ids.size < v
    rows = neighbours(ids.ravel() if of_places else jnp.arange(v), table, count)
    row = jnp.arange(ids.size).reshape(ids.shape) if of_places else ids
    return rows[row, jax.random.randint(key, ids.shape, 0, count)].astype(jnp.int32)
