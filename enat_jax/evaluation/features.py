"""Networks that turn images into features, by which sets of images are compared.

Only features of FID's Inception-v3 give an FID. The others serve where its weights are not at hand,
or where images are too unlike photographs for it; what is computed from them is labelled so:

    inception, inception:adm    see ``inception_weights`` and ``models.inception``
    random:SEED                 a small network with fixed random weights, for images of any size
    DIRECTORY                   a classifier trained with ``configs/digits_features.py`` or its like
    FILE.jaxexport              anybody's function, serialized by ``jax.export``
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import export
from jax.sharding import PartitionSpec

from enat_jax.checkpoints import model_files
from enat_jax.evaluation import inception_weights
from enat_jax.models import classifier, inception
from enat_jax.runtime import files, sharding

BATCH_SIZE = 32  # images on a device at a time
FORMAT = "enat_jax features 1"
DOWNLOAD = "download"  # in place of the path of Inception's weights
RANDOM_WIDTHS = (32, 64, 128)
KINDS = (
    "features are 'inception', 'inception:adm', 'random:SEED', the directory of a trained feature "
    "network, or the path of a .jaxexport file"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """A network with its weights, to be called with images.

    Attributes:
        kind: "inception", "trained", "random" or "exported".
        description: JSON values, the same if and only if features may be compared. ``label`` is
            what a distance between means and covariances of "pool" is to be called; ``fingerprint``
            the SHA-256 of the weights, or of the exported function.
        names: of what it gives, see ``__call__``.
        apply: (params, uint8 images [b, h, w, c]) -> dict of float32 arrays [b, ...]; pure.
        params: tree of numpy arrays.
        image_shape: (height, width, channels) that it takes, None for any.
        batch_size: images on a device at a time.
        origin: JSON values that say where the weights come from; features do not depend on it.
    """

    kind: str
    description: dict[str, Any]
    names: tuple[str, ...]
    apply: Callable[[Any, jax.Array], dict[str, jax.Array]]
    params: Any
    image_shape: tuple[int | None, int | None, int | None]
    batch_size: int = BATCH_SIZE
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    _placed: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def is_inception(self) -> bool:
        """Whether a Fréchet distance of these features may be called FID."""
        return self.kind == "inception"

    def __call__(
        self, images: np.ndarray, mesh: jax.sharding.Mesh | None = None
    ) -> dict[str, np.ndarray]:
        """Features of uint8 images [b, h, w, c], for any b, as float32 arrays.

        "pool" [b, d] always; of Inception also "spatial" [b, 2023] and "probabilities" [b, 1008].

        Runs on this process's devices of the mesh, None: on all of them. Every device computes
        batches of one size, the last of them filled up, so that features do not depend on how many
        devices there are. Raises ValueError for other images than ``image_shape`` says.
        """
        images = self._checked(images)
        local = jax.local_devices() if mesh is None else mesh.local_devices
        mesh, params, run = self._on(tuple(local))
        size = self.batch_size * mesh.size
        parts, under_way = [], None
        for start in range(0, max(len(images), 1), size):
            part = images[start : start + size]
            filling = np.zeros((size - len(part), *images.shape[1:]), np.uint8)
            found = run(params, sharding.place(np.concatenate([part, filling]), mesh))
            # One batch is computed while the results of the one before are fetched.
            if under_way is not None:
                parts.append(sharding.to_host(under_way))
            under_way = found
        parts.append(sharding.to_host(under_way))
        return {
            name: np.concatenate([part[name] for part in parts])[: len(images)]
            for name in self.names
        }

    def _checked(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3)
        for size, needed in zip(images.shape[1:], self.image_shape, strict=False):
            fits &= needed in (None, size) and size > 0
        if not fits:
            needed = " x ".join("any" if size is None else str(size) for size in self.image_shape)
            raise ValueError(
                f"images of {images.dtype} {images.shape[1:]} do not suit {self.kind} features, "
                f"which take uint8 images of height x width x channels {needed}, grey or RGB"
            )
        return images

    def _on(self, devices: tuple[jax.Device, ...]) -> tuple[jax.sharding.Mesh, Any, Callable]:
        """A mesh of these devices, parameters on each of them, and the compiled network."""
        if devices not in self._placed:
            mesh = sharding.make_mesh(sharding.Sharding(), devices)
            # The same program on every device, which sends nothing to the others.
            run = jax.shard_map(
                self._selected,
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec(sharding.BATCH)),
                out_specs=PartitionSpec(sharding.BATCH),
                check_vma=False,  # not known of exported functions
            )
            params = jax.device_put(self.params, sharding.replicated(mesh))
            self._placed[devices] = mesh, params, jax.jit(run)
        return self._placed[devices]

    def _selected(self, params: Any, images: jax.Array) -> dict[str, jax.Array]:
        found = self.apply(params, images)
        return {name: found[name] for name in self.names}


def open_features(
    text: str, *, weights: str | os.PathLike | None = None, batch_size: int = BATCH_SIZE
) -> Features:
    """The features that ``text`` names, see the head of this module.

    ``weights``: for "inception" the path of its weights, or "download". ``batch_size``: see
    ``Features``; an exported function of a fixed batch has its own.

    Raises OSError, ValueError, of one line, that name the file.
    """
    kind, _, setting = text.partition(":")
    path = pathlib.Path(text)
    if text == "inception":
        return _open_inception("pytorch-fid", weights, batch_size)
    if kind == "inception":
        if setting not in inception.RESIZES:
            raise ValueError(f"features {text!r}: one of {', '.join(inception.RESIZES)} may follow")
        return _open_inception(setting, weights, batch_size)
    if weights is not None:
        raise ValueError(f"weights of Inception ({weights}) are given, but features are {text!r}")
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
    if weights is None:
        raise ValueError(
            "Inception's weights are missing: give --inception FILE, the path of "
            f"{inception_weights.FILE_NAME}, or --inception {DOWNLOAD}; see README"
        )
    if weights == DOWNLOAD:
        weights = inception_weights.download(inception_weights.cache_directory())
    params, origin = inception_weights.read(weights)
    return of_inception(params, resize, origin, batch_size)


def of_inception(
    params: dict, resize: str, origin: dict[str, Any], batch_size: int = BATCH_SIZE
) -> Features:
    """Features of ``inception.Inception`` with given parameters; ``resize``: see its
    ``preprocess``."""
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


def _apply_inception(resize: str, params: dict, images: jax.Array) -> dict[str, jax.Array]:
    return inception.Inception().apply({"params": params}, inception.preprocess(images, resize))


def random(seed: int, batch_size: int = BATCH_SIZE) -> Features:
    """A network whose weights follow from ``seed``, 0 <= seed < 2**32, alone; "pool" is [b, 128].

    They are uniform, as NumPy's ``RandomState`` draws them: the same bits with every version and on
    every machine. Grey images are taken as RGB. Random features tell sets of images apart, but
    their distances agree with people's judgement less than those of a trained network.
    """
    rng = np.random.RandomState(seed)
    params, channels = {}, 3
    for i, width in enumerate(RANDOM_WIDTHS):
        bound = np.sqrt(6 / (9 * channels))  # keeps the variance behind a ReLU (arXiv:1502.01852)
        kernel = bound * (2 * rng.random_sample((3, 3, channels, width)) - 1)
        bias = 0.2 * rng.random_sample(width) - 0.1
        params[f"conv_{i}"] = {"kernel": np.float32(kernel), "bias": np.float32(bias)}
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


def _apply_random(params: dict, images: jax.Array) -> dict[str, jax.Array]:
    rgb = jax.numpy.broadcast_to(images, (*images.shape[:3], 3))
    model = classifier.ConvFeatures(RANDOM_WIDTHS)
    return {"pool": model.apply({"params": params}, classifier.to_float(rgb))}


def save_trained(
    directory: str | os.PathLike,
    model: classifier.Classifier,
    params: Any,
    image_size: tuple[int, int],
    trained_on: str,
    provenance: dict[str, Any],
) -> None:
    """Writes a trained classifier for ``load_trained``; ``features.json`` comes last.

    ``image_size``: (height, width) in pixels. ``trained_on``: name of its data, for people.
    Every process must call this.
    """
    directory = pathlib.Path(directory)
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

    Raises FileNotFoundError if ``directory`` has no feature network, ValueError if it is damaged.
    """
    directory = pathlib.Path(directory)
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
    model: classifier.Classifier, params: dict, images: jax.Array
) -> dict[str, jax.Array]:
    features, _ = model.apply({"params": params}, classifier.to_float(images))
    return {"pool": features}


