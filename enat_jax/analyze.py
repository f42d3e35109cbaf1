"""The paper's analyses, of one's own model, and its claims, of the runs of launch/ablation.sh.

    python -m enat_jax.analyze similarity --model MODEL_DIR --out runs/similarity
    python -m enat_jax.analyze quadrants --model NAT_DIR --tokens HELD_OUT_DIR --out runs/quadrants
    python -m enat_jax.analyze reuse --model MODEL_DIR --tokens HELD_OUT_DIR --out runs/reuse
    python -m enat_jax.analyze loss --model MODEL_DIR --tokens HELD_OUT_DIR --out runs/loss
    python -m enat_jax.analyze costs --out runs/costs
    python -m enat_jax.analyze ablation --runs runs/ablation --out runs/ablation

similarity: how much token features change between sampling steps (paper Figure 5;
evaluation/step_similarity.py says what is compared), averaged over samples of all classes:
`similarity.json`, `similarity.md` and the plots `similarity.png` and `maps.png`.

quadrants: how well a NAT predicts masked tokens without one quadrant of its attention (Figure 2),
cut after training: `quadrants.json` and `quadrants.md`. Models that were trained without one come
from configs/nat_quadrants_imagenet256.py and configs/digits_nat_quadrants.py.

reuse: what it costs by sampling step that features are reused, and what part of it the repeated
projection f has (evaluation/reuse_gap.py says what is compared): `reuse.json` and `reuse.md`. With
--reference and --features, as for `search`, images are drawn and measured, too.

loss: of masked tokens by share visible, of a transformer of either kind: `loss.json`, `loss.md`.

costs: the paper's multiply-adds (Tables 1, 2 and 6) beside ours: `costs.json`, `costs.md`,
`costs.png`.

ablation: the models of configs/cifar10_ablation.py side by side, and what becomes of the paper's
claims: `ablation.json`, `ablation.md`, `ablation.png` and, with --draw, `samples.png`.
evaluation/ablation_runs.py says which files below --runs are read. What is missing leaves cells
blank and is named. --json makes tables and plot anew of an `ablation.json`, without the runs;
beside --runs it adds to them what the file has of other models and seeds.

Plots need matplotlib: pip install 'enat_jax[analyze]'
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from enat_jax.checkpoints import model_files
from enat_jax.data import records, tokens
from enat_jax.evaluation import (
    ablation,
    ablation_runs,
    ablation_tables,
    cards,
    image_sets,
    means,
    paper_costs,
    plots,
    quadrants,
    reuse_gap,
    settings_search,
    similarity,
)
from enat_jax.inference import generator, masked_scores
from enat_jax.models import nat
from enat_jax.runtime import cli, files, png, progress
from enat_jax.runtime.markdown import table as markdown_table

MAX_MAPS = 16  # samples that one plot has room for


def run_similarity(options: argparse.Namespace) -> None:
    """Analyses feature similarity, and writes and prints what it found."""
    if options.maps > MAX_MAPS:
        raise ValueError(f"--maps {options.maps}: one plot has room for {MAX_MAPS} samples")
    plots.require()
    model = _load(options.model)
    if options.steps is not None:
        model = model.with_settings(num_steps=options.steps)
    options.out.mkdir(parents=True, exist_ok=True)  # before the long run, not after it
    with progress.Progress(options.num, 1, unit="image") as bar:
        result, maps = similarity.similarities(
            model,
            options.num,
            seed=options.seed,
            num_maps=options.maps,
            batch_size=options.batch_size,
            progress=bar.update,
        )
    _write(options.out, "similarity", result, similarity.markdown(result))
    plots.similarities(options.out / "similarity.png", result)
    pictures = model.tokenizer.decode(maps["tokens"])
    grid = model.tokenizer.grid
    plots.maps(options.out / "maps.png", maps["adjacent"], maps["group"], pictures, grid)


def run_quadrants(options: argparse.Namespace) -> None:
    """Analyses attention quadrants, and writes and prints what it found."""
    model = _load(options.model)
    batch = _held_out(model, options.tokens, options.num)
    num = len(batch["labels"])
    total = (1 + len(nat.QUADRANTS)) * -(-num // options.batch_size)
    with progress.Progress(total, options.batch_size, unit="batch") as bar:
        losses = quadrants.losses(
            model,
            batch["tokens"],
            batch["labels"],
            seed=options.seed,
            batch_size=options.batch_size,
            progress=bar.update,
        )
    result = _about(model, batch, options.seed) | {
        "visible_shares": masked_scores.VISIBLE_SHARES,
        "quadrants": losses,
    }
    _write(options.out, "quadrants", result, quadrants.markdown(result))


def run_reuse(options: argparse.Namespace) -> None:
    """Analyses what reuse costs, and writes and prints what it found."""
    if (options.reference is None) != (options.features is None):
        raise ValueError("--reference and --features go together: give both or neither")
    if options.repeats < 2:
        raise ValueError(f"--repeats {options.repeats}: a standard error needs two seeds at least")
    model = _load(options.model)
    if options.steps is not None:
        model = model.with_settings(num_steps=options.steps)
    batch = _held_out(model, options.tokens, options.num)
    quality = None
    if options.reference is not None:
        quality = settings_search.make_measure(
            *(model, options.reference, options.features, options.drawn, generator.BATCH_SIZE),
            split=options.split,
        )
    total = -(-len(batch["labels"]) // options.batch_size)
    with progress.Progress(total, options.batch_size, unit="batch") as bar:
        losses = reuse_gap.measure(
            *(model, batch["tokens"], batch["labels"]),
            seed=options.seed,
            batch_size=options.batch_size,
            progress=bar.update,
        )
    result = _about(model, batch, options.seed) | {"losses": losses}
    if quality is not None:
        seeds = range(options.seed, options.seed + options.repeats)
        result["num_drawn"] = options.drawn
        result["distances"] = reuse_gap.distances(
            model, quality, seeds, lambda text: print(text, file=sys.stderr, flush=True)
        )
    _write(options.out, "reuse", result, reuse_gap.markdown(result))


def run_loss(options: argparse.Namespace) -> None:
    """Measures the loss of masked tokens, and writes and prints it."""
    model = _load(options.model)
    if getattr(model.model, "takes_text", False):
        raise ValueError(f"{options.model} takes texts: this is the loss of a model of classes")
    batch = _held_out(model, options.tokens, options.num)
    total = -(-len(batch["labels"]) // options.batch_size)
    with progress.Progress(total, options.batch_size, unit="batch") as bar:
        found = quadrants.losses_of_images(
            *(model, batch["tokens"], batch["labels"]),
            seed=options.seed,
            batch_size=options.batch_size,
            progress=bar.update,
        )
    result = _about(model, batch, options.seed) | {
        "visible_shares": masked_scores.VISIBLE_SHARES,
        "loss": means.mean_and_error(found),
        "all": means.mean_and_error(found.mean(axis=1)),
        "date": cards.today(),
        "hardware": cards.hardware(),
    }
    cells = [means.text(result["loss"], i) for i in range(found.shape[1])]
    titles = [f"{share:.4g} visible" for share in masked_scores.VISIBLE_SHARES]
    text = (
        f"{markdown_table([*titles, 'mean'], [[*cells, means.text(result['all'])]])}\n\n"
        f"Loss (nats) of masked tokens of {len(found)} images; mean ± standard error over images.\n"
    )
    _write(options.out, "loss", result, text)


def run_ablation(options: argparse.Namespace) -> None:
    """Writes and prints the tables of the ablations, and draws their plot and samples."""
    plots.require()
    if options.runs is not None:
        result, missing = ablation_runs.gather(options.runs)
        for line in missing:
            print(f"missing: {line}", file=sys.stderr)
        if options.json is not None:
            result = ablation.join(result, options.json)
    elif options.json is None:
        raise ValueError("give --runs, the directory of the runs, or --json, a file of numbers")
    elif options.draw:
        raise ValueError("--draw needs the models of --runs, and --json has none")
    else:
        result = ablation.read(options.json)
        with model_files.parsing(options.json):
            ablation_tables.markdown(result)
    text = ablation_tables.markdown(result)
    options.out.mkdir(parents=True, exist_ok=True)
    files.write_atomically(options.out / "ablation.json", ablation.json_bytes(result))
    files.write_atomically(options.out / "ablation.md", text.encode())
    plots.ablation(options.out / "ablation.png", result)
    if options.draw:
        drawn = (options.draw, options.steps, options.seed)
        png.write_png(
            options.out / "samples.png", ablation_runs.draw(options.runs, result["models"], *drawn)
        )
    print(text)


def run_costs(options: argparse.Namespace) -> None:
    """Writes and prints the paper's costs beside ours."""
    plots.require()
    rows = paper_costs.rows()
    _write(options.out, "costs", rows, paper_costs.markdown(rows))
    plots.costs(options.out / "costs.png", rows)


