"""The f16 tokenizer of MaskGIT and ENAT, trained as VQGAN+: 256x256 images to 16x16 tokens of 1024.

    python -m enat_jax.train --config configs/vqgan_imagenet256.py \\
        --workdir runs/vqgan_imagenet256 --config.perceptual.weights=resnet50-0676ba61.pth

The network is MaskGIT's, whose released weights can be imported instead of training, as can those
of VQGAN+, see enat_jax/inference/README.md. Its losses are those of VQGAN+, the only recipe for
1024 codes with a published table of what each part brings: a reconstruction FID of 1.67 after 1.35
million steps (4.5 days of 32 A100), of about 2.0 after 300,000. Nobody has run it here. The weights
of the ResNet-50 are torchvision's first ones (IMAGENET1K_V1), see enat_jax/evaluation/README.md.
Warm-ups, the start of the discriminator and the end of restarts of codes come sooner with fewer
--config.train.num_steps.

Sources: "MaskGIT" is arXiv:2202.04200 and its release, "VQGAN+" arXiv:2409.16211 and
configs/tokenizer/vqgan_plus_10bit.yaml of its release, "VQ-VAE" arXiv:1711.00937; "ours" has no
source.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.task = "vqgan"
    config.seed = 0
    config.model = {
        "channels": 128,  # MaskGIT, as all of the model
        "channel_multipliers": (1, 1, 2, 2, 4),
        "num_res_blocks": 2,
        "embed_dim": 256,
        "codebook_size": 1024,
        "num_groups": 32,
        "image_channels": 3,
        "dtype": "bfloat16",  # ours, of convolutions; VQGAN+: float32, as losses and norms are here
        "conv_downsampling": False,  # VQGAN+: True; the released weights of MaskGIT pool
    }
    config.data = {
        "source": "tfds:imagenet2012",  # see enat_jax.prepare
        "data_dir": None,  # of TFDS; its default: ~/tensorflow_datasets
        "held_out_split": "validation",
        "size": 256,  # pixels
        "crop_area": (0.8, 1.0),  # VQGAN+: min_scale
        "crop_ratio": (3 / 4, 4 / 3),  # VQGAN+: use_aspect_ratio_aug
        "flip": True,  # VQGAN+
    }
    config.optimizer = {
        "learning_rate": 1e-4,  # VQGAN+, as all of the optimizer
        "warmup_steps": 5000,
        "schedule": "cosine",
        "final_share": 0.1,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 1e-4,
        "clip_norm": 1.0,
    }
    config.loss = {
        "reconstruction": "l2",  # VQGAN+, of pictures in [0, 1]
        "reconstruction_weight": 4.0,  # VQGAN+: as 1 of pictures in [-1, 1]
        "codebook_weight": 1.0,  # VQGAN+
        "commitment_weight": 0.25,  # VQGAN+; VQ-VAE, section 3.2
        "usage_decay": 0.99,  # ours: VQGAN+ moves no codes
        "dead_below": 0.1,
        "restart_every": 500,
        "restart_until": 500_000,
        "ema_decay": 0.999,  # VQGAN+
    }
    config.perceptual = {
        "kind": "resnet50_logits",  # VQGAN+: features give better pictures and worse samples
        "weights": None,  # give it on the command line
        "weight": 0.1,  # VQGAN+
    }
    config.discriminator = {
        "weight": 0.02,  # VQGAN+, fixed
        "channels": None,  # VQGAN+: 128, as many as the tokenizer has, which None means
        "stages": None,  # VQGAN+: 4, which None means for pictures of this size
        "loss": "hinge",  # VQGAN+
        "start": 20_000,  # VQGAN+
        "lead_steps": 0,  # VQGAN+: both learn from its start on, at once with the whole weight
        "ramp_steps": 0,
        "lecam": 0.001,  # VQGAN+
        "penalty": 0.0,  # VQGAN+
    }
    config.discriminator_optimizer = {
        "learning_rate": 1e-4,  # VQGAN+, as all of it; counted from the discriminator's first step
        "warmup_steps": 5000,
        "schedule": "cosine",
        "final_share": 0.1,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 1e-4,
        "clip_norm": 1.0,
    }
    config.train = {
        "batch_size": 256,  # VQGAN+ and MaskGIT
        "num_steps": 1_350_000,  # VQGAN+
    }
    return config


def scaled(num_steps: int) -> dict[str, int | float]:
    """Returns the settings of a run of so many steps, but for those that are given."""
    return {
        "optimizer.warmup_steps": min(5000, num_steps // 20),
        "discriminator_optimizer.warmup_steps": min(5000, num_steps // 20),
        "discriminator.start": min(20_000, num_steps // 10),
        "loss.restart_until": min(500_000, num_steps * 2 // 5),
    }
