"""ENAT's spatial-temporal transformer (paper Section 4) over windows of the reveal order.

Three pure functions are shared by training, sampling and evaluation:

    modulation = model.condition(labels)                  # once per call
    cache      = model.encode(ids, positions, modulation, cache)
    logits     = model.decode(positions, modulation, cache)

A text is a window of its own, beside those of the reveal order: always visible, never masked, never
cached. ``read`` makes it once a call, ``encode`` and ``decode`` take it as ``text``.

A window may be padded to a static size; then a traced count says how many of its slots are real.
Padding never changes a result. Without a count every slot is real and no mask is built.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from enat_jax.models import blocks, layers, shapes
from enat_jax.models.blocks import Count, Prompt, Text

TEXT_ENCODINGS = ("once", "every_step", "never")
REUSE_PROJECTIONS = ("mlp", "linear", "none")


class ReuseProjection(nn.Module):
    """The paper's f, applied to cached features whenever they are reused.

    Attributes:
        kind: "mlp", ``z + MLP(LN(z))``, as the reference has it; "linear", one dense layer; "none",
            features as they are, the paper's ablation of f.
        mlp_ratio: width of the MLP's hidden layer, in d.
        dtype: of the computation.
    """

    kind: str
    mlp_ratio: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, z: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        """Returns the projected features."""
        if self.kind == "none":
            return z
        if self.kind == "linear":
            return layers.Dense((z.shape[-1],), self.dtype, (None, None), name="dense")(z)
        y = layers.LayerNorm(layers.BLOCK_EPS, name="norm")(z)
        return z + layers.Mlp(self.mlp_ratio, self.dtype, name="mlp")(y)


class ENAT(nn.Module):
    """The spatial-temporal transformer.

    Attributes:
        num_tokens: l, tokens of an image.
        codebook_size: v; the id v is [MASK].
        num_classes: the label ``num_classes`` means "no class". Without classes, 0, there is no
            label table, and modulation vectors are constants.
        width: d; num_heads: h; encoder_layers, decoder_layers, mlp_ratio: sizes.
        dropout: rate after the embedding, in training.
        reuse: whether features are reused between steps; False is the paper's disentangled
            model, which encodes every visible token anew at every step and has no projection f.
        position_init: "normal" (paper) or "sincos".
        word_std: initial standard deviation of the word table, 0.02 in the paper.
        gate_bias: initial bias of the blocks' gates; 0 in the paper. It is added to 0, or to 1 in a
            model without classes.
        remat: what the backward pass computes again instead of storing it, see ``blocks.stack``.
        attention: its implementation, see ``blocks.attention``.
        unroll: layers per iteration of the scan over blocks; only speed depends on it.
        dtype: of the computation; parameters, softmax, norms' statistics and logits are float32.
        text_width: e, of the states of the text encoder; None: no states.
        text_vocabulary: words of a learned table, where text is words and not states; None: none.
            With neither of the two the model takes no text.
        text_tokens: p at most, of a text. In a config 0 leaves it to the longest caption.
        text_encoding: "once": the encoder reads the text alone, once a call; "every_step": it
            reads the text together with the new tokens of every step, as the cost that the paper
            prints for MS-COCO implies; "never": encoder and decoder see the text unread.
        text_positions: whether text gets learned positions; states of CLIP carry theirs.
        attend_padding: whether padding of a text is attended to, as by models that were trained on
            all 77 states of CLIP.
        shared_key_value: whether keys and values of the context and of the tokens themselves come
            from one layer.
        reuse_projection: kind of the projection f, see ``ReuseProjection``.
        project_once: whether a feature passes through f when it is first reused and not again, so
            that it is in sampling what it was in training. False, the paper's: at every reuse.

    Raises:
        ValueError: ``text_encoding`` or ``reuse_projection`` is unknown, or text is both words and
            states, or has no ``text_tokens``.
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
    attention: str = "auto"
    unroll: int = 1
    dtype: str = "float32"
    text_width: int | None = None
    text_vocabulary: int | None = None
    text_tokens: int = 0
    text_encoding: str = "once"
    text_positions: bool = False
    attend_padding: bool = False
    shared_key_value: bool = False
    reuse_projection: str = "mlp"
    project_once: bool = False

    def setup(self) -> None:
        self._check_settings()
        num_layers = self.encoder_layers + self.decoder_layers
        self.embed, self.modulation, self.head = blocks.shared_parts(self, num_layers, 8)
        self.encoder = blocks.stack(self, self.encoder_layers, self.shared_key_value)
        self.decoder = blocks.stack(self, self.decoder_layers, self.shared_key_value)
        dtype = jnp.dtype(self.dtype)
        if self.reuse:
            self.project = ReuseProjection(self.reuse_projection, self.mlp_ratio, dtype)
        if self.takes_text:
            positions = self.text_tokens if self.text_positions else None
            self.embed_text = layers.TextEmbedding(
                self.width, self.text_vocabulary, positions, dtype
            )

    @property
    def takes_text(self) -> bool:
        """Whether there is a text beside the image."""
        return self.text_width is not None or self.text_vocabulary is not None

    def _check_settings(self) -> None:
        for name, known in (
            ("text_encoding", TEXT_ENCODINGS),
            ("reuse_projection", REUSE_PROJECTIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: one of {known}")
        if self.text_width is not None and self.text_vocabulary is not None:
            raise ValueError("text is words (text_vocabulary) or states (text_width), not both")
        if self.takes_text and self.text_tokens < 1:
            raise ValueError("a model of text needs text_tokens, the tokens of a text at most")

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

    def read(self, prompt: Prompt, modulation: Float[Array, "layers b 8 d"]) -> Text:
        """Returns a text as ``encode`` and ``decode`` take it; to be called once a call.

        With ``text_encoding`` "once" it has been through the encoder, alone: it is the same at
        every step, and in training as in sampling. It never passes through the projection f.

        Args:
            prompt: of at most ``text_tokens`` words or states; p may be 0. With ``attend_padding``
                all p are attended to, whatever its length.
            modulation: from ``condition``.

        Raises:
            ValueError: the model takes no text, or an argument has a wrong shape.
        """
        if not self.takes_text:
            raise ValueError("this model takes no text: text_width and text_vocabulary are None")
        sizes = {} if self.text_vocabulary is not None else {"e": self.text_width}
        shapes.check("the prompt's tokens", prompt.tokens, b=None, p=None, **sizes)
        b, p = prompt.tokens.shape[:2]
        if p > self.text_tokens:
            raise ValueError(f"a text of {p} tokens is longer than text_tokens={self.text_tokens}")
        num_layers = {self.encoder_layers, self.encoder_layers + self.decoder_layers}
        shapes.check_inputs(self, b, modulation, num_layers, 8, **{"its length": prompt.length})
        length = None if self.attend_padding else prompt.length
        x = self.embed_text(jnp.asarray(prompt.tokens))
        if self.text_encoding == "once" and p:
            mask = blocks.key_mask((p, None, length))
            x, _ = self.encoder(x, modulation[: self.encoder_layers], None, mask, None)
        return Text(x, length)

    def keep(self, text: Text, modulation: Float[Array, "layers b 8 d"]) -> Text:
        """Returns a text with its keys and values in all layers, for a call of many steps.

        No result depends on it, and none of a text that is read at every step can be kept.

        Args:
            text: from ``read``.
            modulation: from ``condition``, of all layers.
        """
        if self.text_encoding == "every_step" or not text.features.shape[1]:
            return text
        n = self.encoder_layers
        stacks = (self.encoder, modulation[:n]), (self.decoder, modulation[n:])
        kept = [blocks.context_key_values(stack, text.features, x) for stack, x in stacks]
        return text._replace(kept=tuple(kept))

    def encode(
        self,
        tokens: Int[Array, "b n"] | Float[Array, "b n d"],
        positions: Int[Array, "b n"] | None,
        modulation: Float[Array, "layers b 8 d"],
        cache: Float[Array, "b p d"] | None = None,
        *,
        num_new: Count | None = None,
        num_cached: Count | None = None,
        num_projected: Count | None = None,
        text: Text | None = None,
        deterministic: bool = True,
    ) -> Any:
        """Encodes the newly revealed tokens and appends them to the projected cache.

        Args:
            tokens: codes; or floats, which are embedded already and only cast to the dtype of the
                model. n may be 0.
            positions: raster positions of codes; those of embedded tokens are not used.
            modulation: from ``condition``.
            cache: features of earlier tokens, real ones first; None or p = 0: none.
            num_new: real slots of the new window, its first ones; None: all.
            num_cached: real slots of the cache; None: all.
            num_projected: slots of the cache, its first ones, that stay as they are, since they
                have passed through f before; None: none. For ``project_once``.
            text: from ``read``, the same at every step; None: no text.
            deterministic: False applies dropout (rng "dropout").

        Returns:
            The cache for the next step, [b, p + n, d]; given a text, the pair of it and of the
            ``Text`` that ``decode`` takes at this step. The cache's first ``num_cached + num_new``
            rows are real. Cached features have passed through the projection f once more, as in the
            reference: unless ``num_projected`` is given, a token revealed k steps ago has passed
            through it k times.

        Raises:
            ValueError: an argument has a wrong shape.
        """
        shapes.check_tokens(tokens, positions, self.width)
        b, n = tokens.shape[:2]
        num_layers = {self.encoder_layers, self.encoder_layers + self.decoder_layers}
        counts = {"num_new": num_new, "num_cached": num_cached, "num_projected": num_projected}
        shapes.check_inputs(self, b, modulation, num_layers, 8, **counts)
        if cache is not None:
            shapes.check("cache", cache, b=b, p=None, d=self.width)
            cache = self._projected(cache, num_projected) if cache.shape[1] else None
        with_new = text is not None and self.text_encoding == "every_step"
        if n == 0 and not with_new:
            empty = jnp.zeros((b, 0, self.width), jnp.dtype(self.dtype))
            cache = empty if cache is None else cache
            return cache if text is None else (cache, text)
        x = self.embed(tokens, positions, deterministic)
        context, kept, keys = self._context(None if with_new else text, 0, cache, num_cached, b)
        if text is not None and with_new:
            p = text.features.shape[1]
            x = jnp.concatenate([text.features, x], axis=1)
            keys.append((p, None, text.length))
        mask = blocks.key_mask(*keys, (n, None, num_new))
        x, _ = self.encoder(x, modulation[: self.encoder_layers], context, mask, kept)
        if text is not None and with_new:
            text, x = text._replace(features=x[:, :p]), x[:, p:]
        cache = x if cache is None else blocks.append(cache, x, num_cached)
        return cache if text is None else (cache, text)

    def _projected(
        self, cache: Float[Array, "b p d"], num_projected: Count | None
    ) -> Float[Array, "b p d"]:
        projected = self.project(cache)
        if num_projected is None:
            return projected
        before = jnp.arange(cache.shape[1]) < jnp.reshape(num_projected, (-1, 1))
        return jnp.where(before[..., None], cache, projected)

    def _context(
        self,
        text: Text | None,
        stack: int,
        cache: Float[Array, "b p d"] | None,
        num_cached: Count | None,
        b: int,
    ) -> tuple[
        Float[Array, "b c d"] | None,
        Float[Array, "layers b p 2 d"] | None,
        list[tuple[int, Count | None, Count | None]],
    ]:
        """Returns what tokens look at beside themselves, text first, and its windows of keys.

        Of a text with ``kept`` keys and values those of the stack, 0 or 1, stand between the two.
        """
        parts: list[Float[Array, "b c d"]] = []
        keys: list[tuple[int, Count | None, Count | None]] = []
        if text is not None:
            shapes.check("the text's features", text.features, b=b, p=None, d=self.width)
            parts += [text.features] if text.kept is None else []
            keys.append((text.features.shape[1], None, text.length))
        if cache is not None:
            parts.append(cache)
        keys.append((0 if cache is None else cache.shape[1], None, num_cached))
        parts = [part for part in parts if part.shape[1]]
        kept = None if text is None or text.kept is None else text.kept[stack]
        if len(parts) < 2:
            return (parts[0] if parts else None), kept, keys
        return jnp.concatenate(parts, axis=1), kept, keys

    def decode(
        self,
        positions: Int[Array, "b m"],
        modulation: Float[Array, "layers b 8 d"],
        cache: Float[Array, "b p d"],
        *,
        num_masked: Count | None = None,
        num_visible: Count | None = None,
        text: Text | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b m v"]:
        """Predicts the codes at the masked positions.

        Args:
            positions: raster positions of masked tokens; padding comes first.
            modulation: from ``condition``.
            cache: from ``encode``; p may be 0.
            num_masked: real slots of the masked window, its last ones; None: all.
            num_visible: real slots of the cache, its first ones; None: all.
            text: from ``encode`` at this step; None: no text.
            deterministic: False applies dropout (rng "dropout").

        Returns:
            Float32 logits.

        Raises:
            ValueError: an argument has a wrong shape.
        """
        counts = num_masked, num_visible
        y = self.features(positions, modulation, cache, *counts, text, deterministic)
        return self.head(y, self.embed.word)

    def features(
        self,
        positions: Int[Array, "b m"],
        modulation: Float[Array, "layers b 8 d"],
        cache: Float[Array, "b p d"],
        num_masked: Count | None = None,
        num_visible: Count | None = None,
        text: Text | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b m d"]:
        """Returns the decoder's output before the head; arguments as in ``decode``."""
        shapes.check("positions", positions, b=None, m=None)
        num_layers = self.encoder_layers + self.decoder_layers
        counts = {"num_masked": num_masked, "num_visible": num_visible}
        b = positions.shape[0]
        shapes.check_inputs(self, b, modulation, num_layers, 8, **counts)
        shapes.check("cache", cache, b=b, p=None, d=self.width)
        m = positions.shape[1]
        ids = jnp.full_like(positions, self.codebook_size)
        y = self.embed(ids, positions, deterministic)
        first = None if num_masked is None else m - num_masked
        context, kept, keys = self._context(text, 1, cache, num_visible, b)
        mask = blocks.key_mask(*keys, (m, first, None))
        y, _ = self.decoder(y, modulation[self.encoder_layers :], context, mask, kept)
        return y

    def __call__(self, ids: Int[Array, "b l"], labels: Int[Array, " b"]) -> Float[Array, "b m v"]:
        """Runs a pass that touches every parameter, for initialisation; l is at least 3."""
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        modulation = self.condition(labels)
        text = None
        if self.takes_text:
            words = jnp.zeros((ids.shape[0], 1), jnp.int32)
            states = jnp.zeros((*words.shape, self.text_width or 1), jnp.float32)
            prompt = Prompt(states if self.text_vocabulary is None else words)
            text = self.read(prompt, modulation)
        cache = self.encode(ids[:, :1], positions[:, :1], modulation, text=text)
        if text is not None:
            cache, text = cache
        if self.reuse:
            cache = self.encode(ids[:, 1:2], positions[:, 1:2], modulation, cache)
        return self.decode(positions[:, 2:], modulation, cache, text=text)
