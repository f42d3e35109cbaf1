"""ENAT-L on ImageNet 256x256: the full configuration; the other transformers differ by a few lines.

    python -m enat_jax.train --config configs/enat_l_imagenet256.py --workdir runs/enat_l

Needs the tokens of the whole training set and its horizontal flips. The reference trained it on 16
A100s; the paper reports FID 2.79 and IS 326.7 at 8 steps. Not reproduced here yet.

Sources: "paper" is arXiv 2411.06959, "reference" the authors' PyTorch release.
"""

import ml_collections

# Paper Table 7.
SIZES = {
    "S": {"width": 366, "num_heads": 6, "encoder_layers": 15, "decoder_layers": 1},
    "B": {"width": 768, "num_heads": 8, "encoder_layers": 15, "decoder_layers": 1},
    "L": {"width": 1024, "num_heads": 16, "encoder_layers": 22, "decoder_layers": 2},
}


def get_config(size: str = "L") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.task = "enat"
    config.seed = 0
    config.model = {
        "kind": "enat",
        "num_tokens": 256,  # a 16x16 grid, paper
        "codebook_size": 1024,  # MaskGIT's tokenizer, paper
        "num_classes": 1000,
        **SIZES[size],
        "mlp_ratio": 4,  # reference
        "dropout": 0.1,  # of the embedding; reference
        "position_init": "normal",  # N(0, 0.02); reference
        "gate_bias": 0.0,  # adaLN-Zero; reference
        # What the backward pass computes again to save memory: "none", "dots" or "full".
        "remat": "none",
        "attention": "auto",  # or "xla"; "cudnn", on NVIDIA GPUs
        "unroll": 1,
        "dtype": "bfloat16",  # reference: float16 with loss scaling
    }
    config.data = {
        "tokens": "data/imagenet256_tokens",  # centre crops and flips; reference
        "tokenizer": "models/vqgan_imagenet256",
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
        # reference: 0.15 in the data set, then 0.1 in the model: 1 - 0.85 * 0.9
        "label_drop": 0.235,
        "ema_decay": 0.9999,  # reference
        "max_shapes": 40,  # of this implementation: 19% of padded work, see shape_buckets.choose
    }
    config.optimizer = {
        "learning_rate": 4e-4,  # paper
        "warmup_steps": 5000,  # reference
        "schedule": "constant",  # reference
        "b1": 0.99,  # reference
        "b2": 0.99,  # reference
        "eps": 1e-8,  # reference
        "weight_decay": 0.03,  # on all parameters; reference
        "clip_norm": None,  # reference
    }
    config.sampler = {
        "num_steps": 8,  # paper
        "guidance_scale": 2.5,  # reference
        "token_temperature": 6.0,  # reference: samp_temp
        "mask_temperature": 1.5,  # reference: mask_temp
        "num_segments": None,  # of this implementation: by the number of images
    }
    config.train = {
        "batch_size": 2048,  # paper
        "num_steps": 500_000,  # paper
        "log_every": 100,
        "eval_every": 25_000,
        "save_every": 5_000,
        "pictures": True,
    }
    return config
