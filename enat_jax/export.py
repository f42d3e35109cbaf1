"""Make a model directory from a training run, finished or not, or from another model directory.

    python -m enat_jax.export --workdir RUN --out DIR              # the newest of the run
    python -m enat_jax.export --workdir RUN --step 5000 --out DIR  # its checkpoint of this step
    python -m enat_jax.export --model DIR --out DIR --format compiled
    python -m enat_jax.export --model DIR --out DIR --project-once
    python -m enat_jax.export --model DIR --out DIR --text-encoder ENCODER
    python -m enat_jax.export --model DIR --push OWNER/NAME        # to the Hugging Face Hub

`--format` names what the directory gets, separated by commas:

    orbax        weights for JAX: transformer/, tokenizer/params/
    safetensors  weights for everyone: transformer.safetensors, tokenizer/params.safetensors
    compiled     sampler.jaxexport and sampler.json, which draw images without this package
    reference    reference/enat.safetensors and reference/vqgan.safetensors, with the tensor names
                 of the PyTorch reference

Of a model that reads states of a text encoder, `--text-encoder` puts the encoder into DIR, too, and
so does `--with-text-encoder`, which takes it from where the run or the model has it. Without it the
directory names the encoder, and who uses it needs the encoder beside it.

`--settings` gives a new DIR other settings of the sampler, such as those that
`python -m enat_jax.search` has found. With `--project-once` a new DIR samples as with
`config.model.project_once`: f takes each token's features once, and not at every step.

A new DIR appears when it is complete. One that has the same model gets what is asked for in
addition; one that has anything else is left alone. A run may go on training meanwhile.
"""

import argparse
import dataclasses
import pathlib

from enat_jax.checkpoints import hub, model_files
from enat_jax.evaluation import drawing_arguments
from enat_jax.inference import generator, model_directory, sampler_settings, tokenizer
from enat_jax.runtime import buckets, cli, files, paths
from enat_jax.training import finished


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    if options.out is None and (options.push is None or options.model is None):
        raise ValueError("name a directory by --out")
    if options.step is not None and options.model is not None:
        raise ValueError("--step is of a run: name it by --workdir and not a model")
    if options.dtype is not None and "compiled" not in options.format:
        raise ValueError("--dtype is of a compiled sampler: add compiled to --format")
    if options.out is None and options.settings is not None:
        raise ValueError("settings are written to a directory: name it by --out")
    if options.out is None and options.project_once:
        raise ValueError("--project-once is of a directory to write: name it by --out")
    if options.out is None and (options.with_text_encoder or options.text_encoder is not None):
        raise ValueError("a text encoder is written to a directory: name it by --out")
    if options.push is not None:
        hub.parse(hub.PREFIX + options.push)  # before the work, not after it
    if options.out is not None:
        buckets.require(options.out)
        if options.workdir is not None:
            model = finished.of_run(options.workdir, options.step)
        else:
            model = model_directory.load(options.model)
        if options.settings is not None:
            model = _with_settings(model, options.settings)
        if options.project_once:
            model = _projecting_once(model)
        with_text_encoder = options.with_text_encoder or options.text_encoder is not None
        if with_text_encoder:
            model = _with_text_encoder(model, options.text_encoder)
        model_directory.write(
            model, options.out, options.format, options.dtype, with_text_encoder=with_text_encoder
        )
        print(f"[export] {options.out}: step {model.provenance.get('step')}{_size(options.out)}")
    if options.push is not None:
        directory = buckets.fetched(options.out or options.model)
        files.read_description(directory / "model.json", generator.FORMAT, "push a model directory")
        print(f"[export] pushed: {hub.push(directory, hub.PREFIX + options.push)}")


def _size(out: pathlib.Path) -> str:
    """Returns ", 1.5 MiB", or nothing for a directory in a bucket."""
    if not isinstance(out, pathlib.Path):
        return ""
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return f", {size / 2**20:,.1f} MiB"


def _with_settings(
    model: generator.Generator | tokenizer.Tokenizer, path: pathlib.Path
) -> generator.Generator:
    if not isinstance(model, generator.Generator):
        raise ValueError("a tokenizer draws nothing: it has no settings of a sampler")
    return dataclasses.replace(model, settings=sampler_settings.changed(model.settings, path))


def _projecting_once(
    model: generator.Generator | tokenizer.Tokenizer,
) -> generator.Generator:
    if not isinstance(model, generator.Generator) or not model.model.reuse:
        raise ValueError("--project-once is of a transformer that reuses features, an ENAT")
    return dataclasses.replace(model, model=model.model.clone(project_once=True))


def _with_text_encoder(
    model: generator.Generator | tokenizer.Tokenizer, given: pathlib.Path | None
) -> generator.Generator:
    """Returns a model with its text encoder as it is on disk: given, or where the run had it."""
    if not isinstance(model, generator.Generator):
        raise ValueError("a tokenizer reads no texts: it has no text encoder")
    config = model.provenance.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    known = data.get("text_encoder") if isinstance(data, dict) else None
    if given is None and known and pathlib.Path(known).is_dir():
        given = paths.local(known)
    return model if given is None else model.with_text_encoder(given)


def _formats(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in model_directory.FORMATS:
            raise argparse.ArgumentTypeError(
                f"{name!r} is none of {', '.join(model_directory.FORMATS)}"
            )
    return names


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m enat_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=cli.place, metavar="RUN", help="of a training run")
    source.add_argument(
        "--model", type=cli.model, metavar="DIR", help="model directory, or hf://OWNER/NAME"
    )
    add("--step", type=int, help="of the run (default: the newest)")
    add("--out", type=cli.place, metavar="DIR", help="model directory, or gs://, to write")
    weights, formats = model_files.WEIGHTS, model_directory.FORMATS
    add(
        "--format",
        type=_formats,
        default=list(weights),
        metavar="LIST",
        help=f"of {', '.join(formats)} (default {','.join(weights)})",
    )
    add("--settings", type=cli.path, metavar="FILE", help=drawing_arguments.SETTINGS)
    add("--project-once", action="store_true", help="sample with f once for each token")
    add("--with-text-encoder", action="store_true", help="also write the encoder of its texts")
    add("--text-encoder", type=cli.path, metavar="DIR", help="the same, and where it is")
    add("--dtype", choices=model_files.DTYPES, help="of a compiled sampler (default: the model's)")
    add("--push", metavar="OWNER/NAME", help="repository of the Hugging Face Hub to upload to")
    return parser


if __name__ == "__main__":
    cli.run(main)
