"""Noise on codes: how many are swapped, for which, and until when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.training import code_noise

CODES = jnp.arange(4 * 16 * 16, dtype=jnp.float32).reshape(4, 16, 16, 1)
IDS = jnp.arange(4 * 16 * 16).reshape(4, 16, 16)
TABLE = CODES.reshape(-1, 1)
DECODED = CODES + 0.25
KEY = jax.random.key(0)


def swapped(decoded=DECODED, share=0.25, **settings):
    noise = code_noise.CodeNoise(code_noise=share, **settings)
    return noise.swapped(decoded, CODES, IDS, TABLE, share, KEY)


def test_a_share_of_codes_is_swapped_for_others_of_the_batch():
    found = swapped()
    changed = np.asarray(found != DECODED)
    assert abs(changed.mean() - 0.25) < 0.05
    assert np.isin(np.asarray(found)[changed], CODES).all()
    gradient = jax.grad(lambda x: swapped(x).sum())
    np.testing.assert_array_equal(np.asarray(gradient(DECODED)) == 0, changed)


def test_runs_of_earlier_versions_have_the_same_noise():
    """The draws that checkpoints were made with."""
    swap_key, order_key = jax.random.split(KEY)
    swap = jax.random.bernoulli(swap_key, 0.25, DECODED.shape[:-1])
    others = jax.random.permutation(order_key, TABLE).reshape(CODES.shape)
    np.testing.assert_array_equal(swapped(), jnp.where(swap[..., None], others, DECODED))


def test_near_codes_are_near():
    found = np.asarray(swapped(code_noise_kind="nearest", code_noise_nearest=6))
    changed = np.asarray(found != DECODED)
    assert abs(changed.mean() - 0.25) < 0.05
    distance = np.abs(found - CODES)[changed]
    assert set(distance) <= {1, 2, 3, 4, 5, 6}  # more than 3 at the table's ends alone
    assert (distance <= 3).mean() > 0.95


def test_a_share_of_images_has_noise():
    changed = np.asarray(swapped(code_noise_images=0.5) != DECODED).mean((1, 2, 3))
    assert 0 < (changed > 0).mean() < 1
    assert (np.abs(changed[changed > 0] - 0.25) < 0.1).all()


def test_noise_falls_to_what_is_left():
    noise = code_noise.CodeNoise(code_noise=0.4, code_noise_until=10, code_noise_left=0.5)
    shares = [noise.share_at(jnp.int32(step)) for step in (0, 5, 10, 50)]
    np.testing.assert_allclose(shares, [0.4, 0.3, 0.2, 0.2], rtol=1e-6)
    assert code_noise.CodeNoise(code_noise=0.4).share_at(jnp.int32(50)) == 0.4
    none = code_noise.CodeNoise(code_noise=0.4, code_noise_until=10)
    assert none.share_at(jnp.int32(10)) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"code_noise": -0.1},
        {"code_noise": 1.0},
        {"code_noise_kind": "far"},
        {"code_noise_images": 1.5},
        {"code_noise_left": -1.0},
        {"code_noise_nearest": 0},
        {"code_noise_until": 0},
    ],
)
def test_impossible_noise_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        code_noise.CodeNoise(**settings)
