"""How fast the sampler and the training step run, measured against the machine's own matrix rate.

    python -m enat_jax.benchmark sampler --config configs/digits.py --batch 4 --segments 1,8
    python -m enat_jax.benchmark train --config configs/digits.py --batch 64 --json train.json
    python -m enat_jax.benchmark loader --records 500000,5000000 --batch 2048
    python -m enat_jax.benchmark scaling --config configs/enat_l_imagenet256.py --devices 1,2,4,8
    python -m enat_jax.benchmark profile --config configs/enat_l_imagenet256.py --minutes 9 \\
        --tokenizer-config configs/vqgan_imagenet256.py --out runs/profile

Needs no data: tokens, labels and parameters are random. Any value of the config can be changed, as
in ``--config.model.width=64``. Everything runs on one device. Work is counted in multiply-adds (two
flops each) by ``costs``: "exact" is the work that the method needs, "padded" what the compiled
windows do. Rates and fractions count exact work only, so that padding never passes for speed.
``--batch fit`` finds the largest batch that fits in memory; ``profile`` does so for the settings
that matter, and writes a table that compares them.
"""

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

from enat_jax.checkpoints import model_files
from enat_jax.inference import sampling
from enat_jax.models import vqgan
from enat_jax.profiling import arguments as benchmark_arguments
from enat_jax.profiling import (
    batch_fit,
    loader_timing,
    profile_rows,
    scaling,
    scaling_report,
    setup,
    timing,
    timing_report,
)
from enat_jax.profiling.timing_report import table
from enat_jax.runtime import cli, files, matrix_rate, memory
from enat_jax.training import enat_task

# --- configs --------------------------------------------------------------------------------


# --- the program ----------------------------------------------------------------------------


def main(argv):
    options, overrides = benchmark_arguments.parser().parse_known_args(argv)
    if options.program in ("loader", "machine") and overrides:
        raise ValueError(f"arguments that mean nothing: {' '.join(overrides)}")
    # A compilation found in the persistent cache would pass for a fast one.
    jax.config.update("jax_enable_compilation_cache", False)
    if options.program == "loader":
        _loader(options)
    elif options.program == "machine":
        _machine(options)
    elif options.program == "profile":
        _profile(options, overrides)
    elif options.program == "scaling":
        _scaling(setup.load_config(options.config, overrides), options)
    else:
        _measure(setup.load_config(options.config, overrides), options)


def _measure(config, options):
    """The sampler or the training step."""
    if options.program == "sampler":
        model, settings, found, fit = _sampler(config, options)
        text, rows = timing_report.sampler(found), found
        result = {"sampler": settings, "rows": [x.json() for x in found]}
        title = (
            f"sampler: batch {found[0].images}, {settings['num_steps']} steps, guidance "
            f"{settings['guidance_scale']:g}, {'images' if options.decode else 'tokens only'}"
        )
    else:
        model, found, fit = _train(config, options)
        text, rows, result = timing_report.training(found), found.timed, found.json()
        title = f"train: batch {rows[0].images}, forward, backward and update"
    device = jax.local_devices()[0]
    result |= {
        "benchmark": options.program,
        "batch_size": rows[0].images,
        "model": {"kind": config.model.kind, **model_files.settings_of(model)},
        "machine": _device(),
        "matmul_shape": timing.MATMUL_SHAPE,
    }
    if fit is not None:
        result["fit"] = fit.json()
    # With the JSON on stdout, what is for people goes beside it.
    stream = sys.stderr if options.json == "-" else sys.stdout
    legend = timing_report.LEGEND.format(
        matmul="[{0}, {1}] x [{1}, {2}]".format(*timing.MATMUL_SHAPE),
        dtype=model.dtype,
        repeats=options.repeats,
        peak=rows[0].peak_of,
    )
    print(f"{title}; {_describe(config.model.kind, model)}; {model.dtype}", file=stream)
    print(f"one device: {device.platform} {device.device_kind}, jax {jax.__version__}", file=stream)
    print(f"\n{text}\n\n{legend}", file=stream)
    _write(result, options.json)


def _device():
    device = jax.local_devices()[0]
    return {
        "backend": device.platform,
        "device": device.device_kind,
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
    }


def _train(config, options):
    """The model, ``timing.TrainingMeasurement``, and ``batch_fit.Fit`` or None."""
    size = 1 if options.batch == "fit" else options.batch
    task = setup.make_task(config, size, options.shapes, options.dtype)
    how = {"max_timed": options.time, "repeats": options.repeats}
    fit = None
    if options.batch == "fit":
        fit = batch_fit.fit_training(task, **_bounds(options), **how)
        task = dataclasses.replace(task, batch_size=fit.batch)
        found = fit.result
    else:
        found = timing.time_training(task, **how)
    if options.trace is not None:
        batch_fit.trace_training(task, options.trace)
    return task.model, found, fit


