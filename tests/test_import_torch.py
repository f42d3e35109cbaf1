"""The reference's files come through the command line and draw the reference's tokens."""

import hashlib
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_vqgan_plus
import torch_writer as writer
from flax import serialization, traverse_util
from hostile import import_weights as run
from hostile import refused_import as refused

from enat_jax import import_torch
from enat_jax.checkpoints import weight_files
from enat_jax.data import imagenet
from enat_jax.inference import reference_weights
from enat_jax.inference.generator import Generator
from enat_jax.inference.tokenizer import Tokenizer
from enat_jax.models import conversion, vqgan

GOLDEN = pathlib.Path(__file__).parent / "golden"
# The golden ENAT has 8x8 tokens of 1024 codes: two levels make them of 16x16 pixels.
CODEC = vqgan.VQGAN(
    channels=32, channel_multipliers=(1, 2), num_res_blocks=1, embed_dim=8, dtype="float32"
)
SIZES = ["--num-heads", 4, "--encoder-layers", 3]


def tensors_of(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {k.removeprefix("param:"): file[k] for k in file.files if k.startswith("param:")}


def vqgan_tensors():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(CODEC.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
    return conversion.vqgan_state_dict(params, CODEC)


def lightning(tensors):
    """A checkpoint with objects of Lightning's classes in it."""
    return {
        "epoch": 7,
        "callbacks": {"best": writer.call(writer.name("lightning.callbacks", "ModelCheckpoint"))},
        "state_dict": tensors,
        "hyper_parameters": writer.call(writer.name("lightning.parsing", "AttributeDict")),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Released files in small: a wrapped model in today's format, a checkpoint in the old one."""
    root = tmp_path_factory.mktemp("files")
    enat = {f"module.{k}": v for k, v in tensors_of("enat_generate_greedy").items()}
    (root / "nnet_ema.pth").write_bytes(writer.zip_bytes(enat))
    (root / "vqgan.ckpt").write_bytes(writer.legacy_bytes(lightning(vqgan_tensors())))
    packed = traverse_util.unflatten_dict(tensors_of("maskgit_tokenizer"), sep="/")
    (root / "maskgit").write_bytes(serialization.msgpack_serialize({"params": packed}))
    return root


@pytest.fixture(scope="module")
def imported(files):
    out = files / "model"
    arguments = ["--enat", files / "nnet_ema.pth", "--vqgan", files / "vqgan.ckpt", "--out", out]
    import_torch.main([str(x) for x in [*arguments, *SIZES]])
    return out


def draws_the_golden_tokens(directory):
    with np.load(GOLDEN / "enat_generate_greedy.npz") as golden:
        steps, scale = int(golden["cfg3_steps8:steps"]), float(golden["cfg3_steps8:cfg_scale"])
        labels, expected = golden["labels"], golden["cfg3_steps8:tokens"]
    model = Generator.load(directory).with_settings(
        num_steps=steps,
        guidance_scale=scale,
        token_temperature=0.0,
        mask_temperature=0.0,
        num_segments=1,
    )
    np.testing.assert_array_equal(model.sample_tokens(labels), expected)


def test_the_imported_model_draws_the_reference_s_tokens(imported):
    draws_the_golden_tokens(imported)


def test_what_the_model_directory_says(imported, files):
    model = Generator.load(imported)
    assert model.class_names == imagenet.NAMES
    assert model.settings == reference_weights.SETTINGS[256]
    assert model.tokenizer.image_size == (16, 16) and model.tokenizer.grid == (8, 8)
    assert model.model.dtype == model.tokenizer.model.dtype == "float32"
    for part, file in (("transformer", "nnet_ema.pth"), ("tokenizer", "vqgan.ckpt")):
        said = model.provenance[part]
        assert said["file"] == file
        assert said["sha256"] == hashlib.sha256((files / file).read_bytes()).hexdigest()
    assert model.provenance["transformer"]["model"]["num_heads"] == 4
    assert model.tokenizer.provenance == model.provenance["tokenizer"]


def test_every_tensor_comes_back(imported):
    model = Generator.load(imported)
    given = tensors_of("enat_generate_greedy")
    back = conversion.enat_state_dict(model.params, model.model)
    for name, tensor in given.items():
        if not name.startswith("prev_embedder."):
            np.testing.assert_array_equal(back[name], tensor.astype(np.float32))
    back = conversion.vqgan_state_dict(model.tokenizer.params, model.tokenizer.model)
    for name, tensor in vqgan_tensors().items():
        np.testing.assert_array_equal(back[name], tensor)


def test_the_same_command_again(imported, files, capsys):
    arguments = ["--enat", files / "nnet_ema.pth", *SIZES, "--out", imported]
    before = (imported / "model.json").read_bytes()
    code, out, _ = run(capsys, *arguments, "--vqgan", files / "vqgan.ckpt")
    assert code is None and "holds the same already" in out
    other = ["--enat", files / "nnet_ema.pth", "--num-heads", 2, *SIZES[2:], "--out", imported]
    refused(capsys, "holds another import", *other, "--vqgan", files / "vqgan.ckpt")
    (files / "there").mkdir(exist_ok=True)
    (files / "there" / "note").write_text("mine")
    refused(
        capsys,
        "there is there and no import",
        *arguments[:-1],
        files / "there",
        "--tokenizer",
        imported,
    )
    assert (imported / "model.json").read_bytes() == before


def test_a_tokenizer_alone(files, tmp_path, capsys):
    path = tmp_path / "vqgan.safetensors"
    weight_files.write_safetensors(path, vqgan_tensors())
    out = tmp_path / "new" / "tokenizer"
    refused(capsys, "say which by --image-size", "--vqgan", path, "--out", out)
    refused(capsys, "16x17 pixels cannot", "--vqgan", path, "--out", out, "--image-size", "16x17")
    assert not out.parent.exists()
    code, said, _ = run(capsys, "--vqgan", path, "--out", out, "--image-size", "16")
    assert code is None and "32 channels times (1, 2), 1 blocks a level, 1024 codes of 8" in said
    assert Tokenizer.load(out).image_size == (16, 16)
    refused(capsys, "another import", "--vqgan", path, "--out", out, "--image-size", "32x16")
    assert [x.name for x in out.parent.iterdir()] == ["tokenizer"]
    # And a whole model with it.
    model = tmp_path / "model"
    arguments = ["--enat", files / "nnet_ema.pth", "--tokenizer", out, *SIZES, "--out", model]
    assert run(capsys, *arguments)[0] is None
    assert Generator.load(model).tokenizer.provenance["file"] == "vqgan.safetensors"


def test_maskgit_s_tokenizer(files, tmp_path, capsys):
    arguments = ["--vqgan", files / "maskgit", "--image-size", 32, "--out", tmp_path / "x"]
    code, said, _ = run(capsys, *arguments)
    assert code is None and "times (1, 1, 2), 2 blocks a level, 64 codes of 32" in said
    codec = Tokenizer.load(tmp_path / "x")
    assert codec.provenance["imported"] == "MaskGIT's JAX tokenizer"
    assert codec.grid == (8, 8)
    codebook = tensors_of("maskgit_tokenizer")["quantizer/codebook"]
    np.testing.assert_array_equal(codec.params["codebook"], codebook.astype(np.float32))


def test_maskbit_s_tokenizer_and_back(tmp_path, capsys):
    tensors = torch_vqgan_plus.weights(torch_vqgan_plus.shapes_of(**torch_vqgan_plus.SMALL))
    path, out = tmp_path / "vqgan_plus.bin", tmp_path / "x"
    path.write_bytes(writer.zip_bytes(tensors))
    code, said, _ = run(capsys, "--vqgan", path, "--image-size", "24x16", "--out", out)
    assert code is None and "times (1, 1, 2), 2 blocks a level, 64 codes of 8" in said
    codec = Tokenizer.load(out)
    assert codec.provenance["imported"] == "a tokenizer of MaskBit's program"
    assert codec.model.conv_downsampling and codec.grid == (6, 4)
    reference_weights.write(codec, tmp_path)
    back = weight_files.read(tmp_path / "vqgan.safetensors")
    assert {k: v.tobytes() for k, v in back.items()} == {k: v.tobytes() for k, v in tensors.items()}
    again = reference_weights.read_tokenizer(tmp_path / "vqgan.safetensors", num_tokens=16)
    assert again.fingerprint == codec.fingerprint and again.model == codec.model
    bits = {k: v for k, v in tensors.items() if not k.startswith("quantize.")}
    path.write_bytes(writer.zip_bytes(bits | {"quantize.bits_to_indices": 2 ** np.arange(8)}))
    arguments = ["--vqgan", path, "--image-size", 16, "--out", tmp_path / "bits"]
    assert run(capsys, *arguments)[0] is None
    assert Tokenizer.load(tmp_path / "bits").model.quantizer == "lfq"
    path.write_bytes(writer.zip_bytes(bits))
    refused(capsys, "it has no 'quantize.embedding.weight'", *arguments)


def test_mistakes_are_one_line(files, tmp_path, capsys):
    enat, codec, out = files / "nnet_ema.pth", files / "vqgan.ckpt", ["--out", tmp_path / "x"]
    refused(capsys, "nothing to import", *out)
    refused(capsys, "needs a tokenizer", "--enat", enat, *out)
    refused(capsys, "needs a tokenizer", "--enat", enat, "--vqgan", codec, "--tokenizer", "x", *out)
    refused(capsys, "--num-heads has no use without --enat", "--vqgan", codec, *out, *SIZES)
    without = ["--enat", enat, "--tokenizer", "x", "--num-groups", 2]
    refused(capsys, "--num-groups has no use without --vqgan", *without, *out)
    refused(capsys, "No such file", "--enat", "none.pth", "--vqgan", codec, *out)
    refused(capsys, "(--encoder-layers)", "--enat", enat, "--vqgan", codec, *out)
    refused(capsys, "not an ENAT of the reference", "--enat", codec, "--vqgan", enat, *out, *SIZES)
    both = ["--enat", enat, *SIZES, *out]
    refused(capsys, "do not belong together", *both, "--vqgan", codec, "--image-size", 32)
    refused(capsys, "there is no", *both, "--tokenizer", tmp_path)
    code, _, err = run(capsys, *both, "--vqgan", codec, "--image-size", "1x2x3")
    assert code == 2 and "neither pixels of a side nor HEIGHTxWIDTH" in err
    assert not (tmp_path / "x").exists()


def test_a_hostile_file_is_refused_and_not_run(files, tmp_path, capsys):
    target = tmp_path / "made"
    payload = writer.call(writer.name(os.system.__module__, "system"), f"touch {target}")
    path, out = tmp_path / "hostile.ckpt", ["--image-size", 16, "--out", tmp_path / "x"]
    for value in (payload, {"state_dict": payload}, {"state_dict": {"x": payload}}):
        for content in (writer.zip_bytes(value), writer.legacy_bytes(value), writer.pickled(value)):
            path.write_bytes(content)
            refused(capsys, str(path), "--vqgan", path, *out)
    # Beside good weights it is left out, and not run either.
    path.write_bytes(writer.zip_bytes({"evil": payload, "state_dict": vqgan_tensors()}))
    assert run(capsys, "--vqgan", path, *out)[0] is None
    assert not target.exists()


def test_damaged_weights_are_no_model(tmp_path, capsys):
    tensors = vqgan_tensors()
    path, out = tmp_path / "vqgan.ckpt", ["--image-size", 16, "--out", tmp_path / "x"]

    def refused_with(changes, words):
        path.write_bytes(writer.zip_bytes({**tensors, **changes}))
        refused(capsys, words, "--vqgan", path, *out)

    nan = np.full_like(tensors["decoder.conv_out.bias"], np.nan)
    refused_with({"decoder.conv_out.bias": nan}, "decoder/conv_out/bias has values that are no")
    refused_with({"quant_conv.weight": nan}, "quant_conv.weight: unknown")
    refused_with({f"x{i}": nan for i in range(9)}, "and 4 more")


def test_names_of_classes(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\ufeffcat\ndog\n", encoding="utf-8")  # as some editors write it
    assert import_torch.class_names_for(2, path) == ("cat", "dog")
    assert import_torch.class_names_for(1000, None)[281] == imagenet.NAMES[281]
    with pytest.raises(ValueError, match="2 classes, not ImageNet's 1000.*--class-names"):
        import_torch.class_names_for(2, None)
    with pytest.raises(ValueError, match="names.txt has 2 lines, 0 of them empty.*3 classes"):
        import_torch.class_names_for(3, path)
    path.write_text("cat\ndog \n dog\n")
    with pytest.raises(ValueError, match="names.txt: lines 2 and 3 both name the class ' dog'"):
        import_torch.class_names_for(3, path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="names.txt is not UTF-8"):
        import_torch.class_names_for(2, path)


@pytest.mark.torch
def test_files_of_torch_itself(tmp_path):
    import torch

    def tensors(arrays, prefix):
        return {prefix + k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}

    enat, codec, out = (tmp_path / name for name in ("nnet_ema.pth", "vqgan.ckpt", "model"))
    torch.save(tensors(tensors_of("enat_generate_greedy"), "module."), enat)
    made = {"state_dict": tensors(vqgan_tensors(), ""), "callbacks": {Lightning: Lightning()}}
    torch.save(made, codec, _use_new_zipfile_serialization=False)
    arguments = ["--enat", enat, "--vqgan", codec, "--out", out, *SIZES]
    import_torch.main([str(x) for x in arguments])
    draws_the_golden_tokens(out)


class Lightning:
    """Stands for classes that only Lightning has."""
