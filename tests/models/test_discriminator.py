"""Discriminators and their losses equal the goldens; their sizes, grids and refusals."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.models import conversion, discriminator, losses

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LOSSES = ("hinge", "non_saturating")

VQGAN_PLUS = {
    r"block_in\.0\.weight": ("first/kernel", conversion.CONV),
    r"block_in\.0\.bias": ("first/bias", conversion.COPY),
    r"blocks\.(\d)\.0\.weight": (r"stage_\1/conv/kernel", conversion.CONV),
    r"blocks\.(\d)\.0\.bias": (r"stage_\1/conv/bias", conversion.COPY),
    r"blocks\.(\d)\.1\.kernel": (None, conversion.COPY),  # the blur
    r"blocks\.(\d)\.2\.weight": (r"stage_\1/norm/scale", conversion.COPY),
    r"blocks\.(\d)\.2\.bias": (r"stage_\1/norm/bias", conversion.COPY),
    r"to_logits\.0\.weight": ("hidden/kernel", conversion.CONV),
    r"to_logits\.0\.bias": ("hidden/bias", conversion.COPY),
    r"to_logits\.2\.weight": ("logits/kernel", conversion.CONV),
    r"to_logits\.2\.bias": ("logits/bias", conversion.COPY),
}
STYLEGAN = {
    r"Conv_0/(\w+)": (r"first/\1", conversion.COPY),
    r"Conv_1/(\w+)": (r"last/\1", conversion.COPY),
    r"Dense_0/(\w+)": (r"hidden/\1", conversion.COPY),
    r"Dense_1/(\w+)": (r"logits/\1", conversion.COPY),
    r"ResBlock_(\d)/Conv_0/(\w+)": (r"block_\1/inner/\2", conversion.COPY),
    r"ResBlock_(\d)/Conv_1/(\w+)": (r"block_\1/skip/\2", conversion.COPY),
    r"ResBlock_(\d)/Conv_2/(\w+)": (r"block_\1/outer/\2", conversion.COPY),
}


class Golden:
    """A golden file, its network, and what ours gives for it."""

    def __init__(self, name, model, table, prefix=""):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            self.file = dict(arrays)
        self.model, self.table, self.prefix = model, table, prefix
        start = f"param:{prefix}"
        tensors = {k.removeprefix(start): v for k, v in self.file.items() if k.startswith(start)}
        self.real, self.fake = (self.file[k].astype(np.float32) for k in ("real", "fake"))
        shapes = jax.eval_shape(model.init, jax.random.key(0), self.real)["params"]
        params = conversion.convert(tensors, table, shapes)
        self.params = jax.tree.map(lambda x: x.astype(np.float32), params)
        self.logits = jax.jit(lambda params, images: model.apply({"params": params}, images))

    def gradient_error(self, kind, gradients):
        """The largest error of a gradient, relative to the largest entry of its tensor's golden."""
        errors, start = {}, f"grad:{kind}:{self.prefix}"
        for key, expected in self.file.items():
            if key.startswith(start):
                name, _, every = key.removeprefix(start).partition(":every")
                found = conversion.revert(gradients, self.table, [name])[name]
                found = found.ravel()[:: int(every)] if every else found
                errors[name] = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6)
        assert len(errors) == len(jax.tree.leaves(gradients))
        return max(errors.values())


@pytest.fixture(scope="module")
def plus():
    model = discriminator.Discriminator(channels=32, stages=2, groups=32)
    return Golden("disc_vqgan_plus", model, VQGAN_PLUS, "discriminator.")


@pytest.fixture(scope="module")
def style():
    model = discriminator.StyleGANDiscriminator((32, 32), channels=8, widths=(12, 16, 16))
    return Golden("disc_stylegan", model, STYLEGAN)


def discriminator_losses(golden):
    """Each loss of a discriminator as a function of its parameters, and of these only."""

    def both(params):
        return golden.logits(params, golden.real), golden.logits(params, golden.fake)

    def lecam(params):
        real, fake = both(params)
        return losses.lecam(real.mean(), fake.mean(), jnp.array([0.35, -0.2]))

    def r1(params):
        return losses.gradient_penalty(lambda x: golden.logits(params, x), golden.real)

    adversarial = {k: lambda p, k=k: losses.discriminator_loss(k, *both(p)) for k in LOSSES}
    return adversarial | {"lecam": lecam, "r1": r1}


