"""Make a model directory from a training run, finished or not, or from another model directory.

    python -m enat_jax.export --workdir RUN --out DIR              # the newest of the run
    python -m enat_jax.export --workdir RUN --step 5000 --out DIR  # its checkpoint of this step
    python -m enat_jax.export --model DIR --out DIR --format compiled
    python -m enat_jax.export --model DIR --push OWNER/NAME        # to the Hugging Face Hub

`--format` names what the directory gets, separated by commas:

    orbax        weights for JAX: transformer/, tokenizer/params/
    safetensors  weights for everyone: transformer.safetensors, tokenizer/params.safetensors
    compiled     sampler.jaxexport and sampler.json, which draw images without this package
    reference    reference/enat.safetensors and reference/vqgan.safetensors, with the tensor names
                 of the PyTorch reference

A new DIR appears when it is complete. One that has the same model gets what is asked for in
addition; one that has anything else is left alone. A run may go on training meanwhile.
"""

import argparse
import contextlib
import pathlib
import shutil

import jax

from enat_jax.checkpoints import hub, model_files, weight_files
from enat_jax.inference import compiled_sampler, generator, tokenizer
from enat_jax.models import conversion, enat
from enat_jax.runtime import cli, files
from enat_jax.training import finished

FORMATS = (*model_files.WEIGHTS, "compiled", "reference")


def write(model, out, formats, dtype=None):
    """Write a model directory, or add to one that has the same model.

    Args:
        model: ``Generator`` or ``Tokenizer``.
        out: directory.
        formats: of ``FORMATS``.
        dtype: that a compiled sampler computes in; None: that of the model.

    Raises:
        ValueError: ``out`` holds something else, or formats that the model cannot have.
        OSError: it cannot be written.
    """
    out = pathlib.Path(out)
    new = _is_new(model, out)
    weights = [name for name in formats if name in model_files.WEIGHTS]
    draws = isinstance(model, generator.Generator)
    if new and not weights:
        raise ValueError(f"{out} is new and needs weights: add safetensors or orbax to --format")
    if "compiled" in formats:
        if not draws:
            raise ValueError("a tokenizer draws nothing: no compiled sampler can be made of it")
        if "safetensors" not in formats and not (out / "transformer.safetensors").is_file():
            raise ValueError("a compiled sampler needs weights: add safetensors to --format")
    with _appearing(out) if new else contextlib.nullcontext(out) as directory:
        if weights:
            model.save(directory, weights)
        if "reference" in formats:
            _write_reference(model, directory / "reference")
        if "compiled" in formats:
            computing = model if dtype is None else model.with_dtype(dtype)
            program, description = compiled_sampler.make(computing)
            files.write_atomically(directory / "sampler.jaxexport", program)
            files.write_json(directory / "sampler.json", description)
        if draws:
            model.write_readme(directory, compiled=(directory / "sampler.json").is_file())


def _is_new(model, out):
    """Whether there is nothing yet; raises ValueError if there is anything but this model."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return True
    name = "model.json" if isinstance(model, generator.Generator) else "tokenizer.json"
    if not (out / name).is_file():
        raise ValueError(f"{out} holds something else than a model: name another directory")
    found = files.read_json(out / name, "name another directory")
    if name == "tokenizer.json":
        found, own = found.get("fingerprint"), model.fingerprint
    else:
        names = ("fingerprint", "sampler", "class_names")
        found, own = (
            {k: x.get(k) for k in names} for x in (found, files.as_json(model.description))
        )
    if found != own:
        raise ValueError(f"{out} holds another model: name another directory")
    return False


@contextlib.contextmanager
def _appearing(out):
    """A directory that becomes ``out`` at the end, and is gone if that is not reached."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.absolute().with_name(f".{out.absolute().name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        yield unfinished
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_reference(model, directory):
    """Weights by the names of the PyTorch reference."""
    codec = model.tokenizer if isinstance(model, generator.Generator) else model
    by_model = {"vqgan": conversion.vqgan_state_dict(jax.device_get(codec.params), codec.model)}
    if codec is not model:
        if not isinstance(model.model, enat.ENAT):
            raise ValueError("the reference has no names for the NAT baseline: leave it out")
        by_model["enat"] = conversion.enat_state_dict(jax.device_get(model.params), model.model)
    for name, tensors in by_model.items():
        weight_files.write_safetensors(directory / f"{name}.safetensors", tensors)


def main(argv):
    options = _parser().parse_args(argv)
    if options.out is None and (options.push is None or options.model is None):
        raise ValueError("name a directory by --out")
    if options.step is not None and options.model is not None:
        raise ValueError("--step is of a run: name it by --workdir and not a model")
    if options.dtype is not None and "compiled" not in options.format:
        raise ValueError("--dtype is of a compiled sampler: add compiled to --format")
    if options.push is not None:
        hub.parse(hub.PREFIX + options.push)  # before the work, not after it
    if options.out is not None:
        model = _open(options)
        write(model, options.out, options.format, options.dtype)
        written = [path for path in options.out.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in written) / 2**20
        print(f"[export] {options.out}: step {model.provenance.get('step')}, {size:,.1f} MiB")
    if options.push is not None:
        directory = options.out or options.model
        files.read_description(
            pathlib.Path(directory) / "model.json", generator.FORMAT, "push a model directory"
        )
        print(f"[export] pushed: {hub.push(directory, hub.PREFIX + options.push)}")


def _open(options):
    if options.workdir is not None:
        return finished.of_run(options.workdir, options.step)
    path, devices = options.model, jax.local_devices()[:1]
    kind = generator.Generator
    if not hub.is_address(path) and (pathlib.Path(path) / "tokenizer.json").is_file():
        kind = tokenizer.Tokenizer
    return kind.load(path, devices=devices)


def _formats(text):
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(FORMATS)}")
    return names


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m enat_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=pathlib.Path, metavar="RUN", help="of a training run")
    source.add_argument("--model", metavar="DIR", help="model directory, or hf://OWNER/NAME")
    add("--step", type=int, help="of the run (default: the newest)")
    add("--out", type=pathlib.Path, metavar="DIR", help="model directory to write")
    add("--format", type=_formats, default=list(model_files.WEIGHTS), metavar="LIST",
        help=f"of {', '.join(FORMATS)} (default {','.join(model_files.WEIGHTS)})")  # fmt: skip
    add("--dtype", choices=model_files.DTYPES, help="of a compiled sampler (default: the model's)")
    add("--push", metavar="OWNER/NAME", help="repository of the Hugging Face Hub to upload to")
    return parser


if __name__ == "__main__":
    cli.run(main)
