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
import dataclasses
import pathlib

import numpy as np

from enat_jax.checkpoints import model_files
from enat_jax.data import tokens as token_data
from enat_jax.evaluation import plots, similarity
from enat_jax.inference import generator
from enat_jax.models import nat
from enat_jax.runtime import cli, files
from enat_jax.schedules import paper_costs, reveal
from enat_jax.training import metric_writer

BATCH_SIZE = 50  # images per call of the network
MAPS = 4  # images whose maps are shown
MOST_MAPS = 16
VISIBLE_SHARES = (1 / 16, 1 / 4, 1 / 2, 3 / 4)  # of the tokens


# --- similarity of features -----------------------------------------------------------------


def similarities(model, num, *, seed=0, num_maps=MAPS, batch_size=BATCH_SIZE, progress=None):
    """Similarity of token features in adjacent sampling steps, averaged over samples.

    Args:
        model: ``Generator``; its settings are the sampler's.
        num: images, at least 2; as many of each class as the number allows.
        seed: of the samples.
        num_maps: images whose similarities are returned place by place, the first ones.
        batch_size: images at a time; results depend on it by rounding alone.
        progress: called with the number of images done, after each batch.

    Returns:
        ``(result, maps)``. result: JSON values, see `similarity.json`: by pass 1 to t - 1 the
        numbers of tokens, and mean and standard error over images of

        - adjacent, elsewhere, reused: by group, see ``similarity.Similarities``;
        - change_share: share of the newly revealed tokens in all change;
        - overlap: of the predictions of masked tokens with and without reuse; same_code: share of
          masked tokens for which both have the same most probable code;
        - overall: of ``adjacent`` over all passes, each place of each pass counting once.

        maps: dict of adjacent float32 and group int8 [n, t - 1, l] and tokens int32 [n, l].

    Raises:
        ValueError: there are too few images or steps.
    """
    settings, network = model.settings, model.model
    if num < 2 or batch_size < 1:
        raise ValueError(f"{num=} must be at least 2, for an error, and {batch_size=} at least 1")
    if settings.num_steps < 2:
        raise ValueError(f"{settings.num_steps} step: there are no adjacent steps to compare")
    classes = network.num_classes
    index = np.arange(num, dtype=np.int32)
    labels = (index % classes if num >= classes else index * classes // num).astype(np.int32)
    parts, shown = [], []
    for start in range(0, num, batch_size):
        # One batch size, one compilation: the last batch is filled up.
        size = min(batch_size, num)
        part = np.resize(labels[start : start + batch_size], size)
        tokens, step = similarity.draw(
            network, model.params, settings, part, start + np.arange(size, dtype=np.int32), seed
        )
        found = similarity.measure(network, model.params, tokens, step, part, settings.num_steps)
        kept = slice(0, min(size, num - start))
        found = similarity.Similarities(*(x if x is None else x[kept] for x in found))
        parts.append(_of_images(found))
        room = max(0, num_maps - start)
        shown.append((found.adjacent[:room], found.group[:room], tokens[kept][:room]))
        if progress is not None:
            progress(start + len(found.group))
    result = _describe(model, labels, seed) | _summary(parts)
    maps = [np.concatenate(x) for x in zip(*shown, strict=True)]
    return result, dict(zip(("adjacent", "group", "tokens"), maps, strict=True))


def _of_images(found):
    """Nested dict of numbers of each image, float64 [b, t - 1]."""
    means = lambda values: None if values is None else similarity.image_means(values, found.group)  # noqa: E731
    masked = lambda values: None if values is None else means(values)["masked"]  # noqa: E731
    flat = lambda x: x.reshape(len(x), 1, -1)  # noqa: E731
    overall = similarity.image_means(flat(found.adjacent), flat(found.group))
    return {
        "adjacent": means(found.adjacent),
        "elsewhere": means(found.elsewhere),
        "change_share": similarity.change_share(found.adjacent, found.group),
        "reused": means(found.reused),
        "overlap": masked(found.overlap),
        "same_code": masked(found.same_code),
        "overall": {name: x[:, 0] for name, x in overall.items()},
    }


def _summary(parts):
    """Mean and standard error of what ``_of_images`` gives of each batch."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: _summary([part[name] for part in parts]) for name in first}
    return similarity.mean_and_error(np.concatenate(parts))


def _describe(model, labels, seed):
    """What a reader must know to judge or repeat the numbers."""
    steps = reveal.sampling_steps(model.model.num_tokens, model.settings.num_steps)
    counts = (steps.num_cached, steps.num_new, steps.num_masked)
    return {
        "transformer": model.fingerprint,
        "tokenizer": model.tokenizer.fingerprint,
        "kind": type(model.model).__name__,
        "sampler": dataclasses.asdict(model.settings),
        "num_images": len(labels),
        "num_labels": len(set(labels.tolist())),
        "seed": seed,
        "num_steps": model.settings.num_steps,
        "num_tokens": model.model.num_tokens,
        "tokens": {
            name: count[1:].tolist() for name, count in zip(similarity.GROUPS, counts, strict=True)
        },
    }


def similarity_markdown(result):
    """The table of a result of ``similarities``."""
    head = ["step", *(f"{name} (tokens)" for name in similarity.GROUPS), "newly revealed: share of"]
    head[-1] += " change (of tokens)"
    columns = [result["adjacent"][name] for name in similarity.GROUPS]
    if result["reused"] is not None:
        head += ["reused: already visible", "masked", "overlap", "same code"]
        columns += [result["reused"][name] for name in ("already visible", "masked")]
        columns += [result["overlap"], result["same_code"]]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for s in range(result["num_steps"] - 1):
        cells = [_cell(column, s) for column in columns]
        for i, name in enumerate(similarity.GROUPS):
            cells[i] += f" ({result['tokens'][name][s]})"
        share = result["tokens"]["newly revealed"][s] / result["num_tokens"]
        cells.insert(3, f"{_cell(result['change_share'], s)} ({share:.3f})")
        lines.append(f"| {s + 1} | {' | '.join(cells)} |")
    overall = (f"{name} {_cell(result['overall'][name])}" for name in similarity.GROUPS)
    lines += [
        "",
        f"Cosine similarity of a place's features in a step and in the one before, mean ± standard "
        f"error over {result['num_images']} samples of {result['num_labels']} classes. Over all "
        f"steps: {', '.join(overall)}.",
    ]
    if result["reused"] is not None:
        lines[-1] += (
            " Reused: cosine of the sampler's features and those computed anew. Of masked tokens "
            "also the overlap of the codes' probabilities with both, and the share whose most "
            "probable code is the same."
        )
    return "\n".join(lines) + "\n"


def _cell(values, s=None, sign=""):
    """``mean ± standard error``, at entry s of several; a dash where there is none."""
    mean, error = (x if s is None else x[s] for x in (values["mean"], values["standard_error"]))
    return (
        "-" if mean is None else f"{mean:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
    )


# --- attention quadrants --------------------------------------------------------------------


def quadrant_losses(model, codes, labels, *, seed=0, batch_size=BATCH_SIZE, progress=None):
    """Loss of masked tokens of a NAT, whole and without each quadrant of its attention.

    Args:
        model: ``Generator`` of a NAT that was trained with all of its attention.
        codes: int [n, l] in raster order, best of images it was not trained on; labels: int [n].
        seed: of the random places that are visible, the same for all quadrants.
        batch_size: images at a time; progress: called with the number of passes over a batch done.

    Returns:
        dict by quadrant ("none" and ``nat.QUADRANTS``) of dicts "loss" (nats) and "increase" over
        "none", each mean and standard error over images by ``VISIBLE_SHARES``.

    Raises:
        ValueError: the model is no NAT, or one that lacks a quadrant already, or there are fewer
            than two images.
    """
    network = model.model
    if not isinstance(network, nat.NAT) or network.disabled_attention != "none":
        raise ValueError("quadrants of the attention are those of a NAT that has all four of them")
    if len(codes) < 2:
        raise ValueError(f"{len(codes)} images: a standard error needs two")
    done, losses = 0, {}
    for disabled in ("none", *nat.QUADRANTS):
        cut = dataclasses.replace(model, model=network.clone(disabled_attention=disabled))
        batches = []
        for start in range(0, len(codes), batch_size):
            # One batch size, one compilation: the last batch reaches back.
            first = max(0, min(start, len(codes) - batch_size))
            part = slice(first, first + batch_size)
            scores = [
                cut.masked_scores(
                    codes[part], labels[part], round(network.num_tokens * share), seed + first
                )[0]
                for share in VISIBLE_SHARES
            ]
            of_images = np.stack([np.asarray(x, np.float64).mean(axis=1) for x in scores], axis=1)
            batches.append(of_images[start - first :])
            done += 1
            if progress is not None:
                progress(done)
        losses[disabled] = np.concatenate(batches)
    return {
        name: {
            "loss": similarity.mean_and_error(loss),
            "increase": similarity.mean_and_error(loss - losses["none"]),
        }
        for name, loss in losses.items()
    }


def quadrants_markdown(result):
    """The table of a result of ``_run_quadrants``."""
    head = [f"{share:.4g} visible" for share in VISIBLE_SHARES]
    lines = [f"| without | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for name, found in result["quadrants"].items():
        key = "loss" if name == "none" else "increase"
        sign = "" if name == "none" else "+"
        cells = [_cell(found[key], i, sign) for i in range(len(head))]
        lines.append(f"| {'nothing' if name == 'none' else name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Loss (nats) of masked tokens of {result['num_images']} images, and its increase without "
        "one quadrant of the attention, cut after training; mean ± standard error over images.",
    ]
    return "\n".join(lines) + "\n"


# --- programs -------------------------------------------------------------------------------


def _load(directory):
    if (directory / "tokenizer.json").is_file():
        raise ValueError(
            f"{directory} is a tokenizer: name the `model` directory of a finished run of a "
            "transformer"
        )
    return generator.Generator.load(directory)


def _run_similarity(options):
    if options.maps > MOST_MAPS:
        raise ValueError(f"--maps {options.maps}: one plot has room for {MOST_MAPS} samples")
    plots.require()
    model = _load(options.model)
    if options.steps is not None:
        model = model.with_settings(num_steps=options.steps)
    options.out.mkdir(parents=True, exist_ok=True)
    with metric_writer.Progress(options.num, 1, unit="image") as bar:
        result, maps = similarities(
            model,
            options.num,
            seed=options.seed,
            num_maps=options.maps,
            batch_size=options.batch_size,
            progress=bar.update,
        )
    text = similarity_markdown(result)
    model_files.write_json(options.out / "similarity.json", result)
    files.write(options.out / "similarity.md", text.encode())
    plots.similarities(options.out / "similarity.png", result)
    pictures = model.tokenizer.decode(maps["tokens"])
    grid = model.tokenizer.grid
    plots.maps(options.out / "maps.png", maps["adjacent"], maps["group"], pictures, grid)
    print(text)


def _run_quadrants(options):
    model, found = _load(options.model), token_data.TokenSet.open(options.tokens)
    if found.tokenizer != model.tokenizer.fingerprint:
        raise ValueError(
            f"the tokens in {options.tokens} come from another tokenizer than the model's"
        )
    num = min(len(found), options.num)
    # Evenly over the set, which is sorted by class.
    batch = found.gather(np.linspace(0, len(found) - 1, num).astype(np.int64))
    total = (1 + len(nat.QUADRANTS)) * -(-num // options.batch_size)
    with metric_writer.Progress(total, options.batch_size, unit="batch") as bar:
        quadrants = quadrant_losses(
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
        "visible_shares": VISIBLE_SHARES,
        "quadrants": quadrants,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    model_files.write_json(options.out / "quadrants.json", result)
    files.write(options.out / "quadrants.md", quadrants_markdown(result).encode())
    print(quadrants_markdown(result))


def _run_costs(options):
    plots.require()
    rows = paper_costs.rows()
    options.out.mkdir(parents=True, exist_ok=True)
    model_files.write_json(options.out / "costs.json", rows)
    files.write(options.out / "costs.md", paper_costs.markdown(rows).encode())
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
    add("--maps", type=number, default=MAPS, help=f"samples with maps (default {MAPS})")
    program.set_defaults(run=_run_similarity)
    program = programs.add_parser("quadrants", help="attention without one of four (Figure 2)")
    add = program.add_argument
    add("--model", **directory, help="model directory of a NAT")
    add("--tokens", **directory, help="token set, best of held-out images")
    add("--num", type=number, default=1000, help="most images of it (default 1000)")
    program.set_defaults(run=_run_quadrants)
    for program in programs.choices.values():
        program.add_argument("--batch-size", type=number, default=BATCH_SIZE, help="at a time")
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
