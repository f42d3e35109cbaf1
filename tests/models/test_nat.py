"""The NAT baseline."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import apply, perturbed

from enat_jax.models import nat


@pytest.fixture(scope="module")
def model():
    return nat.NAT(
        num_tokens=9, codebook_size=20, num_classes=3, width=16, num_heads=2, num_layers=2
    )


@pytest.fixture(scope="module")
def params(model):
    return perturbed(model)


ORDER = jnp.array([[3, 8, 1, 0, 2, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
IDS = jnp.arange(18).reshape(2, 9)
LABELS = jnp.array([2, 0])
QUADRANTS = sorted(nat.QUADRANTS)


def logits(model, params, ids, order, num_visible, padding=0):
    run = functools.partial(apply, model, params)
    modulation = run(LABELS, method="condition")
    chex.assert_shape(modulation, (2, 2, 6, 16))
    pad = lambda x, before, behind: jnp.pad(  # noqa: E731
        x, ((0, 0), (before, behind)), constant_values=5
    )
    cache = run(
        pad(ids[:, :num_visible], 0, padding),
        pad(order[:, :num_visible], 0, padding),
        modulation,
        method="encode",
    )
    count = lambda n: jnp.int32(n) if padding else None  # noqa: E731
    out = run(
        pad(order[:, num_visible:], padding, 0),
        modulation,
        cache,
        num_visible=count(num_visible),
        num_masked=count(order.shape[1] - num_visible),
        method="decode",
    )
    return out[:, padding:]


def test_it_is_one_stack_over_all_tokens_in_any_order(model, params):
    """Attention is permutation-equivariant: the visible tokens may come in any order."""
    out = logits(model, params, IDS, ORDER, 4)
    chex.assert_shape(out, (2, 5, 20))
    shuffle = jnp.array([2, 0, 3, 1, 4, 5, 6, 7, 8])
    other = logits(model, params, IDS[:, shuffle], ORDER[:, shuffle], 4)
    np.testing.assert_allclose(out, other, atol=1e-5)


def test_padding_changes_nothing(model, params):
    out = logits(model, params, IDS, ORDER, 4)
    np.testing.assert_allclose(out, logits(model, params, IDS, ORDER, 4, padding=3), atol=1e-5)


def test_embedded_tokens_are_decoded_as_their_ids_are(model, params):
    """Bit for bit, with padding; dropout, which belongs to the embedding, is not applied again."""
    run = functools.partial(apply, model, params)
    modulation = run(LABELS, method="condition")
    embed = lambda module, *window: module.embed(*window)  # noqa: E731
    by_ids = run(IDS[:, :5], ORDER[:, :5], modulation, method="encode")
    embedded = model.apply({"params": params}, IDS[:, :5], ORDER[:, :5], method=embed)
    by_embeddings = run(embedded, None, modulation, method="encode")
    decode = functools.partial(run, ORDER[:, 4:], modulation, num_visible=jnp.array([4, 2]))
    outputs = [decode(cache, method="decode") for cache in (by_ids, by_embeddings)]
    chex.assert_trees_all_equal((by_ids, outputs[0]), (by_embeddings, outputs[1]))
    encode = functools.partial(model.apply, {"params": params}, method="encode")
    chex.assert_trees_all_equal(embedded, encode(embedded, None, None, deterministic=False))


def test_a_quadrant_is_queries_by_keys_and_everyone_sees_himself():
    """Two visible tokens, then two masked ones; rows are queries."""
    found = {name: nat.quadrant_mask(name, 2, 2)[0, 0].astype(int).tolist() for name in QUADRANTS}
    assert found == {
        "visible_from_visible": [[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
        "visible_from_masked": [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]],
        "masked_from_visible": [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]],
        "masked_from_masked": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 1]],
    }


@pytest.mark.parametrize("name", QUADRANTS)
def test_a_quadrant_can_be_disabled(model, params, name):
    """Paper Figure 2: without masked_from_visible the masked tokens know nothing of the visible."""
    without = model.clone(disabled_attention=name)
    out = logits(without, params, IDS, ORDER, 4)
    assert not np.allclose(out, logits(model, params, IDS, ORDER, 4))
    changed = logits(without, params, IDS.at[:, :4].add(1), ORDER, 4)
    assert np.allclose(out, changed) == (name == "masked_from_visible")
    np.testing.assert_allclose(out, logits(without, params, IDS, ORDER, 4, padding=3), atol=1e-5)


def test_masked_tokens_alone_are_decoded_without_a_quadrant(model, params):
    """The first step, where there is nothing visible."""
    without = model.clone(disabled_attention="masked_from_masked")
    assert np.isfinite(logits(without, params, IDS, ORDER, 0)).all()


def test_an_unknown_quadrant_is_refused(model, params):
    with pytest.raises(ValueError, match="'mask' is unknown: one of none, visible_from_visible"):
        model.clone(disabled_attention="mask").init(jax.random.key(0), IDS, LABELS)


def test_features_are_what_the_head_sees(model, params):
    """Of visible and masked tokens; the head turns those of the masked ones into logits."""
    run = functools.partial(apply, model, params)
    modulation = run(LABELS, method="condition")
    cache = run(IDS[:, :4], ORDER[:, :4], modulation, method="encode")
    features = run(ORDER[:, 4:], modulation, cache, method="features")
    chex.assert_shape(features, (2, 9, 16))
    head = lambda module, x: module.head(x, module.embed.word)  # noqa: E731
    out = model.apply({"params": params}, features[:, 4:], method=head)
    np.testing.assert_allclose(out, logits(model, params, IDS, ORDER, 4), atol=1e-5)


def test_it_refuses_a_cache(model, params):
    with pytest.raises(ValueError, match="reuses no features"):
        model.apply({"params": params}, IDS, ORDER, None, jnp.zeros((2, 1, 16)), method="encode")


def test_heads_must_divide_the_width():
    bad = nat.NAT(9, 20, 3, 16, 3, 2)
    with pytest.raises(ValueError, match="num_heads=3"):
        bad.init(jax.random.key(0), IDS, LABELS)
