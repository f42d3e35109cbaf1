"""What is measured, from the files of configs: models and tasks without their data."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import ml_collections
from jaxtyping import PyTree

from enat_jax.models import transformers, vqgan
from enat_jax.models.transformers import Transformer
from enat_jax.runtime import numerics
from enat_jax.training import config as train_config
from enat_jax.training import enat_task


def load_config(
    path: str, overrides: Sequence[str] = (), task: str = "enat"
) -> ml_collections.ConfigDict:
    """Returns the complete config of a file with ``overrides`` applied.

    Args:
        path: of the file.
        overrides: arguments such as ``--config.model.width=64``.
        task: that the config must be of.

    Raises:
        FileNotFoundError: there is no such file.
        absl.flags.Error, ValueError: it is of another task, or a setting is unknown or wrong.
    """
    config = train_config.load(path, overrides)
    if config.task != task:
        raise ValueError(f"{path}: task={config.task!r}, but task={task!r} is needed here")
    return train_config.complete(config)


def make_model(config: ml_collections.ConfigDict, dtype: str | None = None) -> Transformer:
    """Returns the transformer of a config, with another compute dtype if one is given.

    Raises:
        ValueError: a size of the model is not set.
    """
    values = train_config.complete(config).model.to_dict()
    if unset := [f"config.model.{name}" for name, value in values.items() if value is None]:
        raise ValueError(f"{', '.join(unset)} must be set: there are no tokens to take them from")
    model = transformers.MODELS[values.pop("kind")](**values)
    return model if dtype is None else model.clone(dtype=dtype)


def init_model(model: Transformer) -> PyTree:
    """Returns fresh random parameters; pure, so that their shapes can be had without them."""
    ids, labels = jnp.zeros((1, model.num_tokens), jnp.int32), jnp.zeros((1,), jnp.int32)
    return model.init(numerics.key(0), ids, labels)["params"]


def make_codec(config: ml_collections.ConfigDict, dtype: str) -> vqgan.VQGAN:
    """Returns the VQGAN of a config, which must be of the task "vqgan", in a compute dtype."""
    return vqgan.VQGAN(**config.model.to_dict() | {"dtype": dtype})


def make_task(
    config: ml_collections.ConfigDict,
    batch_size: int,
    max_shapes: int | None = None,
    dtype: str | None = None,
) -> enat_task.Task:
    """Returns the training task of a config without its data, which the compiled step never sees.

    Args:
        config: of the task "enat".
        batch_size: images of a step.
        max_shapes: compiled shapes; None: the config's.
        dtype: of the computation; None: the config's.

    Raises:
        ValueError: a setting is wrong, or a size of the model is not set.
    """
    if batch_size < 1:
        raise ValueError(f"{batch_size=} must be at least 1")
    config = train_config.complete(config)
    config.loss.words_from_codebook = False  # there is no codebook
    if max_shapes is not None:
        config.loss.max_shapes = max_shapes
    no_data: Any = None
    model = make_model(config, dtype)
    return enat_task.assemble(
        config, model, batch_size, tokens=no_data, held_out=None, tokenizer=no_data
    )
