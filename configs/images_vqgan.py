"""A tokenizer for one's own pictures: 256x256 pixels to 16x16 tokens out of 1024 codes.

    python -m enat_jax.train --config configs/images_vqgan.py --workdir runs/mine/tokenizer \\
        --config.data.source=pictures.zip
    python -m enat_jax.train --config configs/images_vqgan.py:adversarial \\
        --workdir runs/mine/tokenizer --config.data.source=pictures.zip \\
        --config.perceptual.weights=vgg16.ckpt

The source is a folder or an archive of pictures, in class folders or not, or tfds:NAME. With data
like ImageNet's a released tokenizer does better than training one: this is a quarter of MaskGIT's
width, sized for a single GPU. Its loss is of pixels alone, so reconstructions are soft;
"adversarial" adds LPIPS, a discriminator and a moving average, by the recipe of VQGAN+ (MaskBit,
arXiv:2409.16211), and needs the weights of LPIPS with VGG16, see configs/README.md. With
--config.perceptual.kind=lite0_logits and --config.perceptual.weight=0.1 it costs less. A smaller
picture needs fewer levels: 128 pixels with --config.data.size=128 give 8x8 tokens. Not trained to
the end here: learning rate and steps are those of MaskGIT's release, scaled to the batch. Warm-up,
restarts of codes and intervals shrink with --config.train.num_steps.
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
        "channel_multipliers": (1, 1, 2, 2, 4),  # MaskGIT: 16 pixels a token
        "num_res_blocks": 1,
        "embed_dim": 64,
        "codebook_size": 1024,
        "num_groups": 8,
        "image_channels": 3,
    }
    config.data = {
        "source": None,  # give it on the command line
        "size": 256,  # pixels
        "held_out": 0.05,  # share kept for evaluation; 0 if a folder is called test, None for TFDS
        "crop_area": (0.8, 1.0),  # share of the picture that a crop takes
        "flip": True,  # mirrored half of the time
        "workers": 0,  # processes that decode; 0: threads
    }
    config.optimizer = {
        "learning_rate": 4e-4,
        "warmup_steps": 500,
        "schedule": "cosine",
        "b1": 0.9,
        "b2": 0.99,
        "weight_decay": 0.0,
    }
    config.loss = {
        "reconstruction": "l1",
        "usage_decay": 0.99,
        "restart_every": 100,
        "restart_until": 20_000,
        "code_noise": 0.0,
    }
    config.train = {
        "batch_size": 32,
        "num_steps": 50_000,
        "log_every": 100,
        "eval_every": 5000,
        "save_every": 1000,
    }
    if variant:
        config.loss.update(
            reconstruction="l2",
            reconstruction_weight=4.0,  # VQGAN+: a squared error of weight 1 on [-1, 1]
        )
        config.loss["ema_decay"] = 0.999  # VQGAN+
        config.perceptual = {
            "kind": "lpips_vgg",
            "weight": 1.0,  # LlamaGen, and taming's VQGAN
        }
        config.discriminator = {
            "weight": 0.02,  # VQGAN+; see what share of the gradient it makes
            "lecam": 0.001,  # VQGAN+; of fewer than 5,000 pictures 0.01
        }  # as wide as the tokenizer; starts after a tenth of the run and counts whole 2% later
        config.discriminator_optimizer = {"learning_rate": 1e-4}  # VQGAN+
    return config


def scaled(num_steps: int) -> dict[str, int | float]:
    """Returns the settings of a run of so many steps, but for those that are given."""
    restart_every = min(100, max(2, num_steps // 20))
    return {
        "optimizer.warmup_steps": min(500, num_steps // 20),
        "loss.usage_decay": 1 - 1 / restart_every,  # a code is found dead within 3 restarts
        "loss.restart_every": restart_every,
        "loss.restart_until": min(20_000, num_steps * 2 // 5),  # the codes settle thereafter
        "train.log_every": min(100, max(1, num_steps // 20)),
        "train.eval_every": min(5000, max(1, num_steps // 4)),
        "train.save_every": min(1000, max(1, num_steps // 8)),
    }
