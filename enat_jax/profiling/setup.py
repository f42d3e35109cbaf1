"""TODO."""

import dataclasses
import functools

from enat_jax.inference import sampling
from enat_jax.models import transformers
from enat_jax.schedules import costs, reveal, shape_buckets
from enat_jax.training import config as train_config
from enat_jax.training import enat_task, optim


def load_config(path, overrides=(), task="enat"):
    """The complete config of a file, which must be of a task, with ``overrides`` applied.

    Raises:
        FileNotFoundError: there is no such file.
        absl.flags.Error, ValueError: it is of another task, or a setting is unknown or wrong.
    """
    config = train_config.load(path, overrides)
    if config.task != task:
        raise ValueError(f"{path}: task={config.task!r}, but task={task!r} is needed here")
    return train_config.complete(config)


def make_model(config, dtype=None):
    """The transformer of a config, with another compute dtype if one is given."""
    values = train_config.complete(config).model.to_dict()
    if unset := [f"config.model.{name}" for name, value in values.items() if value is None]:
        raise ValueError(f"{', '.join(unset)} must be set: there are no tokens to take them from")
    model = transformers.MODELS[values.pop("kind")](**values)
    return model if dtype is None else model.clone(dtype=dtype)


def make_task(config, batch_size, max_shapes=None, dtype=None):
    """The training task of a config without its data; ``max_shapes`` None: the config's."""
    if batch_size < 1:
        raise ValueError(f"{batch_size=} must be at least 1")
    config = train_config.complete(config)
    model = make_model(config, dtype)
    training = enat_task.Training(**config.loss)
    splits = reveal.SplitDistribution(**config.mask)
    optimizer = optim.Optimizer(**config.optimizer)
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
