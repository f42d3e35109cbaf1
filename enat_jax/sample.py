"""Draw images with a trained model.

    python -m enat_jax.sample --model MODEL_DIR --labels all --num 10 --out runs/pictures
    python -m enat_jax.sample --model MODEL_DIR --labels 207,"tabby cat" --steps 16 --out runs/cats
    python -m enat_jax.sample --model MODEL_DIR --labels 3,7 --reveal gif,strip --out runs/reveal

DIR receives `NNNNN_<class name>.png`, `grid.png` with a row per label, and `settings.json`. Images
are numbered through, label by label; an image depends on seed, number and label alone. What it was
made with stands in its text chunk "parameters", too, as JSON. Interrupt it whenever you like: the
same command again draws what is missing and makes the same files; a directory with images of other
settings is left alone.
"""

import argparse
import dataclasses
import difflib
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from enat_jax.inference import generator, guidance, image_directory, reveal_pictures, sampling
from enat_jax.runtime import cli


def parse_labels(text: str, class_names: Sequence[str]) -> list[int]:
    """Reads labels from a comma-separated list of class names or numbers, or from "all".

    Args:
        text: the list. A name goes before a number; ``len(class_names)`` means no class. Of a name
            such as "tabby, tabby cat" each part will do.
        class_names: of the model.

    Returns:
        Labels, 0 <= label <= len(class_names).

    Raises:
        ValueError: a label is unknown or out of range.
    """
    if text == "all":
        return list(range(len(class_names)))
    # Names of classes may have commas in them.
    parts = [text] if text in class_names else [part.strip() for part in text.split(",")]
    return [_label(part, class_names) for part in parts]


def _label(text: str, class_names: Sequence[str]) -> int:
    if text in class_names:
        return class_names.index(text)
    # "tabby, tabby cat" is called by either name, in any case and with spaces or underscores.
    wanted = _normal(text)
    synonyms: dict[str, list[int]] = {}
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
    number = int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None
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


def _normal(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    model = generator.Generator.load(options.model, options.dtype)
    settings = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(sampling.Settings)
    }
    model = model.with_settings(**{k: v for k, v in settings.items() if v is not None})
    if options.guidance_interval and model.settings.guidance_schedule != "interval":
        raise ValueError("--guidance-interval needs --guidance-schedule interval")
    labels = parse_labels(options.labels, model.class_names)
    image_directory.draw(
        model, labels, options.num, options.out, seed=options.seed, batch_size=options.batch_size
    )
    print(f"[sample] images and grid.png in {options.out}")
    if options.reveal:
        numbers = reveal_pictures.spread(len(labels), options.num)
        shown = np.repeat(labels, options.num)[numbers]
        reveal = reveal_pictures.draw(model, shown, options.seed, numbers)
        for kind in options.reveal:
            file_name, write = reveal_pictures.KINDS[kind]
            write(options.out / file_name, reveal)
            print(f"[sample] {options.out / file_name}")


def _kinds(text: str) -> list[str]:
    kinds = text.split(",")
    if unknown := [kind for kind in kinds if kind not in reveal_pictures.KINDS]:
        known = " nor ".join(reveal_pictures.KINDS)
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is neither {known}")
    return kinds


def _parser() -> argparse.ArgumentParser:
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
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation, instead of its own")
    add(
        "--reveal",
        type=_kinds,
        default=[],
        metavar=",".join(reveal_pictures.KINDS),
        help="also show step by step how images come about, in "
        f"{', '.join(name for name, _ in reveal_pictures.KINDS.values())} or both: of "
        f"{reveal_pictures.MAX_IMAGES} images at most, the first of each label, then the second",
    )
    # From here on the names are those of the fields of `sampling.Settings`.
    add(
        "--steps",
        type=int,
        dest="num_steps",
        metavar="STEPS",
        help="sampling steps; this and what follows: default, the model's",
    )
    add("--guidance-scale", type=float)
    add("--guidance-schedule", metavar="NAME", help=", ".join(guidance.SCHEDULES))
    add(
        "--guidance-interval",
        type=cli.interval,
        metavar="LOW,HIGH",
        help="share of the steps that the schedule interval guides, such as 0.2,0.8",
    )
    add("--token-temperature", type=float)
    add("--mask-temperature", type=float)
    add(
        "--segments",
        type=int,
        dest="num_segments",
        metavar="SEGMENTS",
        help="compiled parts of the sampler; only speed depends on it",
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
