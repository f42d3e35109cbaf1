"""The paper's NAT baseline: one stack over all tokens, visible and masked alike (paper Section 3).

It offers the same three functions as ENAT, so that one sampler and one training task serve both:
``encode`` only embeds the visible tokens, all of them at every step; ``decode`` runs the stack
over visible and masked tokens together.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from enat_jax.models import blocks, shapes
from enat_jax.models.blocks import Count

# The quadrants of attention, as (queries are visible, keys are visible): paper Figure 2.
QUADRANTS = {
    "visible_from_visible": (True, True),
    "visible_from_masked": (True, False),
    "masked_from_visible": (False, True),
    "masked_from_masked": (False, False),
}


def quadrant_mask(
    disabled: str, num_visible: int, num_masked: int
) -> Bool[Array, "1 1 queries keys"]:
    """Returns the mask of attention without one of its four quadrants.

    Args:
        disabled: a key of ``QUADRANTS``: "visible_from_masked" forbids visible tokens to attend to
            masked ones.
        num_visible, num_masked: p and m, slots of the two windows, the visible ones first.

    Returns:
        False where a query may not look, p + m queries and keys. Every token still sees itself: at
        the first step there are masked tokens only, and without that nothing would be left for
        them to attend to.
    """
    of_query, of_key = QUADRANTS[disabled]
    slot = jnp.arange(num_visible + num_masked)
    visible = slot < num_visible
    cut = (visible == of_query)[:, None] & (visible == of_key)[None, :]
    return (~cut | (slot[:, None] == slot[None, :]))[None, None]


class NAT(nn.Module):
    """Non-autoregressive transformer.

    Attributes:
        num_layers: blocks of the stack.
        disabled_attention: one of ``QUADRANTS`` that all blocks do without, "none" for plain NAT.

    The others are as in ``enat.ENAT``.
    """

    num_tokens: int
    codebook_size: int
    num_classes: int
    width: int
    num_heads: int
    num_layers: int
    mlp_ratio: int = 4
    dropout: float = 0.1
    position_init: str = "normal"
    word_std: float = 0.02
    gate_bias: float = 0.0
    remat: str = "none"
    attention: str = "auto"
    unroll: int = 1
    dtype: str = "float32"
    disabled_attention: str = "none"

    reuse = False  # nothing is kept between steps

    def setup(self) -> None:
        if self.disabled_attention not in ("none", *QUADRANTS):
            raise ValueError(
                f"disabled_attention={self.disabled_attention!r} is unknown: one of none, "
                f"{', '.join(QUADRANTS)}"
            )
        self.embed, self.modulation, self.head = blocks.shared_parts(self, self.num_layers, 6)
        self.blocks = blocks.stack(self, self.num_layers)

    def condition(self, labels: Int[Array, " b"]) -> Float[Array, "layers b 6 d"]:
        """Returns the modulation vectors of all layers; labels as in ``ENAT.condition``."""
        shapes.check("labels", labels, b=None)
        return self.modulation(labels)

    def encode(
        self,
        tokens: Int[Array, "b n"] | Float[Array, "b n d"],
        positions: Int[Array, "b n"] | None,
        modulation: Float[Array, "layers b 6 d"] | None,
        cache: Float[Array, "b p d"] | None = None,
        *,
        num_new: Count | None = None,
        num_cached: Count | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b n d"]:
        """Returns embeddings of the visible tokens; arguments as in ``ENAT.encode``.

        Raises:
            ValueError: a cache is given; this model reuses nothing.
        """
        shapes.check_tokens(tokens, positions, self.width)
        del modulation, num_new, num_cached
        if cache is not None and cache.shape[1]:
            raise ValueError("NAT reuses no features between steps: encode all visible tokens")
        return self.embed(tokens, positions, deterministic)

    def decode(
        self,
        positions: Int[Array, "b m"],
        modulation: Float[Array, "layers b 6 d"],
        cache: Float[Array, "b p d"],
        *,
        num_masked: Count | None = None,
        num_visible: Count | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b m v"]:
        """Predicts the codes at the masked positions; arguments as in ``ENAT.decode``."""
        x = self.features(positions, modulation, cache, num_masked, num_visible, deterministic)
        return self.head(x[:, cache.shape[1] :], self.embed.word)

    def features(
        self,
        positions: Int[Array, "b m"],
        modulation: Float[Array, "layers b 6 d"],
        cache: Float[Array, "b p d"],
        num_masked: Count | None = None,
        num_visible: Count | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b p+m d"]:
        """Returns the stack's output before the head, of the p visible tokens first.

        The arguments are those of ``decode``.
        """
        shapes.check("positions", positions, b=None, m=None)
        counts = {"num_masked": num_masked, "num_visible": num_visible}
        b = positions.shape[0]
        shapes.check_inputs(self, b, modulation, self.num_layers, 6, **counts)
        shapes.check("cache", cache, b=b, p=None, d=self.width)
        m, p = positions.shape[1], cache.shape[1]
        ids = jnp.full_like(positions, self.codebook_size)
        x = jnp.concatenate([cache, self.embed(ids, positions, deterministic)], axis=1)
        first = None if num_masked is None else m - num_masked
        mask = blocks.key_mask((p, None, num_visible), (m, first, None))
        if self.disabled_attention != "none":
            allowed = quadrant_mask(self.disabled_attention, p, m)
            mask = allowed if mask is None else mask & allowed
        x, _ = self.blocks(x, modulation, None, mask, None)
        return x

    def __call__(self, ids: Int[Array, "b l"], labels: Int[Array, " b"]) -> Float[Array, "b m v"]:
        """Runs a pass that touches every parameter, for initialisation; l is at least 2."""
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        modulation = self.condition(labels)
        cache = self.encode(ids[:, :1], positions[:, :1], modulation)
        return self.decode(positions[:, 1:], modulation, cache)
