"""How fast the sampler and the training step run, measured against the machine's own matrix rate.

    python -m enat_jax.benchmark sampler --config configs/digits.py --batch 4 --segments 1,8
    python -m enat_jax.benchmark train --config configs/digits.py --batch 64 --json train.json
    python -m enat_jax.benchmark loader --records 500000,5000000 --batch 2048
    python -m enat_jax.benchmark scaling --config configs/enat_l_imagenet256.py --devices 1,2,4,8

Needs no data: tokens, labels and parameters are random. Any value of the config can be changed, as
in ``--config.model.width=64``. Everything runs on one device. Work is counted in multiply-adds (two
flops each) by ``costs``: "exact" is the work that the method needs, "padded" what the compiled
windows do. Rates and fractions count exact work only, so that padding never passes for speed.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile

import jax
from absl import flags
from ml_collections import config_flags

from enat_jax import (
    cli,
    costs,
    loader_timing,
    model_files,
    optim,
    reveal,
    sampling,
    scaling,
    scaling_report,
    shape_buckets,
    timing,
)
from enat_jax.models import vqgan
from enat_jax.tasks import enat as enat_task

# --- configs --------------------------------------------------------------------------------


def load_config(path, overrides=()):
    """The ``ConfigDict`` of a file, with arguments such as ``--config.model.width=64`` applied.

    Raises:
        FileNotFoundError: there is no such file.
        absl.flags.Error, AttributeError: an override names no value of the config.
    """
    if not os.path.isfile(path.split(":")[0]):
        raise FileNotFoundError(f"there is no config file {path}")
    arguments = ["benchmark", f"--config={path}", *overrides]
    values = flags.FlagValues()  # of its own: train has a flag of this name
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    rest = values(arguments)[1:]
    if rest:
        raise ValueError(f"arguments that mean nothing: {' '.join(rest)}")
    return values.config


def _splat(kind, section, **values):
    """``kind(**values)``; a key that it does not know is the config's mistake."""
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"config.{section}: {error}") from error


def make_model(config, dtype=None):
    """The transformer of a config, with another compute dtype if one is given."""
    if config.get("task") != "enat":
        raise ValueError(
            f"task={config.get('task')!r}: the benchmark needs the config of a transformer, "
            "task='enat'"
        )
    values = config.model.to_dict()
    kind = values.pop("kind")
    if kind not in enat_task.MODELS:
        raise ValueError(f"model.kind={kind!r} is unknown: one of {sorted(enat_task.MODELS)}")
    model = _splat(enat_task.MODELS[kind], "model", **values)
    return model if dtype is None else model.clone(dtype=dtype)


def make_task(config, batch_size, max_shapes=None, dtype=None):
    """The training task of a config without its data; ``max_shapes`` None: the config's."""
    if batch_size < 1:
        raise ValueError(f"{batch_size=} must be at least 1")
    model = make_model(config, dtype)
    training = _splat(enat_task.Training, "training", **config.training)
    splits = _splat(reveal.SplitDistribution, "mask", **config.mask)
    optimizer = _splat(optim.Optimizer, "optimizer", **config.optimizer)
    cost = functools.partial(costs.training_cost, costs.dims_of(model))
    shapes = training.max_shapes if max_shapes is None else max_shapes
    return enat_task.Task(
        model=model,
        tokens=None,
        held_out=None,
        tokenizer=None,
        optimizer=optimizer.make(config.train.num_steps),
        training=dataclasses.replace(training, words_from_codebook=False),  # there is none
        splits=splits,
        buckets=shape_buckets.choose(model.num_tokens, splits, shapes, cost),
        sampler=sampling.Settings(),
        seed=config.seed,
        batch_size=batch_size,
    )


# --- the program ----------------------------------------------------------------------------

