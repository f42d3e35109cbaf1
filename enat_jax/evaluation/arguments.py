"""The command line of ``evaluate``."""

import argparse
from typing import Any

from enat_jax.data import decoding, images
from enat_jax.evaluation import drawing_arguments, image_sets, measures, passes, text_prompts
from enat_jax.inference import guidance, sampler_settings
from enat_jax.runtime import cli

NUM = 50_000  # images of a model, by the convention of published FIDs
KEPT_REFERENCE = 10_000  # images whose features are kept for precision and recall, as ADM's
SAMPLER = {  # flag: field of sampling.Settings
    "steps": "num_steps",
    "guidance_scale": "guidance_scale",
    "guidance_schedule": "guidance_schedule",
    "guidance_interval": "guidance_interval",
    "token_temperature": "token_temperature",
    "mask_temperature": "mask_temperature",
    "order": "order",
    "segments": "num_segments",
}
NEEDED = {  # with each use, which is the first of these that is given
    "fill_centres": ("model", "reference", "out"),
    "model": ("reference", "out"),
    "tokenizer": ("source", "out"),
    "images": ("reference", "out"),
    "make_reference": ("reference",),
    "compare": (),
}
_PICTURES = ("split", "size", "crop", "set", "on_error", "scan", "features", "inception")
_TEXTS = ("prompts", "clip")
_WORK = ("out", "replicates", "save_every", "host_index", "num_hosts")
TAKEN = {  # by each use; others would have no effect
    "fill_centres": (
        *("model", "reference", "out", *_PICTURES),
        *("seed", "dtype", *SAMPLER, "settings"),
    ),
    "model": (
        *("reference", *_PICTURES, *_WORK, "keep"),
        *("num", "seed", "batch_size", "dtype", "text_encoder", *_TEXTS, *SAMPLER, "settings"),
    ),
    "tokenizer": ("source", "reference", "lpips", "near_codes", *_PICTURES, *_WORK, "keep"),
    "images": ("reference", *_PICTURES, *_WORK, *_TEXTS, "keep"),
    "make_reference": (
        *("reference", *_PICTURES, "keep"),
        *("save_every", "host_index", "num_hosts"),
    ),
    "compare": (),
}


def refuse_without_effect(
    parser: argparse.ArgumentParser, flags: argparse.Namespace, use: str
) -> None:
    """Raises ValueError if a flag was given, with another value than its default, for nothing."""
    for name, value in vars(flags).items():
        if name not in (use, *TAKEN[use]) and value != parser.get_default(name):
            raise ValueError(
                f"{option(name)} has no effect with {option(use)}: leave it out; see --help"
            )


def refuse_unknown_settings(flags: argparse.Namespace) -> None:
    """Raises ValueError if a setting of --set is one that none of the sources has."""
    paths = [p for p in (flags.images, flags.source, flags.reference) if p is not None]
    kinds = sorted({images.kind(path) for path in paths if not image_sets.is_npz(path)})
    if flags.crop is not None and not {"files", "tfds"} & set(kinds):
        raise ValueError(
            f"--crop {flags.crop} has no effect on {', '.join(paths)}: leave it out; pictures in "
            "files are cut"
        )
    if flags.images and not kinds:
        for name in ("size", "split"):
            if getattr(flags, name) is not None:
                raise ValueError(
                    f"--{name} has no effect on .npz files, which stay as they are: leave it out"
                )
    known = {name for kind in kinds for name in images.SETTINGS[kind]}
    for name, _ in flags.set:
        if name not in known:
            those = ", ".join(sorted(known)) or "none, as .npz files stay as they are"
            raise ValueError(
                f"--set {name}=... is no setting of {', '.join(paths)}: there are {those}"
            )


def option(name: str) -> str:
    """Returns a flag as it is typed: "batch_size" is "--batch-size"."""
    return f"--{name.replace('_', '-')}"


