"""Models are recognised by their tensors; what shapes cannot tell is asked for."""

import json
import pathlib

import numpy as np
import pytest

from enat_jax.models import reference_sizes, vqgan

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def tensors_of(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        found = {k.removeprefix("param:"): file[k] for k in file.files if k.startswith("param:")}
        return found, json.loads(str(file["config"]))


def shapes(width, layers, hidden=None, **more):
    """A state dict of the shapes that count, without memory."""
    sizes = {
        "x_embedder.word_embeddings.weight": (1025, width),
        "x_embedder.position_embeddings.weight": (256, width),
        "y_embedder.embedding_table.weight": (1001, width),
        "blocks.0.mlp.fc1.weight": (hidden or 4 * width, width),
        f"blocks.{layers - 1}.attn.q.bias": (width,),
        **more,
    }
    return {k: np.broadcast_to(np.float32(0), v) for k, v in sizes.items()} | {
        f"blocks.{i}.x": np.zeros(1) for i in range(layers)
    }


@pytest.mark.parametrize(
    "width, layers, heads, encoder, decoder",
    [(366, 16, 6, 15, 1), (768, 16, 8, 15, 1), (1024, 24, 16, 22, 2)],
)
def test_the_paper_s_models_are_known(width, layers, heads, encoder, decoder):
    model = reference_sizes.enat_of(shapes(width, layers), None, None)
    assert (model.width, model.num_heads) == (width, heads)
    assert (model.encoder_layers, model.decoder_layers) == (encoder, decoder)
    assert (model.num_tokens, model.codebook_size, model.num_classes) == (256, 1024, 1000)
    assert model.mlp_ratio == 4 and model.reuse and model.dtype == "float32"


def test_flags_go_before_the_paper():
    model = reference_sizes.enat_of(shapes(768, 16, 768 * 2), 12, 10)
    assert (model.num_heads, model.encoder_layers, model.decoder_layers) == (12, 10, 6)
    assert model.mlp_ratio == 2


def test_other_sizes_are_asked_for():
    with pytest.raises(ValueError, match="width 32 with 5 layers") as error:
        reference_sizes.enat_of(shapes(32, 5), None, None)
    assert "--num-heads" in str(error.value) and "--encoder-layers" in str(error.value)
    with pytest.raises(ValueError, match="--encoder-layers") as error:
        reference_sizes.enat_of(shapes(32, 5), 4, None)
    assert "--num-heads" not in str(error.value)
    with pytest.raises(ValueError, match="32 cannot be divided among 5"):
        reference_sizes.enat_of(shapes(32, 5), 5, 3)
    with pytest.raises(ValueError, match="5 encoder layers of 5"):
        reference_sizes.enat_of(shapes(32, 5), 4, 5)


def test_what_is_no_enat():
    of_vqgan, _ = tensors_of("vqgan")
    with pytest.raises(ValueError, match="no 'x_embedder.*but 1.. others.*'encoder.conv_in"):
        reference_sizes.enat_of(of_vqgan, None, None)
    with pytest.raises(ValueError, match="are no ENAT's sizes"):
        reference_sizes.enat_of(shapes(32, 5, 33), None, None)
    odd = {"x_embedder.word_embeddings.weight": (1025,)}
    with pytest.raises(ValueError, match=r"has the shape \(1025,\)"):
        reference_sizes.enat_of(shapes(32, 5, **odd), None, None)


def test_the_golden_models_are_recognised():
    tensors, config = tensors_of("enat_forward")
    found = reference_sizes.enat_of(tensors, 4, 3)
    assert (found.encoder_layers, found.decoder_layers) == (3, 2) and found.width == 32
    assert found.num_tokens == config["latent_size"] ** 2 and found.num_classes == 1000
    assert found.codebook_size == 1024 and found.mlp_ratio == 4


@pytest.mark.parametrize("name", ["vqgan", "maskgit_tokenizer"])
def test_tokenizers(name):
    tensors, config = tensors_of(name)
    model = reference_sizes.vqgan_of(tensors, None)
    assert reference_sizes.is_maskgit(tensors) == (name == "maskgit_tokenizer")
    multipliers = config.get("ch_mult") or config["channel_multipliers"]
    assert model == vqgan.VQGAN(
        channels=config.get("ch") or config["filters"],
        channel_multipliers=tuple(multipliers),
        num_res_blocks=config["num_res_blocks"],
        embed_dim=config.get("embed_dim") or config["embedding_dim"],
        codebook_size=config.get("n_embed") or config["codebook_size"],
        num_groups=32,
        image_channels=3,
        dtype="float32",
    )


def test_groups_are_asked_for_where_they_cannot_be_32():
    tensors, _ = tensors_of("vqgan")
    assert reference_sizes.vqgan_of(tensors, 16).num_groups == 16
    with pytest.raises(ValueError, match="cannot have 24 groups each$"):
        reference_sizes.vqgan_of(tensors, 24)
    odd = {k: v[:16] if k.endswith("conv2.weight") else v for k, v in tensors.items()}
    odd["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"][:16]
    with pytest.raises(ValueError, match=r"32 groups each.*\(--num-groups\)"):
        reference_sizes.vqgan_of(odd, None)


def test_what_is_no_tokenizer():
    enat, _ = tensors_of("enat_forward")
    with pytest.raises(ValueError, match="not a VQGAN of the reference: it has no 'quantize"):
        reference_sizes.vqgan_of(enat, None)
    maskgit, _ = tensors_of("maskgit_tokenizer")
    fewer = {k: v for k, v in maskgit.items() if "ResBlock_7" not in k}
    with pytest.raises(ValueError, match="5 residual blocks on 3 levels"):
        reference_sizes.vqgan_of(fewer, None)
    uneven = {k: v for k, v in maskgit.items() if "encoder/ResBlock_4/Conv_1" not in k}
    with pytest.raises(ValueError, match="no 'encoder/ResBlock_4/Conv_1/kernel'"):
        reference_sizes.vqgan_of(uneven, None)


def test_prefixes_of_wrappers_go():
    strip = reference_sizes.without_prefixes
    assert strip({"module.a.b": 1, "module.c": 2}) == {"a.b": 1, "c": 2}
    assert strip({"module.model.a": 1, "module.model.b": 2}) == {"a": 1, "b": 2}
    assert strip({"module.a": 1, "b": 2}) == {"module.a": 1, "b": 2}
    assert strip({"encoder.a": 1, "encoder.b": 2}) == {"encoder.a": 1, "encoder.b": 2}
    assert strip({}) == {}
