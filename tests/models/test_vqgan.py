"""The tokenizer's network reproduces the reference on a small model with random weights."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from enat_jax.models import conversion, vqgan

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "vqgan.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def state_dict(golden):
    return {k.removeprefix("param:"): v for k, v in golden.items() if k.startswith("param:")}


@pytest.fixture(scope="module")
def model(golden):
    config = json.loads(str(golden["config"]))
    assert config["z_channels"] == config["embed_dim"]
    return vqgan.VQGAN(
        channels=config["ch"],
        channel_multipliers=tuple(config["ch_mult"]),
        num_res_blocks=config["num_res_blocks"],
        embed_dim=config["embed_dim"],
        codebook_size=config["n_embed"],
    )


@pytest.fixture(scope="module")
def variables(state_dict, model):
    return {"params": conversion.vqgan_params(state_dict, model)}


def nhwc(array):
    return array.astype(np.float32).transpose(0, 2, 3, 1)


def test_encoder_and_codes_are_the_reference_s(model, variables, golden):
    z = model.apply(variables, nhwc(golden["images_nchw"]), method="encode")
    np.testing.assert_allclose(z, nhwc(golden["encoder_out_nchw"]), atol=1e-4)
    ids, codes = model.apply(variables, z, method="quantize")
    np.testing.assert_array_equal(ids, golden["token_ids"])
    np.testing.assert_array_equal(codes, variables["params"]["codebook"][golden["token_ids"]])


def test_reconstruction_is_the_reference_s(model, variables, golden):
    images = jax.jit(model.apply)(variables, nhwc(golden["images_nchw"]))
    np.testing.assert_allclose(images, nhwc(golden["reconstruction_nchw"]), atol=1e-4)


def test_decoded_codes_are_the_reference_s(model, variables, golden):
    # The parameters are numpy arrays and the codes traced.
    decode = jax.jit(lambda codes: model.apply(variables, codes, method="decode_codes"))
    images = decode(golden["codes"])
    np.testing.assert_allclose(images, nhwc(golden["decoded_codes_nchw"]), atol=1e-4)


def test_parameters_go_back_to_the_reference(variables, state_dict, model):
    tensors = conversion.revert(variables["params"], conversion.vqgan_table(model), state_dict)
    for name, tensor in state_dict.items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)


def test_the_wrong_configuration_is_refused_with_a_list(state_dict, model):
    with pytest.raises(ValueError, match="down_0_2/conv1/kernel") as error:
        conversion.vqgan_params(state_dict, model.clone(num_res_blocks=3, codebook_size=32))
    assert "quantize.embedding.weight" in str(error.value)


def test_layout_of_the_faithful_tokenizer():
    model = vqgan.VQGAN()
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    shapes = {k: v.shape for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    assert shapes["codebook"] == (1024, 256)
    assert shapes["encoder/conv_in/kernel"] == (3, 3, 3, 128)
    assert "encoder/conv_in/bias" not in shapes
    assert shapes["encoder/conv_out/kernel"] == (1, 1, 512, 256)
    assert shapes["decoder/conv_in/bias"] == (512,)
    # The shortcut takes the block's output, so it is square.
    assert shapes["encoder/down_2_0/shortcut/kernel"] == (1, 1, 256, 256)
    assert shapes["decoder/up_1_0/conv1/kernel"] == (3, 3, 256, 128)
    assert "decoder/upsample_0/kernel" not in shapes
    assert not [k for k in shapes if "/conv1/bias" in k or "/conv2/bias" in k or "shortcut/b" in k]
    ids, _ = jax.eval_shape(
        lambda p, x: model.apply(p, model.apply(p, x, method="encode"), method="quantize"),
        {"params": params},
        images,
    )
    assert (ids.shape, ids.dtype) == ((1, 16, 16), jnp.int32)


def small(**settings):
    return vqgan.VQGAN(
        **{
            "channels": 8,
            "channel_multipliers": (1, 2),
            "num_res_blocks": 1,
            "embed_dim": 4,
            "codebook_size": 16,
            "num_groups": 4,
            "image_channels": 1,
        }
        | settings
    )


def test_half_precision_leaves_parameters_and_outputs_float32():
    model = small(dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.apply, variables, images).dtype == jnp.float32
    # Lowered only: half-precision convolutions are very slow to compile for a CPU.
    network = jax.jit(model.apply).lower(variables, images).as_text()
    convolutions = [line for line in network.splitlines() if "stablehlo.convolution" in line]
    assert convolutions and all("bf16" in line for line in convolutions)


def test_the_nearest_code_is_found():
    model = small()
    codebook = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    z = jax.random.normal(jax.random.key(1), (2, 3, 5, 4))
    ids, codes = model.apply({"params": {"codebook": codebook}}, z, method="quantize")
    distances = np.square(np.asarray(z)[..., None, :] - codebook).sum(-1)
    np.testing.assert_array_equal(ids, distances.argmin(-1))
    np.testing.assert_array_equal(codes, codebook[np.asarray(ids)])


def test_what_cannot_be_is_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="9x8 pixels"):
        small().init(key, jnp.zeros((1, 9, 8, 1)))
    with pytest.raises(ValueError, match="3 channels"):
        small().init(key, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="num_groups=3 must divide"):
        small(num_groups=3).init(key, jnp.zeros((1, 8, 8, 1)))
