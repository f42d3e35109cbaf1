"""Sets of images that are evaluated: a model's, a source's, reconstructions, and references."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from enat_jax.data import images
from enat_jax.evaluation import accumulate, features
from enat_jax.evaluation import statistics as image_statistics
from enat_jax.inference import generator, tokenizer
from enat_jax.runtime import versions

# Settings of sources that no evaluation has a use for.
AUGMENTATION = ("rotation", "scale", "shear", "shift", "crop_area", "crop_ratio", "flip")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images that are to pass, and what a card says of them.

    Attributes:
        load: makes or reads some of them.
        read_ahead: whether to read them in a thread, see ``passes.run``.
        spec: numbers and identity.
        shape: height, width, channels.
        description: of ``statistics.Statistics``, but for what is known afterwards.
    """

    load: accumulate.Load
    read_ahead: bool
    spec: accumulate.PassSpec
    shape: tuple[int, int, int]
    description: dict[str, Any]

    def statistics(self, collected: accumulate.Collected) -> image_statistics.Statistics:
        """Returns the statistics of all images, once they have passed."""
        counts = collected.totals.class_counts.tolist()
        return collected.statistics({**self.description, "class_counts": counts})


# --- images --------------------------------------------------------------------------------------


def of_generator(
    model: generator.Generator, num: int, seed: int, batch_size: int, network: features.Features
) -> ImageSet:
    """Returns a model's images: image i is of class i mod the number of classes."""
    classes = len(model.class_names)

    def load(start: int, stop: int) -> accumulate.Batch:
        labels = np.arange(start, stop, dtype=np.int32) % classes
        return accumulate.Batch(
            model.sample(labels, seed=seed, first_index=start, batch_size=batch_size), labels
        )

    height, width = model.tokenizer.image_size
    shape = (height, width, model.tokenizer.model.image_channels)
    identity = {
        "fingerprint": fingerprints(model),
        "sampler": dataclasses.asdict(model.settings),
        "seed": seed,
    }
    # Numbers against other images than the model was trained on mean something else.
    trained_on = _source_of(model.provenance)
    spec = accumulate.PassSpec(num, classes, num, _identity({"model": identity}, network))
    return ImageSet(load, False, spec, shape, _description(network, trained_on, shape, num))


def of_source(source: images.Source, keep: int, network: features.Features) -> ImageSet:
    """Returns the pictures of a source, not augmented."""
    identity, shape = _without_augmentation(source.identity()), source.image_shape
    num, classes = len(source), len(source.class_names)
    spec = accumulate.PassSpec(num, classes, keep, _identity(identity, network))
    about = _description(network, identity, shape, num)
    return ImageSet(loader(source), True, spec, shape, about)


def loader(source: images.Source) -> accumulate.Load:
    """Returns what reads the pictures of a source."""

    def load(start: int, stop: int) -> accumulate.Batch:
        batch = source.gather(np.arange(start, stop))
        return accumulate.Batch(batch["images"], batch["labels"])

    return load


def of_tokenizer(
    codec: tokenizer.Tokenizer, source: images.Source, network: features.Features
) -> ImageSet:
    """Returns the pictures of a source as a tokenizer reconstructs them.

    Each comes with its mean squared error, of pixels in [0, 1].
    """

    def load(start: int, stop: int) -> accumulate.Batch:
        batch = source.gather(np.arange(start, stop))
        # Padded to one shape, so that the last ones need no compilation of their own.
        size = min(accumulate.CHUNK, len(source))
        padded = np.resize(batch["images"], (size, *source.image_shape))
        decoded = codec.decode(codec.encode(padded))[: stop - start]
        error = np.square((decoded.astype(np.float64) - batch["images"]) / 255).mean((1, 2, 3))
        rows = {"squared_error": error.astype(np.float32)[:, None]}
        return accumulate.Batch(decoded, batch["labels"], rows)

    identity, shape = _without_augmentation(source.identity()), source.image_shape
    num, classes = len(source), len(source.class_names)
    made = {"tokenizer": codec.fingerprint, "source": identity}
    spec = accumulate.PassSpec(num, classes, num, _identity(made, network))
    return ImageSet(load, True, spec, shape, _description(network, identity, shape, num))


