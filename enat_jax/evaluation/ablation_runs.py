"""The ablations on CIFAR-10: what the files of their runs say, in one small file of numbers.

``ablation`` says what is in that file. A directory has, of a model NAME of
configs/cifar10_ablation.py, a seed S of its training and T sampling steps,

    NAME/seed_S/run/                      the training
    NAME/steps_T/settings.json            settings that ``search`` found for the model of seed 0,
    NAME/steps_T/report.json              and what its budget was
    NAME/seed_S/steps_T/card.json         ``evaluate`` with these settings
    NAME/seed_S/loss.json                 ``analyze loss``
    NAME/seed_S/reuse/reuse.json          ``analyze reuse``, of models that reuse features
    NAME/seed_S/similarity/similarity.json  ``analyze similarity``, of one model at least
    NAME/seed_S/speed*.json               ``benchmark sampler --json``; all timings count
    NAME/seed_S/machine.json              ``benchmark machine --json`` where it was trained

of which any may be missing: what cannot be had is blank, and nothing stands in its place. Of a
training that has not come to its end the losses on the way are read, and nothing else.
"""

import collections
import dataclasses
import datetime
import json
import math
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from enat_jax.checkpoints import model_files
from enat_jax.evaluation import ablation, reuse_gap, scene_pictures
from enat_jax.inference import generator, masked_scores, sampler_settings, sampling
from enat_jax.models import transformers
from enat_jax.models.transformers import Transformer
from enat_jax.runtime import files, numerics
from enat_jax.schedules import costs, reveal

SPEED = "attention", "remat", "unroll"  # settings of a model that change no result
SAME = {  # of all cards, or their numbers do not compare
    "features": lambda card: card["features"]["label"],
    "images": lambda card: card["images"]["num"],
    "reference_images": lambda card: card["reference"]["description"]["num_images"],
    "reference_split": lambda card: card["reference"]["description"]["source"]["split"],
    "seed": lambda card: card["images"]["seed"],
}


def gather(runs: pathlib.Path) -> tuple[ablation.Result, list[str]]:
    """Reads what there is of the ablations.

    Args:
        runs: the directory of them all.

    Returns:
        The result, JSON values with floats of six digits: "common", what all cards share, and by
        model its sizes, costs (multiply-adds), settings of the sampler, and by seed what was
        measured; pairs are a value and its standard error. By model and seed, in "unfinished", the
        losses on the way of trainings that are not over. And a line about each thing that is
        missing.

    Raises:
        ValueError: there is no run, or a file is damaged, or is not of the model beside it.
        OSError: a file cannot be read.
    """
    there = {path.parent.name for path in runs.glob("*/seed_*")}
    if not there:
        raise ValueError(f"{runs} has no NAME/seed_S: name the directory of the ablations")
    missing: list[str] = []
    models, common, unfinished = ablation.Result(), ablation.Result(), ablation.Result()
    for name in ablation.ordered({*there, *ablation.KNOWN}):
        found = _of_model(runs / name, common, missing)
        if found is not None:
            models[name] = found
        if begun := _unfinished(runs / name):
            unfinished[name] = begun
    if not any("similarity" in seed for x in models.values() for seed in x["seeds"].values()):
        missing.append(f"{runs}: no similarity/similarity.json of any model")
    result = {
        "format": ablation.FORMAT,
        "common": common,
        "models": models,
        "unfinished": unfinished,
    }
    return ablation.rounded(result), missing


def draw(
    runs: pathlib.Path, names: Mapping[str, Any], columns: int, num_steps: int, seed: int
) -> np.ndarray:
    """Draws samples of the models of seed 0, a row each, with the same labels and noise.

    Args:
        runs: as for ``gather``.
        names: of the models; those without a finished training of seed 0 have no row.
        columns: samples of a model, of classes evenly spread.
        num_steps: T; the settings are those that the cards have, or the model's own.
        seed: of the noise.

    Returns:
        uint8 ``[height, width, 3]``.
    """
    rows = {}
    for name in names:
        place = runs / name / "seed_0" / "run" / "model"
        if not place.is_dir():
            continue
        model = generator.Generator.load(place)
        settings = _settings(model.settings, runs / name, num_steps)
        model = model.with_settings(**settings.described())
        labels = np.arange(columns) * len(model.class_names) // columns
        rows[name.replace("_", " ")] = model.sample(labels, seed)
    if not rows:
        raise ValueError(f"{runs} has no NAME/seed_0/run/model to draw from")
    return scene_pictures.labelled(np.stack(list(rows.values())), list(rows))


