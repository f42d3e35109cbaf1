"""Perceptual networks equal the goldens, and so do their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import perceptual_golden
import pytest

from enat_jax.models import lite0, lpips, perceptual


@functools.cache
def compiled(kind, least_side=64):
    """Of params, images and others: distances, and the gradient of their mean by others."""

    def loss(others, params, images):
        found = perceptual.distance(kind, params, images, others, least_side=least_side)
        return found.mean(), found

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(kind, params, images, others, **settings):
    (_, found), gradient = compiled(kind, **settings)(others, params, images)
    return np.asarray(found), np.asarray(gradient)


def close(found, wanted, share):
    """Within a share of the largest value wanted."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=share * np.abs(wanted).max())


@pytest.mark.parametrize("network", perceptual_golden.LPIPS)
def test_lpips_equals_the_golden_of_random_weights(network):
    golden = perceptual_golden.load("lpips_random")
    images, others = perceptual_golden.pictures(golden, "images", "others")
    params = perceptual_golden.random_params(network)
    found, gradient = run(f"lpips_{network}", params, images, others)
    np.testing.assert_allclose(found, golden[f"{network}:distance"], rtol=1e-6)
    close(gradient, golden[f"{network}:gradient"], 2e-3)
    # The third pair is of equal pictures.
    assert found[2] == 0 and not gradient[2].any()


def test_the_parts_of_lpips_equal_the_golden():
    golden = perceptual_golden.load("lpips_random")
    pair = perceptual_golden.pictures(golden, "images", "others")
    params = perceptual_golden.random_params("alex")
    parts = jax.jit(lpips.LPIPS("alex").apply)({"params": params}, *pair)
    np.testing.assert_allclose(parts, golden["alex:layers"], rtol=5e-6)


@pytest.mark.parametrize("network", perceptual_golden.LPIPS)
def test_lpips_equals_the_golden_of_real_weights(network):
    kind = f"lpips_{network}"
    params = perceptual_golden.real_params(kind)
    golden = perceptual_golden.load("lpips_real")
    images, others = perceptual_golden.pictures(golden, "images", "others")
    found, gradient = run(kind, params, images, others)
    np.testing.assert_allclose(found, golden[f"{network}:distance"], rtol=1e-5)
    close(gradient, golden[f"{network}:gradient"], 2e-3)
    if network == "alex":  # as the authors' program prints them
        assert [f"{x:.3f}" for x in found] == ["0.722", "0.138"]
    # The golden of small pictures does not enlarge them.
    images, others = perceptual_golden.pictures(golden, "small_images", "small_others")
    found, gradient = run(kind, params, images, others, least_side=32)
    np.testing.assert_allclose(found, golden[f"{network}:small_distance"], rtol=1e-5)
    if network == "alex":
        close(gradient, golden["alex:small_gradient"], 2e-3)


def logits_equal(kind, params, golden, tolerance):
    images, others = perceptual_golden.pictures(golden, "images", "others")
    logits = jax.jit(functools.partial(perceptual.logits, kind))
    for x, name in ((images, "images"), (others, "others")):
        wanted = golden[f"logits_{name}"]
        np.testing.assert_allclose(logits(params, x), wanted, rtol=0, atol=tolerance)


def loss_equals(kind, params, golden, tolerance):
    images, others = perceptual_golden.pictures(golden, "images", "others")
    found, gradient = run(kind, params, images, others)
    assert found.mean() == pytest.approx(float(golden["loss"]), rel=1e-5)
    close(gradient, golden["gradient"], tolerance)


@pytest.fixture(scope="module")
def resnet():
    golden = perceptual_golden.load("lpips_resnet50_logits")
    tensors = perceptual_golden.random_resnet(golden)
    kind = "resnet50_logits"
    return kind, perceptual_golden.perceptual_weights.params_of(kind, tensors), golden


def test_logits_of_resnet_equal_the_golden(resnet):
    logits_equal(*resnet, 2e-3)


@pytest.mark.slow
def test_the_gradient_of_resnet_equals_the_golden(resnet):
    loss_equals(*resnet, 1e-2)


