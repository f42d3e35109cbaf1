"""Sets of images that are evaluated: a model's, a source's, reconstructions, and references."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from enat_jax.data import images, tokens
from enat_jax.evaluation import (
    accumulate,
    features,
    npz_files,
    npz_images,
    perceptual_distance,
    text_prompts,
)
from enat_jax.evaluation import statistics as image_statistics
from enat_jax.inference import generator, near_tokens, tokenizer
from enat_jax.runtime import numerics, paths, versions

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
        split: of the source that the images are of; None: they are of no split.
        source: of the pictures; None: they were drawn, or are in an .npz file.
    """

    load: accumulate.Load
    read_ahead: bool
    spec: accumulate.PassSpec
    shape: tuple[int, int, int]
    description: dict[str, Any]
    split: str | None = None
    source: images.Source | None = None

    def statistics(self, collected: accumulate.Collected) -> image_statistics.Statistics:
        """Returns the statistics of all images, once they have passed."""
        counts = collected.totals.class_counts.tolist()
        return collected.statistics({**self.description, "class_counts": counts})


# --- images --------------------------------------------------------------------------------------


def of_generator(
    model: generator.Generator,
    num: int,
    seed: int,
    batch_size: int,
    network: features.Features,
    prompts: text_prompts.Prompts | None = None,
) -> ImageSet:
    """Returns a model's images: image i is of class i mod the number of classes, or of prompt i."""
    classes = 1 if prompts is not None else len(model.class_names)
    model = dataclasses.replace(model, planned=num)

    def load(start: int, stop: int) -> accumulate.Batch:
        if prompts is not None:
            texts = model.reading_texts().prompt(prompts.texts[start:stop])
            drawn = model.sample(seed=seed, first_index=start, batch_size=batch_size, prompts=texts)
            return accumulate.Batch(drawn, np.zeros(len(drawn), np.int32))
        labels = np.arange(start, stop, dtype=np.int32) % classes
        return accumulate.Batch(
            model.sample(labels, seed=seed, first_index=start, batch_size=batch_size), labels
        )

    height, width = model.tokenizer.image_size
    shape = (height, width, model.tokenizer.model.image_channels)
    identity = {
        "fingerprint": fingerprints(model),
        "sampler": model.settings.described(),
        "seed": seed,
        **({} if prompts is None else {"prompts": prompts.sha256}),
    }
    # Numbers against other images than the model was trained on mean something else.
    trained_on = _source_of(model.provenance)
    spec = accumulate.PassSpec(num, classes, num, _identity({"model": identity}, network))
    about = _description(network, trained_on, shape, num)
    if prompts is not None:
        about["prompts"] = text_prompts.description(prompts)
    return ImageSet(load, False, spec, shape, about)


def of_source(source: images.Source, keep: int, network: features.Features) -> ImageSet:
    """Returns the pictures of a source, not augmented."""
    identity, shape = _without_augmentation(source.identity()), source.image_shape
    num, classes = len(source), len(source.class_names)
    spec = accumulate.PassSpec(num, classes, keep, _identity(identity, network))
    about = _description(network, identity, shape, num)
    return ImageSet(loader(source), True, spec, shape, about, identity.get("split"), source)


def loader(source: images.Source) -> accumulate.Load:
    """Returns what reads the pictures of a source."""

    def load(start: int, stop: int) -> accumulate.Batch:
        batch = source.gather(np.arange(start, stop))
        return accumulate.Batch(batch["images"], batch["labels"])

    return load


def of_npz(found: npz_images.NpzImages, keep: int, network: features.Features) -> ImageSet:
    """Returns the images of an .npz file as they are."""

    def load(start: int, stop: int) -> accumulate.Batch:
        return accumulate.Batch(found.read(start, stop), found.labels[start:stop])

    identity, shape = found.identity(), found.image_shape
    spec = accumulate.PassSpec(len(found), found.num_classes, keep, _identity(identity, network))
    return ImageSet(load, True, spec, shape, _description(network, identity, shape, len(found)))


