"""A tokenizer of handwritten digits: 32x32 grey images to 8x8 tokens.

python -m enat_jax.train --config configs/digits_vqgan.py --workdir runs/digits_vqgan
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.task = "vqgan"
    config.seed = 0
    config.model = {
        "channels": 16,
        "channel_multipliers": (1, 1, 2),
        "num_res_blocks": 1,
        "embed_dim": 8,
        "codebook_size": 64,
        "num_groups": 4,
        "image_channels": 1,
    }
    config.data = {
        "source": "digits",
        "size": 32,
        "rotation": 10.0,
        "scale": 0.1,
        "shear": 0.15,
        "shift": 0.04,
    }
    config.optimizer = {
        "learning_rate": 2e-3,
        "warmup_steps": 50,
        "schedule": "cosine",
        "b1": 0.9,
        "b2": 0.99,
        "weight_decay": 0.0,
    }
    config.loss = {
        "reconstruction": "l2",
        "usage_decay": 0.9,
        "restart_every": 25,
        "restart_until": 250,
    }
    config.train = {
        "batch_size": 32,
        "num_steps": 400,
        "log_every": 50,
        "eval_every": 200,
        "save_every": 100,
    }
    return config
