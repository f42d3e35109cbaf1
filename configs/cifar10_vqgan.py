"""A tokenizer of CIFAR-10: 32x32 pixels in colour to 8x8 tokens out of 256 codes.

    python -m enat_jax.train --config configs/cifar10_vqgan.py --workdir runs/cifar10/tokenizer \\
        --config.data.source=cifar10_train.zip
    python -m enat_jax.train --config configs/cifar10_vqgan.py:adversarial \\
        --workdir runs/cifar10/tokenizer --config.data.source=cifar10_train.zip \\
        --config.perceptual.weights=alexnet.ckpt

The source is a folder or an archive of `train/<class name>/<picture>`, or "tfds:cifar10" once it
has been prepared as array_record. "adversarial" adds LPIPS, a discriminator and a moving average,
by the recipe of VQGAN+ (MaskBit, arXiv:2409.16211) with what 32 pixels and 1500 steps ask for. It
needs the weights of LPIPS with AlexNet, see configs/README.md.
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "adversarial"):
        raise ValueError(f"{variant!r} is unknown here: 'adversarial' or nothing")
    config = ml_collections.ConfigDict()
    config.task = "vqgan"
    config.seed = 0
    config.model = {
        "channels": 32,
        "channel_multipliers": (1, 1, 2),
        "num_res_blocks": 1,
        "embed_dim": 16,
        "codebook_size": 256,
        "num_groups": 8,  # of at least 4 channels
        "image_channels": 3,
    }
    config.data = {
        "source": None,  # give it on the command line
        "size": 32,  # pixels
        "held_out": 0.02,  # share of the pictures kept for evaluation
        "crop_area": (0.8, 1.0),
        "flip": True,
    }
    config.optimizer = {
        "learning_rate": 2e-3,
        "warmup_steps": 100,
        "schedule": "cosine",
        "b1": 0.9,
        "b2": 0.99,
        "weight_decay": 0.0,
    }
    config.loss = {
        "reconstruction": "l1",
        "usage_decay": 0.95,
        "restart_every": 50,
        "restart_until": 1000,  # the codes settle while the rate falls
        "code_noise": 0.05,  # tokens that can be told from their neighbours, see digits_vqgan.py
    }
    config.train = {
        "batch_size": 32,
        "num_steps": 1500,
        "log_every": 50,
        "eval_every": 500,
        "save_every": 250,
    }
    if variant:
        config.loss["ema_decay"] = 0.999  # VQGAN+
        config.perceptual = {
            "kind": "lpips_alex",  # a ninth of the multiply-adds of VGG's at this size
            "weight": 0.1,  # with 0.25 its gradient is four times that of the absolute error
            "least_side": 64,  # at 32 pixels grain lowers the distance
        }
        config.discriminator = {
            "weight": 0.02,  # VQGAN+
            "start": 500,  # when reconstructions have settled
            "lecam": 0.001,  # VQGAN+
        }
        config.discriminator_optimizer = {
            "learning_rate": 1e-4,  # VQGAN+; with 5e-4 and no warm-up it wins within 60 steps
            "warmup_steps": 100,
        }
    return config
