"""ENAT-S without reuse: the disentangled model, every visible token encoded anew (paper Table 6).

    python -m enat_jax.train --config configs/disentangled_s_imagenet256.py --workdir runs/dis_s

Other splits of its layers: --config.model.encoder_layers=8 --config.model.decoder_layers=8
--config.model.width=288, or 12, 4 and 318. The paper reports FID 4.78 after 300,000 steps for 15
and 1. Not reproduced here yet.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("enat_l_imagenet256.py")


def get_config() -> ml_collections.ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]("S")
    config.model.reuse = False
    config.mask.reuse_probability = 0.0
    config.train.num_steps = 300_000  # paper: ablations
    return config
