"""Networks that turn images into features, by which sets of images are compared.

Only features of FID's Inception-v3 give an FID. The others serve where its weights are not at hand,
or where images are too unlike photographs for it; what is computed from them is labelled so:

    inception, inception:adm    see ``inception_weights`` and ``models.inception``
    lite0:FILE                  EfficientNet-Lite0, for few images; see ``perceptual_weights``
    random:SEED                 a small network with fixed random weights, for images of any size
    DIRECTORY                   a classifier trained with ``configs/digits_features.py`` or its like
    FILE.jaxexport              anybody's function, serialized by ``jax.export``
"""

import functools
import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import export
from jaxtyping import PyTree

from enat_jax.checkpoints import model_files
from enat_jax.evaluation import inception_weights, perceptual_weights
from enat_jax.evaluation.feature_network import BATCH_SIZE, Features
from enat_jax.models import classifier, inception, lite0, perceptual
from enat_jax.runtime import buckets, files, os_errors, paths

FORMAT = "enat_jax features 1"
DOWNLOAD = "download"  # in place of the path of Inception's weights
RANDOM_WIDTHS = (32, 64, 128)
LITE0_STAGE = 3  # whose 40 features a thousand images suffice for
LITE0_SIDE = 64  # pixels, to which smaller images are enlarged
KINDS = (
    "features are 'inception', 'inception:adm', 'lite0:FILE', 'random:SEED', the directory of a "
    "trained feature network, or the path of a .jaxexport file"
)


def open_features(
    text: str, *, weights: str | os.PathLike | None = None, batch_size: int = BATCH_SIZE
) -> Features:
    """Opens the features that ``text`` names, see the head of this module.

    Args:
        text: which features.
        weights: for "inception" the path of its weights, or "download".
        batch_size: see ``Features``; an exported function of a fixed batch has its own.

    Raises:
        OSError: if a file cannot be read; one line that names it.
        ValueError: if there are no such features, or a file is damaged; one line that names it.
    """
    kind, _, setting = text.partition(":")
    path = paths.local(text)
    if text == "inception":
        return _open_inception("pytorch-fid", weights, batch_size)
    if kind == "inception":
        if setting not in inception.RESIZES:
            raise ValueError(f"features {text!r}: one of {', '.join(inception.RESIZES)} may follow")
        return _open_inception(setting, weights, batch_size)
    if weights is not None:
        raise ValueError(f"weights of Inception ({weights}) are given, but features are {text!r}")
    if kind == "lite0" and setting:
        return of_lite0(*perceptual_weights.read("lite0_logits", setting), batch_size)
    if kind == "random":
        if not setting.isascii() or not setting.isdigit() or int(setting) >= 2**32:
            raise ValueError(f"features {text!r}: the seed must be a whole number below 2**32")
        return random(int(setting), batch_size)
    if path.is_dir():
        return load_trained(path, batch_size)
    if path.is_file() and path.suffix == ".jaxexport":
        return load_exported(path, batch_size)
    if path.suffix == ".jaxexport":
        raise FileNotFoundError(f"there is no file {path}")
    raise ValueError(f"there are no features {text!r}: {KINDS}")


def _open_inception(resize: str, weights: str | os.PathLike | None, batch_size: int) -> Features:
    """Reads Inception's weights, or downloads them."""
    if weights is None:
        raise ValueError(
            "Inception's weights are missing: give --inception FILE, the path of "
            f"{inception_weights.FILE_NAME}, or --inception {DOWNLOAD}; of a training run it is "
            "--config.evaluation.inception"
        )
    if weights == DOWNLOAD:
        weights = inception_weights.download(paths.cache_directory())
    params, origin = inception_weights.read(weights)
    return of_inception(params, resize, origin, batch_size)


def of_inception(
    params: dict, resize: str, origin: dict[str, Any], batch_size: int = BATCH_SIZE
) -> Features:
    """Returns the features of ``inception.Inception`` with given parameters.

    Args:
        params: of the network.
        resize: see ``inception.preprocess``.
        origin: see ``Features``.
        batch_size: see ``Features``.
    """
    return Features(
        kind="inception",
        description={
            "kind": "inception",
            "label": "FID",
            "network": "Inception-v3 of 2015-12-05",
            "resize": resize,
            "input_size": inception.SIZE,
            "fingerprint": model_files.fingerprint(params),
        },
        names=("pool", "spatial", "probabilities"),
        apply=functools.partial(_apply_inception, resize),
        params=params,
        image_shape=(None, None, None),
        batch_size=batch_size,
        origin=origin,
    )


