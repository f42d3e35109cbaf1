"""Reconstructions from exchanged tokens: the card says so, and measures what they are."""

import jax
import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax import evaluate
from enat_jax.evaluation import cards
from enat_jax.inference import near_tokens


@pytest.mark.slow
def test_the_card_of_a_tokenizer_is_of_exchanged_tokens(tmp_path, monkeypatch):
    device = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: device)
    codec = tiny.make_tokenizer()
    codec.save(tmp_path / "tokenizer", ["safetensors"])
    pixels = np.random.default_rng(0).integers(0, 256, (6, *tiny.IMAGE_SIZE, 1), np.uint8)
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    for i, picture in enumerate(pixels):
        PIL.Image.fromarray(picture[..., 0]).save(tmp_path / "pictures" / "cat" / f"{i}.png")
    command = ["--tokenizer", tmp_path / "tokenizer", "--source", tmp_path / "pictures"]
    command += ["--features", "random:0", "--replicates", 0, "--near-codes", "0.5:3"]
    command += ["--set", "channels=1"]
    evaluate.main([str(x) for x in [*command, "--out", tmp_path / "out"]])
    card = cards.read(tmp_path / "out")
    assert card["near_codes"] == {"share": 0.5, "nearest": 3}
    assert "## Near codes" in (tmp_path / "out" / "card.md").read_text()
    tokens = near_tokens.NearTokens.of(codec, "0.5:3")(codec.encode(pixels), 0)
    error = np.square((codec.decode(tokens) - pixels.astype(float)) / 255).mean()
    assert card["metrics"]["psnr"]["value"] == pytest.approx(-10 * np.log10(error), rel=1e-5)
