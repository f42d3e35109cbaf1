"""The NAT baseline of the paper's ablations: one stack over all tokens (paper Tables 1 and 6a).

    python -m enat_jax.train --config configs/nat_s_imagenet256.py --workdir runs/nat_s

The paper reports FID 6.54 after 300,000 steps. Not reproduced here yet.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("enat_l_imagenet256.py")


def get_config() -> ml_collections.ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]("S")
    model = config.model.to_dict()
    del model["encoder_layers"], model["decoder_layers"]
    # paper Table 6a
    config.model = model | {"kind": "nat", "num_layers": 8, "width": 288, "num_heads": 6}
    config.mask.reuse_probability = 0.0
    config.train.num_steps = 300_000  # paper: ablations
    return config
