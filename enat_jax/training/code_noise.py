"""Noise on a tokenizer's codes in training: some are swapped before they are decoded.

A decoder that cannot trust every code makes neighbours agree: codes become local and can be
predicted from one another, and a wrong token in a sample does less harm.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from enat_jax.models import quantizers

KINDS = ("any", "nearest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeNoise:
    """Which codes are swapped, and for which; settings of the section ``loss`` of a config.

    Raises ValueError for a setting that is impossible.
    """

    code_noise: float = 0.0  # share of positions whose code is swapped before decoding, in training
    code_noise_kind: str = "any"  # code of the batch, or one of the "nearest" (arXiv:2509.12474)
    code_noise_nearest: int = 100  # codes that are near to a code
    code_noise_images: float = 1.0  # share of images with swapped codes
    code_noise_until: int | None = None  # step until which code_noise falls to code_noise_left
    code_noise_left: float = 0.0  # share of code_noise from then on

    def __post_init__(self) -> None:
        if not 0 <= self.code_noise < 1:
            raise ValueError(f"code_noise={self.code_noise!r} must lie in [0, 1)")
        if self.code_noise_kind not in KINDS:
            raise ValueError(
                f"code_noise_kind={self.code_noise_kind!r} is unknown: one of {', '.join(KINDS)}"
            )
        for name in ("code_noise_images", "code_noise_left"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must lie in [0, 1]")
        for name in ("code_noise_nearest", "code_noise_until"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")

    def share_at(self, step: Int[Array, ""]) -> float | Float[Array, ""]:
        """Returns the share of positions whose code is swapped at a step."""
        if self.code_noise_until is None or not self.code_noise:
            return self.code_noise
        passed = jnp.minimum(step / self.code_noise_until, 1.0)
        return self.code_noise * (1 - (1 - self.code_noise_left) * passed)

    def swapped(
        self,
        decoded: Float[Array, "b h w e"],
        codes: Float[Array, "b h w e"],
        ids: Int[Array, "b h w"],
        table: Float[Array, "v e"],
        share: float | Float[Array, ""],
        key: Key[Array, ""],
    ) -> Float[Array, "b h w e"]:
        """Returns ``decoded`` with other codes at a share of places, which have no gradient.

        Args:
            decoded: what the decoder would see.
            codes: the same, as vectors of the table.
            ids: their numbers.
            table: vectors of all codes.
            share: of places, in images that are chosen.
            key: decides on places, images and codes.
        """
        swap_key, order_key = jax.random.split(key)
        image_key = None
        if self.code_noise_images < 1:
            swap_key, image_key = jax.random.split(swap_key)
        swap = jax.random.bernoulli(swap_key, share, decoded.shape[:-1])
        if image_key is not None:
            chosen = jax.random.bernoulli(image_key, self.code_noise_images, (len(decoded), 1, 1))
            swap &= chosen
        if self.code_noise_kind == "any":
            flat = codes.reshape(-1, codes.shape[-1])
            others = jax.random.permutation(order_key, flat).reshape(codes.shape)
        else:
            others = table[quantizers.near(order_key, ids, table, self.code_noise_nearest)]
        return jnp.where(swap[..., None], jax.lax.stop_gradient(others), decoded)
