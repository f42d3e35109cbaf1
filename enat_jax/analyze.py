"""The paper's analyses, of one's own model.

    python -m enat_jax.analyze similarity --model MODEL_DIR --out runs/similarity
    python -m enat_jax.analyze quadrants --model NAT_DIR --tokens HELD_OUT_DIR --out runs/quadrants
    python -m enat_jax.analyze costs --out runs/costs

similarity: how much token features change between sampling steps (paper Figure 5; the module of
that name says what is compared), averaged over samples of all classes: `similarity.json`,
`similarity.md` and the plots `similarity.png` and `maps.png`.

quadrants: how well a NAT predicts masked tokens without one quadrant of its attention (Figure 2),
cut after training: `quadrants.json` and `quadrants.md`. Models that were trained without one come
from configs/nat_quadrants_imagenet256.py and configs/digits_nat_quadrants.py.

costs: the paper's multiply-adds (Tables 1, 2 and 6) beside ours: `costs.json`, `costs.md`,
`costs.png`.

Plots need matplotlib: pip install 'enat_jax[analyze]'
"""

import argparse
import pathlib

from enat_jax.data import records, tokens
from enat_jax.evaluation import plots, quadrants, similarity
from enat_jax.inference import generator, masked_scores
from enat_jax.models import nat
from enat_jax.runtime import cli, files, progress
from enat_jax.schedules import paper_costs

MAX_MAPS = 16


# --- similarity of features -----------------------------------------------------------------


# --- attention quadrants --------------------------------------------------------------------


# --- programs -------------------------------------------------------------------------------


def _load(directory):
    if (directory / "tokenizer.json").is_file():
        raise ValueError(
            f"{directory} is a tokenizer: name the `model` directory of a finished run of a "
            "transformer"
        )
    return generator.Generator.load(directory)


def _run_similarity(options):
    if options.maps > MAX_MAPS:
        raise ValueError(f"--maps {options.maps}: one plot has room for {MAX_MAPS} samples")
    plots.require()
    model = _load(options.model)
    if options.steps is not None:
        model = model.with_settings(num_steps=options.steps)
    options.out.mkdir(parents=True, exist_ok=True)
    with progress.Progress(options.num, 1, unit="image") as bar:
        result, maps = similarity.similarities(
            model,
            options.num,
            seed=options.seed,
            num_maps=options.maps,
            batch_size=options.batch_size,
            progress=bar.update,
        )
    text = similarity.similarity_markdown(result)
    files.write_json(options.out / "similarity.json", result)
    files.write_atomically(options.out / "similarity.md", text.encode())
    plots.similarities(options.out / "similarity.png", result)
    pictures = model.tokenizer.decode(maps["tokens"])
    grid = model.tokenizer.grid
    plots.maps(options.out / "maps.png", maps["adjacent"], maps["group"], pictures, grid)
    print(text)


def _run_quadrants(options):
    model, found = _load(options.model), tokens.TokenSet.open(options.tokens)
    if found.tokenizer != model.tokenizer.fingerprint:
        raise ValueError(
            f"the tokens in {options.tokens} come from another tokenizer than the model's"
        )
    batch = found.gather(records.evenly(len(found), options.num))
    num = len(batch["labels"])
    total = (1 + len(nat.QUADRANTS)) * -(-num // options.batch_size)
    with progress.Progress(total, options.batch_size, unit="batch") as bar:
        losses = quadrants.quadrant_losses(
            model,
            batch["tokens"],
            batch["labels"],
            seed=options.seed,
            batch_size=options.batch_size,
            progress=bar.update,
        )
    result = {
        "transformer": model.fingerprint,
        "tokenizer": model.tokenizer.fingerprint,
        "num_images": num,
        "seed": options.seed,
        "visible_shares": masked_scores.VISIBLE_SHARES,
        "quadrants": losses,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    files.write_json(options.out / "quadrants.json", result)
    files.write_atomically(
        options.out / "quadrants.md", quadrants.quadrants_markdown(result).encode()
    )
    print(quadrants.quadrants_markdown(result))


def _run_costs(options):
    plots.require()
    rows = paper_costs.rows()
    options.out.mkdir(parents=True, exist_ok=True)
    files.write_json(options.out / "costs.json", rows)
    files.write_atomically(options.out / "costs.md", paper_costs.markdown(rows).encode())
    plots.costs(options.out / "costs.png", rows)
    print(paper_costs.markdown(rows))


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m enat_jax.analyze", description="The paper's analyses."
    )
    programs = parser.add_subparsers(dest="program", required=True)
    directory = {"type": pathlib.Path, "required": True, "metavar": "DIR"}
    number = cli.at_least_one
    program = programs.add_parser("similarity", help="of features between steps (Figure 5)")
    add = program.add_argument
    add("--model", **directory, help="model directory")
    add("--num", type=number, default=200, help="samples, over all classes (default 200)")
    add("--steps", type=number, help="sampling steps (default: the model's)")
    add(
        "--maps",
        type=number,
        default=similarity.MAPS,
        help=f"samples with maps (default {similarity.MAPS})",
    )
    program.set_defaults(run=_run_similarity)
    program = programs.add_parser("quadrants", help="attention without one of four (Figure 2)")
    add = program.add_argument
    add("--model", **directory, help="model directory of a NAT")
    add("--tokens", **directory, help="token set, best of held-out images")
    add("--num", type=number, default=1000, help="most images of it (default 1000)")
    program.set_defaults(run=_run_quadrants)
    for program in programs.choices.values():
        program.add_argument(
            "--batch-size", type=number, default=similarity.BATCH_SIZE, help="at a time"
        )
        program.add_argument("--seed", type=int, default=0)
    program = programs.add_parser("costs", help="multiply-adds (Tables 1, 2 and 6)")
    program.set_defaults(run=_run_costs)
    for program in programs.choices.values():
        program.add_argument("--out", **directory, help="for JSON, table and plots")
    return parser


def main(argv):
    options = _parser().parse_args(argv)
    if not 0 <= getattr(options, "seed", 0) < 2**32:  # JAX would take the lower 32 bits alone
        raise ValueError(f"seed={options.seed} must be a whole number from 0 to 2**32 - 1")
    options.run(options)


if __name__ == "__main__":
    cli.run(main)
