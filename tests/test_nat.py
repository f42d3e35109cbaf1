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


def logits(model, params, ids, order, num_visible, padding=0, attention_mask=None):
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
        attention_mask=attention_mask,
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


def test_quadrants_of_the_attention_can_be_disabled(model, params):
    """Paper Figure 2: without (masked, visible) the masked tokens know nothing of the visible."""
    query, key = jnp.arange(9)[:, None] < 4, jnp.arange(9)[None, :] < 4
    changed = IDS.at[:, :4].add(1)
    for name, allowed, blind in [
        ("masked do not see visible", ~(~query & key), True),
        ("visible do not see masked", ~(query & ~key), False),
    ]:
        mask = allowed[None, None]
        a = logits(model, params, IDS, ORDER, 4, attention_mask=mask)
        b = logits(model, params, changed, ORDER, 4, attention_mask=mask)
        assert np.allclose(a, b) == blind, name
        assert not np.allclose(a, logits(model, params, IDS, ORDER, 4)), name


def test_it_refuses_a_cache(model, params):
    with pytest.raises(ValueError, match="reuses no features"):
        model.apply({"params": params}, IDS, ORDER, None, jnp.zeros((2, 1, 16)), method="encode")


def test_heads_must_divide_the_width():
    bad = nat.NAT(9, 20, 3, 16, 3, 2)
    with pytest.raises(ValueError, match="num_heads=3"):
        bad.init(jax.random.key(0), IDS, LABELS)
