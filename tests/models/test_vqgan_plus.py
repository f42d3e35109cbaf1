"""MaskBit's VQGAN+ is our network with strided convolutions, by other names."""

import jax
import numpy as np
import pytest
import torch_vqgan_plus

from enat_jax.models import conversion, reference_sizes, vqgan

GOLDEN = np.load(torch_vqgan_plus.FILE)
CODEBOOK = "quantize.embedding.weight"


@pytest.fixture(scope="module")
def tensors():
    return torch_vqgan_plus.weights(torch_vqgan_plus.shapes_of(**torch_vqgan_plus.SMALL))


@pytest.fixture(scope="module")
def model(tensors):
    return reference_sizes.vqgan_of(tensors, None)


@pytest.fixture(scope="module")
def of_bits(tensors):
    """The tensors of the same network with bits as codes."""
    bits = np.arange(256)[:, None] // 2 ** np.arange(8) % 2
    return {k: v for k, v in tensors.items() if k != CODEBOOK} | {
        "quantize.bits_to_indices": 2 ** np.arange(8, dtype=np.int32),
        "quantize.codebook": (2 * bits - 1).astype(np.float32),
    }


@pytest.fixture(scope="module")
def outputs(tensors, model, of_bits):
    variables = {"params": conversion.maskbit_params(tensors, model)}
    bits = reference_sizes.vqgan_of(of_bits, None)

    @jax.jit
    def run(images, codes):
        z = model.apply(variables, images / 255, method="encode")
        ids, vectors = model.apply(variables, z, method="quantize")
        given = model.apply(variables, method="code_table")[codes]
        bit_ids, bit_vectors = bits.apply({}, z, method="quantize")
        all_vectors = jax.numpy.concatenate([vectors, given, bit_vectors])
        return z, ids, bit_ids, model.apply(variables, all_vectors, method="decode")

    return run(GOLDEN["images"].astype(np.float32), GOLDEN["codes"])


def test_the_golden_network_is_reproduced(outputs):
    z, ids, bit_ids, pictures = outputs
    np.testing.assert_array_equal(ids, GOLDEN["ids"])
    np.testing.assert_array_equal(bit_ids, GOLDEN["bit_ids"])
    expected = [GOLDEN[x] for x in ("reconstructions", "decoded", "bit_reconstructions")]
    for found, values in ((z, GOLDEN["features"]), (pictures, np.concatenate(expected))):
        np.testing.assert_allclose(found, values, atol=1e-5 * np.abs(values).max())


@pytest.mark.torch
def test_the_golden_file_is_what_the_program_computes():
    for name, array in torch_vqgan_plus.golden().items():
        if name != "config":
            np.testing.assert_allclose(GOLDEN[name], array, atol=1e-10)


@pytest.mark.parametrize("kind", ["tensors", "of_bits"])
def test_every_tensor_comes_back(kind, request):
    tensors = request.getfixturevalue(kind)
    model = reference_sizes.vqgan_of(tensors, None)
    assert (model.quantizer == "lfq") == (kind == "of_bits")
    back = conversion.vqgan_state_dict(conversion.maskbit_params(tensors, model), model)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].tobytes() == tensor.tobytes(), name


def test_the_released_sizes_are_recognised():
    for sizes in torch_vqgan_plus.RELEASED.values():
        shapes = torch_vqgan_plus.shapes_of(**sizes)
        without_memory = {k: np.broadcast_to(np.float32(0), v) for k, v in shapes.items()}
        model = reference_sizes.vqgan_of(without_memory, None)
        assert model == vqgan.VQGAN(
            embed_dim=sizes["width"], codebook_size=sizes["codes"], conv_downsampling=True
        )
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), np.float32)
    ours = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    ours = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), ours)
    back = conversion.vqgan_state_dict(ours, model)
    assert {name: array.shape for name, array in back.items()} == shapes


def test_maskgit_s_tokenizer_by_maskbit_s_names(tensors, model):
    """It pools, and numbers the decoder's levels from the finest."""
    pooled = {k: v for k, v in tensors.items() if "down_conv" not in k}
    turned = {k.replace("up.0", "up.x").replace("up.2", "up.0"): v for k, v in pooled.items()}
    turned = {k.replace("up.x", "up.2"): v for k, v in turned.items()}
    found = reference_sizes.vqgan_of(turned, None)
    assert found == model.clone(conv_downsampling=False)
    params = conversion.maskbit_params(turned, found)
    expected = conversion.maskbit_params(tensors, model)
    jax.tree.map(np.testing.assert_array_equal, params["decoder"], expected["decoder"])
    # What differs is how the encoder halves the sides.
    assert not any(name.startswith("downsample") for name in params["encoder"])


def test_what_does_not_fit_is_refused(tensors, of_bits):
    def refused(message, changed):
        with pytest.raises(ValueError, match=message):
            conversion.maskbit_params(changed, reference_sizes.vqgan_of(changed, None))

    def without(*names):
        return {k: v for k, v in tensors.items() if k not in names}

    refused("bits do not count", of_bits | {"quantize.bits_to_indices": np.arange(8)})
    refused("quantize.codebook: unknown", tensors | {"quantize.codebook": np.zeros((4, 2))})
    refused("not MaskBit's VQGAN.: it has no 'quantize.embedding.weight'", without(CODEBOOK))
    strided = "encoder.down.1.down_conv.weight"
    refused("encoder/downsample_1/kernel: nothing", without(strided))
    refused(f"{strided}: has shape", tensors | {strided: np.zeros((32, 32, 4, 4), np.float32)})
    refused("conv_out.*has shape", tensors | {CODEBOOK: np.zeros((64, 9), np.float32)})
    refused("encoder.attn.weight: unknown", tensors | {"encoder.attn.weight": np.zeros(1)})
    deeper = {k.replace("mid.res_blocks.1", "mid.res_blocks.2"): v for k, v in tensors.items()}
    refused("mid.res_blocks.2.conv1.weight: unknown", tensors | deeper)


def test_sides_are_halved_by_convolutions_only_where_it_is_asked_for():
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
    small = vqgan.VQGAN(32, (1, 1, 2), 1, 4, 8)
    trees = [
        jax.eval_shape(small.clone(conv_downsampling=on).init, jax.random.key(0), images)["params"]
        for on in (False, True)
    ]
    added = set(trees[1]["encoder"]) - set(trees[0]["encoder"])
    assert added == {"downsample_0", "downsample_1"}
    assert jax.tree.structure(trees[0]["decoder"]) == jax.tree.structure(trees[1]["decoder"])
