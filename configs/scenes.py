"""A small ENAT of texts, for scenes of two handwritten digits: "a three left of a seven".

    python -m enat_jax.train --config configs/scenes.py --workdir runs/scenes/enat

It does not yet read well: after 2,000 steps it knows which row or column the digits stand in, and
not which digits they are.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("digits.py")


def get_config() -> ml_collections.ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.model.num_classes = 0
    config.model.codebook_size = 16
    config.model.text_vocabulary = 18  # 17 words, and what stands in front of every text
    config.model.text_tokens = 7  # of "a three left of a seven"
    config.model.text_positions = True
    config.model.shared_key_value = True
    config.data = {
        "tokens": "runs/scenes/tokens",
        "captions": "runs/scenes/tokens/captions",
        "held_out_tokens": "runs/scenes/tokens_held_out",
        "held_out_captions": "runs/scenes/tokens_held_out/captions",
        "tokenizer": "runs/scenes/tokenizer/model",
    }
    config.loss.text_drop = 0.1
    config.sampler.guidance_scale = 2.0
    return config
