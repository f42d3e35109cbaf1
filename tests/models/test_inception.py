"""FID's Inception-v3: equal to the golden, and what comes before and after the network."""

import inception_golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.models import inception

# NHWC, 0 to 255 as uint8 images would be, but not rounded.
IMAGES = inception_golden.FILE["images_nchw_0to1"].transpose(0, 2, 3, 1) * 255


@pytest.fixture(scope="module")
def found():
    """All outputs for the golden's images, and the whole output of Mixed_6d."""

    @jax.jit
    def run(params, images):
        x = inception.preprocess(images, "pytorch-fid")
        wanted = lambda module, _: module.name == "Mixed_6d"  # noqa: E731
        found, state = inception.Inception().apply(
            {"params": params}, x, capture_intermediates=wanted
        )
        ((mixed_6d, _),) = state["intermediates"]["Mixed_6d"]["__call__"]
        return found | {"Mixed_6d": mixed_6d}

    return jax.device_get(run(inception_golden.params(), IMAGES))


def test_features_equal_the_golden(found):
    np.testing.assert_allclose(found["pool"], inception_golden.FILE["pool3"], atol=1e-5)


@pytest.mark.parametrize("block", ["block0", "block1", "block2"])
def test_earlier_blocks_equal_the_golden(found, block):
    means = found[block].mean((1, 2), dtype=np.float64)
    np.testing.assert_allclose(means, inception_golden.FILE[f"{block}_mean"], atol=1e-5)


def test_probabilities_leave_the_bias_out(found):
    kernel = inception_golden.state_dict()["fc.weight"].astype(np.float64)
    odds = np.exp(inception_golden.FILE["pool3"] @ kernel.T)
    expected = odds / odds.sum(1, keepdims=True)
    assert found["probabilities"].shape == (3, 1008)
    np.testing.assert_allclose(found["probabilities"], expected, rtol=1e-4)


def test_spatial_features_are_the_first_seven_channels_of_all_places(found):
    assert found["Mixed_6d"].shape == (3, 17, 17, 768)
    assert found["spatial"].shape == (3, 17 * 17 * 7)
    np.testing.assert_array_equal(found["spatial"][1, :7], found["Mixed_6d"][1, 0, 0, :7])
    # Row 2, column 3, channel 4.
    at = (2 * 17 + 3) * 7 + 4
    np.testing.assert_array_equal(found["spatial"][:, at], found["Mixed_6d"][:, 2, 3, 4])


def two_columns():
    """An image of one row: black and white."""
    return np.array([0, 255], np.uint8).reshape(1, 1, 2, 1)


def test_pytorchs_resize_puts_pixel_centres_at_half_integers():
    row = inception.preprocess(two_columns(), "pytorch-fid")[0, 0, :, 0]
    # Column i lies at (i + 1/2) 2/299 - 1/2: 149 in the middle, 200 at 0.841137.
    np.testing.assert_allclose(row[jnp.array([0, 74, 149, 200, 224, 298])],
                               [-1, -1, 0, 0.682274, 1, 1], atol=1e-6)  # fmt: skip


def test_adms_resize_puts_them_at_integers():
    row = inception.preprocess(two_columns(), "adm")[0, 0, :, 0]
    # Column i lies at 2 i / 299: 100 at 0.668896, of 255; then less 128 and over 128.
    np.testing.assert_allclose(row[jnp.array([0, 100, 150, 298])],
                               [-1, 0.332566, 127 / 128, 127 / 128], atol=1e-6)  # fmt: skip


@pytest.fixture(scope="module")
def photograph():
    return np.random.default_rng(0).integers(0, 256, (1, 400, 32, 3)).astype(np.uint8)


def test_pytorchs_resize_is_jaxs_without_antialiasing(photograph):
    x = photograph.astype(np.float32) / 127.5 - 1
    expected = jax.image.resize(x, (1, 299, 299, 3), "bilinear", antialias=False)
    found = inception.preprocess(photograph, "pytorch-fid")
    np.testing.assert_allclose(found, expected, atol=1e-4)  # jax's positions are float32


def test_adms_resize_is_linear_interpolation_from_the_corner(photograph):
    x = (photograph[0].astype(np.float64) - 128) / 128
    rows = np.apply_along_axis(
        lambda column: np.interp(np.arange(299) * 400 / 299, np.arange(400), column), 0, x
    )
    expected = np.apply_along_axis(
        lambda row: np.interp(np.arange(299) * 32 / 299, np.arange(32), row), 1, rows
    )
    np.testing.assert_allclose(inception.preprocess(photograph, "adm")[0], expected, atol=2e-5)


@pytest.mark.torch
def test_pytorchs_resize_is_pytorchs(photograph):
    import torch

    x = torch.from_numpy(photograph).permute(0, 3, 1, 2).float() / 255
    x = torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    expected = (2 * x - 1).permute(0, 2, 3, 1).numpy()
    found = inception.preprocess(photograph, "pytorch-fid")
    np.testing.assert_allclose(found, expected, atol=1e-4)  # PyTorch's positions are float32


@pytest.mark.parametrize("resize", inception.RESIZES)
def test_an_image_of_the_right_size_is_only_scaled(resize):
    image = np.random.default_rng(1).integers(0, 256, (1, 299, 299, 1)).astype(np.uint8)
    found = np.asarray(inception.preprocess(image, resize))
    assert found.shape == (1, 299, 299, 3) and found.dtype == np.float32
    scaled = image / 127.5 - 1 if resize == "pytorch-fid" else (image - 128.0) / 128
    for channel in range(3):  # grey stands for three equal ones
        np.testing.assert_allclose(found[..., channel], scaled[..., 0], atol=1e-6)


def test_an_unknown_resize_is_refused():
    with pytest.raises(ValueError, match="resize='bicubic' is unknown: one of pytorch-fid, adm"):
        inception.preprocess(two_columns(), "bicubic")
