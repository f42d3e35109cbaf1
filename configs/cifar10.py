"""A small ENAT on CIFAR-10: 64 tokens an image, ten classes.

    python -m enat_jax.train --config configs/cifar10_vqgan.py --workdir runs/cifar10/tokenizer \\
        --config.data.source=cifar10_train.zip
    python -m enat_jax.tokenize_images --model runs/cifar10/tokenizer/model \\
        --source cifar10_train.zip --split train --out runs/cifar10/tokens
    python -m enat_jax.tokenize_images --model runs/cifar10/tokenizer/model \\
        --source cifar10_train.zip --split test --out runs/cifar10/tokens_held_out
    python -m enat_jax.train --config configs/cifar10.py --workdir runs/cifar10/enat

Small enough for two CPU cores, and too small to draw what it has not seen often: expect colours and
shapes of the class, not objects. Width, layers and steps are there to be raised on a GPU.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.task = "enat"
    config.seed = 0
    config.model = {
        "kind": "enat",
        "num_tokens": 64,
        "codebook_size": 256,  # of configs/cifar10_vqgan.py
        "num_classes": 10,
        "width": 128,
        "num_heads": 4,
        "encoder_layers": 4,
        "decoder_layers": 2,
        # As in digits.py: a short run needs a start that is less flat than the paper's.
        "dropout": 0.0,
        "position_init": "sincos",
        "word_std": 0.2,
        "gate_bias": 0.3,
    }
    config.data = {
        "tokens": "runs/cifar10/tokens",
        "held_out_tokens": "runs/cifar10/tokens_held_out",
        "tokenizer": "runs/cifar10/tokenizer/model",
        "in_memory": False,
    }
    config.mask = {"mask_ratio": "cosine", "min_visible": 0, "reuse_probability": 0.5}
    config.loss = {
        "label_smoothing": 0.0,
        "label_drop": 0.1,
        "ema_decay": 0.995,
        "max_shapes": 12,  # 140 ms a step on two CPU cores; with 4, less to compile, 200
        "words_from_codebook": True,  # without it the loss stayed at the marginals for 1,000 steps
    }
    config.sampler = {
        "num_steps": 8,
        "guidance_scale": 2.0,
        "token_temperature": 2.0,
        "mask_temperature": 10.0,
        "num_segments": 2,
    }
    config.optimizer = {
        "learning_rate": 3e-3,
        "warmup_steps": 200,
        "schedule": "cosine",
        "b1": 0.9,
        "b2": 0.99,
        "weight_decay": 0.03,
    }
    config.train = {
        "batch_size": 64,
        "num_steps": 3000,
        "log_every": 50,
        "eval_every": 1000,
        "save_every": 250,
    }
    return config
