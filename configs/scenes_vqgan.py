"""A tokenizer of scenes of handwritten digits: 32x32 grey pixels to 8x8 tokens out of 32 codes.

    python -m enat_jax.train --config configs/scenes_vqgan.py --workdir runs/scenes/tokenizer

A digit has 4x4 tokens, a quarter of what it has in configs/digits_vqgan.py, so that each must tell
more: there are twice as many codes, and the decoder learns alone in the end, without swapped codes.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("digits_vqgan.py")


def get_config() -> ml_collections.ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.model.codebook_size = 32
    config.data = {
        "source": "scenes",
        "size": 32,  # pixels
        # Scenes of one digit teach what the words mean, before where each belongs.
        "single": 0.6,
    }
    config.loss.restart_until = 500
    config.loss.decoder_from = 800
    config.train.num_steps = 1000
    return config
