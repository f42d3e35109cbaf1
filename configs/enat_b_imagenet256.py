"""ENAT-B on ImageNet 256x256 (paper Table 7); otherwise as ENAT-L.

    python -m enat_jax.train --config configs/enat_b_imagenet256.py --workdir runs/enat_b

The paper reports FID 3.53 at 8 steps. Not reproduced here yet.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("enat_l_imagenet256.py")


def get_config() -> ml_collections.ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]("B")
    return config
