"""A training task on random tokens, without files."""

import functools

import numpy as np
import tiny

from enat_jax.inference import sampling
from enat_jax.models import enat, nat
from enat_jax.schedules import costs, reveal, shape_buckets
from enat_jax.training import enat_task, optim

SIZES = dict(num_tokens=16, codebook_size=20, num_classes=3, width=32, num_heads=4, dropout=0.0)


def make_task(kind="enat", batch_size=8, **changes):
    """A transformer on random tokens; past adaLN-Zero's start, where most gradients are 0."""
    settings = SIZES | {"gate_bias": 0.5, "word_std": 0.2} | changes
    if kind == "nat":
        model = nat.NAT(num_layers=2, **settings)
    else:
        model = enat.ENAT(**{"encoder_layers": 2, "decoder_layers": 1} | settings)
    splits = reveal.SplitDistribution(
        "cosine", min_visible=0, reuse_probability=0.5 if model.reuse else 0.0
    )
    rng = np.random.default_rng(0)
    token_set = tiny.token_set(
        rng.integers(20, size=(50, 16)),
        rng.integers(3, size=50),
        codebook_size=20,
        class_names=("a", "b", "c"),
        tokenizer="none",
    )
    cost = functools.partial(costs.training_cost, costs.dims_of(model))
    return enat_task.Task(
        model=model,
        tokens=token_set,
        held_out=None,
        tokenizer=None,
        optimizer=optim.Optimizer(learning_rate=1e-3, warmup_steps=0, eps=1e-4).make(100),
        loss=enat_task.Loss(max_shapes=2, ema_decay=0.9),
        splits=splits,
        buckets=shape_buckets.choose(16, splits, 2, cost),
        sampler=sampling.Settings(num_steps=3, num_segments=1),
        seed=0,
        batch_size=batch_size,
    )
