"""ENAT on tokens of one's own pictures; how many tokens, codes and classes, the tokens say.

    python -m enat_jax.tokenize_images --model runs/mine/tokenizer/model --source pictures.zip \\
        --out runs/mine/tokens
    python -m enat_jax.train --config configs/images.py --workdir runs/mine/enat \\
        --config.data.tokens=runs/mine/tokens --config.data.tokenizer=runs/mine/tokenizer/model

The transformer is ENAT-S of the paper, trained as the paper's on ImageNet, but with a batch for a
single GPU, a learning rate scaled to it, fewer steps, b1 of 0.9, and a moving average that warms
up. Warm-up and intervals shrink with --config.train.num_steps. Not trained to the end here.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.task = "enat"
    config.seed = 0
    config.model = {
        "kind": "enat",
        "num_tokens": None,  # as the tokens have it; so the next two
        "codebook_size": None,
        "num_classes": None,
        "width": 366,  # ENAT-S: paper Table 7
        "num_heads": 6,
        "encoder_layers": 15,
        "decoder_layers": 1,
        "dropout": 0.1,  # reference
        "dtype": "bfloat16",
    }
    config.data = {
        "tokens": None,  # give both on the command line
        "tokenizer": None,
    }
    config.mask = {
        "mask_ratio": "beta",  # r ~ Beta(12, 3); reference
        "alpha": 12.0,
        "beta": 3.0,
        "min_visible": 1,  # reference
        "reuse_probability": 0.5,  # paper Section 4.2
    }
    config.loss = {
        "label_smoothing": 0.1,  # reference
        "label_drop": 0.235,  # reference, see enat_l_imagenet256.py
        "ema_decay": 0.9999,  # reference
        "ema_warmup": True,  # so that a short run forgets its start, too; reference: none
        "max_shapes": 16,
    }
    config.sampler = {
        "num_steps": 8,  # paper
        "guidance_scale": 2.5,  # reference
        "token_temperature": 6.0,  # reference
        "mask_temperature": 1.5,  # reference
        "num_segments": 8,
    }
    config.optimizer = {
        "learning_rate": 2e-4,  # paper: 4e-4 at a batch of 2048
        "warmup_steps": 5000,  # reference
        "schedule": "constant",  # reference
        "b1": 0.9,  # reference: 0.99
        "b2": 0.99,  # reference
        "weight_decay": 0.03,  # reference
    }
    config.train = {
        "batch_size": 256,
        "num_steps": 200_000,
        "log_every": 100,
        "eval_every": 10_000,
        "save_every": 2000,
    }
    return config


def scaled(num_steps: int) -> dict[str, int]:
    """Returns the settings of a run of so many steps, but for those that are given."""
    return {
        "optimizer.warmup_steps": min(5000, num_steps // 20),
        "train.log_every": min(100, max(1, num_steps // 20)),
        "train.eval_every": min(10_000, max(1, num_steps // 4)),
        "train.save_every": min(2000, max(1, num_steps // 8)),
    }
