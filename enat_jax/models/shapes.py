"""Shapes of arguments, checked where networks take them; it costs nothing, as shapes are static."""

from typing import Any

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from enat_jax.models.blocks import Count, TransformerFields


def check(name: str, array: Any, **sizes: int | set[int] | None) -> None:
    """Refuses an array of a wrong shape.

    Args:
        name: what the caller calls the array.
        array: anything without a shape is refused.
        sizes: of each axis, in order and by name: None for any size, a set for one of several.

    Raises:
        ValueError: a sentence that says what the shape must be and what it is.
    """
    try:
        chex.assert_shape([array], [tuple(sizes.values())])
    except AssertionError:
        found = list(array.shape) if hasattr(array, "shape") else type(array).__name__
        wanted = []
        for axis, size in sizes.items():
            either = " or ".join(map(str, sorted(size))) if isinstance(size, set) else size
            wanted.append(axis if size is None else f"{axis}={either}")
        raise ValueError(f"{name} must have the shape [{', '.join(wanted)}], not {found}") from None


def check_count(name: str, count: Count | None, b: int) -> None:
    """Refuses a vector of counts that is not of ``b`` images."""
    if count is not None and jnp.ndim(count):
        check(name, count, b=b)


def check_tokens(
    tokens: Int[Array, "b n"] | Float[Array, "b n d"],
    positions: Int[Array, "b n"] | None,
    width: int,
) -> None:
    """Checks the tokens of a window, either ids with positions or embedded tokens."""
    if jnp.issubdtype(tokens.dtype, jnp.floating):
        check("tokens (of a float dtype, so embedded)", tokens, b=None, n=None, d=width)
    else:
        check("tokens", tokens, b=None, n=None)
        check("positions", positions, b=tokens.shape[0], n=tokens.shape[1])


def check_inputs(
    model: TransformerFields,
    b: int,
    modulation: Float[Array, "layers b vectors d"],
    num_layers: int | set[int],
    num_vectors: int,
    **counts: Count | None,
) -> None:
    """Checks what ``encode`` and ``decode`` of a transformer take beside a window and a cache.

    Args:
        model: the transformer.
        b: images of the window.
        modulation, num_layers, num_vectors: the modulation vectors and how many there must be.
        counts: of real slots, by name.
    """
    check("modulation", modulation, layers=num_layers, b=b, vectors=num_vectors, d=model.width)
    for name, count in counts.items():
        check_count(name, count, b)
