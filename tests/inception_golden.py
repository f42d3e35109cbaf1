"""The golden of FID's Inception-v3, and its random weights, which follow from their names."""

import functools
import json
import pathlib
import zlib

import numpy as np

from enat_jax.evaluation import inception_weights

FILE = np.load(pathlib.Path(__file__).parent / "golden" / "inception_fid.npz")


@functools.cache
def state_dict():
    """The tensors by torchvision's names, float32."""
    kinds = json.loads(str(FILE["param_kinds"]))
    shapes = json.loads(str(FILE["param_shapes"]))
    return {name: draw(name, kind, shapes[name]) for name, kind in kinds.items()}


def draw(name, kind, shape):
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    r = rng.standard_normal(int(np.prod(shape))).reshape(shape)
    match kind:
        case "conv":
            r = r * np.sqrt(2 / np.prod(shape[1:]))
        case "fc":
            r = r / np.sqrt(shape[1])
        case "bnw":
            r = 1 + 0.1 * r
        case "var":
            r = 1 + 0.1 * np.abs(r)
        case "b":
            r = 0.1 * r
    return r.astype(np.float32)


@functools.cache
def params():
    return inception_weights.params(state_dict())