def values_and_gradients(golden, kinds):
    functions = {kind: discriminator_losses(golden)[kind] for kind in kinds}
    run = jax.jit(lambda p: {kind: jax.value_and_grad(f)(p) for kind, f in functions.items()})
    return jax.device_get(run(golden.params))


@pytest.mark.parametrize(
    ("images", "expected"),
    [("real", "logits_real"), ("fake", "logits_fake"), ("pooled_input", "logits_pooled")],
)
def test_logits_equal_the_golden(plus, images, expected):
    """Of pictures, of reconstructions, and of a grid of 32x32 cells, which is pooled."""
    found = plus.logits(plus.params, plus.file[images].astype(np.float32))
    np.testing.assert_allclose(found, plus.file[expected][:, 0], atol=1e-5)


def test_losses_of_the_discriminator_equal_the_golden(plus):
    found = values_and_gradients(plus, (*LOSSES, "lecam", "r1"))
    for kind, (value, gradients) in found.items():
        np.testing.assert_allclose(value, plus.file[kind], rtol=2e-5, err_msg=kind)
        if kind != "non_saturating":  # of which the golden has no gradient
            assert plus.gradient_error(kind, gradients) < 1e-3, kind


@pytest.mark.parametrize(
    ("name", "kind", "every", "tolerance"),
    [
        ("plus", "hinge", 4, 1e-3),
        ("plus", "non_saturating", 4, 1e-3),
        ("style", "non_saturating", 1, 2e-5),
    ],
)
def test_losses_of_the_tokenizer_equal_the_golden(request, name, kind, every, tolerance):
    golden = request.getfixturevalue(name)

    def loss(images):
        return losses.generator_loss(kind, golden.logits(golden.params, images))

    value, gradient = jax.jit(jax.value_and_grad(loss))(golden.fake)
    np.testing.assert_allclose(value, golden.file[f"g_{kind}"], rtol=2e-5)
    expected = golden.file[f"image_grad:g_{kind}" + (f":every{every}" if every > 1 else "")]
    error = np.abs(gradient[:, ::every, ::every] - expected).max()
    assert error < tolerance * np.abs(expected).max()


def test_stylegan_equals_the_golden(style):
    for name in ("real", "fake"):
        found = style.logits(style.params, getattr(style, name))
        np.testing.assert_allclose(found[:, 0, 0], style.file[f"logits_{name}"], rtol=2e-5)
    for kind, (value, gradients) in values_and_gradients(style, ("non_saturating", "r1")).items():
        np.testing.assert_allclose(value, style.file[kind], rtol=2e-5)
        assert style.gradient_error(kind, gradients) < 2e-5, kind


def sizes(model, side):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_the_defaults_are_the_networks_of_the_recipes():
    assert discriminator.make("vqgan_plus", (256, 256), channels=128).stages == 4
    assert discriminator.make("vqgan_plus", (128, 192), channels=128).stages == 3
    assert discriminator.make("vqgan_plus", (32, 32), channels=32).stages == 2
    assert sizes(discriminator.Discriminator(), 256) == 7_431_297
    assert sizes(discriminator.Discriminator(channels=32, stages=2), 32) == 36_129
    style = discriminator.make("stylegan", (256, 256), channels=64)
    assert style == discriminator.StyleGANDiscriminator((256, 256))
    with pytest.raises(ValueError, match="kind='patch' of a discriminator is unknown: one of vqga"):
        discriminator.make("patch", (32, 32), channels=8)


def initial(model, images):
    return jax.jit(model.init)(jax.random.key(0), images)


def test_weights_begin_as_pytorchs_do():
    params = initial(discriminator.Discriminator(16, 1), jnp.zeros((1, 8, 8, 3)))["params"]
    for part, fan_in in [("first", 75), ("stage_0/conv", 144), ("hidden", 16), ("logits", 400)]:
        found = params
        for name in part.split("/"):
            found = found[name]
        limit = fan_in**-0.5
        assert 0.9 * limit < np.abs(found["kernel"]).max() <= limit, part
        assert 0 < np.abs(found["bias"]).max() <= limit, part


