"""A state dict either fits the model in every tensor or is refused with everything said at once.

And back: what the reference would load is what it once saved, bit for bit.
"""

import json
import pathlib

import chex
import jax
import numpy as np
import pytest

from enat_jax.models import conversion, enat, vqgan

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

TABLE = {
    r"head\.weight": ("head/kernel", conversion.DENSE),
    r"head\.bias": ("head/bias", conversion.COPY),
    r"blocks\.([01])\.fc\.weight": (r"encoder/fc[\1]", conversion.DENSE),
    # Two blocks make the encoder, the rest the decoder.
    "blocks.2.fc.weight": ("decoder/fc[0]", conversion.DENSE),
    "blocks.3.fc.weight": ("decoder/fc[1]", conversion.DENSE),
    r"unused\..*": (None, conversion.COPY),
}
TARGET = {
    "head": {"kernel": (3, 5), "bias": (5,)},
    "encoder": {"fc": (2, 3, 4)},
    "decoder": {"fc": (1, 3, 4)},
}
TARGET = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, np.float32), TARGET, is_leaf=lambda s: isinstance(s, tuple)
)


@pytest.fixture
def state_dict():
    rng = np.random.default_rng(0)
    shapes = {"head.weight": (5, 3), "head.bias": (5,), "unused.x": (7,)}
    shapes |= {f"blocks.{i}.fc.weight": (4, 3) for i in range(3)}
    return {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}


def test_layers_are_stacked_and_layouts_changed(state_dict):
    params = conversion.convert(state_dict, TABLE, TARGET)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, TARGET)
    np.testing.assert_array_equal(params["head"]["kernel"], state_dict["head.weight"].T)
    np.testing.assert_array_equal(params["encoder"]["fc"][1], state_dict["blocks.1.fc.weight"].T)
    np.testing.assert_array_equal(params["decoder"]["fc"][0], state_dict["blocks.2.fc.weight"].T)


def test_and_back_again(state_dict):
    params = conversion.convert(state_dict, TABLE, TARGET)
    del state_dict["unused.x"]
    chex.assert_trees_all_equal(conversion.revert(params, TABLE, state_dict), state_dict)
    with pytest.raises(ValueError, match="unused.x.*drops"):
        conversion.revert(params, TABLE, ["unused.x"])


def test_a_convolution_keeps_its_taps():
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # out, in, height, width
    ours = conversion.CONV.forward(kernel)
    assert ours.shape == (4, 5, 3, 2)
    assert ours[1, 2, 0, 1] == kernel[1, 0, 1, 2]
    np.testing.assert_array_equal(conversion.CONV.inverse(ours), kernel)


def test_a_leftover_tensor_is_an_error(state_dict):
    state_dict["surprise"] = np.zeros(1)
    with pytest.raises(ValueError, match="surprise: unknown"):
        conversion.convert(state_dict, TABLE, TARGET)


def test_a_leftover_parameter_is_an_error(state_dict):
    del state_dict["head.bias"]
    with pytest.raises(ValueError, match="head/bias: nothing"):
        conversion.convert(state_dict, TABLE, TARGET)


def test_a_missing_layer_is_named(state_dict):
    del state_dict["blocks.1.fc.weight"]
    with pytest.raises(ValueError, match=r"encoder/fc: layers \[1\] of 2 are missing"):
        conversion.convert(state_dict, TABLE, TARGET)


def test_a_layer_too_many_is_an_error(state_dict):
    state_dict["blocks.3.fc.weight"] = state_dict["blocks.2.fc.weight"]
    with pytest.raises(ValueError, match="layer 1 of decoder/fc, which has 1"):
        conversion.convert(state_dict, TABLE, TARGET)


def test_a_wrong_shape_is_an_error(state_dict):
    state_dict["head.weight"] = np.zeros((5, 4))
    with pytest.raises(ValueError, match=r"head.weight: .*\(4, 5\).*\(3, 5\)") as error:
        conversion.convert(state_dict, TABLE, TARGET)
    assert "nothing in the state dict" not in str(error.value)


def test_two_tensors_for_one_place_are_an_error(state_dict):
    table = TABLE | {r"twin": ("head/bias", conversion.COPY)}
    state_dict["twin"] = state_dict["head.bias"]
    with pytest.raises(ValueError, match="twin: leads to head/bias, which is taken"):
        conversion.convert(state_dict, table, TARGET)


def test_a_tensor_that_two_patterns_match_is_an_error(state_dict):
    table = TABLE | {r"head\..*": ("head/bias", conversion.COPY)}
    with pytest.raises(ValueError, match="ambiguous"):
        conversion.convert(state_dict, table, TARGET)


def test_all_errors_are_said_at_once(state_dict):
    state_dict["surprise"] = np.zeros(1)
    state_dict["head.weight"] = np.zeros((5, 4))
    del state_dict["head.bias"]
    del state_dict["blocks.0.fc.weight"]
    with pytest.raises(ValueError) as error:
        conversion.convert(state_dict, TABLE, TARGET)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 4
    for word in ("surprise", "head.weight", "head/bias", "encoder/fc"):
        assert any(word in line for line in lines)


def test_whole_numbers_are_no_weights(state_dict):
    state_dict["head.bias"] = np.zeros(5, np.int8)
    with pytest.raises(ValueError, match="head.bias: holds int8, not floating point"):
        conversion.convert(state_dict, TABLE, TARGET)


