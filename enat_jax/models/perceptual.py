"""Perceptual distances of pictures, by networks that were trained on ImageNet and stay as they are.

They are losses for tokenizers, and LPIPS is a measure of reconstructions, too. The networks are in
``lpips.py``, ``resnet.py`` and ``lite0.py``, their weights in ``evaluation/perceptual_weights.py``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from enat_jax.models import lite0, lpips, resnet
from enat_jax.models import shapes as array_shapes

KINDS = ("lpips_vgg", "lpips_alex", "resnet50_logits", "lite0_logits")
_LPIPS = {"lpips_vgg": "vgg", "lpips_alex": "alex"}


def distance(
    kind: str,
    params: PyTree,
    images: Float[Array, "b H W 3"],
    others: Float[Array, "b H W 3"],
    *,
    least_side: int = 64,
) -> Float[Array, " b"]:
    """Returns how different two pictures look, for each pair, float32 and differentiable in both.

    Args:
        kind: one of ``KINDS``. The first two are LPIPS. The others are the mean squared difference
            of a classifier's logits, of pictures that are resized to 224x224 pixels (arXiv:
            2409.16211 trains with ResNet-50's).
        params: float32, as ``shapes`` says. Convolutions are computed in their dtype: of bfloat16
            weights in bfloat16, with norms, logits and sums in float32.
        images, others: float32 in [0, 1], of three channels.
        least_side: pixels. LPIPS enlarges pictures whose shorter side has fewer: on smaller ones
            noise would lower the distance. The other kinds have a size of their own.

    Raises:
        ValueError: the kind is unknown, the pictures have no three channels or other shapes, or are
            too small for the network even so.
    """
    _check(kind)
    array_shapes.check("images", images, b=None, H=None, W=None, c=3)
    array_shapes.check("others", others, **dict(zip("bHWc", images.shape, strict=True)))
    dtype = jax.tree.leaves(params)[0].dtype
    if kind in _LPIPS:
        pair = (enlarged(images, least_side), enlarged(others, least_side))
        network: Any = lpips.LPIPS(_LPIPS[kind], dtype)
        return network.apply({"params": params}, *pair).sum(0)
    difference = logits(kind, params, images) - logits(kind, params, others)
    return jnp.square(difference).mean(-1)


def logits(kind: str, params: PyTree, images: Float[Array, "b H W 3"]) -> Float[Array, "b 1000"]:
    """Returns a classifier's logits of ImageNet's classes, float32.

    Args:
        kind: "resnet50_logits" or "lite0_logits".
        params, images: see ``distance``.
    """
    dtype = jax.tree.leaves(params)[0].dtype
    network: Any
    if kind == "resnet50_logits":
        network = resnet.ResNet50(dtype)
        return network.apply({"params": params}, resnet.preprocess(images))
    if kind == "lite0_logits":
        network = lite0.Lite0(dtype)
        return network.apply({"params": params}, lite0.preprocess(images))["logits"]
    raise ValueError(f"kind={kind!r} has no logits: resnet50_logits and lite0_logits have")


def enlarged(images: Float[Array, "b H W c"], least_side: int) -> Float[Array, "b h w c"]:
    """Returns float32 pictures, enlarged bilinearly to a shorter side of ``least_side`` pixels."""
    images = jnp.asarray(images, jnp.float32)
    height, width = images.shape[1:3]
    short = min(height, width)
    if short >= least_side:
        return images
    sides = (round(height * least_side / short), round(width * least_side / short))
    shape = (len(images), *sides, images.shape[-1])
    return jax.image.resize(images, shape, "bilinear", precision=jax.lax.Precision.HIGHEST)


@functools.cache
def shapes(kind: str) -> Any:
    """Returns the tree of the parameters of a kind, with a ShapeDtypeStruct for each.

    Raises:
        ValueError: the kind is unknown.
    """
    _check(kind)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    made: dict[str, Callable[[], Any]] = {
        "resnet50_logits": resnet.ResNet50,
        "lite0_logits": lite0.Lite0,
    }
    if kind in _LPIPS:
        network: Any = lpips.LPIPS(_LPIPS[kind])
        return jax.eval_shape(network.init, jax.random.key(0), images, images)["params"]
    return jax.eval_shape(made[kind]().init, jax.random.key(0), images)["params"]


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} of a perceptual network is unknown: {', '.join(KINDS)}")
