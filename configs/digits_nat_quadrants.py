"""The digits' NAT without one quadrant of its attention (paper Figure 2).

    python -m enat_jax.train --config configs/digits_nat_quadrants.py:masked_from_visible \\
        --workdir runs/digits/nat_without_mv

After the colon stands what is cut in every block, see configs/nat_quadrants_imagenet256.py; without
it nothing is, which is configs/digits_nat.py.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("digits_nat.py")


def get_config(disabled: str = "none") -> ml_collections.ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.model.disabled_attention = disabled
    return config
