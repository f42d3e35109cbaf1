"""CLIP's two towers: pictures as it takes them, vectors, and the directory of both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from enat_jax.inference import clip_model, clip_towers


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("shape", [(8, 8), (40, 31), (9, 17), (6, 5), (16, 8)])
def test_pictures_are_resized_and_cut_as_by_pillow(shape):
    """The rules of torchvision's Resize and CenterCrop, which OpenAI's program uses."""
    images = pictures(2, *shape, 3)
    found = clip_towers.prepared(images, 8)
    for one, image in zip(found, images, strict=True):
        whole = Image.fromarray(image)
        scale = 8 / min(whole.size)
        sides = [int(scale * side + 1e-9) for side in whole.size]
        resized = whole.resize(sides, Image.Resampling.BICUBIC)
        left, top = (round((side - 8) / 2) for side in sides)
        expected = resized.crop((left, top, left + 8, top + 8))
        np.testing.assert_array_equal(one, np.asarray(expected))


def test_grey_is_repeated():
    images = pictures(3, 12, 12, 1)
    found = clip_towers.prepared(images, 8)
    np.testing.assert_array_equal(found, clip_towers.prepared(np.repeat(images, 3, 3), 8))
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 8, 8, 2)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(ValueError, match=r"need uint8 \[n, h, w, 1\] or \[n, h, w, 3\]"):
        clip_towers.prepared(pictures(*shape), 8)
    with pytest.raises(ValueError, match="images of float32"):
        clip_towers.prepared(np.zeros((1, 8, 8, 3), np.float32), 8)


def test_vectors_are_those_of_normalised_pixels_whatever_the_batch():
    vision = tiny.make_both_towers().vision
    images = pictures(130, 8, 8, 3)  # more than one call of the network
    pixels = (images / 255 - clip_towers.MEAN) / clip_towers.DEVIATION
    run = jax.jit(vision.model.apply)
    expected = run({"params": vision.params}, jnp.asarray(pixels, jnp.float32))
    found = vision.vectors(images)
    assert found.dtype == np.float32 and found.shape == (130, vision.model.projection)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert vision.vectors(images[:0]).shape == (0, vision.model.projection)
    np.testing.assert_array_equal(vision.vectors(images[:1]), found[:1])


def test_both_lie_in_one_directory_which_a_text_encoder_reads(tmp_path):
    both = tiny.make_both_towers()
    both.save(tmp_path, ["safetensors"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "encoder.json", "null_text.npy", "text.safetensors", "vision.safetensors"
    }  # fmt: skip
    found = clip_towers.Clip.load(tmp_path, devices=jax.devices()[:1])
    assert found.description == both.description
    images = pictures(2, 8, 8, 3)
    np.testing.assert_array_equal(found.vision.vectors(images), both.vision.vectors(images))
    text = clip_model.ClipText.load(tmp_path, devices=jax.devices()[:1])
    assert text.fingerprint == both.text.fingerprint
    assert "ClipVision(VisionTower" in repr(found) and "8x8 pixels" in repr(found)
    halved = clip_towers.Clip.load(tmp_path, "bfloat16", jax.devices()[:1])
    assert halved.vision.vectors(images).dtype == np.float32
    assert halved.vision.fingerprint == both.vision.fingerprint
    (tmp_path / "vision.safetensors").unlink()
    clip_model.ClipText.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no parameters at .*vision"):
        clip_towers.Clip.load(tmp_path)


def test_a_text_tower_without_projection_has_no_vectors():
    with pytest.raises(ValueError, match="no vectors of them, because its weights have no"):
        tiny.make_clip().vectors(np.zeros((1, 8), np.int32))
