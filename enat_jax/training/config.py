"""The config of a training run: its file and flags, its sections, and what a run depends on.

A config says what differs from the defaults of the classes that ``SECTIONS`` names; ``complete``
adds the rest.
"""

import dataclasses
import functools
import inspect
import json
import os
import pathlib
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags

from enat_jax.data import image_data, images, token_data
from enat_jax.evaluation import during_training
from enat_jax.inference import sampling
from enat_jax.models import classifier, transformers, vqgan
from enat_jax.runtime import files, numerics, paths, sharding
from enat_jax.schedules import reveal
from enat_jax.training import (
    adversarial,
    classifier_task,
    enat_task,
    optim,
    settings,
    vqgan_task,
)
from enat_jax.training.task import Task

TASKS = {"vqgan": vqgan_task, "enat": enat_task, "classifier": classifier_task}

# Names that sections had in earlier versions, whose configs, runs and command lines go on working.
RENAMED: dict[str, dict[str, str]] = {"enat": {"training": "loss"}, "vqgan": {}, "classifier": {}}

# Settings that change speed and rounding alone, so that a run may go on elsewhere with others.
SPEED = [("model", name) for name in ("remat", "attention", "unroll")]

# Settings that say where a file is, whose contents are compared instead.
PLACES = [("perceptual", "weights")]

# Settings that runs of earlier versions go on without, although the config has them now.
LATER = ("loss.ema_warmup",)

# Sections that may change when a run goes on; the task says what must not change of its data.
FREE = ("data", "train", "sampler", "sharding", "evaluation")


@dataclasses.dataclass(frozen=True)
class Loop:
    """The section ``train`` of a config; all intervals in steps.

    Attributes:
        batch_size: images of a step, over all devices.
        num_steps: of the whole run.
        accumulate: micro-batches that a step's batch is cut into, each with its own token counts;
            the update is that of their mean gradient.
        log_every, eval_every, save_every: intervals; evaluation and saving happen at the end too,
            and what is evaluated is saved before.
        keep, keep_every: checkpoints that stay: the newest, and at multiples of so many steps.
        best_metric, best_mode: of evaluation, such as "held_out/loss_0.5_visible", and "min" or
            "max"; the checkpoint that is best by it stays too. None: none.
        pictures: whether evaluation makes pictures.
        max_skipped: steps in a row whose loss or gradients are not finite before the run stops.
        hang_timeout: seconds without a step, compilation, evaluation and saving aside, after which
            the run ends; None: never.
        matrix_rate: whether to measure the devices' matrix rate at the start, to log what share of
            it training reaches.
        wandb_project: of Weights & Biases, where metrics go too; None: nowhere.
        rehearse: whether a new run, or one with changed settings, first tries all that it will do
            later and once, see ``rehearsal``.
    """

    batch_size: int
    num_steps: int
    accumulate: int = 1
    log_every: int = 100
    eval_every: int = 5000
    save_every: int = 5000
    keep: int = 2
    keep_every: int | None = None
    best_metric: str | None = None
    best_mode: str = "min"
    pictures: bool = True
    max_skipped: int = 10
    hang_timeout: float | None = 1800.0
    matrix_rate: bool = True
    wandb_project: str | None = None
    rehearse: bool = True

    def __post_init__(self) -> None:
        intervals = ("log_every", "eval_every", "save_every")
        for name in ("batch_size", "num_steps", "accumulate", *intervals, "keep", "max_skipped"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"train.{name}={value!r} must be a whole number of at least 1")
        if self.hang_timeout is not None and not self.hang_timeout > 0:
            raise ValueError(f"train.hang_timeout={self.hang_timeout!r} must be positive or None")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.batch_size={self.batch_size} is not divisible by "
                f"train.accumulate={self.accumulate}"
            )


SEED = settings.setting("seed", int, 0)
# The classes that sections describe; see ``schema`` for what is left.
COMMON = {"train": Loop, "optimizer": optim.Optimizer, "sharding": sharding.Sharding}
SECTIONS = {
    "enat": COMMON
    | {
        "data": token_data.Data,
        "mask": reveal.SplitDistribution,
        "loss": enat_task.Loss,
        "sampler": sampling.Settings,
        "evaluation": during_training.Settings,
    },
    "vqgan": COMMON
    | {
        "model": vqgan.VQGAN,
        "data": image_data.Data,
        "loss": vqgan_task.Loss,
        "perceptual": adversarial.Perceptual,
        "discriminator": adversarial.Discriminator,
        "discriminator_optimizer": adversarial.Optimizer,
    },
    "classifier": COMMON
    | {"model": classifier.Classifier, "data": image_data.Data, "loss": classifier_task.Loss},
}


