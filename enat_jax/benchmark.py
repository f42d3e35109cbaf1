"""How fast the sampler and the training step run, measured against the machine's own matrix rate.

    python -m enat_jax.benchmark sampler --config configs/digits.py --batch 4 --segments 1,8
    python -m enat_jax.benchmark train --config configs/digits.py --batch 64 --json train.json
    python -m enat_jax.benchmark loader --records 500000,5000000 --batch 2048
    python -m enat_jax.benchmark scaling --config configs/enat_l_imagenet256.py --devices 1,2,4,8
    python -m enat_jax.benchmark scaling --config configs/enat_l_imagenet256.py \\
        --topology v5e:2x4 --layouts fsdp=8 --remat none,dots,full --batch fit
    python -m enat_jax.benchmark profile --config configs/enat_l_imagenet256.py --minutes 9 \\
        --tokenizer-config configs/vqgan_imagenet256.py --out runs/profile

Needs no data: tokens, labels and parameters are random. Any value of the config can be changed, as
in ``--config.model.width=64``. Everything runs on one device. Work is counted in multiply-adds (two
flops each) by ``costs``: "exact" is the work that the method needs, "padded" what the compiled
windows do. Rates and fractions count exact work only, so that padding never passes for speed.
``--batch fit`` finds the largest batch that fits in memory; ``profile`` does so for the settings
that matter, and writes a table that compares them. ``scaling`` compiles for devices that need not
be there: for CPUs, or by ``--topology`` for TPUs, which takes minutes a program.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from enat_jax.checkpoints import model_files
from enat_jax.inference import sampling
from enat_jax.models.transformers import Transformer
from enat_jax.profiling import (
    accelerators,
    arguments,
    batch_fit,
    loader_timing,
    machine,
    profile_rows,
    reports,
    scaling,
    setup,
    timing,
    topology_report,
    tpu_programs,
)
from enat_jax.runtime import cli, files, sharding
from enat_jax.schedules import costs, shape_buckets
from enat_jax.training import enat_task, vqgan_task


def main(argv: list[str]) -> None:
    """Runs one of the programs with command-line arguments."""
    options, overrides = arguments.parser().parse_known_args(argv)
    if options.program in ("loader", "machine") and overrides:
        raise ValueError(f"arguments that mean nothing: {' '.join(overrides)}")
    for path in (getattr(options, "out", None), getattr(options, "json", None)):
        if path and path != "-":  # before the work, not after it
            files.require_writable(pathlib.Path(path).parent)
    # A compilation found in the persistent cache would pass for a fast one.
    jax.config.update("jax_enable_compilation_cache", False)
    match options.program:
        case "loader":
            _loader(options)
        case "machine":
            _machine(options)
        case "profile":
            _profile(options, overrides)
        case "scaling":
            if options.topology:
                _topologies(setup.load_config(options.config, overrides, task=None), options)
            else:
                _scaling(setup.load_config(options.config, overrides), options)
        case "sampler":
            _sampler(setup.load_config(options.config, overrides), options)
        case "train":
            _train(setup.load_config(options.config, overrides), options)


# --- the sampler and the training step ------------------------------------------------------


def _sampler(config: ConfigDict, options: argparse.Namespace) -> None:
    model = setup.make_model(config, options.dtype)
    values = config.sampler.to_dict() | {"num_segments": None}
    if options.steps is not None:
        values["num_steps"] = options.steps
    settings = sampling.Settings(**values)
    if options.decode != (options.tokenizer_config is not None):
        raise ValueError("--decode and --tokenizer-config FILE go together: give both or neither")
    codec = None
    if options.decode:
        # One compute dtype for both, so that there is one rate to compare with.
        codec = setup.make_codec(
            setup.load_config(options.tokenizer_config, task="vqgan"), model.dtype
        )
    segments = options.segments or (1, settings.num_steps)
    how = {"codec": codec, "repeats": options.repeats}
    fit = None
    if options.batch == "fit":
        fit = batch_fit.fit_sampler(model, settings, segments, **_bounds(options), **how)
        found = fit.result
    else:
        found = timing.time_sampler(model, settings, options.batch, segments, **how)
    title = (
        f"sampler: batch {found[0].images}, {settings.num_steps} steps, guidance "
        f"{settings.guidance_scale:g}, {'images' if options.decode else 'tokens only'}"
    )
    result = {"sampler": settings.described(), "rows": [x.json() for x in found]}
    _say_timed(config, options, model, title, reports.sampler_text(found), found[0], result, fit)


def _train(config: ConfigDict, options: argparse.Namespace) -> None:
    batch_size = 1 if options.batch == "fit" else options.batch
    task = setup.make_task(config, batch_size, options.shapes, options.dtype)
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
    first = found.timed[0]
    title = f"train: batch {first.images}, forward, backward and update"
    text = reports.training_text(found)
    _say_timed(config, options, task.model, title, text, first, found.json(), fit)


def _bounds(options: argparse.Namespace) -> dict[str, Any]:
    """Returns arguments of ``batch_fit.fit``."""
    report = functools.partial(print, file=sys.stderr)
    return {"first": min(options.first, options.most), "most": options.most, "report": report}


def _say_timed(
    config: ConfigDict,
    options: argparse.Namespace,
    model: Transformer,
    title: str,
    text: str,
    first: timing.Measurement,
    result: dict[str, Any],
    fit: batch_fit.Fit | None,
) -> None:
    """Prints a title, the table ``text`` and its legend; writes ``result`` with what it is of."""
    result = result | {
        "benchmark": options.program,
        "batch_size": first.images,
        "model": _model(config, model),
        "machine": machine.device(),
        "matmul_shape": timing.MATMUL_SHAPE,
    }
    if fit is not None:
        result["fit"] = fit.json()
    of = result["machine"]
    _report(
        options,
        f"{title}; {_describe(config, model)}\n"
        f"one device: {of['backend']} {of['device']}, jax {of['jax']}\n\n{text}\n\n"
        + reports.timed_legend(model.dtype, options.repeats, first.peak_of),
        result,
    )


# --- the machine ----------------------------------------------------------------------------


def _machine(options: argparse.Namespace) -> None:
    """Measures what ``profile`` says about the machine above its tables."""
    found = machine.describe(options.dtype)
    of = found["machine"]
    _report(
        options,
        f"{of['backend']} {of['device']}, jax {of['jax']}\n"
        f"{found['matrix_rate'] / 1e9:.4g} GMA/s of {options.dtype} in matrix products",
        {"benchmark": "machine"} | found,
    )


def _profile(options: argparse.Namespace, overrides: list[str]) -> None:
    """Measures all rows for some configs, each by a process of its own: none of it here."""
    configs = {path: setup.load_config(path, overrides) for path in options.config}
    for config in configs.values():
        setup.make_model(config, options.dtype)  # a mistake would otherwise be one in every row
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


# --- the loader, and other devices ----------------------------------------------------------


def _loader(options: argparse.Namespace) -> None:
    """Times shuffled token examples from disk, and what other formats give."""
    found, formats = [], {}
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        directory = pathlib.Path(name)
        for num_records in options.records:
            path = directory / str(num_records)
            made = loader_timing.make_tokens(path, num_records, options.tokens)
            found.append(
                loader_timing.time_loader(path, options.batch, options.repeats, options.workers)
            )
        if options.compare:
            formats = loader_timing.compare_formats(made, directory, options.batch, options.repeats)
    result = {
        "benchmark": "loader",
        "batch_size": options.batch,
        "rows": [dataclasses.asdict(row) for row in found],
        "formats": formats,
    }
    _report(
        options,
        f"loader: shuffled batches of {options.batch} x {options.tokens} tokens from disk, "
        f"{options.workers} worker processes, {os.cpu_count()} cores\n\n"
        + reports.loader_text(found, formats),
        result,
    )


def _scaling(config: ConfigDict, options: argparse.Namespace) -> None:
    """Compiles the training step for several layouts of devices, and predicts from it."""
    for name in ("remat", "sampler", "tokenizer_config"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} needs --topology, such as v5e:2x4")
    if options.batch == "fit":
        raise ValueError("--batch fit needs --topology, such as v5e:2x4, whose memory is known")
    _without_kernels(config)
    task = setup.make_task(config, options.batch or config.train.batch_size)
    rules = enat_task.RULES if config.sharding.rules is None else config.sharding.rules
    layouts = _layouts(options, 8)
    assumptions = accelerators.Assumptions(options.of_flops, options.of_bandwidth)
    scaling.cpu_devices(max(math.prod(sizes.values()) for sizes in layouts))
    found = []
    for sizes in layouts:
        shapes = options.shapes or 1
        found.append(scaling.compile_layout(task, rules, sizes, shapes_of_each=shapes))
        print(f"compiled for {found[-1].name}", file=sys.stderr)
    text = reports.scaling_text(found, accelerators.HARDWARE, assumptions)
    title = f"scaling: batch {task.batch_size}; {_describe(config, task.model)}"
    result = {
        "benchmark": "scaling",
        "batch_size": task.batch_size,
        "model": _model(config, task.model),
        "jax": jax.__version__,
        "hardware": [dataclasses.asdict(device) for device in accelerators.HARDWARE],
        "assumptions": dataclasses.asdict(assumptions),
        "layouts": [layout.json() for layout in found],
    }
    _report(options, f"{title}\n\n{text}", result)


def _layouts(options: argparse.Namespace, devices: int) -> list[dict[str, int]]:
    """Returns the layouts that are asked for, by default those worth comparing on all devices."""
    if options.layouts is not None:
        return scaling.parse_layouts(options.layouts)
    return [x for n in options.devices or (devices,) for x in scaling.layouts_of(n)]


def _without_kernels(config: ConfigDict) -> None:
    """Lets a config use products alone: the same work, which compiles without its devices."""
    if config.model.get("attention") == "cudnn":
        config.model.attention = "xla"


def _topologies(config: ConfigDict, options: argparse.Namespace) -> None:
    """Compiles programs for TPUs that need not be there, and reports what they need."""
    _without_kernels(config)
    assumptions = accelerators.Assumptions(options.of_flops, options.of_bandwidth)
    attempts = _attempts(config, options)
    found: list[tuple[accelerators.Topology, tpu_programs.Row]] = []
    # All of them before the first compilation, which takes minutes.
    wanted = [accelerators.topology(name) for name in options.topology]
    placed = [
        (topology, sizes, tpu_programs.mesh_of(topology, sizes))
        for topology in wanted
        for sizes in _layouts(options, len(topology.devices))
    ]
    for topology, sizes, mesh in placed:
        for setting, attempt in attempts.items():
            name = f"{topology.name}, {scaling.name_of(sizes)}, {setting}"
            tries = _tries(options, config, name, mesh, functools.partial(attempt, topology, mesh))
            row = tpu_programs.Row(topology.name, scaling.name_of(sizes), setting, tries)
            found.append((topology, row))
            result = {
                "benchmark": "scaling",
                "config": options.config,
                "jax": jax.__version__,
                "hardware": [dataclasses.asdict(x.hardware) for x in wanted],
                "assumptions": dataclasses.asdict(assumptions),
                "rows": [row.json() for _, row in found],
            }
            if options.json not in (None, "", "-"):  # a row takes minutes: none is lost
                files.write_json(options.json, result)
    title = f"{pathlib.Path(options.config).stem}, compiled for TPUs by jax {jax.__version__}"
    _report(
        options, f"{title}\n\n{topology_report.topologies_markdown(found, assumptions)}", result
    )


def _tries(
    options: argparse.Namespace,
    config: ConfigDict,
    name: str,
    mesh: jax.sharding.Mesh,
    attempt: Callable[[int], tpu_programs.Found],
) -> tuple[tpu_programs.Found, ...]:
    """Compiles for one batch, or for some until the largest that fits is found."""

    def report(found: tpu_programs.Found) -> None:
        verdict = "fits" if found.fits else "does not fit"
        print(
            f"{name}: batch {found.batch_size} needs {found.needed / 1e9:.4g} GB: {verdict} "
            f"({found.compile_seconds:.0f} s)",
            file=sys.stderr,
        )

    def told(batch: int) -> tpu_programs.Found:
        print(f"{name}: compiling for a batch of {batch}, which may take minutes", file=sys.stderr)
        return attempt(batch)

    ways = sharding.batch_ways(mesh)
    if options.batch == "fit":
        first = config.train.batch_size
        return batch_fit.fit_compiled(told, first=first, ways=ways, report=report)
    batch = options.batch or config.train.batch_size
    if batch % ways:
        raise ValueError(f"a batch of {batch} images cannot be divided among {ways} devices")
    found = told(batch)
    report(found)
    return (found,)


def _attempts(
    config: ConfigDict, options: argparse.Namespace
) -> dict[str, Callable[..., tpu_programs.Found]]:
    """Returns what is compiled, by its name: functions of a topology, a mesh and a batch."""
    if config.task == "vqgan":
        if options.sampler or options.remat:
            raise ValueError(f"--sampler and --remat need a transformer's config: {options.config}")
        tokenizer = setup.make_vqgan_task(config, config.train.batch_size)
        rules = config.sharding.rules
        rules = vqgan_task.RULES if rules is None else rules
        return {
            "training": lambda topology, mesh, batch: tpu_programs.tokenizer_training(
                tokenizer, topology, mesh, rules, batch
            )
        }
    if config.task != "enat":
        raise ValueError(f"{options.config}: task={config.task!r}; give one of 'enat' or 'vqgan'")
    if options.sampler:
        model = setup.make_model(config)
        codec = None
        if options.tokenizer_config:
            of_codec = setup.load_config(options.tokenizer_config, task="vqgan")
            codec = setup.make_codec(of_codec, model.dtype)
        settings = sampling.Settings(**config.sampler.to_dict())
        return {
            "sampler, images" if codec else "sampler, tokens": (
                functools.partial(tpu_programs.sampler, model, codec, settings)
            )
        }
    if options.tokenizer_config:
        raise ValueError("--tokenizer-config is of the sampler's image decoder: give --sampler too")
    rules = enat_task.RULES if config.sharding.rules is None else config.sharding.rules
    attempts: dict[str, Callable[..., tpu_programs.Found]] = {}
    for remat in options.remat or (config.model.remat,):
        config.model.remat = remat
        task = setup.make_task(config, config.train.batch_size)
        shapes: dict[str, shape_buckets.Bucket | None] = {"largest shape": None}
        if options.shapes:
            found = scaling.chosen_buckets(task, options.shapes)
            shapes = {_shape_name(bucket, share): bucket for bucket, share, _ in found}
        for name, bucket in shapes.items():
            attempts[f"remat={remat}, {name}"] = functools.partial(_train_on, task, rules, bucket)
    return attempts


def _shape_name(bucket: shape_buckets.Bucket, share: float) -> str:
    cached = "{}-{} cached".format(*bucket.cached) if bucket.reuse else "no reuse"
    return "{}-{} visible, ".format(*bucket.visible) + f"{cached}, {share:.1%} of steps"


def _train_on(
    task: enat_task.Task,
    rules: Any,
    bucket: shape_buckets.Bucket | None,
    topology: accelerators.Topology,
    mesh: jax.sharding.Mesh,
    batch: int,
) -> tpu_programs.Found:
    return tpu_programs.training(task, topology, mesh, rules, batch, bucket)


# --- results --------------------------------------------------------------------------------


def _report(options: argparse.Namespace, text: str, result: dict[str, Any]) -> None:
    """Prints words for people, on stderr if the JSON goes to stdout, and writes the JSON."""
    if options.json == "-":
        print(text, file=sys.stderr)
        print(json.dumps(result, indent=2))
        return
    print(text)
    if options.json:
        files.write_json(options.json, result)


def _model(config: ConfigDict, model: Transformer) -> dict[str, Any]:
    return {"kind": config.model.kind, **model_files.settings_of(model)}


def _describe(config: ConfigDict, model: Transformer) -> str:
    dims = costs.dims_of(model)
    layers = dims.mixed_layers or f"{dims.encoder_layers}+{dims.decoder_layers}"
    return (
        f"{config.model.kind} of {layers} layers, width {model.width}, {model.num_tokens} tokens; "
        f"{model.dtype}"
    )


if __name__ == "__main__":
    cli.run(main)