def load_exported(path: str | os.PathLike, batch_size: int = BATCH_SIZE) -> Features:
    """A function that ``jax.export`` serialized: uint8 images [b, h, w, c] -> float32 [b, d].

    Each of b, h, w, c may be fixed or symbolic. The file is a program, which is run: take it only
    from those whom you trust. Raises OSError, ValueError if it is not such a function.
    """
    path = pathlib.Path(path)
    content = path.read_bytes()
    try:
        exported = export.deserialize(bytearray(content))
    except Exception as error:  # of any type, as what is read has no checksum
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
    batch, *shape = (None if export.is_symbolic_dim(d) else d for d in exported.in_avals[0].shape)
    fingerprint = hashlib.sha256(content).hexdigest()
    return Features(
        kind="exported",
        description={
            "kind": "exported",
            "label": "Fréchet distance in features of the exported function with SHA-256 "
            f"{fingerprint[:16]}",
            "network": None,
            "resize": None,
            "input_size": shape[:2],
            "fingerprint": fingerprint,
        },
        names=("pool",),
        apply=functools.partial(_apply_exported, exported),
        params={},
        image_shape=tuple(shape),
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
    exported: export.Exported, params: dict, images: jax.Array
) -> dict[str, jax.Array]:
    del params
    return {"pool": exported.call(images)}
