"""The models of the ablations on CIFAR-10, after the paper's Tables 1 and 6 and its Figure 2.

    bash launch/ablation.sh --images cifar10_train.zip        # all of them, and their tables
    python -m enat_jax.train --config configs/cifar10_ablation.py:enat --workdir runs/ablation/enat

After the colon stands a model of `MODELS`, and `_large` after it for the larger size, which is
twice as wide and has twice the heads, or `_long` for the larger size with 20 times as many images,
which wants a GPU: batches of 256, with the paper's dropout and a learning rate, an average and
window shapes of its own. The networks that encode all visible tokens at every step (`nat` and
`disentangled_...`) have widths that make sampling in 8 steps with guidance cost the same, within 5%
of the multiply-adds of `disentangled_7_1`; those that reuse features have its layers and its width,
as in the paper. All else but heads and steps is that of configs/cifar10.py.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("cifar10.py")
NAT = {"kind": "nat", "num_layers": 4, "width": 54}
DEEP = {"encoder_layers": 7, "decoder_layers": 1, "width": 64}
ENAT = DEEP | {"kind": "enat"}
# Changes of the section `model`, and of `mask`.
MODELS = {
    "nat": (NAT, {}),
    "nat_without_visible_from_visible": (NAT | {"disabled_attention": "visible_from_visible"}, {}),
    "nat_without_visible_from_masked": (NAT | {"disabled_attention": "visible_from_masked"}, {}),
    "nat_without_masked_from_visible": (NAT | {"disabled_attention": "masked_from_visible"}, {}),
    "nat_without_masked_from_masked": (NAT | {"disabled_attention": "masked_from_masked"}, {}),
    "disentangled_4_4": (
        {"kind": "enat", "reuse": False, "encoder_layers": 4, "decoder_layers": 4, "width": 54},
        {},
    ),
    "disentangled_7_1": (ENAT | {"reuse": False}, {}),
    "enat": (ENAT, {}),
    "enat_without_f": (ENAT | {"reuse_projection": "none"}, {}),
    # What follows is not in the paper: f once for every token; and training with a cache that was
    # made in up to 4 reveals, in which f has passed over earlier tokens as often as in sampling.
    "enat_project_once": (ENAT | {"project_once": True}, {}),
    "enat_reveals_4": (ENAT, {"reveals": 4}),
}
SIZES = "large", "long"


def get_config(name: str = "enat") -> ml_collections.ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    wanted, _, size = name.rpartition("_")
    if size not in SIZES:
        wanted, size = name, ""
    if wanted not in MODELS:
        sizes = " or ".join(f"NAME_{size}" for size in SIZES)
        raise ValueError(f"there is no model {name!r}: one of {', '.join(MODELS)}, or {sizes}")
    model = config.model.to_dict()
    del model["encoder_layers"], model["decoder_layers"]
    changes, mask = MODELS[wanted]
    model |= {"num_heads": 2} | changes
    config.train.update(num_steps=2000, eval_every=500, save_every=500)
    if size:
        model |= {"num_heads": 4, "width": 2 * model["width"]}
    if size == "long":
        model["dropout"] = 0.1
        config.train.update(batch_size=256, num_steps=10000, eval_every=1000)
        config.optimizer.update(learning_rate=1e-3, schedule="constant")
        config.loss.update(ema_decay=0.999, max_shapes=4)
        config.data.in_memory = True
    config.model = model
    config.mask.update(mask)
    if not model.get("reuse", model["kind"] == "enat"):
        config.mask.reuse_probability = 0.0
    return config