def of_tokenizer(
    codec: tokenizer.Tokenizer,
    source: images.Source,
    network: features.Features,
    distance: perceptual_distance.Distance | None = None,
    exchange: near_tokens.NearTokens | None = None,
) -> ImageSet:
    """Returns the pictures of a source as a tokenizer reconstructs them.

    Each comes with its mean squared error, of pixels in [0, 1], and with its LPIPS, if that is
    asked for. ``exchange`` is applied to the tokens before they are decoded.
    """

    def load(start: int, stop: int) -> accumulate.Batch:
        batch = source.gather(np.arange(start, stop))
        # Padded to one shape, so that the last ones need no compilation of their own.
        size = min(accumulate.CHUNK, len(source))
        padded = np.resize(batch["images"], (size, *source.image_shape))
        codes = codec.encode(padded)
        if exchange is not None:
            codes = exchange(codes, start)
        decoded = codec.decode(codes)[: stop - start]
        error = np.square((decoded.astype(np.float64) - batch["images"]) / 255).mean((1, 2, 3))
        rows = {"squared_error": error.astype(np.float32)[:, None]}
        if distance is not None:
            rows[distance.kind] = distance(batch["images"], decoded)[:, None]
        return accumulate.Batch(decoded, batch["labels"], rows)

    identity, shape = _without_augmentation(source.identity()), source.image_shape
    num, classes = len(source), len(source.class_names)
    made = {"tokenizer": codec.fingerprint, "source": identity}
    if distance is not None:
        made["lpips"] = distance.identity
    if exchange is not None:
        made["near_codes"] = exchange.description
    spec = accumulate.PassSpec(num, classes, num, _identity(made, network))
    about = _description(network, identity, shape, num)
    return ImageSet(load, True, spec, shape, about, identity.get("split"))


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
        crop = "none" if source.get("source") in images.MADE_HERE else source.get("plain_crop")
    return {
        "features": network.description,
        "source": source,
        "resolution": list(shape[:2]),
        "crop": crop,
        "num_images": num,
        "versions": versions.library_versions(),
        **numerics.recorded(),
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


def require_tokenizer(
    model: generator.Generator, found: tokens.TokenSet, path: pathlib.Path
) -> None:
    """Raises ValueError unless the tokens, those in ``path``, are of the model's tokenizer."""
    if model.tokenizer.fingerprint != found.tokenizer:
        raise ValueError(
            f"the tokens in {path} come from another tokenizer than the model's: "
            "give the token set that the model was trained on"
        )


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

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Height, width and channels of pictures; None of statistics."""
        return self.content.shape if isinstance(self.content, ImageSet) else None

    @property
    def kept(self) -> int | None:
        """The number of images with features of their own; None if there are none."""
        if isinstance(self.content, ImageSet):
            return self.content.spec.kept
        pool = self.content.pool
        return self.content.description.get("sample_images") if pool is None else len(pool)


def refuse_models(path: str) -> None:
    """Raises ValueError if it is the directory of a model or a tokenizer."""
    for name in ("model.json", "tokenizer.json"):
        if (pathlib.Path(path) / name).exists():
            raise ValueError(
                f"--reference {path} is the directory of a {name.removesuffix('.json')}: it must "
                "be statistics (.npz) or pictures; were --model and --reference swapped?"
            )


def is_npz(path: str) -> bool:
    """Says whether it is the name of an .npz file, of images or of statistics."""
    return pathlib.Path(path).suffix.lower() == ".npz"


def open_reference(
    path: str, open_pictures: Callable[[], ImageSet], shape: tuple[int, int, int]
) -> Reference:
    """Reads statistics, or opens pictures.

    Args:
        path: of the reference.
        open_pictures: opens it, if it is pictures.
        shape: height and width that pictures must have, and channels: where one side is grey, the
            feature networks take it as RGB.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is neither, or does not suit the images.
    """
    file = paths.local(path)
    if is_npz(path) and not _holds_images_alone(file):
        found = image_statistics.Statistics.load(file)
        with open(file, "rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        num = found.description["num_images"]
        number = f"of {num:,} images" if num else "of an unknown number of images"
        return Reference(path, f"the statistics {file.name} {number}", sha256, found)
    pictures = open_pictures()
    if pictures.shape[:2] != shape[:2]:
        advice = "both must be of one size"
        if not is_npz(path) and shape[0] == shape[1]:
            advice = f"--set size={shape[0]} opens them so"
        raise ValueError(
            f"pictures of --reference {path} are {size_of(pictures.shape)}, those to measure "
            f"{size_of(shape)}: {advice}"
        )
    split = pictures.split
    about = f"{pictures.spec.num_images:,} images of {path}{f', split {split}' if split else ''}"
    return Reference(path, about, None, pictures)


def _holds_images_alone(path: pathlib.Path) -> bool:
    with npz_files.open_npz(path, image_statistics.ADVICE) as archive:
        return npz_images.IMAGES in archive and not {"description", "mu", "sigma"} & {*archive}


def size_of(shape: tuple[int, int, int]) -> str:
    """Returns a shape (height, width, channels) in words."""
    return f"{shape[0]}x{shape[1]} pixels of {shape[2]} channel{'s' * (shape[2] > 1)}"
