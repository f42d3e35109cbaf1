"""The spatial-temporal transformer against the reference, exact and through padded windows."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import Golden, apply, initial, order_of, perturbed, rows

from enat_jax.models import enat, layers
from enat_jax.schedules import reveal

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def forward():
    return Golden("enat_forward")


def run(golden, ids, order, labels, num_prev, num_vis, padding):
    """Cache, projected and complete, and logits, through windows ``padding`` slots too large.

    Padded slots are filled with the values most likely to do harm if a mask were missing.
    """
    l = order.shape[1]  # noqa: E741
    modulation = golden.apply(labels, method="condition")

    def window(x, start, stop, before=0, behind=0):
        return np.pad(x[:, start:stop], ((0, 0), (before, behind)), constant_values=7)

    def count(n):
        return jnp.int32(n) if padding else None

    cache = None
    if num_prev:
        cache = golden.apply(
            window(ids, 0, num_prev, behind=padding),
            window(order, 0, num_prev, behind=padding),
            modulation,
            num_new=count(num_prev),
            method="encode",
        )
        cache = cache.at[:, num_prev:].set(100.0)
    first = 0 if num_prev is None else num_prev
    cache = golden.apply(
        window(ids, first, num_vis, behind=padding),
        window(order, first, num_vis, behind=padding),
        modulation,
        cache,
        num_new=count(num_vis - first),
        num_cached=count(first) if cache is not None else None,
        method="encode",
    )
    cache = cache.at[:, num_vis:].set(100.0)
    logits = golden.apply(
        window(order, num_vis, l, before=padding),
        modulation,
        cache,
        num_masked=count(l - num_vis),
        num_visible=count(num_vis),
        method="decode",
    )
    return np.asarray(cache)[:, :num_vis], np.asarray(logits)[:, padding:]


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("case", ["prev", "without_reuse", "with_reuse"])
def test_logits_and_features_equal_the_reference(forward, case, padding):
    order, num_prev, num_vis = order_of(forward["masked_ids_prev"], forward["masked_ids"])
    assert 0 < num_prev < num_vis
    logits_key, features_key = f"logits_{case}", f"feat_{case}"
    if case == "prev":
        num_prev, num_vis, logits_key, features_key = 0, num_prev, "prev_logits", "prev_feat"
    elif case == "without_reuse":
        num_prev = 0
    ids = rows(forward["tokens"], order)
    features, logits = run(forward, ids, order, forward["labels"], num_prev, num_vis, padding)
    chex.assert_shape(logits, (3, 64 - num_vis, 1024))
    expected = rows(forward[logits_key], order[:, num_vis:])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    expected = rows(forward[features_key], order[:, :num_vis])
    np.testing.assert_allclose(features, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    "num_prev, num_vis", [(0, 1), (1, 1), (0, 14), (14, 14), (0, 63), (20, 63), (63, 63)]
)
def test_corners_equal_the_reference(num_prev, num_vis, padding):
    golden = Golden("enat_edges")
    order = np.argsort(golden["rank"], axis=1)
    ids = rows(golden["tokens"], order)
    _, logits = run(golden, ids, order, golden["forward_labels"], num_prev, num_vis, padding)
    expected = rows(golden[f"logits:{num_prev}_{num_vis}"], order[:, num_vis:])
    np.testing.assert_allclose(logits[..., :64], expected, rtol=0, atol=TOLERANCE)


def test_counts_may_differ_from_row_to_row(forward):
    """A vector of counts gives every row what it would get alone."""
    order, num_prev, num_vis = order_of(forward["masked_ids_prev"], forward["masked_ids"])
    ids, labels = rows(forward["tokens"], order), forward["labels"]
    cached = np.array([num_prev, num_prev - 6, 1])
    together = padded_by_row(forward, ids, order, labels, cached, num_vis)
    for i, n in enumerate(cached):
        part = slice(i, i + 1)
        _, alone = run(forward, ids[part], order[part], labels[part], int(n), num_vis, 0)
        np.testing.assert_allclose(together[part], alone, rtol=0, atol=TOLERANCE)


def test_features_that_have_been_projected_stay_as_they_are(forward):
    ids, labels = forward["tokens"], forward["labels"]
    order = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    modulation = forward.apply(labels, method="condition")
    cache = forward.apply(ids[:, :5], order[:, :5], modulation, method="encode")
    new = ids[:, 5:8], order[:, 5:8], modulation, cache
    all_of_them = forward.apply(*new, method="encode")
    for counts in (2, np.array([2, 0, 5])):
        found = forward.apply(*new, num_projected=counts, method="encode")
        for row, n in enumerate(np.broadcast_to(counts, 3)):
            np.testing.assert_array_equal(found[row, :n], cache[row, :n])
            np.testing.assert_array_equal(found[row, n:5], all_of_them[row, n:5])
    assert np.abs(found[0, 5:] - all_of_them[0, 5:]).max() > 1e-4  # they saw another context


def padded_by_row(golden, ids, order, labels, cached, num_vis):
    modulation = golden.apply(labels, method="condition")
    p = int(cached.max())
    cache = golden.apply(
        ids[:, :p], order[:, :p], modulation, num_new=jnp.asarray(cached), method="encode"
    )
    n = num_vis - int(cached.min())
    index = np.minimum(cached[:, None] + np.arange(n), ids.shape[1] - 1)
    cache = golden.apply(
        np.take_along_axis(ids, index, axis=1),
        np.take_along_axis(order, index, axis=1),
        modulation,
        cache,
        num_new=jnp.asarray(num_vis - cached),
        num_cached=jnp.asarray(cached),
        method="encode",
    )
    return np.asarray(
        golden.apply(
            order[:, num_vis:],
            modulation,
            cache,
            num_visible=jnp.full(3, num_vis),
            method="decode",
        )
    )


def small(**changes):
    settings = dict(
        num_tokens=16, codebook_size=20, num_classes=3, width=16, num_heads=2,
        encoder_layers=2, decoder_layers=1,
    )  # fmt: skip
    return enat.ENAT(**settings | changes)


EMBED = lambda model, *window: model.embed(*window)  # noqa: E731


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embedded_tokens_are_encoded_as_their_ids_are(dtype):
    """Bit for bit, with a cache and with padding, whose counts differ from image to image."""
    model = small(dtype=dtype)
    params = perturbed(model)
    ids, positions = jnp.arange(16).reshape(2, 8) % 20, jnp.array([range(8), range(15, 7, -1)])
    run = functools.partial(apply, model, params)
    modulation = run(jnp.array([1, 3]), method="condition")

    def encode(embed):
        cache = run(*embed(slice(0, 3)), modulation, method="encode")
        counts = dict(num_new=jnp.array([5, 2]), num_cached=jnp.array([1, 3]))
        return cache, run(*embed(slice(3, 8)), modulation, cache, **counts, method="encode")

    by_ids = encode(lambda part: (ids[:, part], positions[:, part]))
    embedded = run(ids, positions, method=EMBED).astype(jnp.float32)
    by_embeddings = encode(lambda part: (embedded[:, part], None))
    chex.assert_trees_all_equal(by_ids, by_embeddings)
    assert {x.dtype for x in by_embeddings} == {jnp.dtype(dtype)}


def test_initialisation_is_the_paper_s():
    params = initial(small(width=64, codebook_size=500, num_classes=200))
    block = params["encoder"]
    bound = lambda i, o: (6 / (i + o)) ** 0.5  # noqa: E731
    for kernel, limit in [
        (block["query"]["kernel"], bound(64, 64)),
        (block["key_value_self"]["kernel"], bound(64, 128)),
        (block["key_value_context"]["kernel"], bound(64, 128)),
        (block["mlp"]["up"]["kernel"], bound(64, 256)),
        (params["head"]["dense"]["kernel"], bound(64, 64)),
        (params["project"]["mlp"]["down"]["kernel"], bound(256, 64)),
    ]:
        assert float(jnp.abs(kernel).max()) == pytest.approx(limit, rel=0.02)
        assert float(kernel.std()) == pytest.approx(limit / 3**0.5, rel=0.05)
    assert not np.allclose(block["query"]["kernel"][0], block["query"]["kernel"][1])
    for table in (params["embed"]["word"], params["modulation"]["label_table"]):
        assert float(table.std()) == pytest.approx(0.02, rel=0.05)
    assert not params["modulation"]["kernel"].any() and not params["modulation"]["bias"].any()
    assert not params["head"]["bias"].any() and not block["out"]["bias"].any()


def test_gates_and_positions_may_start_elsewhere():
    params = initial(small(gate_bias=0.3, position_init="sincos"))
    bias = params["modulation"]["bias"].reshape(3, 8, 16)
    np.testing.assert_allclose(bias[:, [4, 7]], 0.3)
    assert not bias[:, [0, 1, 2, 3, 5, 6]].any()
    table = np.asarray(params["embed"]["position"])
    np.testing.assert_allclose(table, layers.sincos_2d(16, 16))
    assert len(np.unique(table.round(5), axis=0)) == 16
    with pytest.raises(ValueError, match="position_init"):
        initial(small(position_init="learned"))


def test_remat_and_unrolling_change_nothing():
    ids = jnp.arange(16)[None] % 20
    outputs = []
    params = perturbed(small())
    for model in (small(), small(remat="full"), small(remat="dots"), small(unroll=2)):
        function = lambda p, m=model: apply(m, p, ids, jnp.array([1])).sum()  # noqa: E731
        outputs.append(jax.jit(jax.value_and_grad(function))(params))
    for other in outputs[1:]:
        chex.assert_trees_all_close(outputs[0], other, rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_float32_parameters_and_logits():
    model = small(dtype="bfloat16")
    params = initial(model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    ids = jnp.arange(16)[None] % 20
    logits = apply(model, params, ids, jnp.array([1]))
    chex.assert_type(logits, jnp.float32)
    exact = apply(small(), params, ids, jnp.array([1]))
    np.testing.assert_allclose(logits, exact, atol=0.03)


def test_without_reuse_there_is_no_projection_and_no_dead_weight():
    params = initial(small(reuse=False))
    assert "project" not in params
    assert "key_value_context" not in params["encoder"]
    assert "key_value_context" in params["decoder"]


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="num_heads=3"):
        initial(small(num_heads=3))


def test_padding_has_no_gradient_and_no_nan():
    """All keys of a query may be padding: the cache is empty and the window larger than it."""
    model = small()
    params = perturbed(model)
    ids = jnp.arange(16)[None] % 20
    positions = jnp.arange(16)[None]
    windows = reveal.Windows(4, 4, 8, 16)

    def total(params):
        run = functools.partial(model.apply, {"params": params})
        modulation = run(jnp.array([1]), method="condition")
        cache = run(
            ids[:, : windows.num_new],
            positions[:, : windows.num_new],
            modulation,
            jnp.zeros((1, windows.num_cached, 16)),
            num_new=jnp.int32(0),
            num_cached=jnp.int32(0),
            method="encode",
        )
        logits = run(
            positions,
            modulation,
            cache,
            num_masked=jnp.int32(16),
            num_visible=jnp.int32(0),
            method="decode",
        )
        return jnp.square(logits).mean()

    loss, grads = jax.jit(jax.value_and_grad(total))(params)
    assert np.isfinite(loss)
    chex.assert_tree_all_finite(grads)
    assert not any(g.any() for g in jax.tree.leaves(grads["encoder"]))
