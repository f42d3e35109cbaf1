"""From images and a tokenizer to a token set.

    python -m enat_jax.tokenize_images --model TOKENIZER_DIR --source pictures.zip --out DIR
    python -m enat_jax.tokenize_images --model TOKENIZER_DIR --source digits --copies 20 --out DIR
    python -m enat_jax.tokenize_images --model TOKENIZER_DIR --inspect DIR --out PICTURES_DIR

Start the same command again to go on with an interrupted one. Several hosts that share DIR take
every n-th shard each: give them ``--num-hosts N`` and ``--host-index 0`` to N-1. The result is the
same byte for byte. A source of the kind that the tokenizer was trained on, files, TFDS or digits,
has the settings of its training, the share held out too, but for what ``--set`` changes; another
one its size, and is mirrored if its training pictures were.
"""

import argparse
import contextlib
import json
import pathlib
import shlex
from collections.abc import Iterator
from typing import Any

import jax

from enat_jax.data import images, token_plans, tokens
from enat_jax.inference import token_inspection, tokenization, tokenizer
from enat_jax.runtime import buckets, cli, numerics, paths

PIXELS = 1 << 20  # of one call of the tokenizer on one device
_SETTINGS = {name for settings in images.SETTINGS.values() for name in settings}
_OF_SOURCE = "preprocessing.source."  # what a plan says of the settings of a source
_LISTING = f"{_OF_SOURCE}listing"
_CHOICE = (
    *("num_images", "shard_items", f"{_OF_SOURCE}num_images", _LISTING),
    f"{_OF_SOURCE}kept_to_train_on",
)
# What else differs in the plan of a token set where a setting is another one.
_EXPLAINS = {
    "copies": ("shard_items", "preprocessing.augmentation_seed"),
    "batch_size": ("shard_items",),
    "split": _CHOICE,
    "held_out": _CHOICE,
    "splits": (*_CHOICE, "class_names"),
    "classes": ("class_names", f"{_OF_SOURCE}class_order", _LISTING),
    "class_order": ("class_names", _LISTING),
}


