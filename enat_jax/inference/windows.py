"""The windows of the reveal order: the one place that cuts them, for training, sampling, analyses.

A sequence in reveal order has three of them, of real sizes that may be traced values, inside static
sizes that hold them:

    order:   [ 0 .... num_cached | num_cached .... num_visible | num_visible ........ l ]
                  cached                newly revealed                  masked

The cached window is a prefix, its padding behind its real slots; the newly revealed one starts
where the cached ends, its padding behind; the masked one is a suffix, its padding in front. A
condition that is visible from the start, such as a text, is no part of the order and is not counted
here: it is a window of its own beside these three.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from enat_jax.models import shapes
from enat_jax.models.blocks import Count
from enat_jax.schedules import reveal


class Window(NamedTuple):
    """Some slots of the reveal order of every image."""

    ids: Int[Array, "b n"]
    positions: Int[Array, "b n"]


class Cut(NamedTuple):
    """The windows of one step, and how many of their slots are real.

    Attributes:
        cached, new, masked: the three windows.
        sizes: static sizes of the windows, and of the cache after the step.
        num_cached, num_new, num_visible, num_masked: real slots of the cache before the step, of
            the new window, of the cache after the step and of the masked window, as ``encode`` and
            ``decode`` of a model take them: scalars, or [b] for counts of each image. None: every
            slot of every window is real, and nothing needs a mask.
        num_projected: slots of the cache that pass through the projection f no more; None: all
            do.
    """

    cached: Window
    new: Window
    masked: Window
    sizes: reveal.Windows
    num_cached: Count | None
    num_new: Count | None
    num_visible: Count | None
    num_masked: Count | None
    num_projected: Count | None = None

    @property
    def masked_is_real(self) -> Bool[Array, "#b m"] | None:
        """Which slots of the masked window are real; None: all are."""
        if self.num_masked is None:
            return None
        slots = self.masked.ids.shape[1]
        return jnp.arange(slots) >= slots - jnp.reshape(self.num_masked, (-1, 1))


def cut(
    ids: Int[Array, "b l"],
    order: Int[Array, "b l"],
    num_cached: Count,
    num_visible: Count,
    sizes: reveal.Windows,
    *,
    num_projected: Count | None = None,
    exact: bool = False,
) -> Cut:
    """Cuts the windows of one step out of sequences in reveal order.

    Args:
        ids: codes; what stands at masked places does not matter.
        order: raster positions.
        num_cached, num_visible: tokens visible before the step and in it: scalars, or [b] where
            images differ; traced or not. 0 <= num_cached <= num_visible <= l.
        sizes: static sizes that hold the counts of every image.
        num_projected: see ``Cut``.
        exact: the sizes are the counts themselves.
    """
    shapes.check("ids", ids, b=None, l=None)
    b, length = ids.shape
    shapes.check("order", order, b=b, l=length)
    shapes.check_count("num_cached", num_cached, b)
    shapes.check_count("num_visible", num_visible, b)
    # Spare slots at the end: the slice never clamps, wherever it starts.
    spare = ((0, 0), (0, sizes.num_new))

    def new(x: Int[Array, "b l"]) -> Int[Array, "b n"]:
        padded = jnp.pad(x, spare)
        if jnp.ndim(num_cached) == 0:
            return jax.lax.dynamic_slice_in_dim(padded, num_cached, sizes.num_new, axis=1)
        rows = jax.vmap(jax.lax.dynamic_slice_in_dim, in_axes=(0, 0, None))
        return rows(padded, num_cached, sizes.num_new)

    first = length - sizes.num_masked
    windows = (
        Window(ids[:, : sizes.num_cached], order[:, : sizes.num_cached]),
        Window(new(ids), new(order)),
        Window(ids[:, first:], order[:, first:]),
    )
    if exact:
        return Cut(*windows, sizes, None, None, None, None, num_projected)
    num_new, num_masked = num_visible - num_cached, length - num_visible
    return Cut(*windows, sizes, num_cached, num_new, num_visible, num_masked, num_projected)
