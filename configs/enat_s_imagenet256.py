"""ENAT-S on ImageNet 256x256, the size of the paper's ablations (paper Tables 6 and 7).

    python -m enat_jax.train --config configs/enat_s_imagenet256.py --workdir runs/enat_s

The paper reports FID 4.97 after 300,000 steps. Not reproduced here yet.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("enat_l_imagenet256.py")


def get_config() -> ml_collections.ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]("S")
    config.train.num_steps = 300_000  # paper: ablations
    return config