def test_lite0_equals_the_golden_of_real_weights():
    golden = perceptual_golden.load("lpips_lite0_real")
    kind = "lite0_logits"
    params = perceptual_golden.real_params(kind)
    logits_equal(kind, params, golden, 1e-4)
    loss_equals(kind, params, golden, 5e-3)
    assert golden["logits_images"][0].argmax() == 1  # a goldfish


def test_features_of_lite0_have_the_sizes_of_its_stages():
    images = jax.ShapeDtypeStruct((2, 64, 48, 3), jnp.float32)
    params = {"params": perceptual.shapes("lite0_logits")}
    found = jax.eval_shape(lite0.Lite0().apply, params, images)
    sizes = {f"stage_{i}": n for i, n in enumerate((16, 24, 40, 80, 112, 192, 320), 1)}
    assert {name: x.shape[1] for name, x in found.items()} == sizes | {"logits": 1000}


def test_places_without_features_leave_the_gradient_finite():
    """Black pictures have none, where a root's gradient would be infinite."""
    params = jax.tree.map(np.copy, perceptual_golden.random_params("alex"))
    params["trunk"]["features_0"]["kernel"][:] = 1
    params["trunk"]["features_0"]["bias"][:] = 0
    black, white = np.zeros((1, 64, 64, 3), np.float32), np.ones((1, 64, 64, 3), np.float32)
    for pair in ((black, white), (white, black), (black, black)):
        found, gradient = run("lpips_alex", params, *pair)
        assert np.isfinite(found).all() and np.isfinite(gradient).all()


def test_small_pictures_are_enlarged():
    golden = perceptual_golden.load("lpips_real")
    images, others = perceptual_golden.pictures(golden, "small_images", "small_others")
    params = perceptual_golden.random_params("alex")
    doubled = [jax.image.resize(x, (2, 64, 64, 3), "bilinear") for x in (images, others)]
    found, gradient = run("lpips_alex", params, images, others)
    np.testing.assert_allclose(found, run("lpips_alex", params, *doubled)[0], rtol=1e-6)
    assert gradient.shape == images.shape and gradient.any()
    assert perceptual.enlarged(np.zeros((1, 16, 24, 3)), 64).shape == (1, 64, 96, 3)
    assert perceptual.enlarged(np.zeros((1, 64, 24, 3)), 24).shape == (1, 64, 24, 3)


def test_bfloat16_weights_compute_in_bfloat16():
    golden = perceptual_golden.load("lpips_random")
    images, others = perceptual_golden.pictures(golden, "images", "others")
    params = perceptual_golden.random_params("alex")
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    found, gradient = run("lpips_alex", params, images, others)
    assert found.dtype == gradient.dtype == np.float32
    np.testing.assert_allclose(found, golden["alex:distance"], rtol=0.02)
    assert (found != golden["alex:distance"].astype(np.float32))[:2].all() and found[2] == 0


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("kind", "images", "others", "message"),
    [
        ("lpips", (1, 64, 64, 3), (1, 64, 64, 3), "'lpips' of a perceptual network is unknown"),
        ("lpips_vgg", (1, 64, 64, 1), (1, 64, 64, 1), r"images must have the shape .*c=3"),
        ("lite0_logits", (1, 64, 64, 1), (1, 64, 64, 1), r"images must have the shape .*c=3"),
        ("lpips_alex", (1, 64, 64, 3), (1, 64, 32, 3), r"others must have the shape .*W=64"),
        ("lpips_alex", (1, 30, 64, 3), (1, 30, 64, 3), "30x64 pixels are too small .*needs 31"),
    ],
)
def test_other_pictures_are_refused(kind, images, others, message):
    params = perceptual.shapes(kind if kind in perceptual.KINDS else "lpips_alex")
    run = functools.partial(perceptual.distance, kind, least_side=8)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, params, shaped(*images), shaped(*others))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
def test_a_sum_of_slices_is_the_convolution_of_each_channel(size, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 12, 4)).astype(np.float32)
    kernel, bias = rng.normal(size=(size, size, 1, 4)), rng.normal(size=4)
    params = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
    wanted = jax.lax.conv_general_dilated(
        *(x, params["kernel"], (stride, stride), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    found = lite0.Depthwise(size, stride).apply({"params": params}, x)
    np.testing.assert_allclose(found, wanted + params["bias"], atol=1e-5)
