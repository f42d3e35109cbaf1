"""The NAT baseline without one quadrant of its attention (paper Figure 2).

    python -m enat_jax.train --workdir runs/nat_s_without_vm \\
        --config configs/nat_quadrants_imagenet256.py:visible_from_masked

After the colon stands which attention every block does without, in training and in sampling:
visible_from_visible, visible_from_masked, masked_from_visible or masked_from_masked, the reader
first. Without a colon nothing is cut, which is configs/nat_s_imagenet256.py. Every token goes on
seeing itself. Not trained here.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("nat_s_imagenet256.py")


def get_config(disabled: str = "none") -> ml_collections.ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.model.disabled_attention = disabled
    return config
