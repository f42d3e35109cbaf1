"""A small ENAT that learns to draw what it reads, on a laptop: "a three left of a seven".

    bash launch/quickstart_text.sh                # everything, the tokenizer and the tokens too
    python -m enat_jax.train --config configs/scenes.py --workdir runs/scenes/enat

For how well it reads, and what that was measured on, see the README here.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("digits.py")


def get_config() -> ml_collections.ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.model.num_classes = 0
    config.model.codebook_size = 32  # of configs/scenes_vqgan.py
    config.model.text_vocabulary = 18  # 17 words, and what stands in front of every text
    config.model.text_tokens = 7  # of "a three left of a seven"
    config.model.text_positions = True  # without them a text is a bag of words
    config.model.shared_key_value = True
    # Gates of 0.3 and not 1. With 1 neither digits' names nor visible tokens were used after 2,000
    # steps, with 0.3 they came into use from there on.
    config.model.gate_bias = -0.7
    config.data = {
        "tokens": "runs/scenes/tokens",
        "captions": "runs/scenes/tokens/captions",
        "held_out_tokens": "runs/scenes/tokens_held_out",
        "held_out_captions": "runs/scenes/tokens_held_out/captions",
        "tokenizer": "runs/scenes/tokenizer/model",
    }
    config.loss.text_drop = 0.1
    # By the figures of enat_jax.evaluate_scenes. 8 steps show too many tokens at once: one in seven
    # scenes of two digits then has a third, or both of them twice. A higher temperature draws more
    # diverse digits, and more broken ones.
    config.sampler.num_steps = 12
    config.sampler.token_temperature = 1.5
    config.sampler.guidance_scale = 2.0
    config.train.num_steps = 4000
    return config
