"""What is measured, from the files of configs: models and tasks without their data."""

import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import PyTree

from enat_jax.data import clip_tokens, text_tokens
from enat_jax.inference import clip_model, text_encoder
from enat_jax.models import clip, clip_names, perceptual, transformers, vqgan
from enat_jax.models.blocks import Prompt
from enat_jax.models.transformers import Transformer
from enat_jax.runtime import numerics
from enat_jax.training import adversarial, enat_task, optim, vqgan_task
from enat_jax.training import config as train_config

# What a config may leave to its tokens and captions.
SIZES = ("num_tokens", "codebook_size", "num_classes")
CLIP_LAYERS = {512: 12, 768: 12, 1024: 24, 1280: 32}  # of the published text towers, by width


def load_config(
    path: str, overrides: Sequence[str] = (), task: str | None = "enat"
) -> ml_collections.ConfigDict:
    """Returns the complete config of a file with ``overrides`` applied.

    Args:
        path: of the file.
        overrides: arguments such as ``--config.model.width=64``.
        task: that the config must be of; None: any.

    Raises:
        FileNotFoundError: there is no such file.
        absl.flags.Error, ValueError: it is of another task, or a setting is unknown or wrong.
    """
    config = train_config.load(path, overrides)
    if task is not None and config.task != task:
        raise ValueError(f"{path}: task={config.task!r}, but task={task!r} is needed here")
    return train_config.complete(config)


def make_model(config: ml_collections.ConfigDict, dtype: str | None = None) -> Transformer:
    """Returns the transformer of a config, with another compute dtype if one is given.

    Raises:
        ValueError: a size of the model is not set.
    """
    config = train_config.complete(config)
    values = config.model.to_dict()
    unset = [f"config.model.{name}" for name in SIZES if values[name] is None]
    if config.data.captions:
        if values.get("text_width") is None and values.get("text_vocabulary") is None:
            unset.append("config.model.text_vocabulary or text_width")
        if not values.get("text_tokens"):
            unset.append("config.model.text_tokens")
    if unset:
        raise ValueError(
            f"{', '.join(unset)} must be set: there are no tokens and captions to take them from"
        )
    kind = values.pop("kind")
    model = transformers.MODELS[kind](**{k: v for k, v in values.items() if v is not None})
    return model if dtype is None else model.clone(dtype=dtype)


def init_model(model: Transformer) -> PyTree:
    """Returns fresh random parameters; pure, so that their shapes can be had without them."""
    ids, labels = jnp.zeros((1, model.num_tokens), jnp.int32), jnp.zeros((1,), jnp.int32)
    return model.init(numerics.key(0), ids, labels)["params"]


def make_prompt(model: Transformer, rows: int) -> Prompt | None:
    """Returns random texts for a model, of as many tokens as it takes; None if it takes none."""
    if not getattr(model, "takes_text", False):
        return None
    shape, key = (rows, model.text_tokens), numerics.key(0)
    length = jnp.full(rows, model.text_tokens, jnp.int32)
    if model.text_vocabulary is not None:
        return Prompt(jax.random.randint(key, shape, 0, model.text_vocabulary), length)
    assert model.text_width is not None
    return Prompt(jax.random.normal(key, (*shape, model.text_width), jnp.float16), length)


def make_text(model: Transformer) -> text_encoder.TextEncoder | None:
    """Returns what a training step reads texts with, without weights; None if it reads none.

    A model of states is given the text tower of the published CLIP of their width, whose weights
    are ``jax.ShapeDtypeStruct`` in the model's dtype.

    Raises:
        ValueError: no published CLIP has states of this width.
    """
    if not getattr(model, "takes_text", False):
        return None
    if model.text_vocabulary is not None:
        words = text_tokens.Words(tuple(map(str, range(1, model.text_vocabulary))))
        return text_encoder.TextEncoder(words, model.text_tokens)
    width, dtype = model.text_width, jnp.dtype(model.dtype)
    if width not in CLIP_LAYERS:
        raise ValueError(
            f"config.model.text_width={width} is that of no published CLIP: {list(CLIP_LAYERS)}"
        )
    tower = clip.TextTower(
        vocabulary=text_tokens.Clip.size,
        context=clip_tokens.CONTEXT,
        width=width,
        num_layers=CLIP_LAYERS[width],
        num_heads=width // clip_names.HEAD_CHANNELS,
        hidden=4 * width,
        activation="quick_gelu",
        dtype=dtype.name,
    )
    ids = jnp.zeros((1, tower.context), jnp.int32)
    shapes = numerics.eval_shape(tower.init, numerics.key(0), ids)["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    null = np.zeros((tower.context, width), np.float16)
    found = clip_model.ClipText(
        *(tower, params, text_tokens.Clip.pad, {}, null), saved_fingerprint="none"
    )
    return text_encoder.of_clip(found, model.text_tokens)


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
        config,
        model,
        batch_size,
        tokens=no_data,
        held_out=None,
        tokenizer=no_data,
        text=make_text(model),
    )


def make_vqgan_task(config: ml_collections.ConfigDict, batch_size: int) -> vqgan_task.Task:
    """Returns the training task of a tokenizer's config with all its terms, without its images.

    Weights of the perceptual network are ``jax.ShapeDtypeStruct``.

    Args:
        config: of the task "vqgan".
        batch_size: images of a step.

    Raises:
        ValueError: a setting is wrong, or the size of the images is not set.
    """
    config = train_config.complete(config)
    size, channels = config.data.get("size"), config.model.image_channels
    if size is None:
        raise ValueError("config.data.size must be set: there are no images to take it from")
    height, width = (size, size) if isinstance(size, int) else size

    def judge(
        settings: adversarial.Perceptual, channels: int, dtype: str
    ) -> adversarial.PerceptualLoss | None:
        if settings.kind is None or not settings.weight:
            return None
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype), perceptual.shapes(settings.kind)
        )
        return adversarial.PerceptualLoss(settings, params, "none")

    shared = {
        "source": types.SimpleNamespace(image_shape=(height, width, channels)),
        "held_out": None,
        "optimizer": optim.Optimizer(**config.optimizer).make(config.train.num_steps),
        "seed": config.seed,
        "batch_size": batch_size,
    }
    return vqgan_task.assemble(config, shared, judge)