# --- one model ------------------------------------------------------------------------------


def _of_model(
    directory: pathlib.Path, common: ablation.Result, missing: list[str]
) -> ablation.Result | None:
    """Returns what is known of a model; None without a finished training."""
    size = ablation.end_of(directory.name)
    found = {int(x.name[5:]) for x in directory.glob("seed_*") if x.name[5:].isdecimal()}
    seeds, first, without = {}, None, []
    for seed in sorted(found | set(range(1 if size else ablation.SEEDS))):
        place = directory / f"seed_{seed}"
        path = place / "run" / "model" / "model.json"
        if not path.is_file():
            without.append(place.name)
            continue
        model = files.read_json(path, "train it again")
        with model_files.parsing(path):
            first = model if first is None else first
            if model["model"] != first["model"]:
                raise ValueError(f"{path} is not the model of the other seeds in {directory}")
            ablation.agree(common, "tokenizer", model["fingerprint"]["tokenizer"], str(path))
            steps = model["provenance"]["step"]
            ablation.agree(common, f"training_steps{size}", steps, str(path))
            seeds[str(seed)] = _of_seed(place, model, common, missing)
    if without:
        missing.append(f"{directory}: no finished training in {', '.join(without)}")
    if first is None:
        return None
    network = transformers.MODELS[first["kind"]](**model_files.settings_from(first["model"]))
    own = sampling.Settings(**model_files.settings_from(first["sampler"]))
    settings = {t: _settings(own, directory, t) for t in ablation.STEPS}
    searched = {t: x.described() for t, x in settings.items() if _file(directory, t).is_file()}
    absent = [f"steps_{t}" for t in ablation.STEPS if t not in searched]
    if absent and not directory.name.startswith(ablation.CUT):
        missing.append(f"{directory}: no settings.json in {', '.join(absent)}")
    for t in searched:
        _check_budget(_file(directory, t).with_name("report.json"), common, missing)
    return _sizes(network, first) | {
        "multiply_adds": {
            str(t): costs.exact_sampling_cost(costs.dims_of(network), t) for t in ablation.STEPS
        },
        "multiply_adds_as_drawn": {
            str(t): costs.exact_sampling_cost(
                *(costs.dims_of(network), t),
                guided=x.guidance_weights() > 0,
                counts=x.counts,
            )
            for t, x in settings.items()
        },
        "settings": {str(t): _changes(x, own.described()) for t, x in searched.items()},
        "seeds": seeds,
    }


def _unfinished(directory: pathlib.Path) -> ablation.Result:
    """Returns by seed the losses on the way of a model's trainings that have no model yet."""
    seeds: ablation.Result = {}
    for place in sorted(directory.glob("seed_*"), key=lambda path: path.name):
        run = place / "run"
        if (run / "model" / "model.json").is_file() or not (run / "config.json").is_file():
            continue
        config = files.read_json(run / "config.json", "train it again")
        with model_files.parsing(run / "config.json"):
            batch_size = config["train"]["batch_size"]
        found = _on_the_way(run, batch_size)
        if "curve" not in found:
            continue
        found["steps"] = found["images"] // batch_size
        path = place / "machine.json"
        if path.is_file():
            described = files.read_json(path, "make it again")
            with model_files.parsing(path):
                machine = described["machine"]
                found |= {"machine": _machine(machine), "jax": machine["jax"]}
        seeds[place.name.removeprefix("seed_")] = found
    return seeds


def _check_budget(path: pathlib.Path, common: ablation.Result, missing: list[str]) -> None:
    """Checks that a search had the budget of all others."""
    if not path.is_file():
        missing.append(f"{path.parent}: no {path.name}")
        return
    report = files.read_json(path, "search again")
    with model_files.parsing(path):
        ablation.agree(common, "search_trials", report["trials"], str(path))
        ablation.agree(common, "search_images", report["measure"]["num"], str(path))
        ablation.agree(common, "search_repeats", len(report["rows"][0]["values"]), str(path))


def _file(directory: pathlib.Path, num_steps: int) -> pathlib.Path:
    return directory / f"steps_{num_steps}" / "settings.json"


def _settings(own: sampling.Settings, directory: pathlib.Path, num_steps: int) -> sampling.Settings:
    """Returns the searched settings of so many steps, or the model's own where there are none."""
    path = _file(directory, num_steps)
    given = {} if path.is_file() else {"num_steps": num_steps}
    return sampler_settings.changed(own, path if path.is_file() else None, given)