@functools.cache
def schema(task: str, kind: str | None = None) -> dict[str, settings.Settings]:
    """Returns the settings of each section; ``kind`` is of the transformer, None: of all kinds."""
    found = {name: settings.of(made) for name, made in SECTIONS[task].items()}
    if task == "enat":
        models = [transformers.MODELS[kind]] if kind else transformers.MODELS.values()
        found["model"] = {"kind": settings.setting("kind", str, "enat")}
        for model in models:
            found["model"] |= settings.of(model)
        return found
    del found["data"]["settings"]  # stand beside the others
    for name, setting in (x for kind in images.SETTINGS.values() for x in kind.items()):
        found["data"][name] = setting.replace(default=setting.empty)  # each kind has its own
    if task == "classifier":
        for name in ("num_classes", "image_channels"):  # as the data have them
            del found["model"][name]
    return found


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a config with every setting of every section; without value or default it is None.

    Raises:
        ValueError: a section or a setting is unknown, or a value is of another type.
    """
    task = _task(config)
    values = {RENAMED[task].get(name, name): value for name, value in config.to_dict().items()}
    kind = (values.get("model") or {}).get("kind", "enat")
    if task == "enat" and str(kind) not in transformers.MODELS:
        raise ValueError(f"model.kind={kind!r} is unknown: one of {sorted(transformers.MODELS)}")
    sections = schema(task, kind)
    top = {"task": settings.setting("task", str), "seed": SEED}
    settings.refuse_unknown("config", values, top | sections)
    found = settings.complete("config", {k: v for k, v in values.items() if k in top}, top)
    for name, section in sections.items():
        found[name] = settings.complete(f"config.{name}", values.get(name) or {}, section)
    return ml_collections.ConfigDict(found)


def _task(config: ml_collections.ConfigDict) -> str:
    task = config.get("task")
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown: one of {sorted(TASKS)}")
    return task


# --- files and flags ------------------------------------------------------------------------


def define(values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Defines the flag --config FILE, which defines --config.SECTION.SETTING for all settings."""
    parser, words = _ConfigParser(values), "File of the config."
    config = flags.DEFINE(parser, "config", None, words, values, module_name=sys.argv[0])
    values["config"].default_as_str = "'None'"  # absl would leave it out of --help
    return config


