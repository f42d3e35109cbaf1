"""A small ENAT that learns to draw handwritten digits, on a laptop.

bash launch/quickstart.sh                     # everything, the tokenizer and the tokens too
python -m enat_jax.train --config configs/digits.py --workdir runs/digits/enat
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
        # The paper starts from N(0, 0.02) and 0. So small a model then ignores the context for
        # thousands of steps; with these it uses it within hundreds.
        "position_init": "sincos",
        # 0.02 drowns the codes in the positions, and the head, tied to them, starts too flat: the
        # held-out loss at 300 steps was 2.58 instead of 2.94 (32 codes, with twice the rate too).
        "word_std": 0.2,
        "gate_bias": 0.3,
    }
    config.data = {
        "tokens": "runs/digits/tokens",
        "held_out_tokens": "runs/digits/tokens_held_out",
        "tokenizer": "runs/digits/tokenizer/model",
    }
    # Beta(12, 3) hardly ever shows 64 tokens the ratios that sampling uses, nor the first step.
    config.mask = {"mask_ratio": "cosine", "min_visible": 0, "reuse_probability": 0.5}
    config.training = {
        "label_smoothing": 0.1,
        "label_drop": 0.1,
        "ema_decay": 0.99,
        "max_shapes": 4,
    }
    config.sampler = {
        "num_steps": 8,
        "guidance_scale": 1.0,
        "token_temperature": 1.0,
        "mask_temperature": 10.0,
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
        "num_steps": 1200,
        "log_every": 50,
        "eval_every": 600,
        "save_every": 250,
    }
    return config