def _changes(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if own.get(k) != v and k != "num_steps"}


def _sizes(network: Transformer, description: Mapping[str, Any]) -> ablation.Result:
    """Returns layers, width, parameters, and multiply-adds of an image of training, of seed 0."""
    dims, config = costs.dims_of(network), description["provenance"]["config"]
    ids, labels = np.zeros((1, dims.num_tokens), np.int32), np.zeros(1, np.int32)
    shapes = numerics.eval_shape(network.init, numerics.key(0), ids, labels)["params"]
    splits = reveal.SplitDistribution(**config["mask"])
    steps = range(config["train"]["num_steps"])
    counts = collections.Counter(splits.draw(dims.num_tokens, 0, step)[1:] for step in steps)
    # An exported model may have other settings than the one that was trained.
    once = config["model"].get("project_once", False)
    trained = dataclasses.replace(dims, project_once=once)
    work = sum(n * int(costs.exact_training_cost(trained, *split)) for split, n in counts.items())
    layers = (dims.encoder_layers, dims.decoder_layers) if dims.encoder_layers else ()
    return {
        "layers": layers or (dims.mixed_layers,),
        "width": dims.width,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)),
        "training_multiply_adds": round(work / len(steps)),
    }


# --- one training ---------------------------------------------------------------------------


def _of_seed(
    place: pathlib.Path, model: Mapping[str, Any], common: ablation.Result, missing: list[str]
) -> ablation.Result:
    """Returns what was measured of one trained model."""
    absent: list[str] = []
    result = _training(place / "run", model["provenance"], absent)

    def add(name: str, of: Any, needed: bool = True) -> None:
        path = place / name
        if not path.is_file():
            absent.extend([name] * needed)
            return
        values = files.read_json(path, "make it again")
        with model_files.parsing(path):
            if not _is_of(values, model):
                raise ValueError(f"{path} is of another model than {place / 'run'}: make it again")
            result.update(of(path, values))

    reuses, cut = model["model"].get("reuse", False), place.parent.name.startswith(ablation.CUT)
    if reuses:
        once = model["model"].get("project_once", False)
        result["reused"] = reuse_gap.ONCE if once else reuse_gap.EVERY_STEP
    add("machine.json", lambda path, x: {"machine": _machine(x["machine"])})
    add("loss.json", lambda path, x: _loss(x, common))
    add("reuse/reuse.json", lambda path, x: {"reuse": _reuse(x, common)}, reuses)
    add("similarity/similarity.json", lambda path, x: {"similarity": _similarity(x)}, False)
    for t in ablation.STEPS:
        of = lambda path, x: _card(path, x, common, result, place.parent)  # noqa: E731
        add(f"steps_{t}/card.json", of, not cut)
    timed = sorted(place.glob("speed*.json"))
    for path in timed:
        add(path.name, lambda path, x: {"speed": [*result.get("speed", []), *_timings(x)]})
    if timed:
        times = result["speed"]
        result["speed"] = [statistics.median(times), min(times), max(times), len(times)]
    elif place.name == "seed_0":
        absent.append("speed.json")
    if absent:
        missing.append(f"{place}: no {', '.join(absent)}")
    return result