def given_settings(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of ``sampling.Settings`` that were given."""
    given = {field: getattr(flags, name) for name, field in SAMPLER.items()}
    return {field: value for field, value in given.items() if value is not None}


def parser(description: str) -> argparse.ArgumentParser:
    """Returns the parser of all uses; ``description`` is shown by --help."""
    made = cli.Parser(
        prog="python -m enat_jax.evaluate",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    use = made.add_mutually_exclusive_group(required=True)
    use.add_argument("--model", type=cli.model, metavar="DIR", help="directory, or hf://OWNER/NAME")
    use.add_argument("--tokenizer", type=cli.path, metavar="DIR", help="tokenizer directory")
    use.add_argument("--images", metavar="SOURCE", help="pictures that something else made")
    use.add_argument("--make-reference", type=cli.path, metavar="FILE", help=".npz to write")
    use.add_argument("--compare", nargs=2, metavar="CARD", help="cards or their directories")
    add = made.add_argument
    add("--reference", help="statistics (.npz) or pictures to compare with")
    add("--source", help="pictures that a tokenizer reconstructs")
    add("--split", help="of a source (default: train; with --tokenizer one that is held out)")
    add("--size", type=cli.at_least_one, help="pixels of a side of a source's pictures")
    add("--crop", choices=tuple(decoding.CROPS), help="of pictures (default: adm)")
    add(
        "--set",
        type=cli.name_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value for a setting, such as channels=1, of every source that has it",
    )
    add(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what to do about pictures that cannot be read, which are looked for at the start",
    )
    add(
        "--scan",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read all pictures once before it begins, to find those that cannot be read",
    )
    add(
        "--features",
        default="inception",
        help="inception, inception:adm, lite0:FILE, random:SEED, a directory of a trained "
        "network, or a .jaxexport file (default: inception)",
    )
    add("--inception", metavar="FILE", help="weights of Inception, or 'download'")
    add("--lpips", metavar="NETWORK:FILE", help="of a tokenizer, too: vgg:FILE or alex:FILE")
    add(
        "--near-codes",
        metavar="SHARE:NEAREST",
        help="exchange a share of tokens for one of so many codes nearest to each, as in 0.7:280",
    )
    add(
        "--num",
        type=cli.at_least_one,
        help=f"images of a model (default: {NUM:,}; of texts: all, at most {text_prompts.NUM:,})",
    )
    add(
        "--fill-centres",
        type=cli.path,
        metavar="TOKENS",
        help="fill held-out pictures of --reference; TOKENS: what the model was trained on",
    )
    add("--prompts", metavar="FILE", help="texts of the images, see above")
    add("--clip", type=cli.path, metavar="DIR", help="that scores images by their texts")
    add("--text-encoder", type=cli.path, metavar="DIR", help="if the model needs one and has none")
    add("--seed", type=int, default=0)
    add("--out", type=cli.path, metavar="DIR", help="directory to write")
    add("--batch-size", type=cli.at_least_one, default=64, help="images drawn at a time")
    add(
        "--keep",
        type=cli.at_least_one,
        default=KEPT_REFERENCE,
        help="images of a source whose features are kept for precision and recall "
        f"(default: {KEPT_REFERENCE:,})",
    )
    add(
        "--replicates",
        type=int,
        default=measures.REPLICATES,
        help=f"of the bootstrap; 0: no intervals (default: {measures.REPLICATES})",
    )
    add(
        "--save-every",
        type=float,
        default=passes.SAVE_EVERY_S,
        metavar="SECONDS",
        help="how much work a kill may cost (default: 60)",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="of the model's weights and computation")
    about = "this and what follows: default, the model's"
    add("--settings", type=cli.path, metavar="FILE", help=drawing_arguments.SETTINGS)
    add("--steps", metavar="NUM_STEPS", type=int, help=about)
    add("--guidance-scale", type=float)
    add("--guidance-schedule", metavar="NAME", help=", ".join(guidance.SCHEDULES))
    add("--guidance-interval", type=cli.interval, metavar="LOW,HIGH", help="such as 0.2,0.8")
    add("--token-temperature", type=float)
    add("--mask-temperature", type=float)
    add("--order", metavar="NAME", help=f"of revealing: {', '.join(sampler_settings.ORDERS)}")
    add("--segments", metavar="NUM_SEGMENTS", type=int)
    add("--host-index", type=int, help="of this process (default: jax's)")
    add("--num-hosts", type=cli.at_least_one, help="that share the work (default: jax's)")
    return made