def make_spec(
    model: tokenizer.Tokenizer,
    source: images.Source,
    location: dict[str, Any],
    flags: argparse.Namespace,
) -> tokens.TokenSetSpec:
    """Returns what the command line asks for.

    Raises:
        ValueError: the images do not suit the tokenizer.
    """
    height, width, channels = source.image_shape
    needed = (*model.image_size, model.model.image_channels)
    if source.image_shape != needed:
        raise ValueError(
            f"images of {source.image_shape} do not suit this tokenizer: it takes {needed}: "
            "height, width, channels; "
            f"{tokenization.advice(flags.source, source.image_shape, needed)}"
        )
    by_default = source.mirrored and flags.split.lower().startswith("train")
    preprocessing = {"source": source.identity(), "ignored_files": source.ignored}
    if flags.copies > 1:
        preprocessing["augmentation_seed"] = tokenization.SEED
    preprocessing |= numerics.recorded()
    return tokens.TokenSetSpec(
        num_images=len(source),
        copies=flags.copies,
        flips=by_default if flags.flips is None else flags.flips,
        batch_size=flags.batch_size or min(64, max(1, PIXELS // (height * width))),
        grid=model.grid,
        codebook_size=model.model.codebook_size,
        class_names=tuple(source.class_names),
        tokenizer=model.fingerprint,
        preprocessing=preprocessing,
        location=location,
        shard_items=flags.shard_items,
    )


def _location(model: tokenizer.Tokenizer, flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of ``images.open_source``: the tokenizer's, but for those of flags."""
    settings = tokenization.source_settings(model, flags.source)
    if twice := {"source", "split"} & dict(flags.set).keys():
        raise ValueError(f"--set {min(twice)}=... is an option of its own: --{min(twice)}")
    return {"source": flags.source, "split": flags.split} | settings | dict(flags.set)


def _begin(directory: pathlib.Path, spec: tokens.TokenSetSpec, source: images.Source) -> list[int]:
    """Does what ``tokens.begin`` does, and says how to go on with a set of other settings."""
    try:
        return tokens.begin(directory, spec)
    except token_plans.OtherTokens as error:
        if arguments := _arguments_of(error.differences):
            raise ValueError(f"{error}; to go on with it, give {' '.join(arguments)}") from error
        if gone := _gone(directory, source):
            raise ValueError(
                f"{error}; to go on with it, put back what is missing of its pictures: "
                f"{', '.join(gone[:3])}{f' and {len(gone) - 3} more' if gone[3:] else ''}"
            ) from error
        raise


def _gone(directory: pathlib.Path, source: images.Source) -> list[str]:
    """Returns the names of the pictures of finished shards that a source no longer has."""
    known: set[str] = set()
    for path in directory.glob("*-of-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known.update(json.loads(path.read_text(encoding="utf-8"))["keys"])
    return sorted(known.difference(source.key(i) for i in range(len(source))))


def _arguments_of(differences: list[tuple[str, Any, Any]]) -> list[str]:
    """Returns the arguments that make plans alike, or none if arguments alone do not.

    Args:
        differences: names, and what the plans have now and had before.
    """
    found: dict[str, str] = {}
    explained: set[str] = set()
    for name, now, before in differences:
        setting = name.removeprefix(_OF_SOURCE)
        if name == "flips":
            found[name] = "--flips" if before else "--no-flips"
        elif name in ("copies", "batch_size"):
            found[name] = f"--{name.replace('_', '-')} {before}"
        elif name == f"{_OF_SOURCE}split":
            found[name] = f"--split {shlex.quote(before)}"
        elif name == f"{_OF_SOURCE}splits":  # the folders, where they are not those of before
            none = before == [] or (before is None and now)
            found[name] = f"--set splits={'none' if none else 'folders'}"
        elif name == f"{_OF_SOURCE}class_order":
            found[name] = f"--set class_order={before or 'text'}"
        elif setting in _SETTINGS and name != setting and before is not None:
            value = before if isinstance(before, str) else json.dumps(before)
            found[name] = f"--set {shlex.quote(f'{setting}={value}')}"
        explained |= {name, *_EXPLAINS.get(setting, ())} if name in found else set()
    return list(found.values()) if explained.issuperset(x[0] for x in differences) else []


def _refuse_within(out: pathlib.Path, source: str) -> None:
    folder = paths.local(source)
    local = isinstance(out, pathlib.Path)
    if local and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"--out {out} lies within --source {source}, where it would be listed with the "
            "pictures: choose a directory outside"
        )


@contextlib.contextmanager
def _naming_flags(batch_size: int) -> Iterator[None]:
    """Lets the messages of errors name the flags that help."""
    try:
        yield
    except images.UnreadableImage as error:
        advice = (
            "start again with --on-error skip to leave it out, or mend it (then everything is made "
            "anew in another directory)"
        )
        raise images.UnreadableImage(error.key, f"{error.reason}; {advice}") from error
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise ValueError(
                f"{batch_size} images a device do not fit into memory: choose a smaller "
                "--batch-size and another --out"
            ) from error
        raise


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m enat_jax.tokenize_images", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", type=cli.model, required=True, metavar="DIR", help="tokenizer directory")
    add(
        "--source",
        default="digits",
        help="digits, a folder, a .zip, a .tar or tfds:NAME (default: digits)",
    )
    add("--split", default="train", help="train, test, all; with tfds its own (default: train)")
    add(
        "--copies",
        type=cli.at_least_one,
        default=1,
        help="versions of each image, augmented but one",
    )
    add(
        "--flips",
        action=argparse.BooleanOptionalAction,
        help="also mirrored images (default: for training splits, unless flip is off)",
    )
    add(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what to do about an image that cannot be read; skipped ones are listed in the set",
    )
    add("--out", type=cli.place, required=True, metavar="DIR", help="directory or gs:// to write")
    add(
        "--set",
        type=cli.name_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value for a setting of the source, such as held_out=0.05",
    )
    add(
        "--batch-size",
        type=cli.at_least_one,
        help="images a call and device (default: by their size)",
    )
    add(
        "--shard-items",
        type=cli.at_least_one,
        help="images a file (default: 128 files, 256 or more)",
    )
    add("--host-index", type=int, help="of this process (default: jax's)")
    add("--num-hosts", type=cli.at_least_one, help="that share the work (default: jax's)")
    add(
        "--inspect",
        type=cli.model,
        metavar="DIR",
        help="make nothing, but show how good a finished token set is; pictures go to --out",
    )
    return parser


def main(arguments: list[str]) -> None:
    flags = _parser().parse_args(arguments)
    if flags.inspect and not isinstance(flags.out, pathlib.Path):
        raise ValueError(f"pictures are not written to {flags.out}: name a local directory")
    buckets.require(flags.out)
    model = tokenizer.Tokenizer.load(flags.model)
    if flags.inspect:
        print(token_inspection.inspect(flags.inspect, model, flags.out))
        return
    num_hosts = flags.num_hosts or jax.process_count()
    host_index = jax.process_index() if flags.host_index is None else flags.host_index
    if not 0 <= host_index < num_hosts:
        raise ValueError(f"--host-index {host_index} is not in [0, {num_hosts})")
    _refuse_within(flags.out, flags.source)
    location = _location(model, flags)
    source = images.open_source(**location)
    spec = make_spec(model, source, location, flags)
    unfinished = _begin(flags.out, spec, source)
    if not unfinished and (flags.out / "metadata.json").exists():
        tokens.finish(flags.out, spec)  # reads all of it: what is damaged does not count as made
        print(f"{flags.out} already holds these tokens")
        return
    if unused := images.describe_unused(source.ignored):
        print(unused)
    settings = {k: v for k, v in sorted(location.items()) if k not in ("source", "split")}
    print(f"{flags.source}, {flags.split}: {', '.join(f'{k}={v}' for k, v in settings.items())}")
    print(
        f"tokenizing {spec.copies} x {spec.num_images} images"
        f"{' and their mirror images' if spec.flips else ''} into {flags.out}: "
        f"{len(unfinished)} of {spec.num_shards} shards to do"
    )
    with _naming_flags(spec.batch_size):
        skip = flags.on_error == "skip"
        print(tokenization.tokenize(model, source, spec, flags.out, skip, host_index, num_hosts))
    if tokens.finish(flags.out, spec):
        print(token_inspection.summary(flags.out))
    else:
        print(f"this host's shards are finished; {flags.out} is complete when the others' are")


if __name__ == "__main__":
    cli.run(main)
