"""Weights of the goldens of perceptual networks, which follow from their names, or are in files.

The real ones are not ours to give: ``ENAT_JAX_PERCEPTUAL`` names a folder that has them.
"""

import functools
import json
import os
import pathlib

import inception_golden
import numpy as np
import pytest

from enat_jax.evaluation import perceptual_weights
from enat_jax.models import perceptual

FOLDER = pathlib.Path(__file__).parent / "golden"
LPIPS = ("vgg", "alex")
FILES = {
    "lpips_vgg": "vgg16.ckpt",
    "lpips_alex": "alexnet.ckpt",
    "lite0_logits": "efficientnet-lite0-57934424.pth",
}


def load(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def pictures(golden, *names):
    return [golden[name].astype(np.float32) / 255 for name in names]


def random_lpips(network):
    """Tensors by the names of torchvision and of LPIPS, as two files have them."""
    golden, trunk = load("lpips_random"), {}
    for name, leaves in perceptual.shapes(f"lpips_{network}")["trunk"].items():
        height, width, inside, outside = leaves["kernel"].shape
        shapes = {"weight": (outside, inside, height, width), "bias": (outside,)}
        for part, shape in shapes.items():
            key = f"{name.replace('_', '.')}.{part}"
            kind = "conv" if part == "weight" else "b"
            trunk[key] = inception_golden.draw(f"{network}/{key}", kind, shape)
    mark = f"{network}:lin"
    heads = {k.partition(":")[2]: x for k, x in golden.items() if k.startswith(mark)}
    return trunk, heads


def random_resnet(golden):
    """Tensors by torchvision's names."""
    rows = zip(*(golden[f"param_{x}"] for x in ("names", "kinds", "shapes")), strict=True)
    return {str(n): inception_golden.draw(str(n), str(k), json.loads(str(s))) for n, k, s in rows}


@functools.cache
def random_params(network):
    trunk, heads = random_lpips(network)
    return perceptual_weights.params_of(f"lpips_{network}", trunk | heads)


def real_file(kind):
    """The published file; without it the test is skipped."""
    path = pathlib.Path(os.environ.get("ENAT_JAX_PERCEPTUAL", "")) / FILES[kind]
    if not os.environ.get("ENAT_JAX_PERCEPTUAL") or not path.is_file():
        pytest.skip(f"needs {FILES[kind]} in the folder that ENAT_JAX_PERCEPTUAL names")
    return path


def real_params(kind):
    params, origin = perceptual_weights.read(kind, str(real_file(kind)))
    assert origin["published"]
    return params
