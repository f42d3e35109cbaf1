"""The training step on meshes, with accumulation, and over steps that are not finite."""

import functools

import chex
import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from enat_jax import costs, optim, reveal, sampling, shape_buckets, sharding, train_step
from enat_jax.models import enat, nat
from enat_jax.tasks import enat as enat_task
from enat_jax.tasks import vqgan as vqgan_task

# All shapes of a mesh of eight devices.
POLICIES = [
    pytest.param(
        sharding.Sharding(data, fsdp, tensor),
        id=f"{data}x{fsdp}x{tensor}",
        marks=[] if (data, fsdp, tensor) == (2, 2, 2) else pytest.mark.slow,
    )
    for data, fsdp, tensor in [
        *[(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1)],
        *[(2, 4, 1), (4, 1, 2), (2, 1, 4), (1, 4, 2), (1, 2, 4)],
    ]
]
SIZES = dict(num_tokens=16, codebook_size=20, num_classes=3, width=32, num_heads=4, dropout=0.0)


def make_task(kind="enat", batch_size=8, **changes):
    """A transformer on random tokens; past adaLN-Zero's start, where most gradients are 0."""
    settings = SIZES | {"gate_bias": 0.5, "word_std": 0.2} | changes
    if kind == "nat":
        model = nat.NAT(num_layers=2, **settings)
    else:
        model = enat.ENAT(encoder_layers=2, decoder_layers=1, **settings)
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
        training=enat_task.Training(max_shapes=2, ema_decay=0.9),
        splits=splits,
        buckets=shape_buckets.choose(16, splits, 2, cost),
        sampler=sampling.Settings(num_steps=3, num_segments=1),
        seed=0,
        batch_size=batch_size,
    )


def make_vqgan_task(**model):
    sizes = {
        "channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "embed_dim": 8,
        "codebook_size": 16, "num_groups": 4, "image_channels": 1,
    }  # fmt: skip
    config = ConfigDict(
        {
            "seed": 0,
            "model": sizes | model,
            "data": {"source": "digits", "size": 8},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "eps": 1e-4},
            "loss": {"restart_every": 2, "code_noise": 0.1},
            "train": {"batch_size": 16, "num_steps": 60},
        }
    )
    return vqgan_task.make(config)


def train(task, policy, devices=8, num_steps=3, accumulate=1, rules=None):
    """(final state, metrics of each step) as numpy, and the Steps."""
    mesh = sharding.make_mesh(policy, jax.devices()[:devices])
    rules = rules or (enat_task.RULES if isinstance(task, enat_task.Task) else vqgan_task.RULES)
    steps = train_step.Steps(task, mesh, rules, seed=0, accumulate=accumulate)
    state, history = steps.init(), []
    batches = task.batches(0)
    for step in range(num_steps):
        micro = [sharding.global_batch(next(batches), mesh) for _ in range(accumulate)]
        state, metrics = steps(state, micro, step)
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history, steps


@functools.cache
def on_one_device(kind):
    task = make_vqgan_task() if kind == "vqgan" else make_task(kind)
    return task, train(task, sharding.Sharding(), devices=1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["enat", "vqgan"])
def test_every_mesh_trains_like_one_device(kind, policy):
    """Losses, gradients' norms and all parameters after three steps, to rounding."""
    task, (expected, expected_history, _) = on_one_device(kind)
    state, history, steps = train(task, policy)
    chex.assert_trees_all_close(history, expected_history, rtol=2e-4)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-3, atol=2e-5)
    chex.assert_trees_all_close(state.ema_params, expected.ema_params, rtol=1e-3, atol=2e-5)
    ways = policy.fsdp * policy.tensor
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(steps.abstract_state))
    # Everything but vectors is divided, over both axes where it has two that can be.
    assert sharding.shard_bytes(steps.abstract_state) <= whole * (0.3 + 0.7 / min(ways, 4))
