"""LPIPS between pictures and what a tokenizer makes of them, on all devices of a process."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree, UInt8

from enat_jax.evaluation import feature_network, perceptual_weights
from enat_jax.models import perceptual

TITLES = {"lpips_vgg": "LPIPS (VGG16)", "lpips_alex": "LPIPS (AlexNet)"}
LEAST_SIDE = 64  # pixels, to which smaller pictures are enlarged
BATCH_SIZE = 8  # pairs on a device at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Distance:
    """LPIPS with its weights, to be called with pictures.

    Attributes:
        kind: of the network, a key of ``TITLES``.
        description: the section ``lpips`` of a card.
        network: that takes pairs, one picture above the other.
    """

    kind: str
    description: dict[str, Any]
    network: feature_network.Features

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that decide the distances."""
        return {name: self.description[name] for name in ("kind", "fingerprint", "least_side")}

    def __call__(
        self, images: UInt8[np.ndarray, "b h w 3"], others: UInt8[np.ndarray, "b h w 3"]
    ) -> Float[np.ndarray, " b"]:
        """Returns the distance of each pair, float32; it does not depend on how many there are."""
        return self.network(np.concatenate([images, others], 1))["distance"]


def open_distance(text: str, channels: int) -> Distance:
    """Opens the network that a command line names.

    Args:
        text: "vgg:FILE" or "alex:FILE", see ``perceptual_weights.load``.
        channels: of the pictures.

    Raises:
        OSError: the file cannot be read.
        ValueError: no such network is named, its weights are others, or the pictures are grey.
    """
    network, colon, paths = text.partition(":")
    kind = f"lpips_{network}"
    if not colon or not paths or kind not in TITLES:
        raise ValueError(
            f"--lpips {text} names no network with its weights: give vgg:FILE or alex:FILE"
        )
    if channels != 3:
        raise ValueError(
            f"--lpips compares pictures of 3 channels, and these have {channels}: leave it out"
        )
    params, origin = perceptual_weights.read(kind, paths)
    about = origin | {"version": "0.1", "least_side": LEAST_SIDE}
    label = {"label": TITLES[kind], "fingerprint": origin["fingerprint"]}
    shape = (None, None, 3)
    found = feature_network.Features(
        "lpips", label, ("distance",), _Pairs(kind), params, shape, BATCH_SIZE
    )
    return Distance(kind, about, found)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    kind: str

    def __call__(
        self, params: PyTree, pairs: UInt8[jax.Array, "b 2*h w 3"]
    ) -> dict[str, Float[jax.Array, " b"]]:
        height = pairs.shape[1] // 2
        images, others = pairs[:, :height] / 255, pairs[:, height:] / 255
        found = perceptual.distance(self.kind, params, images, others, least_side=LEAST_SIDE)
        return {"distance": found}
