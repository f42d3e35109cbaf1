"""A tokenizer of scenes of handwritten digits: 32x32 grey pixels to 8x8 tokens out of 16 codes.

    python -m enat_jax.train --config configs/scenes_vqgan.py --workdir runs/scenes/tokenizer

As configs/digits_vqgan.py; a scene has one or two digits of 16 pixels in four cells.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("digits_vqgan.py")


def get_config() -> ml_collections.ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.data.source = "scenes"
    return config
