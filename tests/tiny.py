"""A tokenizer and a generator with random weights, small enough to be run by many tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from enat_jax.data import records, text_tokens, tokens
from enat_jax.inference import clip_model, clip_towers, generator, sampling, text_encoder, tokenizer
from enat_jax.models import clip, enat, vqgan

CLASSES = ("cat", "dog", "tench, Tinca tinca")
IMAGE_SIZE = (8, 8)
NUM_TOKENS = 16
CODES = 8


def random_params(init, *inputs, seed):
    """Parameters of a module without running its initialisation.

    Noise on everything: fresh gates are zero, and then labels and context would do nothing.
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0), *inputs)["params"]

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(mean, 0.3, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


CODEC = vqgan.VQGAN(
    channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    embed_dim=4,
    codebook_size=CODES,
    num_groups=4,
    image_channels=1,
    dtype="float32",
)
TRANSFORMER = enat.ENAT(
    num_tokens=NUM_TOKENS,
    codebook_size=CODES,
    num_classes=len(CLASSES),
    width=16,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=1,
)
SETTINGS = sampling.Settings(
    num_steps=3, guidance_scale=1.0, token_temperature=1.0, mask_temperature=2.0, num_segments=1
)


@functools.cache  # tracing the networks takes seconds, and many test files ask
def make_tokenizer(seed=0):
    params = random_params(CODEC.init, jnp.zeros((1, *IMAGE_SIZE, 1)), seed=seed)
    return tokenizer.Tokenizer(CODEC, params, IMAGE_SIZE, {"weights": f"random {seed}"})


WORDS = ("a", "two", "red", "blue", "cat", "cats", "dog")
TEXT_TOKENS = 5


def text_transformer(**changes):
    settings = dict(text_tokens=TEXT_TOKENS, text_positions=True, shared_key_value=True)
    return TRANSFORMER.clone(**settings | changes)


def _text_generator(model, text, seed):
    ids, labels = jnp.zeros((1, NUM_TOKENS), jnp.int32), jnp.zeros((1,), jnp.int32)
    return generator.Generator(
        model,
        random_params(model.init, ids, labels, seed=seed + 200),
        make_tokenizer(),
        CLASSES[: model.num_classes],
        SETTINGS,
        {"weights": f"random {seed}"},
        text,
    )


@functools.cache
def make_word_generator(num_classes=0, seed=16, **changes):
    """A generator that reads ``WORDS``, on request beside classes."""
    kind = text_tokens.Words(WORDS)
    model = text_transformer(num_classes=num_classes, text_vocabulary=kind.size, **changes)
    return _text_generator(model, text_encoder.TextEncoder(kind, TEXT_TOKENS), seed)


@functools.cache
def make_clip(seed=0):
    """CLIP's text tower of random weights and its own tokens."""
    model = clip.TextTower(
        vocabulary=text_tokens.Clip.size,
        context=8,
        width=6,
        num_layers=1,
        num_heads=2,
        hidden=8,
        activation="quick_gelu",
    )
    params = random_params(model.init, jnp.zeros((1, 8), jnp.int32), seed=seed + 300)
    return clip_model.ClipText(model, params, text_tokens.Clip.end, {"weights": f"random {seed}"})


@functools.cache
def make_both_towers(seed=0):
    """Both towers of CLIP; of pictures and texts some are alike and others not.

    The text tower is another one than ``make_clip``.
    """
    text = clip.TextTower(text_tokens.Clip.size, 8, 6, 1, 2, 8, "quick_gelu", projection=5)
    vision = clip.VisionTower(8, 4, 8, 1, 2, 8, "quick_gelu", projection=5)
    of_text = random_params(text.init, jnp.zeros((1, 8), jnp.int32), seed=seed + 405)
    of_vision = random_params(vision.init, jnp.zeros((1, 8, 8, 3)), seed=seed + 505)
    reading = clip_model.ClipText(
        text, of_text, text_tokens.Clip.end, {"weights": f"random {seed}"}
    )
    return clip_towers.Clip(reading, clip_towers.ClipVision(vision, of_vision))


@functools.cache
def make_clip_generator(num_classes=0, **changes):
    """A generator that reads states of ``make_clip``."""
    text = text_encoder.of_clip(make_clip(), TEXT_TOKENS)
    model = text_transformer(
        num_classes=num_classes, text_width=text.width, text_positions=False, **changes
    )
    return _text_generator(model, text, 1)


@functools.cache
def make_generator(seed=0):
    ids, labels = jnp.zeros((1, NUM_TOKENS), jnp.int32), jnp.zeros((1,), jnp.int32)
    return generator.Generator(
        TRANSFORMER,
        random_params(TRANSFORMER.init, ids, labels, seed=seed + 100),
        make_tokenizer(seed),
        CLASSES,
        SETTINGS,
        {"weights": f"random {seed}"},
    )


def token_set(
    codes, labels, *, codebook_size, class_names, tokenizer, preprocessing=None, grid=None
):
    """A token set in memory, of tokens [n, l] and labels [n]."""
    side = round(codes.shape[1] ** 0.5)
    rows = np.zeros(len(codes), records.dtype(codes.shape[1], codebook_size))
    rows["tokens"], rows["label"], rows["image"] = codes, labels, np.arange(len(codes))
    return tokens.TokenSet(
        rows=rows,
        grid=grid or (side, side),
        codebook_size=codebook_size,
        class_names=tuple(class_names),
        tokenizer=tokenizer,
        preprocessing=preprocessing or {},
    )


def write_tokens(directory, made):
    """Writes a token set as tokenization does; returns the directory."""
    spec = tokens.TokenSetSpec(
        num_images=len(made),
        copies=1,
        flips=False,
        batch_size=1,
        grid=made.grid,
        codebook_size=made.codebook_size,
        class_names=made.class_names,
        tokenizer=made.tokenizer,
        preprocessing=made.preprocessing,
        location={},
    )
    for shard in tokens.begin(directory, spec):
        items = np.array(spec.items(shard))
        tokens.write_shard(directory, spec, shard, made.rows[items], [str(i) for i in items], [])
    assert tokens.finish(directory, spec)
    return directory
