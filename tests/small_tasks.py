"""A training task on random tokens, without files."""

import functools

import jax.numpy as jnp
import numpy as np
import tiny

from enat_jax.data import captioned, captions, text_tokens
from enat_jax.inference import clip_model, sampling, text_encoder
from enat_jax.models import clip, enat, nat
from enat_jax.schedules import costs, reveal, shape_buckets
from enat_jax.training import enat_task, optim

SIZES = dict(num_tokens=16, codebook_size=20, num_classes=3, width=32, num_heads=4, dropout=0.0)
WORDS = text_tokens.Words(("red", "green", "blue", "thing"))
TEXT_TOKENS = 5


def make_task(kind="enat", batch_size=8, text=None, **changes):
    """A transformer on random tokens; past adaLN-Zero's start, where most gradients are 0.

    With ``text``, "words" or "clip", it reads which of three colours a picture has, in two
    captions of different lengths, and has no classes; the tokens are those of the colour.
    """
    settings = SIZES | {"gate_bias": 0.5, "word_std": 0.2}
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(20, size=(50, 16)), rng.integers(3, size=50)
    encoder = text_encoders()[text] if text else None
    if encoder is not None:
        codes = labels[:, None] + np.arange(16) % 4
        words = encoder.kind.size if encoder.width is None else None
        settings |= {"text_vocabulary": words, "text_width": encoder.width, "num_classes": 0}
        settings |= {"text_tokens": TEXT_TOKENS, "shared_key_value": True}
        settings["gate_bias"] = 0.0  # added to 1 where there are no classes
    settings |= changes
    if kind == "nat":
        model = nat.NAT(num_layers=2, **settings)
    else:
        model = enat.ENAT(**{"encoder_layers": 2, "decoder_layers": 1} | settings)
    splits = reveal.SplitDistribution(
        "cosine", min_visible=0, reuse_probability=0.5 if model.reuse else 0.0
    )
    token_set = tiny.token_set(
        codes, labels, codebook_size=20, class_names=("a", "b", "c"), tokenizer="none"
    )
    if encoder is not None:
        token_set = captioned.Captioned.of(token_set, colours(encoder.kind, labels), TEXT_TOKENS)
    cost = functools.partial(costs.training_cost, costs.dims_of(model))
    return enat_task.Task(
        model=model,
        tokens=token_set,
        held_out=None if encoder is None else token_set,
        tokenizer=None,
        optimizer=optim.Optimizer(learning_rate=1e-3, warmup_steps=0, eps=1e-4).make(100),
        loss=enat_task.Loss(max_shapes=2, ema_decay=0.9),
        splits=splits,
        buckets=shape_buckets.choose(16, splits, 2, cost),
        sampler=sampling.Settings(num_steps=3, num_segments=1),
        seed=0,
        batch_size=batch_size,
        text=encoder,
    )


@functools.cache
def text_encoders():
    """Of ``WORDS``, and of CLIP's tokens by a tower of random weights."""
    tower = clip.TextTower(
        vocabulary=text_tokens.Clip.size,
        context=8,
        width=16,
        num_layers=2,
        num_heads=4,
        hidden=32,
        activation="quick_gelu",
    )
    params = tiny.random_params(tower.init, jnp.zeros((1, 8), jnp.int32), seed=0)
    found = clip_model.ClipText(tower, params, text_tokens.Clip.end, {})
    return {
        "words": text_encoder.TextEncoder(WORDS, TEXT_TOKENS),
        "clip": text_encoder.of_clip(found, TEXT_TOKENS),
    }


def colours(kind, labels):
    """Two captions of each picture: its colour, which tokens 1, 2, 3 are, and that with token 4."""
    ids = np.array([[1 + label, 1 + label, 4] for label in labels]).ravel()
    offsets = np.cumsum([0, *[1, 2] * len(labels)])
    made_of = {"tokens": "made up", "mirror_words": "keep"}
    return captions.Captions(ids, offsets, 2 * np.arange(len(labels) + 1), kind, made_of)