def golden_of(name):
    """Arrays, tensors in float32 and config of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    names = [name for name in arrays if name.startswith("param:")]
    tensors = {name.removeprefix("param:"): arrays[name].astype(np.float32) for name in names}
    return arrays, tensors, json.loads(str(arrays["config"]))


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == np.float32 and found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


ENAT = enat.ENAT(
    num_tokens=64,
    codebook_size=1024,
    num_classes=1000,
    width=32,
    num_heads=4,
    encoder_layers=3,
    decoder_layers=2,
)


def test_every_tensor_of_the_reference_s_enat_comes_back():
    _, tensors, _ = golden_of("enat_forward")
    back = conversion.enat_state_dict(conversion.enat_params(tensors, ENAT), ENAT)
    unused = {k: np.zeros_like(v) for k, v in tensors.items() if k.startswith("prev_embedder.")}
    assert len(unused) == 4  # never used by the reference, dropped here
    same_bits(back, {**tensors, **unused})


def test_a_model_without_reuse_cannot_be_given_to_the_reference():
    with pytest.raises(ValueError, match="no model without reuse"):
        conversion.enat_state_dict({}, ENAT.clone(reuse=False))


def test_every_tensor_of_the_reference_s_vqgan_comes_back():
    _, tensors, config = golden_of("vqgan")
    model = vqgan.VQGAN(
        config["ch"], tuple(config["ch_mult"]), config["num_res_blocks"], config["embed_dim"], 64
    )
    params = conversion.vqgan_params(tensors, model)
    same_bits(conversion.vqgan_state_dict(params, model), tensors)
    # Of a training checkpoint, the losses' networks are not the tokenizer's.
    training = {**tensors, "loss.discriminator.main.0.weight": np.zeros((64, 3, 4, 4), np.float32)}
    chex.assert_trees_all_equal(conversion.vqgan_params(training, model), params)


@pytest.fixture(scope="module")
def maskgit():
    arrays, tensors, config = golden_of("maskgit_tokenizer")
    model = vqgan.VQGAN(
        channels=config["filters"],
        channel_multipliers=tuple(config["channel_multipliers"]),
        num_res_blocks=config["num_res_blocks"],
        embed_dim=config["embedding_dim"],
        codebook_size=config["codebook_size"],
    )
    return arrays, tensors, model


@pytest.fixture(scope="module")
def outputs(maskgit):
    """Features, codes and pictures by our network with MaskGIT's weights, in one compilation."""
    arrays, tensors, model = maskgit
    variables = {"params": conversion.maskgit_params(tensors, model)}

    @jax.jit
    def run(images, codes):
        z = model.apply(variables, images, method="encode")
        ids, _ = model.apply(variables, z, method="quantize")
        both = jax.numpy.concatenate([ids, codes])
        return z, ids, model.apply(variables, both, method="decode_codes")

    return run(arrays["images_nhwc"].astype(np.float32), arrays["codes"])


def test_maskgit_s_tokenizer_is_reproduced(maskgit, outputs):
    arrays, (z, ids, pictures) = maskgit[0], outputs
    np.testing.assert_allclose(z, arrays["encoder_out_nhwc"], atol=1e-4)
    np.testing.assert_array_equal(ids, arrays["token_ids"])
    np.testing.assert_allclose(pictures[:2], arrays["reconstruction_nhwc"], atol=1e-4)
    np.testing.assert_allclose(pictures[2:], arrays["decoded_codes_nhwc"], atol=1e-4)


def test_maskgit_s_blocks_have_their_places():
    """Of 5 levels with 2 blocks, as released."""
    table = conversion.maskgit_table(vqgan.VQGAN())

    expected = {
        "encoder/ResBlock_0/Conv_0/kernel": "encoder/down_0_0/conv1/kernel",
        "encoder/ResBlock_9/GroupNorm_1/scale": "encoder/down_4_1/norm2/scale",
        "encoder/ResBlock_10/Conv_1/kernel": "encoder/mid_0/conv2/kernel",
        "encoder/ResBlock_11/GroupNorm_0/bias": "encoder/mid_1/norm1/bias",
        "decoder/ResBlock_0/Conv_0/kernel": "decoder/mid_0/conv1/kernel",
        "decoder/ResBlock_1/Conv_0/kernel": "decoder/mid_1/conv1/kernel",
        "decoder/ResBlock_2/Conv_2/kernel": "decoder/up_4_0/shortcut/kernel",
        "decoder/ResBlock_11/Conv_1/kernel": "decoder/up_0_1/conv2/kernel",
        "decoder/Conv_0/bias": "decoder/conv_in/bias",
        "decoder/Conv_1/kernel": "decoder/upsample_4/kernel",
        "decoder/Conv_4/kernel": "decoder/upsample_1/kernel",
        "decoder/Conv_5/kernel": "decoder/conv_out/kernel",
        "encoder/Conv_1/bias": "encoder/conv_out/bias",
    }
    target = {path: jax.ShapeDtypeStruct((), np.float32) for path in expected.values()}
    values = {name: np.float32(i) for i, name in enumerate(expected)}
    found = conversion.convert(values, table, target)
    for i, path in enumerate(expected.values()):
        tree = found
        for part in path.split("/"):
            tree = tree[part]
        assert tree == i, path


def test_maskgit_s_other_tokenizers_are_refused(maskgit):
    _, tensors, model = maskgit
    strided = {**tensors, "encoder/Conv_2/kernel": np.zeros((3, 3, 32, 32), np.float32)}
    with pytest.raises(ValueError, match="encoder/Conv_2/kernel: unknown"):
        conversion.maskgit_params(strided, model)
