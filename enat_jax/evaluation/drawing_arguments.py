"""The arguments that commands which draw images have in common, and what they mean."""

import argparse
import dataclasses

from enat_jax.data import prompt_files
from enat_jax.evaluation import npz_prompts
from enat_jax.inference import (
    generator,
    guidance,
    image_directory,
    label_names,
    sampler_settings,
    sampling,
)
from enat_jax.runtime import cli

SETTINGS = "settings of the sampler in JSON, such as settings.json of a search or of drawn images"


def add_texts(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of texts, and of the encoder that reads them."""
    add = parser.add_argument
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument(
        "--prompt", nargs="+", action="extend", metavar="TEXT", help="texts, in quotes each"
    )
    texts.add_argument(
        "--prompts",
        metavar="FILE",
        help="a text on each line, or .jsonl with text or prompt; - is stdin",
    )
    texts.add_argument(
        "--embeddings",
        type=cli.path,
        metavar="FILE.npz",
        help="states of a text encoder in place of texts, see above",
    )
    add("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    add("--text-encoder", type=cli.path, metavar="DIR", help="if the model needs one and has none")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the directory of images, and of how they are computed."""
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--out", type=cli.path, required=True, metavar="DIR", help="for the images")
    add("--batch-size", type=int, default=generator.BATCH_SIZE, help="images at a time")
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation, instead of its own")


def add_sampler(parser: argparse.ArgumentParser) -> None:
    """Adds flags of ``sampling.Settings``, by its names or as ``dest``, and of a file of them."""
    add = parser.add_argument
    add("--settings", type=cli.path, metavar="FILE", help=SETTINGS)
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
    add("--order", metavar="NAME", help=f"of revealing: {', '.join(sampler_settings.ORDERS)}")
    add(
        "--segments",
        type=int,
        dest="num_segments",
        metavar="SEGMENTS",
        help="compiled parts of the sampler; only speed depends on it",
    )


def load(options: argparse.Namespace) -> generator.Generator:
    """Returns the model that is asked for, with the settings of its sampler that were given.

    Raises:
        OSError, ValueError: as ``Generator.load``; or a setting is out of range.
    """
    model = generator.Generator.load(
        options.model, options.dtype, text_encoder_directory=options.text_encoder
    )
    named = (field.name for field in dataclasses.fields(sampling.Settings))
    given = {name: getattr(options, name, None) for name in named}
    given = {name: value for name, value in given.items() if value is not None}
    settings = sampler_settings.changed(model.settings, options.settings, given)
    model = dataclasses.replace(model, settings=settings)
    if options.guidance_interval and model.settings.guidance_schedule != "interval":
        raise ValueError("--guidance-interval needs --guidance-schedule interval")
    return model


def shown(
    options: argparse.Namespace, model: generator.Generator, default: str = "all"
) -> tuple[list[int], image_directory.Texts | None]:
    """Returns what images are to show: labels, and as many texts where there are any.

    Args:
        options: the flags.
        model: draws them.
        default: the labels where neither labels nor texts are given.

    Raises:
        ValueError: labels or texts are missing, unknown, or do not fit the model or each other.
    """
    texts = _texts(options, model)
    no_class = model.model.num_classes
    if options.labels is not None and not no_class:
        raise ValueError("this model has no classes: give prompts and no --labels")
    if texts is None and not no_class:
        raise ValueError(
            "this model draws what it reads: give --prompt TEXT, see --help for others"
        )
    if texts is None:
        options.labels = default if options.labels is None else options.labels
        return label_names.parse_labels(options.labels, model.class_names), None
    labels = [no_class]
    if options.labels is not None:
        labels = label_names.parse_labels(options.labels, model.class_names)
    return image_directory.paired(labels, texts)


def _texts(options: argparse.Namespace, model: generator.Generator) -> image_directory.Texts | None:
    given = (options.prompt, options.prompts, options.embeddings)
    if all(source is None for source in given):
        if options.negative_prompt is not None:
            raise ValueError('--negative-prompt needs a prompt beside it, which may be --prompt ""')
        return None
    encoder = model.reading_texts()
    states = None
    if options.prompt is not None:
        prompts = options.prompt
    elif options.prompts is not None:
        prompts = prompt_files.read(options.prompts)
    else:
        states, prompts = npz_prompts.read(options.embeddings, encoder)
    return image_directory.Texts(prompts, states, options.negative_prompt)
