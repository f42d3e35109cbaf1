"""The program from labels or prompts to images in a file that runs without this package.

``jax.export`` writes it. The file has the program for CPU, NVIDIA GPU and TPU, and for any number
of images. Its weights are arguments: those of the safetensors files of a model directory, as they
are. A program with the weights inside would hold them once more, and could not exceed the 2 GB of a
serialized module. JSON beside it describes the arguments. The program is that of ``Generator`` on
one device. JAX reads such files for half a year at least, so it is the model directory that should
be kept.
"""

import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export
from jaxtyping import Array, Float, Int, PyTree, UInt8, UInt32

from enat_jax.inference import sampler_schedule, sampling, tokenizer
from enat_jax.inference.generator import Generator
from enat_jax.models.blocks import Prompt
from enat_jax.runtime import files, numerics

FORMAT = "enat_jax compiled sampler 1"
PLATFORMS = ("cpu", "cuda", "tpu")
SCHEDULE = ("guidance", "token_temperature", "mask_temperature")  # fields of StepInputs
WEIGHTS = {"transformer": "transformer.safetensors", "tokenizer": "tokenizer/params.safetensors"}


def write(generator: Generator, directory: pathlib.Path) -> None:
    """Writes what ``make`` returns, as ``sampler.jaxexport`` and ``sampler.json``, and opens it."""
    program, description = make(generator)
    path = directory / "sampler.jaxexport"
    files.write_atomically(path, program)
    export.deserialize(bytearray(path.read_bytes()))
    files.write_json(directory / "sampler.json", description)


def make(generator: Generator) -> tuple[bytes, dict[str, Any]]:
    """Exports the sampler and the image decoder of a generator, with its settings.

    Returns:
        Bytes for ``jax.export.deserialize``, and JSON values that describe the program and give
        the schedule of the settings. The function of the program returns uint8 images
        [b, h, w, c], for any b >= 1, and takes

            weights: {"transformer": {name: array}, "tokenizer": {name: array}}, which
                ``safetensors.numpy.load_file`` reads from the files ``WEIGHTS``,
            labels: int32 [b], 0 <= label <= num_classes, which is not checked,
            image_index: int32 [b],
            seed: uint32 [2], (0, seed) for a seed below 2**32,
            schedule: {name: float32 [t]}, with the names ``SCHEDULE``,

        and of a model of texts

            prompt: (tokens, lengths): words, int32 [b, p], or states of the text encoder, float16
                [b, p, e], for p = ``text_tokens``; and int32 [b],
            null_prompt: likewise for b = 1, the empty text or a negative prompt.
    """
    codec = generator.tokenizer
    kept = {"transformer": generator.params, "tokenizer": codec.params}
    kept = {k: _shapes(traverse_util.flatten_dict(v, sep="/")) for k, v in kept.items()}
    static, inputs = sampler_schedule.make(generator.settings, generator.model, grid=codec.grid)
    model = generator.model.clone(attention="xla")  # cuDNN's kernels are of one platform alone
    rows, columns = codec.grid

    def sample(
        weights: dict[str, dict[str, Array]],
        labels: Int[Array, " b"],
        image_index: Int[Array, " b"],
        seed: UInt32[Array, "2"],
        schedule: dict[str, Float[Array, " t"]],
        *texts: tuple[Array, Array],
    ) -> UInt8[Array, "b h w c"]:
        # In the files they are float32, whatever the generator computes with.
        weights = jax.tree.map(lambda x, like: x.astype(like.dtype), weights, kept)
        params = {k: traverse_util.unflatten_dict(v, sep="/") for k, v in weights.items()}
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        steps = inputs._replace(**schedule)
        prompts = itertools.starmap(Prompt, texts)
        tokens = sampling.sample_tokens(
            model, static, steps, params["transformer"], labels, image_index, key, *prompts
        )
        grids = tokens.reshape(tokens.shape[0], rows, columns)
        return tokenizer.decode(codec.model, params["tokenizer"], grids)

    (b,) = export.symbolic_shape("b", constraints=["b >= 1"])
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), kept)
    schedule = {name: np.asarray(getattr(inputs, name)) for name in SCHEDULE}
    integers = jax.ShapeDtypeStruct((b,), jnp.int32)
    seed = jax.ShapeDtypeStruct((2,), jnp.uint32)
    exported = numerics.pinned()(export.export(jax.jit(sample), platforms=PLATFORMS))(
        *(weights, integers, integers, seed, _shapes(schedule)), *_prompts(generator, b)
    )
    return bytes(exported.serialize()), _description(generator, exported, schedule)


def _prompts(generator: Generator, b: Any) -> list[tuple[jax.ShapeDtypeStruct, ...]]:
    """Returns the shapes of the prompts of b images and of the null prompt."""
    if generator.text is None:
        return []
    null = _shapes(tuple(generator.text.null_prompt))
    return [tuple(jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in null), null]


def _description(
    generator: Generator, exported: export.Exported, schedule: dict[str, Float[np.ndarray, " t"]]
) -> dict[str, Any]:
    codec, num_classes = generator.tokenizer, generator.model.num_classes
    image_shape = (*codec.image_size, codec.model.image_channels)
    num_steps = generator.settings.num_steps
    return {
        "format": FORMAT,
        "platforms": list(exported.platforms),
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
        "weights": WEIGHTS,
        "fingerprint": {
            "transformer": generator.fingerprint,
            "tokenizer": codec.fingerprint,
        },
        "arguments": {
            "weights": "{name: {tensor: float32}} of the files above",
            "labels": f"int32 [b], 0 to {num_classes}; {num_classes} means no class",
            "image_index": "int32 [b], numbers of the images within the seed",
            "seed": "uint32 [2]: 0 and the seed",
            "schedule": f"{{name: float32 [{num_steps}]}}, a value a step; to be scaled "
            "at will: a guidance of 0 stays 0, a greedy sampler stays greedy",
            **_of_texts(generator),
        },
        "result": f"uint8 [b, {', '.join(map(str, image_shape))}]",
        "dtype": str(generator.model.dtype),
        "settings": generator.settings.described(),
        "schedule": {name: values.tolist() for name, values in schedule.items()},
        **({} if generator.text is None else {"text": generator.text.description()}),
    }


def _of_texts(generator: Generator) -> dict[str, str]:
    """Returns what the description says of the arguments that are prompts."""
    if generator.text is None:
        return {}
    text = generator.text
    tokens = f"int32 [b, {text.context}], words"
    if text.width is not None:
        tokens = f"float16 [b, {text.context}, {text.width}], states of the text encoder"
    return {
        "prompt": f"({tokens}, and int32 [b], tokens of each text, its start included)",
        "null_prompt": "likewise for b = 1: the empty text, or a negative prompt",
    }


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
