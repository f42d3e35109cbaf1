import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from enat_jax.training import optim


def test_rate_rises_linearly_and_then_stays():
    optimizer = optim.Optimizer(learning_rate=4e-4, warmup_steps=4)
    rates = [float(optimizer.learning_rate_at(step)) for step in (0, 1, 2, 4, 5, 1000)]
    np.testing.assert_allclose(rates, [0, 1e-4, 2e-4, 4e-4, 4e-4, 4e-4], rtol=1e-6)


def test_rate_without_warmup_is_the_peak_from_the_first_step():
    assert optim.Optimizer(learning_rate=0.5, warmup_steps=0).learning_rate_at(0) == 0.5


def test_cosine_ends_at_zero_after_the_run_or_after_decay_steps():
    run = optim.Optimizer(learning_rate=1.0, warmup_steps=2, schedule="cosine")
    np.testing.assert_allclose(
        [float(run.learning_rate_at(step, num_steps=12)) for step in (0, 1, 2, 7, 12)],
        [0, 0.5, 1, 0.5, 0],
        atol=1e-6,
    )
    fixed = optim.Optimizer(learning_rate=1.0, warmup_steps=2, schedule="cosine", decay_steps=12)
    assert fixed.learning_rate_at(7) == pytest.approx(0.5)


def test_rate_can_be_traced():
    optimizer = optim.Optimizer(learning_rate=1e-3, warmup_steps=10)
    rate = jax.jit(optimizer.learning_rate_at)(jnp.int32(5))
    assert rate.dtype == jnp.float32
    assert float(rate) == pytest.approx(5e-4)


def test_updates_equal_adamw_written_out():
    optimizer = optim.Optimizer(learning_rate=0.1, warmup_steps=2, b1=0.9, b2=0.8, weight_decay=0.5)
    transform = optimizer.make(num_steps=10)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.full((2,), 3.0)}
    state = transform.init(params)
    expected = {name: np.asarray(p, np.float64) for name, p in params.items()}
    first = {name: 0.0 for name in params}
    second = {name: 0.0 for name in params}
    for step in range(4):
        grads = {"kernel": jnp.full((2, 2), 1.0 + step), "bias": jnp.full((2,), -2.0)}
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        rate = 0.1 * min(step / 2, 1)
        for name, grad in grads.items():
            grad = np.asarray(grad, np.float64)
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.8 * second[name] + 0.2 * grad**2
            direction = (first[name] / (1 - 0.9 ** (step + 1))) / (
                np.sqrt(second[name] / (1 - 0.8 ** (step + 1))) + 1e-8
            )
            expected[name] = expected[name] - rate * (direction + 0.5 * expected[name])
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)


def test_biases_and_norms_decay_too():
    transform = optim.Optimizer(learning_rate=0.1, warmup_steps=0, weight_decay=0.5).make(1)
    params = {"bias": jnp.full((3,), 2.0), "scale": jnp.ones((3,))}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(zeros, transform.init(params), params)
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["scale"], -0.05, rtol=1e-6)


def test_clipping_bounds_what_adam_sees():
    settings = {"learning_rate": 1.0, "warmup_steps": 0, "eps": 1.0, "weight_decay": 0.0}
    params, grads = jnp.zeros(2), jnp.array([30.0, 40.0])
    clipped = optim.Optimizer(**settings, clip_norm=5.0).make(1)
    plain = optim.Optimizer(**settings).make(1)
    got, _ = clipped.update(grads, clipped.init(params), params)
    expected, _ = plain.update(grads / 10, plain.init(params), params)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"schedule": "linear"}, "linear.*constant"),
        ({"b2": 1.0}, "b2"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"decay_steps": 100}, "no effect"),
        ({"schedule": "cosine", "decay_steps": 10}, "decay_steps=10 must exceed warmup_steps=10"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        optim.Optimizer(**{"learning_rate": 1e-3, "warmup_steps": 10, **settings})


def test_a_run_too_short_for_its_cosine_is_refused():
    optimizer = optim.Optimizer(learning_rate=1e-3, warmup_steps=10, schedule="cosine")
    with pytest.raises(ValueError, match="num_steps"):
        optimizer.learning_rate_at(3)
    with pytest.raises(ValueError, match="decay_steps=5 must exceed"):
        optimizer.make(5)
    with pytest.raises(ValueError, match="num_steps=0"):
        optimizer.make(0)
