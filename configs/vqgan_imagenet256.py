"""The f16 tokenizer of MaskGIT and ENAT: 256x256 images to 16x16 tokens out of 1024 codes.

    python -m enat_jax.train --config configs/vqgan_imagenet256.py --workdir runs/vqgan_imagenet256

The architecture is that of the released weights, for which it is meant first of all: import them
instead of training. Training here knows no perceptual and no adversarial loss yet, and the authors
publish no settings for it; reconstructions will be softer than those of the released tokenizer.
Sources: "MaskGIT" is arXiv:2202.04200 and its release, "VQ-VAE" arXiv:1711.00937.
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
        "dtype": "bfloat16",  # of convolutions; parameters and distances are float32
    }
    config.data = {
        "source": "tfds:imagenet2012",  # see enat_jax.prepare
        "data_dir": None,  # of TFDS; its default: ~/tensorflow_datasets
        "held_out_split": "validation",
        "size": 256,  # pixels
    }
    config.optimizer = {
        "learning_rate": 1e-4,  # MaskGIT: Adam with 1e-4 and these moments
        "warmup_steps": 5000,
        "schedule": "constant",
        "b1": 0.9,
        "b2": 0.99,
        "weight_decay": 0.0,
    }
    config.loss = {
        "reconstruction": "l2",
        "reconstruction_weight": 1.0,
        "codebook_weight": 1.0,
        "commitment_weight": 0.25,  # VQ-VAE, section 3.2
        "usage_decay": 0.99,
        "dead_below": 0.1,
        "restart_every": 500,
        "restart_until": None,
    }
    config.train = {
        "batch_size": 256,  # MaskGIT
        "num_steps": 500_000,
    }
    return config
