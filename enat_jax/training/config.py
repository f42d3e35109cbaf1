"""The config of a training run: its sections, the loop's settings, and what a run depends on."""

import dataclasses
import json

from enat_jax.runtime import sharding
from enat_jax.training import classifier_task, enat_task, optim, vqgan_task

TASKS = {"vqgan": vqgan_task, "enat": enat_task, "classifier": classifier_task}
SECTIONS = {
    "vqgan": {"model", "data", "loss", "optimizer", "train", "sharding"},
    "enat": {
        *("model", "data", "mask", "training", "sampler", "optimizer", "train", "sharding"),
        "evaluation",
    },
    "classifier": {"model", "data", "loss", "optimizer", "train", "sharding"},
}

OPTIONAL = {"sharding", "evaluation"}

# Settings that change speed and rounding alone, so that a run may go on elsewhere with others.
SPEED = [("model", name) for name in ("remat", "attention", "unroll")]


@dataclasses.dataclass(frozen=True)
class Loop:
    """The section ``train`` of a config; all intervals in steps.

    Attributes:
        batch_size: images of a step, over all devices.
        num_steps: of the whole run.
        accumulate: micro-batches that a step's batch is cut into, each with its own token counts;
            the update is that of their mean gradient.
        log_every, eval_every, save_every: intervals; evaluation and saving happen at the end too.
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

    def __post_init__(self):
        intervals = ("log_every", "eval_every", "save_every")
        for name in ("batch_size", "num_steps", "accumulate", *intervals, "keep", "max_skipped"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"train.{name}={value!r} must be a whole number of at least 1")
        if self.hang_timeout is not None and not self.hang_timeout > 0:
            raise ValueError(f"train.hang_timeout={self.hang_timeout!r} must be positive or None")
        if self.best_metric and self.eval_every % self.save_every:
            raise ValueError(
                f"train.eval_every={self.eval_every} must be a multiple of "
                f"train.save_every={self.save_every} for train.best_metric: what is not saved "
                "cannot be kept as the best"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.batch_size={self.batch_size} is not divisible by "
                f"train.accumulate={self.accumulate}"
            )


def build(config):
    """Settings of loop, sharding and optimizer, and the task of a config; unknown keys raise."""
    if config.get("task") not in TASKS:
        raise ValueError(f"task={config.get('task')!r} is unknown: one of {sorted(TASKS)}")
    expected = SECTIONS[config.task] | {"task", "seed"}
    unknown, missing = set(config) - expected, expected - set(config) - OPTIONAL
    if unknown or missing:
        raise ValueError(
            f"a config of task {config.task!r} has no sections {sorted(unknown)} "
            f"and needs {sorted(missing)}"
        )
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} must lie in [0, 2**32)")
    try:
        loop = Loop(**config.train.to_dict())
        policy = sharding.Sharding(**config.get("sharding", {}))
        optimizer = optim.Optimizer(**config.optimizer.to_dict())
        task = TASKS[config.task].make(config, loop.batch_size // loop.accumulate)
        if loop.best_metric and loop.best_metric not in task.evaluated:
            raise ValueError(
                f"train.best_metric={loop.best_metric!r} is not evaluated here, only "
                f"{', '.join(task.evaluated) or 'nothing: there is no held-out set'}"
            )
        return loop, policy, optimizer, task
    except TypeError as error:
        # A dataclass names the key that it does not know, or that it needs.
        if "unexpected keyword" in str(error) or "required positional" in str(error):
            raise ValueError(f"config: {error}") from error
        raise


def identity(config, task):
    """What a checkpoint must have been made with to be continued, as JSON values."""
    values = json.loads(config.to_json_best_effort())
    others = ("data", "train", "sampler", "sharding", "evaluation")
    kept = {k: v for k, v in values.items() if k not in others}
    for section, name in SPEED:
        kept.get(section, {}).pop(name, None)
    kept["batch_size"] = config.train.batch_size
    kept["accumulate"] = config.train.get("accumulate", 1)
    kept["data"] = task.data_identity()
    settings = config.optimizer
    if settings.get("schedule", "constant") != "constant" and settings.get("decay_steps") is None:
        kept["num_steps"] = config.train.num_steps  # the learning rate depends on it
    return kept
