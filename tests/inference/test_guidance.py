"""Guidance: the weight of every schedule at every step, and the arithmetic of its branches."""

import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.inference import guidance, sampling, windows
from enat_jax.models.blocks import Text
from enat_jax.schedules import reveal

# Of scale 3, four steps, interval (0.25, 0.75).
EXPECTED = {
    "linear": [0, 0.75, 1.5, 2.25],
    "constant": [3, 3, 3, 3],
    "cosine": [0, 1.5 * (1 - np.sqrt(0.5)), 1.5, 1.5 * (1 + np.sqrt(0.5))],
    "interval": [0, 3, 3, 0],
}


@pytest.mark.parametrize("schedule", guidance.SCHEDULES)
def test_each_schedule_has_its_weights(schedule):
    found = guidance.weights(schedule, 3.0, (0.25, 0.75), 4)
    np.testing.assert_allclose(found, EXPECTED[schedule], rtol=0, atol=1e-12)
    settings = sampling.Settings(4, 3.0, guidance_schedule=schedule, guidance_interval=(0.25, 0.75))
    np.testing.assert_array_equal(settings.guidance_weights(), found)


def test_a_schedule_is_an_entry_of_the_table_and_nothing_else(monkeypatch):
    monkeypatch.setitem(guidance.SCHEDULES, "last", lambda share, interval: share == share.max())
    settings = sampling.Settings(4, 3.0, guidance_schedule="last")
    assert settings.guidance_weights().tolist() == [0, 0, 0, 3]
    with pytest.raises(ValueError, match="'first' is none of linear, .*, last"):
        sampling.Settings(4, 3.0, guidance_schedule="first")


def apply(*arguments, method, **counts):
    """A model whose cache adds up modulation, and whose logits are modulation and cache."""
    ids, positions, *rest = arguments
    if method == "encode":
        modulation, cache = rest
        assert len(ids) == len(positions) == len(cache) == modulation.shape[1]
        return jnp.concatenate([cache, jnp.broadcast_to(modulation[0], (len(ids), 1, 1))], axis=1)
    modulation, cache = positions, rest[0]
    assert len(ids) == len(cache) == modulation.shape[1]
    return modulation[0] + 10 * cache.sum(axis=1, keepdims=True)


def test_branches_lie_side_by_side_and_unguided_steps_decode_one():
    ids = np.zeros((2, 1), np.int32)
    cut = windows.cut(ids, ids, 0, 0, reveal.Windows(0, 1, 1, 1), exact=True)
    conditional, unconditional = jnp.array([1.0, 2.0]), jnp.array([5.0, 5.0])
    shape = (1, 2, 1, 1)
    modulation = guidance.pair(conditional.reshape(shape), unconditional.reshape(shape))
    assert modulation.ravel().tolist() == [1, 5, 2, 5]
    empty = jnp.zeros((4, 0, 1))
    logits, cache = guidance.guided_logits(apply, cut, modulation, empty, 0.5, guided=True)
    c, u = 11 * conditional, 11 * unconditional
    assert logits.ravel().tolist() == (c + 0.5 * (c - u)).tolist()
    logits, unguided = guidance.guided_logits(apply, cut, modulation, empty, 0.5, guided=False)
    assert logits.ravel().tolist() == c.tolist()
    assert cache.tolist() == unguided.tolist()  # the null rows are encoded all the same
    modulation, cache, _ = guidance.conditional_only(modulation, cache)
    assert modulation.ravel().tolist() == cache.ravel().tolist() == [1, 2]


def test_texts_of_both_branches_lie_side_by_side_and_are_padded():
    one = Text(jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]]), jnp.array([2, 1]))
    null = Text(jnp.array([[[5.0], [6.0], [7.0]]]), None)
    both = guidance.pair_texts(one, null)
    assert both.features[..., 0].tolist() == [[1, 2, 0], [5, 6, 7], [3, 4, 0], [5, 6, 7]]
    assert both.length.tolist() == [2, 3, 1, 3]
    *_, alone = guidance.conditional_only(jnp.zeros((1, 4, 1)), jnp.zeros((4, 0, 1)), both)
    assert alone.features[..., 0].tolist() == [[1, 2, 0], [3, 4, 0]]
    assert alone.length.tolist() == [2, 1]
    whole = guidance.pair_texts(Text(null.features, None), null)
    assert whole.length is None and whole.features.shape == (2, 3, 1)