def _load(directory: str | pathlib.Path) -> generator.Generator:
    if (pathlib.Path(directory) / "tokenizer.json").is_file():
        raise ValueError(
            f"{directory} is a tokenizer: name the `model` directory of a finished run of a "
            "transformer"
        )
    return generator.Generator.load(directory)


def _held_out(
    model: generator.Generator, directory: pathlib.Path, most: int
) -> dict[str, np.ndarray]:
    """Returns tokens and labels of images spread evenly over a token set of the model's."""
    found = tokens.TokenSet.open(directory)
    image_sets.require_tokenizer(model, found, directory)
    return found.gather(records.evenly(len(found), most))


def _about(model: generator.Generator, batch: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Returns what a result says of the model and of the images."""
    return {
        "transformer": model.fingerprint,
        "tokenizer": model.tokenizer.fingerprint,
        "num_images": len(batch["labels"]),
        "seed": seed,
    }


def _write(out: pathlib.Path, name: str, result: Any, text: str) -> None:
    """Writes ``result`` as JSON and ``text`` as Markdown, and prints the text."""
    files.write_json(out / f"{name}.json", result)
    files.write_atomically(out / f"{name}.md", text.encode())
    print(text)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m enat_jax.analyze", description="The paper's analyses.")
    programs = parser.add_subparsers(dest="program", required=True)
    directory: dict[str, Any] = {"type": cli.path, "required": True, "metavar": "DIR"}
    number = cli.at_least_one

    def held_out(program: argparse.ArgumentParser, of: str, batch_size: int) -> Any:
        add = program.add_argument
        add("--model", **directory | {"type": cli.model}, help=f"model directory of {of}")
        add("--tokens", **directory, help="token set, best of held-out images")
        add("--num", type=number, default=1000, help="most images of it (default 1000)")
        add("--batch-size", type=number, default=batch_size, help="at a time")
        add("--seed", type=int, default=0)
        return add

    program = programs.add_parser("similarity", help="of features between steps (Figure 5)")
    add = program.add_argument
    add("--model", **directory | {"type": cli.model}, help="model directory")
    add("--num", type=number, default=200, help="samples, over all classes (default 200)")
    add("--steps", type=number, help="sampling steps (default: the model's)")
    default = similarity.NUM_MAPS
    add("--maps", type=number, default=default, help=f"samples with maps (default {default})")
    add("--batch-size", type=number, default=similarity.BATCH_SIZE, help="at a time")
    add("--seed", type=int, default=0)
    program.set_defaults(run=run_similarity)
    program = programs.add_parser("quadrants", help="attention without one of four (Figure 2)")
    held_out(program, "a NAT", quadrants.BATCH_SIZE)
    program.set_defaults(run=run_quadrants)
    program = programs.add_parser("reuse", help="what reused features cost, by step")
    add = held_out(program, "an ENAT", reuse_gap.BATCH_SIZE)
    add("--steps", type=number, help="sampling steps (default: the model's)")
    add("--reference", help="to measure drawn images, too: statistics (.npz) or pictures")
    add("--features", help="with --reference: digits, or as for python -m enat_jax.evaluate")
    add("--split", default="train", help="of pictures (default train)")
    add("--drawn", type=number, default=500, help="images of a measurement (default 500)")
    add("--repeats", type=number, default=5, help="seeds of drawn images (default 5)")
    program.set_defaults(run=run_reuse)
    program = programs.add_parser("loss", help="of masked tokens by share visible")
    held_out(program, "classes", quadrants.BATCH_SIZE)
    program.set_defaults(run=run_loss)
    program = programs.add_parser("ablation", help="tables of the runs of launch/ablation.sh")
    add = program.add_argument
    add("--runs", type=cli.path, metavar="DIR", help="of launch/ablation.sh")
    add("--json", type=cli.path, metavar="FILE", help="an ablation.json, beside or without --runs")
    add("--draw", type=number, metavar="N", help="also draw N samples of each model")
    add("--steps", type=number, default=8, help="of the samples of --draw (default 8)")
    add("--seed", type=int, default=0, help="of the samples of --draw")
    program.set_defaults(run=run_ablation)
    program = programs.add_parser("costs", help="multiply-adds (Tables 1, 2 and 6)")
    program.set_defaults(run=run_costs)
    for program in programs.choices.values():
        program.add_argument("--out", **directory, help="for JSON, table and plots")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Runs the analysis that the command line names."""
    options = _parser().parse_args(arguments)
    if not 0 <= getattr(options, "seed", 0) < 2**32:  # JAX would take the lower 32 bits alone
        raise ValueError(f"seed={options.seed} must be a whole number from 0 to 2**32 - 1")
    files.require_writable(options.out)  # before the work, not after it
    options.run(options)


if __name__ == "__main__":
    cli.run(main)