def _apply_inception(resize: str, params: PyTree, images: jax.Array) -> dict[str, jax.Array]:
    apply: Callable[..., Any] = inception.Inception().apply
    return apply({"params": params}, inception.preprocess(images, resize))


def of_lite0(params: PyTree, origin: dict[str, Any], batch_size: int = BATCH_SIZE) -> Features:
    """Returns the means of features of a stage of ``lite0.Lite0``; "pool" is ``[b, 40]``.

    The distance of so few features is little biased with a thousand images, where FID is not to be
    had. Grey images are taken as RGB.

    Args:
        params: of the network.
        origin: see ``Features``.
        batch_size: see ``Features``.
    """
    return Features(
        kind="lite0",
        description={
            "kind": "lite0",
            "label": f"Fréchet distance in features of EfficientNet-Lite0, stage {LITE0_STAGE}",
            "network": "EfficientNet-Lite0",
            "resize": f"bilinear to at least {LITE0_SIDE} pixels of the shorter side",
            "input_size": None,
            "fingerprint": model_files.fingerprint(params),
        },
        names=("pool",),
        apply=_apply_lite0,
        params=params,
        image_shape=(None, None, None),
        batch_size=batch_size,
        origin=origin,
    )


def _apply_lite0(params: PyTree, images: jax.Array) -> dict[str, jax.Array]:
    rgb = jax.numpy.broadcast_to(images, (*images.shape[:3], 3)) / 255
    apply: Callable[..., Any] = lite0.Lite0().apply
    found = apply({"params": params}, lite0.scaled(perceptual.enlarged(rgb, LITE0_SIDE)))
    return {"pool": found[f"stage_{LITE0_STAGE}"]}


def random(seed: int, batch_size: int = BATCH_SIZE) -> Features:
    """Returns a network whose weights follow from ``seed`` alone; "pool" is ``[b, 128]``.

    They are uniform, as NumPy's ``RandomState`` draws them: the same bits with every version and on
    every machine. Grey images are taken as RGB. Random features tell sets of images apart, but
    their distances agree with people's judgement less than those of a trained network.

    Args:
        seed: from 0 to 2**32 - 1.
        batch_size: see ``Features``.
    """
    rng = np.random.RandomState(seed)
    params: dict[str, dict[str, np.ndarray]] = {}
    channels = 3
    for i, width in enumerate(RANDOM_WIDTHS):
        bound = np.sqrt(6 / (9 * channels))  # keeps the variance behind a ReLU (arXiv:1502.01852)
        kernel = bound * (2 * rng.random_sample((3, 3, channels, width)) - 1)
        bias = 0.2 * rng.random_sample(width) - 0.1
        kernel, bias = kernel.astype(np.float32), bias.astype(np.float32)
        params[f"conv_{i}"] = {"kernel": kernel, "bias": bias}
        channels = width
    return Features(
        kind="random",
        description={
            "kind": "random",
            "label": f"Fréchet distance in features of a random network (seed {seed})",
            "network": {"convolutions": list(RANDOM_WIDTHS)},
            "resize": None,
            "input_size": None,
            "fingerprint": model_files.fingerprint(params),
        },
        names=("pool",),
        apply=_apply_random,
        params=params,
        image_shape=(None, None, None),
        batch_size=batch_size,
        origin={"seed": seed},
    )


def _apply_random(params: PyTree, images: jax.Array) -> dict[str, jax.Array]:
    rgb = jax.numpy.broadcast_to(images, (*images.shape[:3], 3))
    apply: Callable[..., Any] = classifier.ConvFeatures(RANDOM_WIDTHS).apply
    return {"pool": apply({"params": params}, classifier.to_float(rgb))}


def save_trained(
    directory: str | os.PathLike,
    model: classifier.Classifier,
    params: PyTree,
    image_size: tuple[int, int],
    trained_on: str,
    provenance: dict[str, Any],
) -> None:
    """Writes a trained classifier for ``load_trained``; ``features.json`` comes last.

    Every process must call this.

    Args:
        directory: to write.
        model: the network.
        params: its parameters.
        image_size: height and width in pixels.
        trained_on: name of its data, for people.
        provenance: JSON values.
    """
    directory = paths.place(directory)
    model_files.save_params(directory / "params", params)
    description = {
        "format": FORMAT,
        "model": model_files.settings_of(model),
        "image_size": list(image_size),
        "trained_on": trained_on,
        "fingerprint": model_files.fingerprint(params),
        "provenance": provenance,
    }
    if jax.process_index() == 0:
        files.write_json(directory / "features.json", description)