def _identity(images: dict[str, Any], network: features.Features) -> dict[str, Any]:
    return {"images": images, "features": network.description}


def _description(
    network: features.Features,
    source: dict[str, Any] | None,
    shape: tuple[int, int, int],
    num: int,
) -> dict[str, Any]:
    crop = None
    if source is not None:
        # Digits are drawn in their size.
        crop = "none" if source.get("source") == "digits" else source.get("plain_crop")
    return {
        "features": network.description,
        "source": source,
        "resolution": list(shape[:2]),
        "crop": crop,
        "num_images": num,
        "versions": versions.library_versions(),
    }


def _source_of(provenance: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the identity of the images that a model was trained on; None if it is not known."""
    try:
        found = provenance.get("data", {}).get("preprocessing", {}).get("source")
        return _without_augmentation(found) if found else None
    except AttributeError as error:  # it was edited by hand
        raise ValueError("the model's provenance, in its model.json, is damaged") from error


def _without_augmentation(identity: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in identity.items() if k not in AUGMENTATION}


def fingerprints(model: generator.Generator) -> dict[str, str]:
    """Returns the SHA-256 of its weights, hexadecimal."""
    return {"transformer": model.fingerprint, "tokenizer": model.tokenizer.fingerprint}


# --- references ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reference:
    """What images are compared with: a file of statistics, or pictures to make them of.

    Attributes:
        path: as given.
        about: words for the card.
        sha256: of the file; None for pictures.
        content: statistics of the file, or the pictures.
    """

    path: str
    about: str
    sha256: str | None
    content: image_statistics.Statistics | ImageSet

    @property
    def identity(self) -> dict[str, Any]:
        """The JSON values that decide what it is."""
        if isinstance(self.content, image_statistics.Statistics):
            return {"sha256": self.sha256}
        spec = self.content.spec
        return {"source": spec.identity["images"], "keep": spec.keep}


def refuse_models(path: str) -> None:
    """Raises ValueError if it is the directory of a model or a tokenizer."""
    for name in ("model.json", "tokenizer.json"):
        if (pathlib.Path(path) / name).exists():
            raise ValueError(
                f"--reference {path} is the directory of a {name.removesuffix('.json')}: it must "
                "be statistics (.npz) or pictures; were --model and --reference swapped?"
            )


def open_reference(
    path: str,
    open_source: Callable[[], images.Source],
    shape: tuple[int, int, int],
    network: features.Features,
    keep: int,
) -> Reference:
    """Reads statistics, or opens pictures.

    Args:
        path: of the reference.
        open_source: opens it, if it is pictures.
        shape: height, width and channels that pictures must have.
        network: the features.
        keep: most pictures whose features are kept.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is neither, or does not suit the images or the features.
    """
    file = pathlib.Path(path)
    if file.suffix == ".npz":
        found = image_statistics.Statistics.load(file)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        num = found.description["num_images"]
        number = f"of {num:,} images" if num else "of an unknown number of images"
        return Reference(path, f"the statistics {file.name} {number}", sha256, found)
    source = open_source()
    if source.image_shape != shape:
        raise ValueError(
            f"pictures of --reference {path} are {size_of(source.image_shape)}, those to measure "
            f"{size_of(shape)}: --set size=... and channels=... change them"
        )
    about = f"{len(source):,} images of {path}"
    return Reference(path, about, None, of_source(source, keep, network))


def size_of(shape: tuple[int, int, int]) -> str:
    """Returns a shape (height, width, channels) in words."""
    return f"{shape[0]}x{shape[1]} pixels of {shape[2]} channel{'s' * (shape[2] > 1)}"
