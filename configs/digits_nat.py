"""The digits model as a plain NAT: one stack over visible and masked tokens alike.

    python -m enat_jax.train --config configs/digits_nat.py --workdir runs/digits/nat

As many steps as configs/digits.py. A row for the comparison of `evaluate_digits`. Its size makes
sampling cost what configs/digits.py does: 0.97 of its multiply-adds at 8 steps with guidance.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("digits.py")


def get_config() -> ml_collections.ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    model = config.model.to_dict()
    del model["encoder_layers"], model["decoder_layers"]
    config.model = model | {"kind": "nat", "num_layers": 2, "width": 60}
    config.mask.reuse_probability = 0.0
    return config
