"""A small ENAT that learns to draw handwritten digits, on a laptop.

    bash launch/quickstart.sh                     # everything, the tokenizer and the tokens too
    python -m enat_jax.train --config configs/digits.py --workdir runs/digits/enat

For what it draws, and how good that is, see the README.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.task = "enat"
    config.seed = 0
    config.model = {
        "kind": "enat",
        "num_tokens": 64,
        "codebook_size": 16,  # of configs/digits_vqgan.py
        "num_classes": 10,
        "width": 64,
        "num_heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 2,
        # The paper has 0.1, and label smoothing of 0.1. With both the context was hardly used after
        # 2,000 steps, without them after 600; a second decoder layer, a higher rate and positions
        # of shorter wavelength came at the same time, so no one of these is proven alone.
        "dropout": 0.0,
        # The paper starts from N(0, 0.02), which drowns the codes in the sine-cosine positions and
        # makes the head, tied to the codes, start too flat for so short a run; and from gates of 0.
        "position_init": "sincos",
        "word_std": 0.2,
        "gate_bias": 0.3,
        "unroll": 2,  # all layers: a step takes 29 ms on two CPU cores instead of 34
    }
    config.data = {
        "tokens": "runs/digits/tokens",
        "held_out_tokens": "runs/digits/tokens_held_out",
        "tokenizer": "runs/digits/tokenizer/model",
    }
    # Beta(12, 3) hardly ever shows 64 tokens the ratios that sampling uses, nor the first step.
    config.mask = {"mask_ratio": "cosine", "min_visible": 0, "reuse_probability": 0.5}
    config.loss = {
        "label_smoothing": 0.0,
        "label_drop": 0.1,
        "ema_decay": 0.99,
        "max_shapes": 4,
        # From noise, the paper's way, 1,800 steps are needed for the loss of 1,200 steps with it.
        "words_from_codebook": True,
    }
    # By the figures of enat_jax.evaluate_digits: cooler or less noisy collapses diversity, hotter
    # draws broken strokes, and more steps than 8 did not help.
    config.sampler = {
        "num_steps": 8,
        "guidance_scale": 1.15,
        "token_temperature": 2.75,
        "mask_temperature": 25.0,
        "num_segments": 2,
    }
    config.optimizer = {
        "learning_rate": 4e-3,  # so few steps need a high one
        "warmup_steps": 100,
        "schedule": "cosine",
        "b1": 0.9,
        "b2": 0.99,
        "weight_decay": 0.03,
    }
    config.train = {
        "batch_size": 32,
        "num_steps": 2000,
        "log_every": 50,
        "eval_every": 1000,
        "save_every": 250,
    }
    return config
