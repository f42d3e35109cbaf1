"""The tokenizer as a thing of its own: shapes, batches, wrong input, its directory."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from enat_jax.checkpoints import model_files
from enat_jax.inference import tokenizer


@pytest.fixture(scope="module")
def codec():
    return tiny.make_tokenizer()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(256, size=(7, 8, 8, 1), dtype=np.uint8)


def test_images_to_tokens_and_back(codec, images):
    assert codec.grid == (4, 4)
    codes = codec.encode(images)
    assert codes.shape == (7, tiny.NUM_TOKENS) and codes.dtype == np.int32
    assert 0 <= codes.min() and codes.max() < tiny.CODES
    assert len(np.unique(codes)) > 1
    decoded = codec.decode(codes)
    assert decoded.shape == images.shape and decoded.dtype == np.uint8
    assert not np.array_equal(decoded[0], decoded[1])


def test_a_picture_need_not_be_square():
    wide = tokenizer.Tokenizer(tiny.CODEC, tiny.make_tokenizer().params, (4, 8))
    codes = wide.encode(np.zeros((2, 4, 8, 1), np.uint8))
    assert wide.grid == (2, 4) and codes.shape == (2, 8)
    assert wide.decode(codes).shape == (2, 4, 8, 1)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_batches_change_nothing(codec, images, size, monkeypatch):
    codes = codec.encode(images)
    decoded = codec.decode(codes)
    monkeypatch.setattr(tokenizer, "BATCH_SIZE", size)
    assert np.array_equal(codec.encode(images), codes)
    # Another batch size may round differently by one level.
    assert np.abs(codec.decode(codes).astype(int) - decoded).max() <= 1


def test_more_images_than_a_batch_holds(codec, images):
    many = np.resize(images, (tokenizer.BATCH_SIZE + 6, 8, 8, 1))
    codes = codec.encode(many)
    assert codes.shape == (tokenizer.BATCH_SIZE + 6, tiny.NUM_TOKENS)
    assert np.array_equal(codes[63:70], codec.encode(images))  # 63 is 9 times all seven
    assert codec.decode(codes).shape == many.shape


def test_no_images(codec):
    assert codec.encode(np.zeros((0, 8, 8, 1), np.uint8)).shape == (0, tiny.NUM_TOKENS)
    assert codec.decode(np.zeros((0, tiny.NUM_TOKENS), int)).shape == (0, 8, 8, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((1, 16, 16, 1), np.uint8), r"it takes uint8 images of \(8, 8, 1\)"),
        (np.zeros((1, 8, 8, 1), np.float32), "float32"),
        (np.zeros((8, 8, 1), np.uint8), "do not suit"),
        (np.zeros((1, 8, 8), np.uint8), "do not suit"),
        (np.zeros((1, 8, 8, 3), np.uint8), "do not suit"),
    ],
)
def test_wrong_images(codec, wrong, message):
    with pytest.raises(ValueError, match=message):
        codec.encode(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.full((1, 16), 8), "tokens from 8 to 8: the codebook has 8"),
        (np.full((1, 16), -1), "tokens from -1 to -1"),
        (np.zeros((1, 15), int), r"need \[n, 16\]"),
        (np.zeros(16, int), r"need \[n, 16\]"),
        (np.zeros((1, 16)), "whole numbers"),
    ],
)
def test_wrong_tokens(codec, wrong, message):
    with pytest.raises(ValueError, match=message):
        codec.decode(wrong)


def test_a_loaded_tokenizer_is_the_same(codec, images, tmp_path):
    codec.save(tmp_path / "tokenizer")
    loaded = tokenizer.Tokenizer.load(tmp_path / "tokenizer", devices=jax.devices()[:1])
    assert loaded.model == codec.model and loaded.image_size == (8, 8)
    assert loaded.provenance == codec.provenance
    assert loaded.fingerprint == codec.fingerprint != tiny.make_tokenizer(seed=1).fingerprint
    assert np.array_equal(loaded.encode(images), codec.encode(images))


def without_quantizer(path):
    """Makes the description of a tokenizer what earlier versions wrote."""
    values = json.loads(path.read_text())
    for name in ("quantizer", "normalize", "projection", "levels", "gradient"):
        del values["model"][name]
    path.write_text(json.dumps(values))


def test_tokenizers_of_earlier_versions_are_read(codec, images, tmp_path):
    codec.save(tmp_path, formats=["safetensors"])
    without_quantizer(tmp_path / "tokenizer.json")
    loaded = tokenizer.Tokenizer.load(tmp_path, devices=jax.devices()[:1])
    assert loaded.model == codec.model
    assert np.array_equal(loaded.encode(images), codec.encode(images))


@pytest.mark.parametrize(
    "settings",
    [
        {"quantizer": "fsq", "levels": (4, 3), "codebook_size": 12, "embed_dim": 2},
        {"quantizer": "lfq", "codebook_size": 16},
        {"projection": True, "normalize": True},
    ],
    ids=("fsq", "lfq", "projection"),
)
def test_a_tokenizer_of_any_quantizer(settings, images, tmp_path):
    model = tiny.CODEC.clone(**settings)
    params = tiny.random_params(model.init, np.zeros((1, 8, 8, 1), np.float32), seed=0)
    made = tokenizer.Tokenizer(model, params, tiny.IMAGE_SIZE)
    made.save(tmp_path, formats=["safetensors"])
    loaded = tokenizer.Tokenizer.load(tmp_path, devices=jax.devices()[:1])
    assert loaded.model == model
    codes = loaded.encode(images)
    assert len(np.unique(codes)) > 1 and codes.max() < model.codebook_size
    table = np.asarray(loaded.code_table)
    assert table.shape == (model.codebook_size, model.embed_dim)
    vectors = table[codes].reshape(-1, 4, 4, model.embed_dim)
    pictures = model.apply({"params": params}, vectors, method="decode")
    assert np.abs(loaded.decode(codes) - 255.0 * np.clip(pictures, 0, 1)).max() < 0.51


def test_other_weights_than_were_saved(codec, tmp_path):
    codec.save(tmp_path)
    model_files.save_params(tmp_path / "params", tiny.make_tokenizer(seed=1).params)
    with pytest.raises(ValueError, match="not those that were saved: damaged"):
        tokenizer.Tokenizer.load(tmp_path)


def test_a_whole_model_instead_of_its_tokenizer(codec, tmp_path):
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="a whole model, its tokenizer is .*/tokenizer$"):
        tokenizer.Tokenizer.load(tmp_path)


def test_images_are_divided_over_devices(codec, images):
    spread = dataclasses.replace(codec, devices=tuple(jax.devices()))
    codes = codec.encode(images)
    assert np.array_equal(spread.encode(images), codes)
    assert np.array_equal(spread.decode(codes), codec.decode(codes))


def test_weights_for_others_alone(codec, images, tmp_path):
    codec.save(tmp_path, formats=["safetensors"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "params.safetensors",
        "tokenizer.json",
    ]
    loaded = tokenizer.Tokenizer.load(tmp_path, devices=jax.devices()[:1])
    assert np.array_equal(loaded.encode(images), codec.encode(images))
    with pytest.raises(ValueError, match="choose from orbax, safetensors"):
        codec.save(tmp_path, formats=["torch"])


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json: train one"):
        tokenizer.Tokenizer.load(tmp_path)


@pytest.mark.parametrize("missing", ["model", "image_size", "provenance", "fingerprint"])
def test_a_damaged_description(tmp_path, codec, missing):
    codec.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    del values[missing]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"tokenizer.json is damaged: KeyError.'{missing}'"):
        tokenizer.Tokenizer.load(tmp_path)
