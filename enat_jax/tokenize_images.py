"""From a set of images and a tokenizer to a token set.

    python -m enat_jax.tokenize_images --model TOKENIZER_DIR --source digits --split train \\
        --copies 20 --out DIR

Preprocessing and augmentation are those that the tokenizer was trained with, as its directory says,
but for what `--set` changes. The first copy of each image is not augmented. If DIR already holds
the very same set, the program says so and ends.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np

from enat_jax import cli, metric_writer, tokenizer
from enat_jax.data import images, tokens

SEED = 0
BATCH_SIZE = 256  # images in memory at a time


def tokenize(
    model: tokenizer.Tokenizer,
    source: images.Digits,
    copies: int,
    preprocessing: dict[str, Any],
    seed: int = SEED,
) -> tokens.TokenSet:
    """Tokens of `copies` versions of each image of `source`, all first versions first.

    Version 0 is the image as it is, the others are augmented by a seed that depends on `seed`, the
    version and the image alone. `preprocessing` is written into the set.
    """
    n = len(source)
    rows, labels = [], []
    with metric_writer.Progress(copies * n, 1) as progress:
        for copy in range(copies):
            seeds = np.random.default_rng([seed, copy]).integers(0, 1 << 63, n) if copy else None
            for start in range(0, n, BATCH_SIZE):
                part = np.arange(start, min(start + BATCH_SIZE, n))
                batch = source.gather(part, None if seeds is None else seeds[part])
                rows.append(model.encode(batch["images"]))
                labels.append(batch["labels"])
                progress.update(copy * n + int(part[-1]) + 1)
    return tokens.TokenSet(
        tokens=np.concatenate(rows),
        labels=np.concatenate(labels),
        grid=tuple(model.grid),
        codebook_size=model.model.codebook_size,
        class_names=tuple(source.class_names),
        tokenizer=model.fingerprint,
        preprocessing=preprocessing,
    )


def is_done(directory: pathlib.Path, fingerprint: str, preprocessing: dict[str, Any]) -> bool:
    """Whether `directory` holds the set that this tokenizer would make.

    Raises ValueError if it holds anything else.
    """
    if not directory.exists():
        return False
    try:
        found = tokens.TokenSet.open(directory)
    except FileNotFoundError as error:
        raise ValueError(
            f"{directory} exists and is no token set: remove it or choose another --out"
        ) from error
    if (found.tokenizer, found.preprocessing) != (fingerprint, preprocessing):
        raise ValueError(
            f"{directory} holds tokens of another tokenizer or of other settings "
            f"({found.preprocessing}): remove it or choose another --out"
        )
    return True


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m enat_jax.tokenize_images", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--model", type=pathlib.Path, required=True, help="tokenizer directory")
    parser.add_argument("--source", default="digits", help="where the images come from")
    parser.add_argument("--split", default="train", help="train or test")
    parser.add_argument("--copies", type=_at_least_one, default=1, help="versions of each image")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="new directory")
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value for a setting of the source, such as rotation=5",
    )
    flags = parser.parse_args(arguments)

    model = tokenizer.Tokenizer.load(flags.model)
    trained_with = dict(model.provenance.get("config", {}).get("data", {}))
    settings = trained_with if trained_with.pop("source", None) == flags.source else {}
    settings |= dict(flags.set)
    source = images.open_source(flags.source, flags.split, **settings)
    preprocessing = json.loads(  # as it will be read back: tuples become lists
        json.dumps(
            {"source": flags.source, "split": flags.split, "copies": flags.copies, "seed": SEED}
            | settings
        )
    )
    if is_done(flags.out, model.fingerprint, preprocessing):
        print(f"{flags.out} already holds these tokens")
        return
    print(f"tokenizing {flags.copies} x {len(source)} images into {flags.out}")
    made = tokenize(model, source, flags.copies, preprocessing)
    made.save(flags.out)
    rows, columns = made.grid
    print(
        f"{len(made)} images of {rows}x{columns} tokens, "
        f"{len(np.unique(made.tokens))} of {made.codebook_size} codes in use"
    )


if __name__ == "__main__":
    cli.run(main)
