"""The whole way from labels to images as one file that runs without this package (``jax.export``).

The file has the program for CPU, NVIDIA GPU and TPU, and any number of images; weights are
arguments, those of the safetensors files of a model directory as they are. A program with the
weights inside would hold them once more, and could not exceed the 2 GB of a serialized module.
JSON beside it says what its arguments are. The program is that of ``Generator`` on one device:
jax reads such files for half a year or longer, so the model directory stays what to keep.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export

from enat_jax.inference import sampling, tokenizer

FORMAT = "enat_jax compiled sampler 1"
PLATFORMS = ("cpu", "cuda", "tpu")
SCHEDULE = ("guidance", "token_temperature", "mask_temperature")  # arguments, a value a step
WEIGHTS = {"transformer": "transformer.safetensors", "tokenizer": "tokenizer/params.safetensors"}


def make(generator):
    """Export the sampler and the image decoder of a generator, with its settings.

    Args:
        generator: ``Generator``.

    Returns:
        ``(program, description)``: bytes for ``jax.export.deserialize``, whose function takes

            weights: {"transformer": {name: array}, "tokenizer": {name: array}}, what
                ``safetensors.numpy.load_file`` gives of the files ``WEIGHTS``,
            labels: int32 [b], in 0..num_classes, which is not checked; image_index: int32 [b],
            seed: uint32 [2], (0, seed) for a seed below 2**32,
            schedule: {name: float32 [t]} of ``SCHEDULE``

        and gives uint8 [b, h, w, c] for any b >= 1; JSON values that say the same, and the
        schedule of the settings.
    """
    codec = generator.tokenizer
    kept = {"transformer": generator.params, "tokenizer": codec.params}
    kept = {k: _shapes(traverse_util.flatten_dict(v, sep="/")) for k, v in kept.items()}
    static, inputs = sampling.make_schedule(generator.settings, generator.model)
    model = generator.model.clone(attention="xla")  # cuDNN's kernels are of one platform alone
    rows, columns = codec.grid

    def sample(weights, labels, image_index, seed, schedule):
        # In the files they are float32, whatever the generator computes with.
        weights = jax.tree.map(lambda x, like: x.astype(like.dtype), weights, kept)
        params = {k: traverse_util.unflatten_dict(v, sep="/") for k, v in weights.items()}
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        steps = inputs._replace(**schedule)
        tokens = sampling.sample_tokens(
            model, static, steps, params["transformer"], labels, image_index, key
        )
        grids = tokens.reshape(tokens.shape[0], rows, columns)
        return tokenizer.decode(codec.model, params["tokenizer"], grids)

    (b,) = export.symbolic_shape("b", constraints=["b >= 1"])
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), kept)
    schedule = {name: np.asarray(getattr(inputs, name)) for name in SCHEDULE}
    integers = jax.ShapeDtypeStruct((b,), jnp.int32)
    exported = export.export(jax.jit(sample), platforms=PLATFORMS)(
        weights, integers, integers, jax.ShapeDtypeStruct((2,), jnp.uint32), _shapes(schedule)
    )
    description = {
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
            "labels": f"int32 [b], 0 to {model.num_classes}; {model.num_classes} means no class",
            "image_index": "int32 [b], numbers of the images within the seed",
            "seed": "uint32 [2]: 0 and the seed",
            "schedule": f"{{name: float32 [{len(inputs.step)}]}}, a value a step; to be scaled "
            "at will: a guidance of 0 stays 0, a greedy sampler stays greedy",
        },
        "result": f"uint8 [b, {', '.join(map(str, _image_shape(codec)))}]",
        "dtype": str(model.dtype),
        "settings": dataclasses.asdict(generator.settings),
        "schedule": {name: values.tolist() for name, values in schedule.items()},
    }
    return bytes(exported.serialize()), description


def _image_shape(codec):
    return *codec.image_size, codec.model.image_channels


def _shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
