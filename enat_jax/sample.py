"""Draw images with a trained model.

    python -m enat_jax.sample --model MODEL_DIR --labels all --num 10 --out runs/pictures
    python -m enat_jax.sample --model MODEL_DIR --labels 3,7 --steps 16 --out runs/pictures

DIR receives `NNNNN_<class name>.png`, `grid.png` with a row per label, and `settings.json`. Images
are numbered through, label by label; an image depends on seed, number and label alone. The same
command again makes the same files; a directory with images of other settings is left alone.
"""

import argparse
import dataclasses
import difflib
import json
import pathlib
import re
import sys
import time

import numpy as np

from enat_jax import cli, generator, metric_writer, model_files

GRID_IMAGES = 2500  # most images of `grid.png`, in whole rows
SAMPLER_OPTIONS = {  # option: field of sampling.Settings
    "steps": "num_steps",
    "guidance_scale": "guidance_scale",
    "token_temperature": "token_temperature",
    "mask_temperature": "mask_temperature",
    "segments": "num_segments",
}


def parse_labels(text, class_names):
    """Labels named by a comma-separated list of class names or numbers, or by "all".

    Args:
        text: what was asked for. A name goes before a number; ``len(class_names)`` is no class. Of
            a name such as "tabby, tabby cat" each part will do.
        class_names: of the model.

    Returns:
        list of int, 0 <= label <= len(class_names).

    Raises:
        ValueError: a label is unknown or out of range.
    """
    if text == "all":
        return list(range(len(class_names)))
    # Names of classes may have commas in them.
    parts = [text] if text in class_names else [part.strip() for part in text.split(",")]
    return [_label(part, class_names) for part in parts]


def _label(text, class_names):
    if text in class_names:
        return class_names.index(text)
    # "tabby, tabby cat" is called by either name, in any case and with spaces or underscores.
    wanted, synonyms = _normal(text), {}
    for label, name in enumerate(class_names):
        for synonym in {_normal(name), *map(_normal, name.split(","))}:
            synonyms.setdefault(synonym, []).append(label)
    meant = synonyms.get(wanted, [])
    if len(meant) > 1:
        raise ValueError(
            f"label {text!r} may be " + " or ".join(f"{i} ({class_names[i]})" for i in meant)
        )
    if meant:
        return meant[0]
    number = int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else None
    if number is None:
        near = difflib.get_close_matches(wanted, synonyms, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"label {text!r} is neither a class name nor a number{hint or ':'} this model has "
            f"the classes 0 ({class_names[0]}) to {len(class_names) - 1} ({class_names[-1]})"
        )
    if not 0 <= number <= len(class_names):
        raise ValueError(
            f"label {number} is out of range: this model has the classes 0 to "
            f"{len(class_names) - 1}, and {len(class_names)} for no class"
        )
    return number


def _normal(name):
    return " ".join(name.replace("_", " ").casefold().split())


def sample(model, labels, num, out, *, seed=0, batch_size=generator.BATCH_SIZE, description=None):
    """Draw ``num`` images of each label into a directory.

    Args:
        model: ``Generator``.
        labels: list of int; num: images per label, at least 1.
        out: directory, created if missing.
        seed: int; batch_size: images per call of the network, of no influence on the images.
        description: more JSON values for `settings.json`.

    Returns:
        uint8 [n, h, w, c], the images of `grid.png`.

    Raises:
        ValueError: an argument is out of range, or ``out`` holds images of other settings.
        OSError: ``out`` cannot be written.
    """
    for name, value in (("num", num), ("batch_size", batch_size), ("labels", len(labels))):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    out = pathlib.Path(out)
    _claim(
        out,
        {
            "labels": labels,
            "num": num,
            "seed": seed,
            "sampler": dataclasses.asdict(model.settings),
            "class_names": [_class_name(model, label) for label in labels],
            "transformer": model.fingerprint,
            "tokenizer": model.tokenizer.fingerprint,
            "provenance": model.provenance,
            **(description or {}),
        },
    )
    wanted = np.repeat(np.asarray(labels, np.int32), num)
    shown = min(len(labels), max(1, GRID_IMAGES // num)) * num
    size, for_grid, start = min(batch_size, len(wanted)), [], time.monotonic()
    for first in range(0, len(wanted), size):
        part = wanted[first : first + size]
        # One batch size, one compilation: the last batch is filled up.
        images = model.sample(np.resize(part, size), seed, first, size)[: len(part)]
        for number, (label, image) in enumerate(zip(part, images, strict=True), start=first):
            name = re.sub(r"[^\w-]+", "_", _class_name(model, label))
            metric_writer.write_png(out / f"{number:05d}_{name}.png", image)
        for_grid.append(images[: max(0, shown - first)])
        _progress(first + len(part), len(wanted), start)
    for_grid = np.concatenate(for_grid)
    metric_writer.write_png(out / "grid.png", metric_writer.grid(for_grid, columns=num))
    return for_grid


def _class_name(model, label):
    return model.class_names[label] if label < len(model.class_names) else "no class"


def _claim(out, settings):
    """Write `settings.json`, unless the directory belongs to other settings."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.exists():
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == settings
        except ValueError:
            same = False
        if not same:
            raise ValueError(f"{out} holds images of other settings: choose another directory")
    model_files.write_json(path, settings)


def _progress(done, total, start):
    seconds = time.monotonic() - start
    end = "\n" if done == total or not sys.stderr.isatty() else "\r"
    line = f"[sample] {done}/{total} images, {done / seconds:.1f} images/s"
    print(f"{line:50}" if end == "\r" else line, end=end, file=sys.stderr, flush=True)


def main(argv):
    options = _parser().parse_args(argv)
    model = generator.Generator.load(options.model)
    changes = {field: getattr(options, name) for name, field in SAMPLER_OPTIONS.items()}
    model = model.with_settings(**{k: v for k, v in changes.items() if v is not None})
    sample(
        model,
        parse_labels(options.labels, model.class_names),
        options.num,
        options.out,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    print(f"[sample] images and grid.png in {options.out}")


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m enat_jax.sample", description="Draws images with a trained model."
    )
    add = parser.add_argument
    add("--model", type=pathlib.Path, required=True, metavar="DIR", help="model directory")
    add("--labels", default="all", help="class names or numbers, such as 0,1,2 (default: all)")
    add("--num", type=int, default=10, help="images per label (default 10)")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, required=True, metavar="DIR", help="for the images")
    add("--batch-size", type=int, default=generator.BATCH_SIZE, help="images at a time")
    add("--steps", type=int, help="sampling steps; this and what follows: default, the model's")
    add("--guidance-scale", type=float)
    add("--token-temperature", type=float)
    add("--mask-temperature", type=float)
    add("--segments", type=int, help="compiled parts of the sampler; only speed depends on it")
    return parser


if __name__ == "__main__":
    cli.run(main)
