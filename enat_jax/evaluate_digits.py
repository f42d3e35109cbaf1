"""How good are the generated digits? One table, and whether the model uses context.

    python -m enat_jax.evaluate_digits --model DIR --tokens TRAIN_TOKENS_DIR --out DIR

`evaluation/digit_table.py` says what the rows are and how they are measured.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import numpy as np

from enat_jax.data import images, tokens
from enat_jax.evaluation import digit_table, filled_centres, image_sets, passes
from enat_jax.inference import generator
from enat_jax.runtime import cli, files


def main(arguments: Sequence[str]) -> None:
    """Measures models of digits, and writes and prints the tables."""
    options = _parser().parse_args(arguments)
    directories = cli.models(options.model, options.compare)
    models = {name: generator.Generator.load(path) for name, path in directories.items()}
    training_tokens = tokens.TokenSet.open(options.tokens)
    image_sets.require_tokenizer(models["ours"], training_tokens, options.tokens)
    held_out = _digits("test", training_tokens)
    held_out_tokens = None
    if options.heldout_tokens is not None:
        found = tokens.TokenSet.open(options.heldout_tokens)
        image_sets.require_tokenizer(models["ours"], found, options.heldout_tokens)
        batch = found.gather(np.arange(len(found)))
        if not np.array_equal(batch["labels"], held_out[1]):
            raise ValueError(
                f"the tokens in {options.heldout_tokens} are not of the held-out digits"
            )
        held_out_tokens = batch["tokens"]
    settings = {
        "models": {name: image_sets.fingerprints(model) for name, model in models.items()},
        "tokens": training_tokens.preprocessing,
        "held_out": held_out_tokens is not None,
        **{name: getattr(options, name) for name in ("num", "draws", "seed")},
    }
    passes.claim(options.out, settings)
    evaluation = digit_table.evaluate(
        models,
        _digits("train", training_tokens),
        held_out,
        training_tokens,
        held_out_tokens,
        num=options.num,
        num_draws=options.draws,
        seed=options.seed,
        say=_say,
    )
    files.write_json(options.out / "evaluation.json", dataclasses.asdict(evaluation))
    files.write_atomically(options.out / "evaluation.md", evaluation.markdown().encode())
    print(evaluation.markdown())
    if options.filled:
        judge = filled_centres.ClassAccuracy(*_digits("train", training_tokens))
        rows = filled_centres.evaluate(
            models["ours"], judge, held_out, training_tokens, seed=options.seed
        )
        files.write_json(options.out / "filled.json", [dataclasses.asdict(row) for row in rows])
        print(filled_centres.markdown(rows, judge, "held-out digits"))


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m enat_jax.evaluate_digits",
        description="Compares generated digits with real ones and with a control.",
    )
    add = parser.add_argument
    add("--model", type=cli.model, required=True, help="directory of the model")
    add("--tokens", type=cli.path, required=True, help="token set that it was trained on")
    add("--heldout-tokens", type=cli.path, help="token set of the held-out digits")
    add("--compare", action="append", default=[], metavar="NAME=DIR", help="another model")
    add("--num", type=int, default=500, help="images of each model (default 500)")
    add("--draws", type=int, default=5, help="random orders of held-out tokens (default 5)")
    add("--filled", action="store_true", help="also fill hidden centres; filled.json has the table")
    add("--seed", type=int, default=0)
    add("--out", type=cli.path, required=True, help="for evaluation.json and evaluation.md")
    return parser


def _digits(split: str, training_tokens: tokens.TokenSet) -> tuple[np.ndarray, np.ndarray]:
    """Returns the digits as they were prepared for the token set, but not augmented."""
    settings = dict(training_tokens.preprocessing.get("source") or {})
    if (settings.pop("source", None), settings.pop("split", None)) != ("digits", "train"):
        raise ValueError(
            "the model's --tokens must be those of the training digits, made with --source digits "
            f"--split train, not with {training_tokens.preprocessing}"
        )
    source = images.open_source("digits", split, **settings)
    batch = source.gather(np.arange(len(source)))
    return batch["images"], batch["labels"]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