def load(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Returns the config of a file with arguments such as ``--config.model.width=64`` applied.

    Raises:
        FileNotFoundError: there is no such file.
        absl.flags.Error: a setting is unknown or has a value of another type.
        ValueError: an argument sets nothing.
    """
    values = flags.FlagValues()  # of its own: a program may have a flag of this name
    config = define(values)
    rest = values(["", f"--config={path}", *overrides])[1:]
    if rest:
        raise ValueError(f"arguments that mean nothing: {' '.join(rest)}")
    return config.value


def keep_what_began(workdir: pathlib.Path, values: flags.FlagValues = flags.FLAGS) -> Iterator[str]:
    """Gives a run that goes on the values that it began with, where the flags leave that open.

    These are values that the config's file makes of the number of steps, see ``scaled`` there, and
    of settings that were not there yet when the run began.

    Args:
        workdir: of the run.
        values: with the flag of ``define``, whose config is changed.

    Yields:
        A sentence for each value that has been changed.

    Raises:
        OSError: ``config.json`` cannot be read.
        ValueError: it is damaged.
    """
    path = workdir / "config.json"
    if not (any((workdir / "checkpoints").glob("[0-9]*")) and path.exists()):
        return
    begun = files.read_json(path, "move it away; nothing else needs it")
    config, parser = values["config"].value, values["config"].parser
    assert config is not None and isinstance(parser, _ConfigParser)
    if not isinstance(begun, dict) or begun.get("task") != config.task:
        return  # which will be refused
    before = {RENAMED[config.task].get(name, name): value for name, value in begun.items()}
    for setting in sorted({*parser.scaled(), *LATER} - parser.given):
        section, name = setting.split(".")
        known, now = before.get(section) or {}, config.get(section) or {}
        if section in FREE or name not in now or (setting in LATER and name in known):
            continue
        value = known.get(name, schema(config.task)[section][name].default)
        if value != now[name]:
            yield f"{setting} stays {value}, as this run began; a new one would have {now[name]}"
            _put(config, setting, value)


def _put(config: ml_collections.ConfigDict, path: str, value: Any) -> None:
    for name in reversed(path.split(".")):
        value = {name: value}
    with config.unlocked(), config.ignore_type():
        config.update(value)


class _ConfigParser(flags.ArgumentParser):
    """Reads ``FILE``, or ``FILE:NAME`` for a ``get_config`` that takes a name.

    A file may say by a function ``scaled`` which settings follow from the number of steps: from
    ``num_steps`` it makes their values, by names such as "optimizer.warmup_steps".

    Attributes:
        given: settings that flags have given, by such names.
        scaled: returns the values of the settings that follow from the number of steps.
    """

    given: set[str]
    scaled: Callable[[], dict[str, Any]]

    def __init__(self, values: flags.FlagValues):
        self._values = values

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        # The path of a file may have a colon, too.
        whole = paths.local(argument).is_file()
        path, *name = [argument] if whole else argument.split(":", 1)
        path = str(paths.local(path))
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no config file {argument}")
        file = runpy.run_path(path)
        config = file["get_config"](*name)
        old_names = RENAMED[_task(config)]
        known = {"seed": SEED} | {
            f"{section}.{name}": setting
            for section, found in schema(config.task).items()
            for name, setting in found.items()
        }
        with config.unlocked():
            for old in old_names.keys() & set(config):
                config[old_names[old]] = config[old]
                del config[old]
        config.lock()

        scaled = file.get("scaled")
        self.given = set()
        self.scaled = lambda: scaled(steps) if scaled and (steps := config.train.num_steps) else {}

        def put(path: str, value: Any) -> None:
            self.given.add(path)
            _put(config, path, value)
            for other, following in self.scaled().items():
                if other not in self.given:
                    _put(config, other, following)

        for path, setting in known.items():
            section, *name = path.split(".")
            for shown in (section, *(old for old, new in old_names.items() if new == section)):
                full = ".".join(["config", shown, *name])
                flag = settings.flag(full, setting, functools.partial(put, path))
                # Among the program's own flags, so that --config FILE --help shows them.
                flags.DEFINE_flag(flag, self._values, module_name=sys.argv[0])
        return config


# --- what a run is made of ------------------------------------------------------------------


def build(
    config: ml_collections.ConfigDict,
) -> tuple[Loop, sharding.Sharding, optim.Optimizer, Task]:
    """Returns settings of loop, sharding and optimizer, and the task of a config.

    Raises:
        ValueError: a setting is unknown, not set, or does not fit the others.
    """
    config = complete(config)
    for section, found in schema(config.task).items():
        # The data have advice of their own; sizes of the model may be left to them.
        for name in found if section not in ("data", "model") else ():
            if config[section][name] is None and found[name].default is inspect.Parameter.empty:
                path = f"config.{section}.{name}"
                raise ValueError(f"{path} is not set: give --{path}={name.upper()}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} must lie in [0, 2**32)")
    try:
        loop = Loop(**config.train)
        policy = sharding.Sharding(**config.sharding)
        optimizer = optim.Optimizer(**config.optimizer)
        task = TASKS[config.task].make(config, loop.batch_size // loop.accumulate)
    except TypeError as error:
        # A network names the setting that it needs.
        if "required positional" in str(error):
            raise ValueError(f"config: {error}") from error
        raise
    if loop.best_metric and loop.best_metric not in task.evaluated:
        raise ValueError(
            f"train.best_metric={loop.best_metric!r} is not evaluated here, only "
            f"{', '.join(task.evaluated) or 'nothing: there is no held-out set'}"
        )
    return loop, policy, optimizer, task


def identity(config: ml_collections.ConfigDict, task: Task) -> dict[str, Any]:
    """Returns what a checkpoint must have been made with to be continued, as JSON values.

    As the config has them, without defaults, and by the names of earlier versions, which can then
    go on from the checkpoint, too.
    """
    values = json.loads(config.to_json_best_effort())
    full = complete(config)
    kept = {k: v for k, v in values.items() if k not in FREE}
    for section, name in SPEED + PLACES:
        kept.get(section, {}).pop(name, None)
    for old, new in RENAMED[config.task].items():
        if new in kept:
            kept[old] = kept.pop(new)
    kept["batch_size"] = full.train.batch_size
    kept["accumulate"] = full.train.accumulate
    kept["data"] = task.data_identity()
    if _depends_on_length(full):
        kept["num_steps"] = full.train.num_steps
    return kept


def _depends_on_length(full: ml_collections.ConfigDict) -> bool:
    """Says whether a step depends on how many there will be: by a rate, or by what has begun."""
    sections = [full.optimizer]
    if full.task == "vqgan" and full.discriminator.weight:
        if full.discriminator.start is None or full.discriminator.ramp_steps is None:
            return True
        sections.append(full.discriminator_optimizer)
    return any(x.schedule != "constant" and x.decay_steps is None for x in sections)


def complete_identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an identity with all defaults: two that mean the same are then equal."""
    renamed = RENAMED[values["task"]]
    values = {renamed.get(name, name): value for name, value in values.items()}
    sections = schema(values["task"], values["model"].get("kind", "enat"))
    filled = {
        name: settings.defaults(section) | values.get(name, {})
        for name, section in sections.items()
        if name not in FREE
    }
    if values.get("data", {}).get("source") == "files":
        # Versions that did not write it down knew no other.
        filled["data"] = {"class_order": "text"} | values["data"]
    return numerics.with_all({"seed": SEED.default} | values | filled)