def _bounds(options):
    """Of ``batch_fit.fit``."""
    tell = functools.partial(print, file=sys.stderr)
    return {"first": min(options.first, options.most), "most": options.most, "tell": tell}


def _machine(options):
    """What ``profile`` says about the machine above its tables."""
    free = memory.free_bytes()
    machine = _device() | {
        "driver": batch_fit.driver(),
        "memory_bytes": free,
        "platform_version": " ".join(jax.local_devices()[0].client.platform_version.split()),
    }
    rate = matrix_rate.matrix_rate(options.dtype, jax.local_devices()[:1])
    stream = sys.stderr if options.json == "-" else sys.stdout
    print(f"{machine['backend']} {machine['device']}, jax {machine['jax']}", file=stream)
    print(f"{rate / 1e9:.4g} GMA/s of {options.dtype} in matrix products", file=stream)
    result = {"benchmark": "machine", "machine": machine, "matrix_rate": rate}
    _write(result | {"dtype": options.dtype}, options.json)


def _profile(options, overrides):
    """All rows for some configs, each measured by a process of its own: none of it here."""
    configs = {path: setup.load_config(path, overrides) for path in options.config}
    for config in configs.values():
        setup.make_model(
            config, options.dtype
        )  # a mistake in it would otherwise be one in every row
    setup.load_config(options.tokenizer_config, task="vqgan")
    rows = profile_rows.list_rows(
        configs,
        options.tokenizer_config,
        dtype=options.dtype,
        most=options.most,
        repeats=options.repeats,
        shapes=options.time,
        overrides=overrides,
    )
    with profile_rows.ended_as_by_ctrl_c():
        saved = profile_rows.profile(
            rows,
            options.out,
            dtype=options.dtype,
            minutes=options.minutes,
            row_minutes=options.row_minutes,
            trace=options.trace,
        )
    print((pathlib.Path(options.out) / "profile.md").read_text(), end="")
    if saved["left"]:
        print(f"{saved['left']} rows are left: call this again to go on", file=sys.stderr)


def _write(result, path):
    """For programs: to a file, or to stdout for "-"; a path of None: not at all."""
    if path == "-":
        print(json.dumps(result, indent=2))
    elif path:
        files.write_json(path, result)


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
    if config.model.attention == "cudnn":
        config.model.attention = "xla"  # the same products and collectives; this one compiles here
    task = setup.make_task(config, options.batch or config.train.batch_size)
    rules = enat_task.RULES if config.sharding.rules is None else config.sharding.rules
    layouts = options.layouts or [x for n in options.devices for x in scaling.layouts_of(n)]
    assumptions = scaling.Assumptions(options.of_flops, options.of_bandwidth)
    scaling.cpu_devices(max(math.prod(sizes.values()) for sizes in layouts))
    stream = sys.stderr if options.json == "-" else sys.stdout
    found = []
    for sizes in layouts:
        found.append(scaling.compile_layout(task, rules, sizes, shapes_of_each=options.shapes))
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
    """The model, the settings, list of ``timing.Measurement``, ``batch_fit.Fit`` or None."""
    model = setup.make_model(config, options.dtype)
    values = config.sampler.to_dict()
    if options.steps is not None:
        values["num_steps"] = options.steps
    values["num_segments"] = None
    settings = sampling.Settings(**values)
    if options.decode != (options.tokenizer_config is not None):
        raise ValueError("--decode and --tokenizer-config FILE go together: give both or neither")
    codec = None
    if options.decode:
        section = setup.load_config(options.tokenizer_config, task="vqgan").model
        # One compute dtype for both, so that there is one rate to compare with.
        codec = vqgan.VQGAN(**section.to_dict() | {"dtype": model.dtype})
    segments = options.segments or (1, settings.num_steps)
    how = {"codec": codec, "repeats": options.repeats}
    fit = None
    if options.batch == "fit":
        fit = batch_fit.fit_sampler(model, settings, segments, **_bounds(options), **how)
        found = fit.result
    else:
        found = timing.time_sampler(model, settings, options.batch, segments, **how)
    return model, dataclasses.asdict(settings), found, fit


def _describe(kind, model):
    layers = (
        f"{model.num_layers}" if kind == "nat" else f"{model.encoder_layers}+{model.decoder_layers}"
    )
    return f"{kind} of {layers} layers, width {model.width}, {model.num_tokens} tokens"


if __name__ == "__main__":
    cli.run(main)