def load_trained(directory: str | os.PathLike, batch_size: int = BATCH_SIZE) -> Features:
    """Reads what ``save_trained`` wrote; "pool" is the layer before the classes.

    Raises:
        FileNotFoundError: if ``directory`` has no feature network.
        ValueError: if it is damaged.
    """
    directory = buckets.fetched(directory)
    path = directory / "features.json"
    advice = "train a feature network, see configs/digits_features.py"
    saved = files.read_description(path, FORMAT, advice)
    try:
        settings = saved["model"]
        model = classifier.Classifier(**model_files.settings_from(settings))
        height, width = saved["image_size"]
        trained_on, fingerprint = saved["trained_on"], saved["fingerprint"]
        provenance = saved["provenance"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    params = model_files.load_params(directory / "params")
    if model_files.fingerprint(params) != fingerprint:
        raise ValueError(f"the weights in {directory} are not those that were saved: damaged")
    return Features(
        kind="trained",
        description={
            "kind": "trained",
            "label": f"Fréchet distance in features of a network trained on {trained_on}",
            "network": settings,
            "resize": None,
            "input_size": [height, width],
            "fingerprint": fingerprint,
        },
        names=("pool",),
        apply=functools.partial(_apply_trained, model),
        params=params,
        image_shape=(height, width, model.image_channels),
        batch_size=batch_size,
        origin={"provenance": provenance},
    )


def _apply_trained(
    model: classifier.Classifier, params: PyTree, images: jax.Array
) -> dict[str, jax.Array]:
    apply: Callable[..., Any] = model.apply
    features, _ = apply({"params": params}, classifier.to_float(images))
    return {"pool": features}


def load_exported(path: str | os.PathLike, batch_size: int = BATCH_SIZE) -> Features:
    """Reads a function that ``jax.export`` serialized: images ``[b, h, w, c]`` -> ``[b, d]``.

    It takes uint8 and gives float32; each of b, h, w, c may be fixed or symbolic. The file is a
    program, which is run: take it only from those whom you trust.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not such a function.
    """
    path = pathlib.Path(path)
    content = path.read_bytes()
    try:
        exported = export.deserialize(bytearray(content))
    except Exception as error:  # of any type, as what is read has no checksum
        os_errors.pass_on(error, path)
        raise ValueError(
            f"{path} is no function serialized by jax.export, or by a version of jax that "
            f"{jax.__version__} cannot read ({type(error).__name__})"
        ) from error
    _check_signature(path, exported)
    backend = jax.default_backend()
    platforms = {"gpu": ("cuda", "rocm")}.get(backend, (backend,))
    if not set(platforms) & set(exported.platforms):
        raise ValueError(
            f"{path} is exported for {', '.join(exported.platforms)}, not for {backend}: "
            "export it with platforms= of jax.export.export"
        )
    sizes = (None if export.is_symbolic_dim(d) else d for d in exported.in_avals[0].shape)
    batch, height, width, channels = sizes
    fingerprint = hashlib.sha256(content).hexdigest()
    return Features(
        kind="exported",
        description={
            "kind": "exported",
            "label": "Fréchet distance in features of the exported function with SHA-256 "
            f"{fingerprint[:16]}",
            "network": None,
            "resize": None,
            "input_size": [height, width],
            "fingerprint": fingerprint,
        },
        names=("pool",),
        apply=functools.partial(_apply_exported, exported),
        params={},
        image_shape=(height, width, channels),
        batch_size=batch or batch_size,
        origin={"file": path.name},
    )


def _check_signature(path: pathlib.Path, exported: export.Exported) -> None:
    """Raises ValueError, which names ``path``, unless it is what ``load_exported`` says."""
    match exported.in_avals, exported.out_avals:
        case [image], [feature]:
            fits = image.dtype == np.uint8 and image.ndim == 4
            fits &= feature.dtype == np.float32 and feature.ndim == 2
            fits = fits and image.shape[0] == feature.shape[0] and image.shape[0] != 0
        case _:
            fits = False
    if not fits or exported.nr_devices != 1:
        taken = ", ".join(map(str, exported.in_avals))
        given = ", ".join(map(str, exported.out_avals))
        raise ValueError(
            f"{path} holds a function of ({taken}) that gives ({given}): it must take uint8 images "
            "[b, h, w, c] alone, on one device, and give float32 features [b, d]"
        )


def _apply_exported(
    exported: export.Exported, params: PyTree, images: jax.Array
) -> dict[str, jax.Array]:
    del params
    return {"pool": exported.call(images)}
