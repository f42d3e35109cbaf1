"""A tokenizer and a generator with random weights, small enough to be run by many tests."""

import jax
import jax.numpy as jnp

from enat_jax import generator, sampling, tokenizer
from enat_jax.models import enat, vqgan

CLASSES = ("cat", "dog", "tench, Tinca tinca")
IMAGE_SIZE = (8, 8)
NUM_TOKENS = 16
CODES = 8


def perturbed(params, seed):
    """With noise on everything: fresh gates are zero, and then labels and context do nothing."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return jax.tree.unflatten(tree, [x + 0.3 * jax.random.normal(k, x.shape) for k, x in pairs])


@jax.jit
def _initial_codec():
    return CODEC.init(jax.random.key(0), jnp.zeros((1, *IMAGE_SIZE, 1)))["params"]


@jax.jit
def _initial_transformer():
    ids = jnp.zeros((1, NUM_TOKENS), jnp.int32)
    return TRANSFORMER.init(jax.random.key(0), ids, jnp.zeros((1,), jnp.int32))["params"]


CODEC = vqgan.VQGAN(
    channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    embed_dim=4,
    codebook_size=CODES,
    num_groups=4,
    image_channels=1,
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


def make_tokenizer(seed=0):
    return tokenizer.Tokenizer(
        CODEC, perturbed(_initial_codec(), seed), IMAGE_SIZE, {"weights": f"random {seed}"}
    )


def make_generator(seed=0):
    return generator.Generator(
        TRANSFORMER,
        perturbed(_initial_transformer(), seed + 100),
        make_tokenizer(seed),
        CLASSES,
        SETTINGS,
        {"weights": f"random {seed}"},
    )
