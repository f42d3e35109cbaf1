"""Model and tokenizer directories: opening either, and adding formats to one that is there."""

import contextlib
import os
import pathlib
from collections.abc import Collection

import jax

from enat_jax.checkpoints import hub, model_files, orbax_paths
from enat_jax.inference import (
    clip_towers,
    compiled_sampler,
    generator,
    reference_weights,
    tokenizer,
)
from enat_jax.runtime import buckets, files

FORMATS = (*model_files.WEIGHTS, "compiled", "reference")


def load(directory: str | os.PathLike) -> generator.Generator | tokenizer.Tokenizer:
    """Loads what the directory has, a model or a tokenizer, onto one device.

    Args:
        directory: path, or address on the Hugging Face Hub, see ``Generator.load``.

    Raises:
        OSError: there is neither, or it cannot be read.
        ValueError: it is damaged.
    """
    devices = jax.local_devices()[:1]
    if not hub.is_address(directory):
        directory = buckets.fetched(directory)
    if (pathlib.Path(directory) / "tokenizer.json").is_file():
        return tokenizer.Tokenizer.load(directory, devices=devices)
    return generator.Generator.load(directory, devices=devices)


def check(
    model: generator.Generator | tokenizer.Tokenizer | clip_towers.Clip, directory: pathlib.Path
) -> None:
    """Opens the directory that a model has been written to.

    Raises:
        OSError: it is not that model, or it cannot be read.
        ValueError: it is damaged.
    """
    found = type(model).load(directory, devices=jax.local_devices()[:1])
    if files.as_json(found.description) != files.as_json(model.description):
        raise OSError(f"{directory} is not the model that was written to it: write it again")


def write(
    model: generator.Generator | tokenizer.Tokenizer,
    out: pathlib.Path,
    formats: Collection[str],
    dtype: str | None = None,
    with_text_encoder: bool = False,
) -> None:
    """Writes a model directory, or adds to one that has the same model.

    A new directory appears when it is complete and has been opened once.

    Args:
        model: to be written.
        out: directory.
        formats: of ``FORMATS``.
        dtype: that a compiled sampler computes in; None: that of the model.
        with_text_encoder: whether the encoder of a model's texts is written, too.

    Raises:
        ValueError: ``out`` holds something else, or the model cannot have one of the formats.
        OSError: it cannot be written, or not be read back as it was.
    """
    new = _is_new(model, out)
    weights = [name for name in formats if name in model_files.WEIGHTS]
    if new and not weights:
        raise ValueError(f"{out} is new and needs weights: add safetensors or orbax to --format")
    if "compiled" in formats:
        if not isinstance(model, generator.Generator):
            raise ValueError("a tokenizer draws nothing: no compiled sampler can be made of it")
        if "safetensors" not in formats and not (out / "transformer.safetensors").is_file():
            raise ValueError("a compiled sampler needs weights: add safetensors to --format")
    if with_text_encoder and not weights:
        raise ValueError("a text encoder has weights: add safetensors or orbax to --format")
    if "orbax" in formats:
        orbax_paths.of(out)  # refuses a name that Orbax cannot use, and not that of ``directory``
    description = "model.json" if isinstance(model, generator.Generator) else "tokenizer.json"
    if not new and not isinstance(out, pathlib.Path):
        raise ValueError(f"{out} is there: in a bucket nothing is added to a model, name a new one")
    made = files.new_directory(out, description) if new else contextlib.nullcontext(out)
    with made as directory:
        if with_text_encoder and isinstance(model, generator.Generator):
            model.reading_texts().save_encoder(directory, weights)
        if weights:
            model.save(directory, weights)
        if "reference" in formats:
            reference_weights.write(model, directory / "reference")
        if isinstance(model, generator.Generator):
            if "compiled" in formats:
                compiled_sampler.write(
                    model if dtype is None else model.with_dtype(dtype), directory
                )
            model.write_readme(directory, compiled=(directory / "sampler.json").is_file())
        check(model, directory)


def _is_new(model: generator.Generator | tokenizer.Tokenizer, out: pathlib.Path) -> bool:
    """Says whether there is nothing yet; raises ValueError if there is anything but this model."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return True
    name = "model.json" if isinstance(model, generator.Generator) else "tokenizer.json"
    if not (out / name).is_file():
        raise ValueError(f"{out} holds something else than a model: name another directory")
    found = files.read_json(out / name, "name another directory")
    expected = files.as_json(model.description)
    compared = (
        ("fingerprint", "sampler", "class_names", "text")
        if name == "model.json"
        else ("fingerprint",)
    )
    if any(found.get(key) != expected.get(key) for key in compared):
        raise ValueError(f"{out} holds another model: name another directory")
    return False