COLUMNS = (
    ("compile s", lambda x: f"{x.compile_seconds:.2f}"),
    ("s/call", lambda x: f"{x.call_seconds:.4g}"),
    ("images/s (min-max)", lambda x: "{:.4g} ({:.4g}-{:.4g})".format(*x.images_per_second)),
    ("exact GMA", lambda x: f"{x.exact / 1e9:.4g}"),
    ("padded GMA", lambda x: f"{x.padded / 1e9:.4g}"),
    ("padding", lambda x: f"{x.padding:+.1%}"),
    ("exact GMA/s", lambda x: f"{x.exact_rate / 1e9:.4g}"),
    ("matmul GMA/s", lambda x: f"{x.matmul_rate / 1e9:.4g}"),
    ("of matmul", lambda x: f"{x.fraction:.1%}"),
    ("peak MiB", lambda x: f"{x.peak_bytes / 2**20:.0f}"),
)
LEGEND = """\
GMA: 10^9 multiply-adds a call, two flops each.
exact: what the method needs; padded: what the compiled windows compute; padding: the difference.
of matmul: exact GMA/s over that of {matmul} in {dtype} at jax's
  default precision, timed in turns with the calls; medians of {repeats}.
compile s: tracing, lowering and compiling. peak: {peak}, the largest so far."""


