"""Does a model draw what a text says? Tables and pictures of scenes of handwritten digits.

    python -m enat_jax.evaluate_scenes --model DIR --tokens TRAIN_TOKENS_DIR --out DIR

`evaluation/scene_table.py` says what the rows are and how they are measured.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from enat_jax.data import images, scenes, tokens
from enat_jax.evaluation import image_sets, passes, scene_pictures, scene_table
from enat_jax.inference import generator
from enat_jax.runtime import cli, files


def main(arguments: Sequence[str]) -> None:
    """Measures models of scenes, and writes and prints the tables."""
    options = _parser().parse_args(arguments)
    directories = cli.models(options.model, options.compare)
    models = {
        name: generator.Generator.load(path, text_encoder_directory=options.text_encoder)
        for name, path in directories.items()
    }
    training_tokens = tokens.TokenSet.open(options.tokens)
    image_sets.require_tokenizer(models["ours"], training_tokens, options.tokens)
    source = _scenes(training_tokens)
    for name, model in models.items():
        _require_scenes(model, source, str(directories[name]))
        for scale in options.guidance:
            model.with_settings(guidance_scale=scale)
    settings = {
        "models": {name: image_sets.fingerprints(model) for name, model in models.items()},
        "samplers": {name: model.settings.described() for name, model in models.items()},
        "tokens": training_tokens.preprocessing,
        **{name: getattr(options, name) for name in ("num", "guidance", "seed")},
    }
    for split in scene_table.COMBINATIONS.values():
        scene_table.ask(split, options.num)
    passes.claim(options.out, settings)
    evaluation = scene_table.evaluate(
        models,
        source,
        num=options.num,
        guidance=options.guidance,
        seed=options.seed,
        say=_say,
    )
    _say("drawing pictures")
    pictures = scene_pictures.write(models["ours"], options.out, options.seed)
    lines = [f"- `{name}`: {what}." for name, what in pictures.items()]
    text = (
        f"{evaluation.markdown()}\nPictures, none of them left out:\n\n" + "\n".join(lines) + "\n"
    )
    files.write_json(options.out / "evaluation.json", dataclasses.asdict(evaluation))
    files.write_atomically(options.out / "evaluation.md", text.encode())
    print(text)


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m enat_jax.evaluate_scenes",
        description="Compares drawn scenes of digits with the texts that they were drawn of.",
    )
    add = parser.add_argument
    add("--model", type=cli.model, required=True, help="directory of the model")
    add("--tokens", type=cli.path, required=True, help="token set that it was trained on")
    add("--compare", action="append", default=[], metavar="NAME=DIR", help="another model")
    add("--text-encoder", type=cli.path, metavar="DIR", help="if the models need one and have none")
    add("--num", type=cli.at_least_one, default=500, help="images of each row (default 500)")
    add(
        "--guidance",
        type=_scales,
        default=(0.0, 1.0, 2.0, 4.0),
        metavar="SCALE,...",
        help="scales of the guidance to compare (default 0,1,2,4)",
    )
    add("--seed", type=int, default=0)
    add("--out", type=cli.path, required=True, help="for evaluation.json, evaluation.md, pictures")
    return parser


def _scales(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not numbers with commas between them, such as 0,1,2"
        ) from None


def _scenes(training_tokens: tokens.TokenSet) -> scenes.Scenes:
    """Returns the scenes that the token set was made of."""
    settings = dict(training_tokens.preprocessing.get("source") or {})
    if (settings.pop("source", None), settings.get("split")) != ("scenes", "train"):
        raise ValueError(
            "the model's --tokens must be those of the training scenes, made with --source scenes "
            f"--split train, not with {training_tokens.preprocessing}"
        )
    source = images.open_source("scenes", settings.pop("split"), **settings)
    assert isinstance(source, scenes.Scenes)
    return source


def _require_scenes(model: generator.Generator, source: scenes.Scenes, path: str) -> None:
    """Raises ValueError unless a model reads the words of scenes and draws pictures like them."""
    if model.text is None:
        raise ValueError(
            f"{path} reads no texts: name a model that was trained on the captions of scenes, or "
            "measure a model of digits with python -m enat_jax.evaluate_digits"
        )
    size = (*model.tokenizer.image_size, model.tokenizer.model.image_channels)
    if size != source.image_shape:
        raise ValueError(
            f"{path} draws images of {size}: height, width and channels; the scenes of --tokens "
            f"have {source.image_shape}"
        )
    try:
        model.text.window([" ".join(scenes.WORDS)])
    except ValueError as error:
        raise ValueError(f"{path} does not read the words of scenes: {error}") from error


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
