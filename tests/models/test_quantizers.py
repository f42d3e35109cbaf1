"""Quantizers are what their papers define, written here once more in numpy."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.models import quantizers, vqgan

SMALL = dict(
    channels=4, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=2, image_channels=1
)
LEVELS = (8, 5, 3)
KINDS = {
    "vq": dict(codebook_size=16, embed_dim=4),
    "normalize": dict(codebook_size=16, embed_dim=4, normalize=True),
    "projection": dict(codebook_size=16, embed_dim=4, projection=True),
    "both": dict(codebook_size=16, embed_dim=4, normalize=True, projection=True),
    "fsq": dict(quantizer="fsq", levels=LEVELS, codebook_size=120, embed_dim=3),
    "lfq": dict(quantizer="lfq", codebook_size=16, embed_dim=4),
}


def model_of(kind):
    return vqgan.VQGAN(**SMALL, **KINDS[kind])


def params_of(model, seed=0):
    """Random parameters of what is learnt of codes, which is all that is needed here."""
    rng = np.random.default_rng(seed)
    sizes = {"codebook": (model.codebook_size, model.embed_dim)} if model.quantizer == "vq" else {}
    if model.projection:
        sizes["code_projection"] = (model.embed_dim, model.embed_dim)
    return {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def table_of(kind, params):
    """The vectors of all codes, float64."""
    if kind == "fsq":
        # The first feature's level changes fastest.
        levels = np.array(list(itertools.product(*(range(n) for n in LEVELS[::-1]))))[:, ::-1]
        half = np.array(LEVELS) // 2
        return (levels - half) / half
    if kind == "lfq":
        return np.array(list(itertools.product([-1, 1], repeat=4)))[:, ::-1]
    table = params["codebook"].astype(np.float64)
    if kind in ("projection", "both"):
        table = table @ params["code_projection"].astype(np.float64)
    return unit(table) if kind in ("normalize", "both") else table


@pytest.mark.parametrize("kind", KINDS)
def test_every_place_gets_its_code(kind):
    model = model_of(kind)
    params = params_of(model)
    table = table_of(kind, params)
    apply = lambda *x, method: model.apply({"params": params}, *x, method=method)  # noqa: E731
    np.testing.assert_allclose(apply(method="code_table"), table, atol=1e-5)
    z = np.random.default_rng(1).normal(size=(2, 5, 7, model.embed_dim)).astype(np.float32)
    ids, codes = apply(z, method="quantize")
    assert ids.dtype == jnp.int32 and codes.dtype == jnp.float32
    np.testing.assert_array_equal(codes, apply(method="code_table")[ids])
    if kind == "fsq":
        # Even numbers of levels are centred between two of them, and zero is the upper one.
        count = np.array(LEVELS)
        half, offset = (count - 1) * 0.999 / 2, (count % 2 == 0) / 2
        level = np.round(np.tanh(z + np.arctanh(offset / half)) * half - offset) + count // 2
        expected = level[..., 0] + 8 * level[..., 1] + 40 * level[..., 2]
    else:
        compared = unit(z) if kind in ("normalize", "both") else z
        expected = np.square(compared[..., None, :] - table).sum(-1).argmin(-1)
    np.testing.assert_array_equal(ids, expected)
    assert len(np.unique(ids)) > 8


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (7, 5, 4, 3), (3,), (2,) * 10])
def test_codes_and_their_numbers_are_one_to_one(levels):
    ids = np.arange(np.prod(levels))
    digits = quantizers.from_ids(jnp.asarray(ids), levels)
    assert len(np.unique(np.asarray(digits), axis=0)) == len(ids)
    np.testing.assert_array_equal(quantizers.to_ids(digits, levels), ids)
    vectors = quantizers.of_digits(digits, levels)
    assert jnp.abs(vectors).max() == 1
    np.testing.assert_array_equal(quantizers.digits_of(vectors, levels), digits)


def test_every_level_can_be_reached_and_zero_stays_zero():
    levels = (3, 4, 5, 8, 255, 256)
    z = np.linspace(-12, 12, 20_001, dtype=np.float32)[:, None] + np.zeros(len(levels))
    digits = np.asarray(quantizers.digits_of(quantizers.bounded(jnp.asarray(z), levels), levels))
    assert [len(np.unique(x)) for x in digits.T] == list(levels)
    np.testing.assert_allclose(quantizers.bounded(jnp.zeros(len(levels)), levels), 0, atol=1e-6)


def rotation(z, q):
    """The matrix by which the gradient of a code is that of features: turn and scale."""
    e, f = unit(z), unit(q)
    w = unit(e + f)
    turn = np.eye(len(z)) - 2 * np.outer(w, w) + 2 * np.outer(f, e)
    return np.linalg.norm(q) / np.linalg.norm(z) * turn


def test_a_code_s_gradient_is_turned_as_its_features_are():
    z, q, cotangent = np.random.default_rng(0).normal(size=(3, 20, 5))
    found, back = jax.vjp(
        lambda z: quantizers.passed(z, jnp.asarray(q), "rotation"), jnp.asarray(z)
    )
    np.testing.assert_allclose(found, q, rtol=1e-5, atol=1e-5)
    matrices = [rotation(*pair) for pair in zip(z, q, strict=True)]
    assert np.allclose([m @ x for m, x in zip(matrices, z, strict=True)], q)
    expected = [m.T @ c for m, c in zip(matrices, cotangent, strict=True)]
    np.testing.assert_allclose(back(jnp.asarray(cotangent, found.dtype))[0], expected, atol=1e-4)


@pytest.mark.parametrize("gradient", quantizers.GRADIENTS)
def test_where_nothing_can_be_turned_the_gradient_goes_straight_through(gradient):
    """Opposite directions, features that are zero, and a code that is."""
    z = jnp.array([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]])
    q = jnp.array([[-2.0, -4.0], [1.0, 0.0], [0.0, 0.0]])
    found, back = jax.vjp(lambda z: quantizers.passed(z, q, gradient), z)
    np.testing.assert_allclose(found, q, atol=1e-6)
    cotangent = jnp.array([[1.0, -2.0], [0.5, 3.0], [4.0, 5.0]])
    np.testing.assert_array_equal(back(cotangent)[0], cotangent)


def test_no_gradient_reaches_a_code_by_the_decoder():
    z, q = jnp.ones((2, 3)), jnp.full((2, 3), 0.5)
    for gradient in quantizers.GRADIENTS:
        found = jax.grad(lambda q, g=gradient: quantizers.passed(z, q, g).sum())(q)
        np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("bits", [1, 2, 5, 6])
def test_entropy_of_bits_is_that_of_all_codes(bits):
    temperature = 0.7
    z = 0.3 * np.random.default_rng(bits).normal(size=(2, 3, 4, bits))
    codes = np.array(list(itertools.product([-1, 1], repeat=bits)))
    logits = -np.square(z.reshape(-1, 1, bits) - codes).sum(-1) / temperature
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = lambda p: -(p * np.log(p)).sum(-1)  # noqa: E731
    expected = entropy(p).mean() - entropy(p.mean(0))
    found = quantizers.entropy_loss(jnp.asarray(z, jnp.float32), temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_entropy_is_least_where_all_codes_are_taken_for_sure():
    codes = np.array(list(itertools.product([-1.0, 1.0], repeat=6)), np.float32)
    function = jax.jit(jax.value_and_grad(quantizers.entropy_loss))
    loss, gradient = function(jnp.asarray(codes), 0.01)
    np.testing.assert_allclose(loss, -6 * np.log(2), rtol=1e-5)
    assert np.isfinite(gradient).all()
    # As many bits as are allowed need no table of all codes at all places.
    wide = jax.eval_shape(quantizers.entropy_loss, jnp.zeros((64, 8, quantizers.MOST_BITS)), 0.01)
    assert wide.shape == ()


def test_each_kind_has_its_losses():
    z, codes = jnp.zeros((1, 1, 2, 2)), jnp.ones((1, 1, 2, 2))
    names = {kind: [*quantizers.losses(kind, z, codes, 1.0)] for kind in quantizers.KINDS}
    both = ["commitment_loss", "entropy_loss"]
    assert names == {"vq": ["codebook_loss", "commitment_loss"], "fsq": [], "lfq": both}

    def weighted(z, codes):
        found = quantizers.losses("vq", z, codes, 1.0)
        return 3 * found["codebook_loss"] + 5 * found["commitment_loss"]

    of_z, of_codes = jax.grad(weighted, (0, 1))(z, codes)
    np.testing.assert_allclose(of_z, 5 * 2 * -1 / 4)
    np.testing.assert_allclose(of_codes, 3 * 2 * 1 / 4)


def test_the_table_of_a_projection_is_frozen_and_its_matrix_learns():
    model = model_of("projection")
    z = jax.random.normal(jax.random.key(0), (1, 3, 3, 4))

    def total(params):
        return model.apply({"params": params}, z, method="quantize")[1].sum()

    gradient = jax.grad(total)(params_of(model))
    np.testing.assert_array_equal(gradient["codebook"], 0)
    assert jnp.abs(gradient["code_projection"]).min() > 0


def test_first_codes_are_as_wide_as_each_kind_wants():
    made = {}
    for kind in ("normalize", "projection"):
        init = model_of(kind).clone(codebook_size=512).init
        made[kind] = init(jax.random.key(0), method="code_table")["params"]
    lengths = jnp.linalg.norm(made["normalize"]["codebook"], axis=-1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)
    assert abs(made["projection"]["codebook"].std() - 4**-0.5) < 0.03
    assert jnp.abs(made["projection"]["code_projection"]).max() <= 4**-0.5


@pytest.mark.parametrize("places", [6, 400])
def test_a_code_is_swapped_for_one_near_to_it(places):
    """Whether there are fewer places or fewer codes."""
    table = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    ids = jnp.arange(places).reshape(2, -1) % 40
    distances = np.square(table[:, None] - table).sum(-1)
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1)[:, :5]
    found = jax.jit(quantizers.near, static_argnums=3)(jax.random.key(0), ids, table, 5)
    assert found.shape == ids.shape and found.dtype == jnp.int32
    pairs = list(zip(np.ravel(ids), np.ravel(found), strict=True))
    assert all(other in nearest[code] for code, other in pairs)
    if places > 40:
        assert {np.argmax(nearest[code] == other) for code, other in pairs} == set(range(5))
    # More than there are: any but itself.
    some = quantizers.near(jax.random.key(0), ids, jnp.asarray(table), 1000)
    assert (some != ids).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(quantizer="pq"), "quantizer='pq' is unknown"),
        (dict(gradient="none"), "gradient='none' is unknown"),
        (dict(quantizer="fsq"), "'fsq' needs them"),
        (dict(levels=(8, 8)), "'fsq' needs them"),
        (dict(quantizer="lfq", normalize=True), "normalize is of quantizer='vq'"),
        (dict(quantizer="fsq", levels=(8, 8), projection=True), "projection is of quantizer='vq'"),
        (dict(quantizer="fsq", levels=(8, 2)), "from 3 to 256"),
        (dict(quantizer="lfq", embed_dim=19), "1 to 18"),
        (dict(quantizer="lfq", embed_dim=10, codebook_size=1000), "codebook_size=1024"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        vqgan.VQGAN(**settings)


def test_the_advice_about_sizes_works():
    with pytest.raises(ValueError, match="1000 codes of width 4") as error:
        vqgan.VQGAN(quantizer="fsq", levels=(8, 5, 5, 5))
    sizes = re.findall(r"--config\.model\.(\w+)=(\d+)", str(error.value))
    made = vqgan.VQGAN(quantizer="fsq", levels=(8, 5, 5, 5), **{k: int(v) for k, v in sizes})
    assert (made.codebook_size, made.embed_dim) == (1000, 4)
