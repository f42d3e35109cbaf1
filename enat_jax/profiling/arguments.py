"""The command line of ``benchmark``."""

import argparse

from enat_jax.runtime import cli

DTYPES = ("float32", "bfloat16", "float16")
REMATS = ("none", "dots", "full")  # of ``config.model.remat``
Programs = argparse._SubParsersAction


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all programs; arguments that it does not know may be of the config."""
    main = cli.Parser(
        prog="python -m enat_jax.benchmark",
        description="Speed of the sampler and of the training step. Arguments such as "
        "--config.model.width=64 change the config.",
    )
    programs = main.add_subparsers(dest="program", required=True)
    add = _add_timed(programs, "sampler", "labels to tokens").add_argument
    add("--segments", type=_numbers, help="such as 1,8 (default: 1 and the steps)")
    add("--steps", type=cli.at_least_one, help="sampling steps (default: the config's)")
    add("--decode", action="store_true", help="decode to images as well")
    add("--tokenizer-config", type=_path, metavar="FILE", help="config of the decoder's VQGAN")
    add = _add_timed(programs, "train", "one training step").add_argument
    add("--shapes", type=cli.at_least_one, help="compiled shapes (default: the config's)")
    add("--time", type=cli.at_least_one, default=4, help="shapes that are timed (default 4)")
    add("--trace", type=_path, metavar="DIR", help="also write a trace of three steps")
    _add_scaling(programs)
    _add_profile(programs)
    _add_loader(programs)
    return main


def _add_timed(programs: Programs, name: str, text: str) -> argparse.ArgumentParser:
    program = programs.add_parser(name, help=text, allow_abbrev=False)
    add = program.add_argument
    add("--config", type=_path, required=True, help="file of a transformer's config")
    add("--batch", type=_batch, required=True, help="images of a call; fit: the most that fit")
    add("--first", type=cli.at_least_one, default=8, help="batch that fit tries first (8)")
    add("--most", type=cli.at_least_one, default=2048, help="largest that fit tries (2048)")
    add("--repeats", type=cli.at_least_one, default=5, help="timings of each (default 5)")
    add("--dtype", choices=DTYPES, help="default: the config's")
    add("--json", type=_path, metavar="FILE", help="write the results for programs; - for stdout")
    return program


def _add_scaling(programs: Programs) -> None:
    text = "the training step on more devices, predicted; programs compiled for TPUs"
    program = programs.add_parser("scaling", help=text, allow_abbrev=False)
    add = program.add_argument
    add("--config", type=_path, required=True, help="file of a config")
    where = program.add_mutually_exclusive_group()
    where.add_argument("--devices", type=_numbers, help="such as 1,2,4,8 (8, or all of --topology)")
    where.add_argument("--layouts", help='such as "data=8;data=4,fsdp=2"')
    add("--batch", type=_batch, help="images of a step (default: the config's); fit: the most")
    add(
        "--topology",
        type=_names,
        default=(),
        help="compile for TPUs that need not be there, such as v5e:2x4,v5p:2x2x1; else CPUs",
    )
    add("--remat", type=_remats, help="such as none,dots,full, each compiled (the config's)")
    add("--sampler", action="store_true", help="compile the sampler, not the training step")
    add("--tokenizer-config", type=_path, metavar="FILE", help="of the sampler's image decoder")
    add(
        "--shapes",
        type=cli.at_least_one,
        help="compiled shapes, so many with reuse and so many without, most probable first (1; of "
        "--topology the shape that needs the most memory)",
    )
    add("--of-flops", type=float, default=0.45, help="of the peak that products reach (0.45)")
    add("--of-bandwidth", type=float, default=0.8, help="of the peak of collectives (0.8)")
    add("--json", type=_path, metavar="FILE", help="write the results for programs; - for stdout")


def _add_profile(programs: Programs) -> None:
    program = programs.add_parser("machine", help="its matrix rate and memory", allow_abbrev=False)
    program.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="bfloat16")
    program.add_argument(
        "--json", type=_path, metavar="FILE", help="write the results; - for stdout"
    )
    text = "train and sampler in all settings that matter, into one table"
    program = programs.add_parser("profile", help=text, allow_abbrev=False)
    add = program.add_argument
    add(
        "--config",
        type=_path,
        action="append",
        required=True,
        help="of a transformer; may be repeated",
    )
    add(
        "--tokenizer-config",
        type=_path,
        metavar="FILE",
        required=True,
        help="config of the decoder's VQGAN",
    )
    add(
        "--out",
        type=_path,
        metavar="DIR",
        required=True,
        help="of profile.md and profile.json; resumed",
    )
    add("--minutes", type=float, help="after which no row is begun (default: no limit)")
    add("--row-minutes", type=float, default=15.0, help="after which a row has failed (15)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of all rows (bfloat16)")
    add("--most", type=cli.at_least_one, default=2048, help="largest batch to try (2048)")
    add("--repeats", type=cli.at_least_one, default=5, help="timings of each (5)")
    add("--time", type=cli.at_least_one, default=4, help="training shapes that are timed (4)")
    add(
        "--trace",
        type=_path,
        metavar="DIR",
        help="at the end, of the fastest training step of each config",
    )


def _add_loader(programs: Programs) -> None:
    program = programs.add_parser("loader", help="token records to batches", allow_abbrev=False)
    add = program.add_argument
    add("--records", type=_numbers, default=(500_000,), help="sizes of the sets (default 500000)")
    add("--tokens", type=cli.at_least_one, default=256, help="of a record (default 256)")
    add("--batch", type=cli.at_least_one, default=2048, help="examples of a batch (default 2048)")
    add("--workers", type=int, default=0, help="processes that read; 0: a thread (default)")
    add("--repeats", type=cli.at_least_one, default=5, help="timings of each (default 5)")
    add("--compare", action="store_true", help="also other file formats, of the last set")
    add(
        "--dir",
        type=_path,
        metavar="DIR",
        help="disk to measure (default: that of temporary files)",
    )
    add("--json", type=_path, metavar="FILE", help="write the results for programs; - for stdout")


def _path(text: str) -> str:
    """Reads the path of a file or directory; "-" is stdout, and an empty text no file."""
    return text if text in ("-", "") else str(cli.path(text))


def _batch(text: str) -> int | str:
    return text if text == "fit" else cli.at_least_one(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _remats(text: str) -> tuple[str, ...]:
    names = _names(text)
    if not names or not set(names) <= set(REMATS):
        raise argparse.ArgumentTypeError(f"{text!r} must be of {', '.join(REMATS)}, with commas")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(cli.at_least_one(part) for part in text.split(","))
