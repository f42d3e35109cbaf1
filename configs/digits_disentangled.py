"""The digits model without reuse: the disentangled ENAT, every visible token encoded anew.

    python -m enat_jax.train --config configs/digits_disentangled.py --workdir runs/digits/dis

As many steps as configs/digits.py. A row for the comparison of `evaluate_digits`. Its width makes
sampling cost what configs/digits.py does: 0.99 of its multiply-adds at 8 steps with guidance.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("digits.py")


def get_config() -> ml_collections.ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.model.reuse = False
    config.model.width = 60
    config.mask.reuse_probability = 0.0
    return config
