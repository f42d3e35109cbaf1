"""TODO."""

import dataclasses
import functools
import os

from absl import flags
from ml_collections import config_flags

from enat_jax.inference import sampling
from enat_jax.models import transformers
from enat_jax.schedules import costs, reveal, shape_buckets
from enat_jax.training import enat_task, optim


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
    if kind not in transformers.MODELS:
        raise ValueError(f"model.kind={kind!r} is unknown: one of {sorted(transformers.MODELS)}")
    model = _splat(transformers.MODELS[kind], "model", **values)
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
