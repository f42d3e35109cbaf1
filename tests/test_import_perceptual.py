"""Weights of perceptual networks come through the command line into one file."""

import perceptual_golden
import pytest
from hostile import import_weights as run
from hostile import refused_import as refused

from enat_jax.checkpoints import model_files, weight_files
from enat_jax.evaluation import perceptual_weights


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for name, tensors in zip("ab", perceptual_golden.random_lpips("alex"), strict=True):
        weight_files.write_safetensors(root / f"{name}.safetensors", tensors)
    return root


def test_two_files_become_one(files, capsys, tmp_path):
    weights, out = (
        f"{files / 'a.safetensors'},{files / 'b.safetensors'}",
        tmp_path / "x.safetensors",
    )
    command = ["--perceptual", "lpips_alex", "--weights", weights, "--out", out]
    code, printed, _ = run(capsys, *command)
    assert code in (0, None)
    assert "lpips_alex from a.safetensors, SHA-256 " in printed
    assert "not the published weights" in printed and f"written to {out}" in printed
    found = model_files.fingerprint(perceptual_weights.load("lpips_alex", str(out)))
    assert found == model_files.fingerprint(perceptual_golden.random_params("alex"))
    before = out.stat().st_mtime_ns
    code, printed, _ = run(capsys, *command)
    assert code in (0, None) and "holds the same already" in printed
    assert out.stat().st_mtime_ns == before
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"mine")
    refused(capsys, "holds something else", *command[:-1], other)
    assert other.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("needs --weights: alexnet.ckpt of", ["--perceptual", "lpips_alex", "--out", "x"]),
        ("--weights has no use without --perceptual", ["--weights", "x", "--out", "x"]),
        ("ends in .safetensors", ["--perceptual", "lpips_alex", "--weights", "x", "--out", "x"]),
        ("--clip has no use with --perceptual",
         ["--perceptual", "lpips_alex", "--clip", "x", "--out", "x.safetensors"]),
        ("there is no file x with the weights of lite0_logits: give efficientnet-lite0",
         ["--perceptual", "lite0_logits", "--weights", "x", "--out", "x.safetensors"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words, arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, words, *arguments)
    assert not list(tmp_path.iterdir())
