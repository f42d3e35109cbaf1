"""ENAT's spatial-temporal transformer (paper Section 4) over windows of the reveal order.

Three pure functions are shared by training, sampling and evaluation:

    modulation = model.condition(labels)                  # once per call
    cache      = model.encode(ids, positions, modulation, cache)
    logits     = model.decode(positions, modulation, cache)

A window may be padded to a static size; then a traced count says how many of its slots are real.
Padding never changes a result. Without a count every slot is real and no mask is built.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from enat_jax.models import blocks, layers, shapes
from enat_jax.models.blocks import Count


class ReuseProjection(nn.Module):
    """The paper's f, applied to cached features whenever they are reused: ``z + MLP(LN(z))``."""

    mlp_ratio: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, z: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        """Returns the projected features."""
        y = layers.LayerNorm(layers.BLOCK_EPS, name="norm")(z)
        return z + layers.Mlp(self.mlp_ratio, self.dtype, name="mlp")(y)


class ENAT(nn.Module):
    """The spatial-temporal transformer.

    Attributes:
        num_tokens: l, tokens of an image.
        codebook_size: v; the id v is [MASK].
        num_classes: the label ``num_classes`` means "no class".
        width: d; num_heads: h; encoder_layers, decoder_layers, mlp_ratio: sizes.
        dropout: rate after the embedding, in training.
        reuse: whether features are reused between steps; False is the paper's disentangled
            model, which encodes every visible token anew at every step and has no projection f.
        position_init: "normal" (paper) or "sincos".
        word_std: initial standard deviation of the word table, 0.02 in the paper.
        gate_bias: initial bias of the blocks' gates; 0 in the paper.
        remat: what the backward pass computes again instead of storing it, see ``blocks.stack``.
        attention: its implementation, see ``blocks.attention``.
        unroll: layers per iteration of the scan over blocks; only speed depends on it.
        dtype: of the computation; parameters, softmax, norms' statistics and logits are float32.
    """

    num_tokens: int
    codebook_size: int
    num_classes: int
    width: int
    num_heads: int
    encoder_layers: int
    decoder_layers: int
    mlp_ratio: int = 4
    dropout: float = 0.1
    reuse: bool = True
    position_init: str = "normal"
    word_std: float = 0.02
    gate_bias: float = 0.0
    remat: str = "none"
    attention: str = "xla"
    unroll: int = 1
    dtype: str = "float32"

    def setup(self) -> None:
        num_layers = self.encoder_layers + self.decoder_layers
        self.embed, self.modulation, self.head = blocks.shared_parts(self, num_layers, 8)
        self.encoder = blocks.stack(self, self.encoder_layers)
        self.decoder = blocks.stack(self, self.decoder_layers)
        if self.reuse:
            self.project = ReuseProjection(self.mlp_ratio, jnp.dtype(self.dtype))

    def condition(
        self, labels: Int[Array, " b"], encoder_only: bool = False
    ) -> Float[Array, "layers b 8 d"]:
        """Returns the modulation vectors of all layers.

        Args:
            labels: 0 to ``num_classes``, which means "no class".
            encoder_only: only those of the encoder's layers, all that ``encode`` needs.
        """
        shapes.check("labels", labels, b=None)
        return self.modulation(labels, self.encoder_layers if encoder_only else None)

    def encode(
        self,
        tokens: Int[Array, "b n"] | Float[Array, "b n d"],
        positions: Int[Array, "b n"] | None,
        modulation: Float[Array, "layers b 8 d"],
        cache: Float[Array, "b p d"] | None = None,
        *,
        num_new: Count | None = None,
        num_cached: Count | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b p+n d"]:
        """Encodes the newly revealed tokens and appends them to the projected cache.

        Args:
            tokens: codes; or floats, which are embedded already and only cast to the dtype of the
                model, as text would be. n may be 0.
            positions: raster positions of codes; those of embedded tokens are not used.
            modulation: from ``condition``.
            cache: features of earlier tokens, real ones first; None or p = 0: none.
            num_new: real slots of the new window, its first ones; None: all.
            num_cached: real slots of the cache; None: all.
            deterministic: False applies dropout (rng "dropout").

        Returns:
            The cache for the next step; its first ``num_cached + num_new`` rows are real. Cached
            features have passed through the projection f once more, as in the reference: a token
            revealed k steps ago has passed through it k times.

        Raises:
            ValueError: an argument has a wrong shape.
        """
        shapes.check_tokens(tokens, positions, self.width)
        b, n = tokens.shape[:2]
        num_layers = {self.encoder_layers, self.encoder_layers + self.decoder_layers}
        counts = {"num_new": num_new, "num_cached": num_cached}
        shapes.check_inputs(self, b, modulation, num_layers, 8, **counts)
        if cache is not None:
            shapes.check("cache", cache, b=b, p=None, d=self.width)
            cache = self.project(cache) if cache.shape[1] else None
        if n == 0:
            empty = jnp.zeros((b, 0, self.width), jnp.dtype(self.dtype))
            return empty if cache is None else cache
        x = self.embed(tokens, positions, deterministic)
        p = 0 if cache is None else cache.shape[1]
        mask = blocks.key_mask((p, None, num_cached), (n, None, num_new))
        x, _ = self.encoder(x, modulation[: self.encoder_layers], cache, mask)
        return x if cache is None else blocks.append(cache, x, num_cached)

    def decode(
        self,
        positions: Int[Array, "b m"],
        modulation: Float[Array, "layers b 8 d"],
        cache: Float[Array, "b p d"],
        *,
        num_masked: Count | None = None,
        num_visible: Count | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b m v"]:
        """Predicts the codes at the masked positions.

        Args:
            positions: raster positions of masked tokens; padding comes first.
            modulation: from ``condition``.
            cache: from ``encode``; p may be 0.
            num_masked: real slots of the masked window, its last ones; None: all.
            num_visible: real slots of the cache, its first ones; None: all.
            deterministic: False applies dropout (rng "dropout").

        Returns:
            Float32 logits.

        Raises:
            ValueError: an argument has a wrong shape.
        """
        y = self.features(positions, modulation, cache, num_masked, num_visible, deterministic)
        return self.head(y, self.embed.word)

    def features(
        self,
        positions: Int[Array, "b m"],
        modulation: Float[Array, "layers b 8 d"],
        cache: Float[Array, "b p d"],
        num_masked: Count | None = None,
        num_visible: Count | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b m d"]:
        """Returns the decoder's output before the head; arguments as in ``decode``."""
        shapes.check("positions", positions, b=None, m=None)
        num_layers = self.encoder_layers + self.decoder_layers
        counts = {"num_masked": num_masked, "num_visible": num_visible}
        b = positions.shape[0]
        shapes.check_inputs(self, b, modulation, num_layers, 8, **counts)
        shapes.check("cache", cache, b=b, p=None, d=self.width)
        m, p = positions.shape[1], cache.shape[1]
        ids = jnp.full_like(positions, self.codebook_size)
        y = self.embed(ids, positions, deterministic)
        first = None if num_masked is None else m - num_masked
        mask = blocks.key_mask((p, None, num_visible), (m, first, None))
        y, _ = self.decoder(y, modulation[self.encoder_layers :], cache if p else None, mask)
        return y

    def __call__(self, ids: Int[Array, "b l"], labels: Int[Array, " b"]) -> Float[Array, "b m v"]:
        """Runs a pass that touches every parameter, for initialisation; l is at least 3."""
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        modulation = self.condition(labels)
        cache = self.encode(ids[:, :1], positions[:, :1], modulation)
        if self.reuse:
            cache = self.encode(ids[:, 1:2], positions[:, 1:2], modulation, cache)
        return self.decode(positions[:, 2:], modulation, cache)