@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (14, 1), (160, 32)])
def test_a_group_has_four_channels_unless_there_are_many(channels, groups):
    images = np.random.default_rng(0).uniform(size=(1, 8, 8, 3))
    default = discriminator.Discriminator(channels, 1)
    variables = initial(default, images)
    others = (groups, channels // 2)
    models = [default, *(default.clone(groups=number) for number in others)]
    found, same, other = jax.jit(lambda x: [model.apply(variables, x) for model in models])(images)
    np.testing.assert_allclose(found, same, atol=1e-6)
    assert np.abs(other - found).max() > 1e-3


def depthwise(x):
    """The blur as a convolution of each channel with its 4x4 filter."""
    row = jnp.array([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = jnp.tile(jnp.outer(row, row)[:, :, None, None], (1, 1, 1, x.shape[-1]))
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (1, 7, 5, 2)])
def test_the_blur_is_a_depthwise_convolution(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = jax.jit(discriminator.blur)(x)
    assert found.shape == (shape[0], shape[1] // 2, shape[2] // 2, shape[3])
    np.testing.assert_allclose(found, jax.jit(depthwise)(x), atol=1e-6)


def test_pictures_of_any_size_are_judged():
    """Odd sizes lose their last places; grids over 16 cells are pooled by overlapping windows."""
    model = discriminator.Discriminator(4, 1)
    images = np.random.default_rng(0).uniform(size=(1, 43, 9, 3))
    variables = initial(model, images)
    run = lambda x: model.apply(variables, x, capture_intermediates=True)  # noqa: E731
    found, state = jax.device_get(jax.jit(run)(images))
    assert found.shape == (1, 16, 4)
    (grid,) = state["intermediates"]["stage_0"]["__call__"]
    assert grid.shape == (1, 21, 4, 4)
    # Windows of PyTorch's AdaptiveMaxPool2d: from floor(i n / 16) to ceil((i + 1) n / 16).
    windows = [grid[:, i * 21 // 16 : math.ceil((i + 1) * 21 / 16)].max(1) for i in range(16)]
    kernel, bias = (variables["params"]["hidden"][name] for name in ("kernel", "bias"))
    (hidden,) = state["intermediates"]["hidden"]["__call__"]
    np.testing.assert_allclose(hidden, np.stack(windows, 1) @ kernel[0, 0] + bias, atol=1e-5)


def test_what_cannot_be_is_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"images of 3x8 pixels are too small .* stages=2"):
        discriminator.Discriminator(4, 2).init(key, jnp.zeros((1, 3, 8, 3)))
    with pytest.raises(ValueError, match="groups=3 must divide channels=8"):
        discriminator.Discriminator(8, 1, groups=3).init(key, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"shape \[b, H=8, W=8, c\], not \[1, 8, 16, 3\]"):
        discriminator.StyleGANDiscriminator((8, 8), 4, (4,)).init(key, jnp.zeros((1, 8, 16, 3)))


@pytest.mark.parametrize("kind", discriminator.KINDS)
def test_half_precision_keeps_parameters_and_logits_float32(kind):
    model = discriminator.make(kind, (8, 8), channels=4, dtype="bfloat16")
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.apply, variables, images).dtype == jnp.float32
    network = jax.jit(model.apply).lower(variables, images).as_text()
    convolutions = [line for line in network.splitlines() if "stablehlo.convolution" in line]
    exact = [line for line in convolutions if "bf16" not in line]
    assert len(convolutions) > 4 and len(exact) == (kind == "vqgan_plus")  # that of the logits


@pytest.mark.parametrize("kind", discriminator.KINDS)
def test_half_precision_is_near_to_single(kind):
    model = discriminator.make(kind, (8, 8), channels=4, dtype="bfloat16")
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))

    def loss(variables, model):
        found = model.apply(variables, images)
        return losses.discriminator_loss("hinge", found, -found) + jnp.square(found).sum()

    variables = initial(model, images)
    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (value, gradients), (exact, expected) = (
        run(variables, model.clone(dtype=dtype)) for dtype in ("bfloat16", "float32")
    )
    np.testing.assert_allclose(value, exact, rtol=0.02)
    for found, wanted in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        assert np.isfinite(found).all()
        assert np.abs(found - wanted).max() < 0.2 * max(np.abs(wanted).max(), 1e-3)


def test_no_gradient_of_the_discriminator_reaches_the_tokenizer(plus):
    def loss(params, reconstruction):
        fake = plus.logits(params, jax.lax.stop_gradient(reconstruction))
        return losses.discriminator_loss("hinge", plus.logits(params, plus.real), fake)

    of_params, of_pictures = jax.jit(jax.grad(loss, (0, 1)))(plus.params, plus.fake)
    assert not np.any(of_pictures)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_params))