def _is_of(values: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Says whether a file is of a model, or of its sizes, or names none."""
    of = values.get("transformer", values.get("model", {}))
    if isinstance(of, Mapping) and "fingerprint" in of:
        of = of["fingerprint"]["transformer"]
    if isinstance(of, Mapping):  # of the benchmark, whose weights are random
        sizes = model["model"] | {"kind": model["kind"]}
        return all(sizes.get(name, x) == x for name, x in of.items() if name not in SPEED)
    return bool(of == model["fingerprint"]["transformer"])


def _training(
    run: pathlib.Path, provenance: Mapping[str, Any], absent: list[str]
) -> ablation.Result:
    """Returns steps and version of a training, and what ``_on_the_way`` finds."""
    result: ablation.Result = {"steps": provenance["step"], "jax": provenance["versions"]["jax"]}
    found = _on_the_way(run, provenance["config"]["train"]["batch_size"])
    if not found:
        absent.append("run/metrics.jsonl")
    return result | found


def _on_the_way(run: pathlib.Path, batch_size: int) -> ablation.Result:
    """Returns images, seconds and end of a training, and its held-out loss on the way.

    The seconds are without compiling and evaluating; the loss, pairs of an evaluation's step and
    the mean over shares visible, is in "curve". Empty where nothing was written.
    """
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        found = list(map(json.loads, text.splitlines()))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete what is no JSON") from error
    rows = {row["step"]: row for row in found if "seconds_per_step" in row}
    names = [f"held_out/loss_{share:.4g}_visible" for share in masked_scores.VISIBLE_SHARES]
    curve = {x["step"]: statistics.mean(x[n] for n in names) for x in found if names[0] in x}
    if not rows:
        return {}
    steps = sorted(rows)
    seconds = sum(
        rows[b]["seconds_per_step"] * (b - a) for a, b in zip([0, *steps[:-1]], steps, strict=True)
    )
    end = datetime.datetime.fromtimestamp(rows[steps[-1]]["time"], datetime.UTC)
    made: ablation.Result = {"images": steps[-1] * batch_size, "seconds": seconds}
    made |= {"date": end.date().isoformat()}
    return made | ({"curve": sorted(curve.items())} if curve else {})


def _machine(of: Mapping[str, Any]) -> str:
    """Returns a machine as ``benchmark`` and cards describe it, in words."""
    name = of.get("cpu", "cpu") if of["device"] == "cpu" else of["device"]
    return f"{name}, {of['cpus'] if 'cpus' in of else of['num_cpus']} CPUs"


def _loss(found: Mapping[str, Any], common: ablation.Result) -> ablation.Result:
    """Returns mean and error over images by share visible, and of the mean over shares."""
    same = {"visible_shares": found["visible_shares"], "held_out_images": found["num_images"]}
    for name, value in same.items():
        ablation.agree(common, name, value, "loss.json")
    made = [_machine(found["hardware"]), found["date"]]
    return {"loss": [_pairs(found["loss"]), _pairs(found["all"])], "loss_made": made}


def _pairs(mean: Mapping[str, Any]) -> list[Any]:
    """Returns a value and its error, or lists of both, of what ``means`` gave."""
    return [mean["mean"], mean["standard_error"]]


def _reuse(found: Mapping[str, Any], common: ablation.Result) -> ablation.Result:
    """Returns by kind the increase of loss by step and over all of them, and of distance."""
    for name in ("steps", "visible"):
        ablation.agree(common, f"reuse_{name}", found["losses"][name], "reuse.json")
    result: ablation.Result = {"images": found["num_images"]}
    for kind in reuse_gap.KINDS[1:]:
        increase = found["losses"][kind]
        result[kind] = {
            "by_step": _pairs(increase["increase"]),
            "loss": _pairs(increase["all"]["increase"]),
        }
        drawn = found.get("distances", {})
        if kind in drawn:
            result[kind]["distance"] = [x[0] for x in _pairs(drawn[kind]["increase"])]
            result["drawn"] = [found["num_drawn"], len(drawn["seeds"])]
    return result


def _similarity(found: Mapping[str, Any]) -> ablation.Result:
    """Returns by step the share of newly revealed tokens in all of them and in all change."""
    tokens = [x / found["num_tokens"] for x in found["tokens"]["newly revealed"]]
    return {"tokens": tokens, "change": _pairs(found["change_share"]), "num": found["num_images"]}


def _card(
    path: pathlib.Path,
    card: Mapping[str, Any],
    common: ablation.Result,
    result: ablation.Result,
    directory: pathlib.Path,
) -> ablation.Result:
    """Returns the cards of a training with one more."""
    for name, of in SAME.items():
        ablation.agree(common, name, of(card), str(path))
    t = card["sampler"]["num_steps"]
    if path.parent.name != f"steps_{t}":
        raise ValueError(f"{path} is of {t} steps: put it into steps_{t}")
    settings = _file(directory, t)
    if settings.is_file():
        wanted = files.read_json(settings, "search again")["sampler"]
        if wanted != card["sampler"]:
            raise ValueError(f"{path} was not drawn with {settings}: make it again")
    about = {"date": card["date"], "machine": _machine(card["hardware"])}
    numbers = {
        name: [card["metrics"][name][x] for x in ("value", "standard_error")]
        for name in ablation.MEASURES
    }
    return {"cards": result.get("cards", {}) | {str(t): numbers | about}}


def _timings(found: Mapping[str, Any]) -> list[float]:
    """Returns milliseconds an image of all timings of the benchmark's fastest program."""
    rows = [[1e3 * x / row["images"] for x in row["seconds"]] for row in found["rows"]]
    return min(rows, key=statistics.median)