def table(columns, rows):
    """Right-aligned text; columns are (title, row -> text)."""
    cells = [[title for title, _ in columns], *([text(row) for _, text in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def sampler_table(found):
    return table([("segments", lambda x: str(x.label["segments"])), *COLUMNS], found)


def training_table(found):
    columns = [
        ("visible", lambda x: "{}-{}".format(*x[1].label["visible"])),
        (
            "cached",
            lambda x: "{}-{}".format(*x[1].label["cached"]) if x[1].label["reuse"] else "no reuse",
        ),
        ("of steps", lambda x: f"{x[0]:.1%}"),
        *((title, lambda x, text=text: text(x[1])) for title, text in COLUMNS),
    ]
    lines = table(columns, list(zip(found.probabilities, found.timed, strict=True)))
    return (
        f"{lines}\n\n{found.shapes} shapes; expected padded work {found.padding:+.1%} over exact "
        f"(over all splits).\nTimed: the {len(found.timed)} most probable, {found.share:.1%} of "
        f"all steps. Expected over these: {found.images_per_second:.4g} images/s, "
        f"{found.fraction:.1%} of matmul."
    )


def main(argv):
    options, overrides = _parser().parse_known_args(argv)
    if options.program == "loader":
        if overrides:
            raise ValueError(f"arguments that mean nothing: {' '.join(overrides)}")
        _loader(options)
        return
    # A compilation found in the persistent cache would pass for a fast one.
    jax.config.update("jax_enable_compilation_cache", False)
    config = load_config(options.config, overrides)
    if options.program == "scaling":
        _scaling(config, options)
        return
    if options.program == "sampler":
        model, settings, found = _sampler(config, options)
        text, rows = sampler_table(found), found
        result = {"sampler": settings, "rows": [x.json() for x in found]}
        title = (
            f"sampler: batch {options.batch}, {settings['num_steps']} steps, guidance "
            f"{settings['guidance_scale']:g}, {'images' if options.decode else 'tokens only'}"
        )
    else:
        task = make_task(config, options.batch, options.shapes, options.dtype)
        model, found = (
            task.model,
            timing.measure_training(task, max_timed=options.time, repeats=options.repeats),
        )
        text, rows, result = training_table(found), found.timed, found.json()
        title = f"train: batch {options.batch}, forward, backward and update"
    device = jax.local_devices()[0]
    result |= {
        "benchmark": options.program,
        "batch_size": options.batch,
        "model": {"kind": config.model.kind, **model_files.settings_of(model)},
        "machine": {
            "backend": device.platform,
            "device": device.device_kind,
            "cpus": os.cpu_count(),
            "jax": jax.__version__,
        },
        "matmul_shape": timing.MATMUL_SHAPE,
    }
    # With the JSON on stdout, what is for people goes beside it.
    stream = sys.stderr if options.json == "-" else sys.stdout
    legend = LEGEND.format(
        matmul="[{0}, {1}] x [{1}, {2}]".format(*timing.MATMUL_SHAPE),
        dtype=model.dtype,
        repeats=options.repeats,
        peak=rows[0].peak_of,
    )
    print(f"{title}; {_describe(config.model.kind, model)}; {model.dtype}", file=stream)
    print(f"one device: {device.platform} {device.device_kind}, jax {jax.__version__}", file=stream)
    print(f"\n{text}\n\n{legend}", file=stream)
    _write(result, options.json)


def _write(result, path):
    """For programs: to a file, or to stdout for "-"; a path of None: not at all."""
    if path == "-":
        print(json.dumps(result, indent=2))
    elif path:
        model_files.write_json(path, result)


def _loader(options):
    """Shuffled token examples from disk, and what other formats give."""
    result = {"benchmark": "loader", "batch_size": options.batch, "rows": [], "formats": {}}
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        directory = pathlib.Path(directory)
        for num_records in options.records:
            path = directory / str(num_records)
            made = loader_timing.make_tokens(path, num_records, options.tokens)
            result["rows"].append(
                loader_timing.measure_loader(path, options.batch, options.repeats, options.workers)
            )
        if options.compare:
            result["formats"] = loader_timing.compare_formats(
                made, directory, options.batch, options.repeats
            )
    columns = [
        ("records", lambda x: f"{x.num_records:,}"),
        ("on disk MiB", lambda x: f"{x.num_bytes / 2**20:.0f}"),
        (
            "examples/s (min-max)",
            lambda x: "{:,.0f} ({:,.0f}-{:,.0f})".format(*x.examples_per_second),
        ),
        ("peak MiB", lambda x: f"{x.memory:.0f}"),
    ]
    stream = sys.stderr if options.json == "-" else sys.stdout
    print(
        f"loader: shuffled batches of {options.batch} x {options.tokens} tokens from disk, "
        f"{options.workers} worker processes, {os.cpu_count()} cores\n",
        file=stream,
    )
    print(table(columns, result["rows"]), file=stream)
    for name, rates in result["formats"].items():
        print(f"random batches, {name}: {statistics.median(rates):,.0f} records/s", file=stream)
    result["rows"] = [dataclasses.asdict(row) for row in result["rows"]]
    _write(result, options.json)


def _scaling(config, options):
    """The training step compiled for several layouts of devices, and predictions from it."""
    if config.get("model", {}).get("attention") == "cudnn":
        config.model.attention = "xla"  # the same products and collectives; this one compiles here
    task = make_task(config, options.batch or config.train.batch_size)
    rules = config.get("sharding", {}).get("rules")
    rules = enat_task.RULES if rules is None else rules
    layouts = options.layouts or [x for n in options.devices for x in scaling.layouts_of(n)]
    assumptions = scaling.Assumptions(options.of_flops, options.of_bandwidth)
    scaling.cpu_devices(max(math.prod(sizes.values()) for sizes in layouts))
    stream = sys.stderr if options.json == "-" else sys.stdout
    found = []
    for sizes in layouts:
        found.append(scaling.measure(task, rules, sizes, shapes_of_each=options.shapes))
        print(f"compiled for {found[-1].name}", file=sys.stderr)
    text = scaling_report.report(found, scaling.HARDWARE, assumptions, table)
    model = _describe(config.model.kind, task.model)
    print(f"scaling: batch {task.batch_size}; {model}; {task.model.dtype}\n\n{text}", file=stream)
    result = {
        "benchmark": "scaling",
        "batch_size": task.batch_size,
        "model": {"kind": config.model.kind, **model_files.settings_of(task.model)},
        "jax": jax.__version__,
        "hardware": [dataclasses.asdict(device) for device in scaling.HARDWARE],
        "assumptions": dataclasses.asdict(assumptions),
        "layouts": [layout.json() for layout in found],
    }
    _write(result, options.json)


def _sampler(config, options):
    model = make_model(config, options.dtype)
    values = config.sampler.to_dict()
    if options.steps is not None:
        values["num_steps"] = options.steps
    values["num_segments"] = None
    settings = _splat(sampling.Settings, "sampler", **values)
    if options.decode != (options.tokenizer_config is not None):
        raise ValueError("--decode and --tokenizer-config FILE go together: give both or neither")
    codec = None
    if options.decode:
        section = load_config(options.tokenizer_config).model.to_dict()
        # One compute dtype for both, so that there is one rate to compare with.
        codec = _splat(vqgan.VQGAN, "model", **section | {"dtype": model.dtype})
    segments = options.segments or (1, settings.num_steps)
    found = timing.measure_sampler(
        model, settings, options.batch, segments, codec=codec, repeats=options.repeats
    )
    return model, dataclasses.asdict(settings), found


def _describe(kind, model):
    layers = (
        f"{model.num_layers}" if kind == "nat" else f"{model.encoder_layers}+{model.decoder_layers}"
    )
    return f"{kind} of {layers} layers, width {model.width}, {model.num_tokens} tokens"


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m enat_jax.benchmark",
        description="Speed of the sampler and of the training step. Arguments such as "
        "--config.model.width=64 change the config.",
    )
    programs = parser.add_subparsers(dest="program", required=True)
    for name, text in (("sampler", "labels to tokens"), ("train", "one training step")):
        program = programs.add_parser(name, help=text, allow_abbrev=False)
        add = program.add_argument
        add("--config", required=True, help="file of a transformer's config")
        add("--batch", type=cli.at_least_one, required=True, help="images of a call")
        add("--repeats", type=cli.at_least_one, default=5, help="timings of each (default 5)")
        add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the config's")
        add("--json", metavar="FILE", help="write the results for programs; - for stdout")
        if name == "sampler":
            add("--segments", type=_numbers, help="such as 1,8 (default: 1 and the steps)")
            add("--steps", type=cli.at_least_one, help="sampling steps (default: the config's)")
            add("--decode", action="store_true", help="decode to images as well")
            add("--tokenizer-config", metavar="FILE", help="config of the decoder's VQGAN")
        else:
            add("--shapes", type=cli.at_least_one, help="compiled shapes (default: the config's)")
            add(
                "--time", type=cli.at_least_one, default=4, help="shapes that are timed (default 4)"
            )
    _add_scaling(programs)
    program = programs.add_parser("loader", help="token records to batches", allow_abbrev=False)
    add = program.add_argument
    add("--records", type=_numbers, default=(500_000,), help="sizes of the sets (default 500000)")
    add("--tokens", type=cli.at_least_one, default=256, help="of a record (default 256)")
    add("--batch", type=cli.at_least_one, default=2048, help="examples of a batch (default 2048)")
    add("--workers", type=int, default=0, help="processes that read; 0: a thread (default)")
    add("--repeats", type=cli.at_least_one, default=5, help="timings of each (default 5)")
    add("--compare", action="store_true", help="also other file formats, of the last set")
    add("--dir", metavar="DIR", help="disk to measure (default: that of temporary files)")
    add("--json", metavar="FILE", help="write the results for programs; - for stdout")
    return parser


def _add_scaling(programs):
    text = "the training step on more devices, predicted"
    program = programs.add_parser("scaling", help=text, allow_abbrev=False)
    add = program.add_argument
    add("--config", required=True, help="file of a transformer's config")
    where = program.add_mutually_exclusive_group()
    where.add_argument("--devices", type=_numbers, default=(8,), help="such as 1,2,4,8 (8)")
    where.add_argument("--layouts", type=_layouts, help='such as "data=8;data=4,fsdp=2"')
    add("--batch", type=cli.at_least_one, help="images of a step (default: the config's)")
    add(
        "--shapes",
        type=cli.at_least_one,
        default=1,
        help="compiled shapes, so many with reuse and so many without, most probable first (1)",
    )
    add("--of-flops", type=float, default=0.45, help="of the peak that products reach (0.45)")
    add("--of-bandwidth", type=float, default=0.8, help="of the peak of collectives (0.8)")
    add("--json", metavar="FILE", help="write the results for programs; - for stdout")


def _layouts(text):
    try:
        return scaling.parse_layouts(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from error


def _numbers(text):
    return tuple(cli.at_least_one(part) for part in text.split(","))


if __name__ == "__main__":
    cli.run(main)
