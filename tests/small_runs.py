"""Small training runs for the tests: random token sets, a config, the program as a process."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tiny

from enat_jax.inference import tokenizer
from enat_jax.models import vqgan
from enat_jax.training import config as train_config

ROOT = pathlib.Path(__file__).parents[1]


def small_config(root, **changes):
    """A transformer of 16 tokens on random token sets; changes are dotted keys."""
    config = ml_collections.ConfigDict(
        {
            "task": "enat",
            "seed": 0,
            "model": {
                "kind": "enat", "num_tokens": 16, "codebook_size": 20, "num_classes": 3,
                "width": 16, "num_heads": 2, "encoder_layers": 2, "decoder_layers": 1,
            },
            "data": {
                "tokens": str(root / "tokens"),
                "held_out_tokens": str(root / "tokens"),
                "tokenizer": str(root / "tokenizer"),
            },
            "mask": {"mask_ratio": "cosine", "min_visible": 0},
            "loss": {"max_shapes": 2, "ema_decay": 0.9},
            "sampler": {"num_steps": 3, "num_segments": 1},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
            "train": {
                "batch_size": 8, "num_steps": 6, "log_every": 2, "eval_every": 100,
                "save_every": 2, "pictures": False, "matrix_rate": False, "rehearse": False,
            },
        }
    )  # fmt: skip
    config.update_from_flattened_dict(changes)
    return train_config.complete(config)


def write_data(root):
    """A tokenizer with random weights, and tokens of no image that follow from the label."""
    model = vqgan.VQGAN(
        channels=4, channel_multipliers=(1, 2), num_res_blocks=1, embed_dim=4, codebook_size=20,
        num_groups=2, image_channels=1,
    )  # fmt: skip
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    codec = tokenizer.Tokenizer(model, params, (8, 8))
    codec.save(root / "tokenizer")
    labels = np.random.default_rng(0).integers(0, 3, 50)
    made = tiny.token_set(
        labels[:, None] + np.arange(16) % 4,
        labels,
        codebook_size=20,
        class_names=("a", "b", "c"),
        tokenizer=codec.fingerprint,
    )
    tiny.write_tokens(root / "tokens", made)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


COMMAND = [
    sys.executable, "-m", "enat_jax.train", "--config", str(ROOT / "configs" / "digits.py"),
    "--config.model.num_tokens=16", "--config.model.codebook_size=20",
    "--config.model.num_classes=3", "--config.model.width=16", "--config.model.num_heads=2",
    "--config.model.encoder_layers=1", "--config.training.max_shapes=2",
    "--config.train.batch_size=8", "--config.train.num_steps=200", "--config.train.save_every=5",
    "--config.train.eval_every=20", "--config.train.log_every=10",
    "--config.optimizer.warmup_steps=5",
]  # fmt: skip


# A tokenizer whose discriminator begins to learn at step 24 and counts from step 30 on.
TOKENIZER = [
    sys.executable, "-m", "enat_jax.train", "--config", str(ROOT / "configs" / "digits_vqgan.py"),
    "--config.data.size=8", "--config.model.channels=8", "--config.model.channel_multipliers=(1,2)",
    "--config.train.batch_size=8", "--config.train.num_steps=60", "--config.train.save_every=3",
    "--config.train.eval_every=20", "--config.train.log_every=10", "--config.train.pictures=False",
    "--config.loss.restart_every=4", "--config.loss.restart_until=40",
    "--config.loss.ema_decay=0.9",
    "--config.discriminator.weight=0.05", "--config.discriminator.stages=1",
    "--config.discriminator.start=30", "--config.discriminator.lead_steps=6",
    "--config.discriminator.penalty=0.1", "--config.discriminator.penalty_every=4",
]  # fmt: skip


def start(data, workdir, cache, *more):
    paths = {"tokens": "tokens", "held_out_tokens": "tokens", "tokenizer": "tokenizer"}
    command = [*COMMAND, f"--workdir={workdir}", *more]
    command += [f"--config.data.{key}={data / name}" for key, name in paths.items()]
    return _started(command, cache)


def start_tokenizer(workdir, cache, *more):
    return _started([*TOKENIZER, f"--workdir={workdir}", *more], cache)


def _started(command, cache):
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
