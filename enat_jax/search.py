"""Search for better settings of a model's sampler, and say what they are worth.

    python -m enat_jax.search --model MODEL_DIR --reference digits --features digits --out DIR
    python -m enat_jax.search --model MODEL_DIR --reference REF.npz --features inception \\
        --inception FILE --num 5000 --steps 4 --trials 100 --out DIR

For a number of steps, --trials settings are tried, which differ in the order of revealing, in how
many tokens each step reveals, in its guidance and its temperatures. What is minimised is the
distance of --num images to --reference in --features, as `python -m enat_jax.evaluate` has them, or
with `--features digits` what `python -m enat_jax.evaluate_digits` measures: the Frechet distance of
digits plus the share of them that is not named as it should. The best trials and the model's own
settings are measured again on other seeds, and the winner on yet other ones, beside the model's own
settings, these in Halton's order, and these with half the steps.

DIR receives `settings.json`, which `sample`, `edit`, `evaluate` and `export` take as --settings,
and `report.md` and `report.json`. Interrupt it whenever you like: the same command goes on, and so
it does with more --trials. Several processes may be given the same command and share the trials.
Needs the package optuna: pip install -e '.[search]'.
"""

import argparse
import contextlib
import dataclasses
import sys
from typing import Any

from enat_jax.evaluation import image_sets, passes, settings_search
from enat_jax.inference import generator, image_directory, sampler_settings
from enat_jax.runtime import cli, exits, files, versions

FORMAT = "enat_jax search 1"


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    import optuna  # noqa: F401  (says at once that it is missing)

    model = _model(options)
    measure = settings_search.make_measure(
        *(model, options.reference, options.features, options.num, options.batch_size),
        inception=options.inception,
        split=options.split,
    )
    claimed = {
        "format": FORMAT,
        "model": image_sets.fingerprints(model),
        "sampler": model.settings.described(),
        "measure": measure.identity,
        "seed": options.seed,
    }
    passes.claim(options.out, claimed)
    search = settings_search.Search(
        *(model, measure, options.out, options.seed, options.repeats, _say)
    )
    try:
        search.run(options.trials)
    except KeyboardInterrupt as error:
        raise cli.Stop("start the same command again to go on", exits.INTERRUPTED) from error
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.lock_directory(options.out))
        except ValueError:
            print(f"[search] another process writes the report into {options.out}")
            return
        _finish(options, search, claimed)


def _finish(
    options: argparse.Namespace, search: settings_search.Search, claimed: dict[str, Any]
) -> None:
    """Chooses the winner, measures it, and writes settings and report."""
    name, found = search.winner()
    rows = search.report(found)
    table = settings_search.markdown(rows, options.num)
    about = claimed | {
        "trials": options.trials,
        "winner": name,
        "rows": [dataclasses.asdict(row) for row in rows],
        "versions": versions.library_versions(),
    }
    files.write_json(options.out / "report.json", about)
    files.write_atomically(options.out / "report.md", f"{table}\n".encode())
    written = {"software": image_directory.SOFTWARE, "sampler": found.described()}
    files.write_json(options.out / "settings.json", written)
    print(table)
    print(f"[search] {options.out / 'settings.json'}: {name} of {options.trials} trials")


def _model(options: argparse.Namespace) -> generator.Generator:
    model = generator.Generator.load(options.model, options.dtype)
    if not model.class_names:
        raise ValueError(
            "this model draws texts, and a search draws classes: it needs a model of classes"
        )
    given = {} if options.steps is None else {"num_steps": options.steps}
    settings = sampler_settings.changed(model.settings, options.settings, given)
    return dataclasses.replace(model, settings=settings)


def _say(text: str) -> None:
    print(f"[search] {text}", file=sys.stderr, flush=True)


def _repeats(text: str) -> int:
    if not text.isdecimal() or not 2 <= int(text[:9]) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seeds from 2 to 1000")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m enat_jax.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=cli.model, required=True, metavar="DIR", help="or hf://OWNER/NAME")
    add("--reference", required=True, help="statistics (.npz) or pictures to compare with")
    add("--features", required=True, help="digits, or as for python -m enat_jax.evaluate")
    add("--inception", metavar="FILE", help="weights of Inception, or 'download'")
    add("--split", default="train", help="of pictures (default train)")
    add("--steps", type=int, metavar="STEPS", help="sampling steps (default: the model's)")
    add("--settings", type=cli.path, metavar="FILE", help="to start from, instead of the model's")
    add("--trials", type=cli.at_least_one, default=50, help="settings to try, in all (default 50)")
    add("--num", type=cli.at_least_one, default=500, help="images of a measurement (default 500)")
    add("--repeats", type=_repeats, default=5, help="seeds of the last measurements (default 5)")
    add("--seed", type=int, default=0)
    add("--out", type=cli.path, required=True, metavar="DIR", help="may hold a search under way")
    add(
        "--batch-size", type=cli.at_least_one, default=generator.BATCH_SIZE, help="images at a time"
    )
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation, instead of its own")
    return parser


if __name__ == "__main__":
    cli.run(main)
