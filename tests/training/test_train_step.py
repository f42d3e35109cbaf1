"""The training step on meshes, with accumulation, and over steps that are not finite."""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from small_tasks import make_task

from enat_jax.runtime import sharding
from enat_jax.training import enat_task, train_step, vqgan_task
from enat_jax.training import task as tasks

# All shapes of a mesh of eight devices.
POLICIES = [
    pytest.param(
        sharding.Sharding(data, fsdp, tensor),
        id=f"{data}x{fsdp}x{tensor}",
        marks=[] if (data, fsdp, tensor) == (2, 2, 2) else pytest.mark.slow,
    )
    for data, fsdp, tensor in [
        *[(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1)],
        *[(2, 4, 1), (4, 1, 2), (2, 1, 4), (1, 4, 2), (1, 2, 4)],
    ]
]


def make_vqgan_task(**model):
    sizes = {
        "channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "embed_dim": 8,
        "codebook_size": 16, "num_groups": 4, "image_channels": 1,
    }  # fmt: skip
    config = ConfigDict(
        {
            "seed": 0,
            "model": sizes | model,
            "data": {"source": "digits", "size": 8},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "eps": 1e-4},
            "loss": {"restart_every": 2, "code_noise": 0.1},
            "train": {"batch_size": 16, "num_steps": 60},
        }
    )
    return vqgan_task.make(config)


def train(task, policy, devices=8, num_steps=3, accumulate=1, steps=None):
    """(final state, metrics of each step) as numpy, and the Steps, to be used again."""
    mesh = sharding.make_mesh(policy, jax.devices()[:devices])
    rules = enat_task.RULES if isinstance(task, enat_task.Task) else vqgan_task.RULES
    steps = steps or train_step.CompiledSteps(task, mesh, rules, seed=0, accumulate=accumulate)
    state, history = steps.init(), []
    batches = task.batches(0)
    for step in range(num_steps):
        micro = [sharding.global_batch(next(batches), mesh) for _ in range(accumulate)]
        state, metrics = steps(state, micro, step)
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history, steps


@functools.cache
def on_one_device(kind):
    task = make_vqgan_task() if kind == "vqgan" else make_task(kind)
    return task, train(task, sharding.Sharding(), devices=1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["enat", pytest.param("vqgan", marks=pytest.mark.slow)])
def test_every_mesh_trains_like_one_device(kind, policy):
    """Losses, gradients' norms and all parameters after three steps, to rounding."""
    task, (expected, expected_history, _) = on_one_device(kind)
    state, history, steps = train(task, policy)
    chex.assert_trees_all_close(history, expected_history, rtol=2e-4)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-3, atol=2e-5)
    chex.assert_trees_all_close(state.ema_params, expected.ema_params, rtol=1e-3, atol=2e-5)
    ways = policy.fsdp * policy.tensor
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(steps.abstract_state))
    # Everything but vectors is divided, over both axes where it has two that can be.
    assert sharding.shard_bytes(steps.abstract_state) <= whole * (0.3 + 0.7 / min(ways, 4))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 8, 1), (2, 4, 1)])
def test_sizes_that_devices_cannot_divide_train_alike(sizes):
    """Six heads, a width of 18 x 2: some arrays stay whole, others move to another dimension."""
    task = make_task(width=36, num_heads=6)
    expected, expected_history, _ = train(task, sharding.Sharding(), devices=1)
    state, history, _ = train(task, sharding.Sharding(*sizes))
    chex.assert_trees_all_close(history, expected_history, rtol=2e-4)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "accumulate"), [((2, 2, 2), 2), ((1, 8, 1), 1)])
def test_texts_train_alike_on_every_mesh(policy, accumulate):
    """With the weights of their encoder, which are divided like those that are trained."""
    task = make_task(text="clip")
    on_one = train(task, sharding.Sharding(), devices=1, accumulate=accumulate)
    expected, expected_history, _ = on_one
    state, history, steps = train(task, sharding.Sharding(*policy), accumulate=accumulate)
    chex.assert_trees_all_close(history, expected_history, rtol=2e-4)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-3, atol=2e-5)
    chex.assert_trees_all_close(state.ema_params, expected.ema_params, rtol=1e-3, atol=2e-5)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(task.frozen))
    kept = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(steps._frozen))
    ways = policy[1]  # nearly all is the table of words, which is divided over "fsdp" alone
    assert kept == pytest.approx(whole / ways, rel=0.02)


def whole_gradients(task, indices):
    """Mean gradients of batches, computed plainly on one device."""
    state = jax.jit(task.init)(jax.random.key(0))
    batches, found = task.batches(0), []
    for index in indices:
        static, traced = task.shapes(index)
        key = jax.random.fold_in(jax.random.key(0), index)
        step = jax.jit(functools.partial(task.gradients, static=static, frozen=task.frozen))
        found.append(step(state, next(batches), traced, key)[0])
    return jax.tree.map(lambda *x: sum(x) / len(x), *found)


@pytest.mark.slow
def test_accumulation_is_the_mean_over_micro_batches_with_counts_of_their_own():
    """SGD's step is the gradient: that of three micro-batches, on one device and on four."""
    task = dataclasses.replace(make_task(), optimizer=optax.sgd(1.0))
    counts = [tuple(task.shapes(i)[1].values()) for i in range(3)]
    assert len(set(counts)) == 3
    start = jax.device_get(jax.jit(task.init)(jax.random.key(0)))
    expected = whole_gradients(task, range(3))
    for policy, devices in [(sharding.Sharding(), 1), (sharding.Sharding(1, 2, 2), 4)]:
        state, (metrics,), _ = train(task, policy, devices, num_steps=1, accumulate=3)
        got = jax.tree.map(lambda new, old: old - new, state.params, start.params)
        chex.assert_trees_all_close(got, jax.device_get(expected), rtol=1e-3, atol=2e-6)
        norm = float(optax.tree.norm(expected))
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert int(state.step) == 1 and int(state.skipped) == 0


@pytest.mark.slow
def test_accumulation_restarts_codes_once_a_step():
    task = make_vqgan_task()
    state, history, _ = train(task, sharding.Sharding(), 2, num_steps=3, accumulate=2)
    assert [float(x["codes_restarted"]) > 0 for x in history] == [True, False, False]
    assert np.isfinite(state.params["codebook"]).all()
    assert state.extra["usage"].sum() == pytest.approx(1.0, abs=0.1)


class Poisoned(enat_task.Task):
    """A task whose batches 1 and 2 have gradients that are not finite."""

    def gradients(self, state, *arguments, **named):
        grads, metrics, extra = super().gradients(state, *arguments, **named)
        bad = (state.step == 1) | (state.step == 2)
        grads["head"]["bias"] = jnp.where(bad, jnp.inf, grads["head"]["bias"])
        return grads, metrics, extra


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(accumulate):
    task = make_task()
    task = Poisoned(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
    run = functools.partial(train, task, sharding.Sharding(1, 2), 2, accumulate=accumulate)
    before, _, steps = run(num_steps=1)
    after, history, _ = run(num_steps=3, steps=steps)
    assert [float(x["skipped"]) for x in history] == [0, 1, 1]
    assert int(after.step) == 3 and int(after.skipped) == 2
    for part in ("params", "ema_params", "opt_state"):
        chex.assert_trees_all_equal(getattr(after, part), getattr(before, part))
    later, history, _ = run(num_steps=4, steps=steps)
    assert float(history[-1]["skipped"]) == 0 and int(later.skipped) == 2
    assert not np.array_equal(later.params["head"]["bias"], after.params["head"]["bias"])


def test_bfloat16_sums_weight_gradients_in_float32():
    """Parameters, gradients, loss are float32, and not bfloat16 numbers in disguise."""
    task = make_task(dtype="bfloat16")
    splits = [(i, task.shapes(i)[1]) for i in range(20)]
    index = next(i for i, n in splits if 4 < n["num_visible"] - n["num_cached"] < 12)
    grads = jax.device_get(whole_gradients(task, [index]))
    assert {x.dtype for x in jax.tree.leaves(grads)} == {np.dtype("float32")}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), grads)
    for name in ("query", "key_value_self", "out"):
        kernel, coarse = (x["encoder"][name]["kernel"] for x in (grads, rounded))
        assert (kernel != coarse)[kernel != 0].mean() > 0.9
    exact = jax.device_get(whole_gradients(make_task(), [index]))
    scale = float(optax.tree.norm(exact))
    error = jax.tree.map(lambda x, y: x - y, grads, exact)
    assert float(optax.tree.norm(error)) < 0.05 * scale


def test_each_shape_is_compiled_once_and_nothing_else():
    """Whatever the counts, over steps that visit every shape: as many compilations as shapes."""
    task = make_task(batch_size=8)
    mesh = sharding.make_mesh(sharding.Sharding())
    steps = train_step.CompiledSteps(task, mesh, enat_task.RULES, seed=0)
    state, batches = steps.init(), task.batches(0)
    compilations = []
    listen = lambda name, seconds, **_: compilations.append(name)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        counted = []
        for step in range(30):
            batch = sharding.global_batch(next(batches), mesh)
            state, metrics = steps(state, [batch], step)
            counted.append(sum("backend_compile" in name for name in compilations))
        jax.block_until_ready(metrics)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    visited = {task.shapes(step)[0] for step in range(30)}
    assert len({tuple(task.shapes(step)[1].values()) for step in range(30)}) > 10
    assert counted[-1] == len(steps.compiled) == len(visited) == len(task.buckets) == 2


def test_the_programs_of_a_run_are_those_of_all_seeds():
    """So that what is compiled for one, and cached, serves the others."""
    texts = []
    mesh = sharding.make_mesh(sharding.Sharding(), jax.devices()[:1])
    for seed in (0, 5):
        task = dataclasses.replace(make_task(batch_size=8), seed=seed)
        steps = train_step.CompiledSteps(task, mesh, enat_task.RULES, seed=seed)
        with jax.set_mesh(mesh):
            init = steps._jit_init.lower(np.uint32(seed))
        texts.append([x.as_text() for x in (init, steps.lower(task.buckets[-1].windows))])
    assert texts[0] == texts[1]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="a micro-batch of 9 images .* among 8 devices"):
        train(make_task(batch_size=9), sharding.Sharding())


def test_a_batch_of_another_shape_is_refused_before_anything_is_compiled():
    mesh = sharding.make_mesh(sharding.Sharding(), jax.devices()[:1])
    task = make_task(batch_size=8)
    steps = train_step.CompiledSteps(task, mesh, enat_task.RULES, seed=0)
    batch = sharding.global_batch(
        {k: v[:, :9] if v.ndim > 1 else v for k, v in next(task.batches(0)).items()}, mesh
    )
    with pytest.raises(
        ValueError, match=r'batch\["tokens"\] must have the shape .*16\], not \[8, 9\]'
    ):
        steps(steps.init(), [batch], 0)


# --- the moving average ---------------------------------------------------------------------


def averages(updates, **loss):
    """The moving average after each of so many updates of parameters that are their number."""
    task = types.SimpleNamespace(loss=enat_task.Loss(**loss), optimizer=optax.sgd(1.0))
    params = {"x": jnp.zeros(())}
    state = tasks.initial_state(params, task.optimizer, ema_params=params)
    found = []
    for skipped in (False, *updates):
        new = enat_task.Task.update(task, state, {"x": -jnp.ones(())}, {})
        state = state if skipped else new
        state = state.replace(step=state.step + 1, skipped=state.skipped + skipped)
        found.append(float(state.ema_params["x"]))
    return found


def test_the_moving_average_warms_up():
    """By TensorFlow's rule: the decay of update n is at most (1 + n) / (10 + n)."""
    expected = [0.0]
    for n in range(20):
        decay = min(0.6, (1 + n) / (10 + n))
        expected.append(decay * expected[-1] + (1 - decay) * (n + 1))
    found = averages([False] * 19, ema_decay=0.6, ema_warmup=True)
    np.testing.assert_allclose(found, expected[1:], rtol=1e-5)
    # Steps that changed nothing do not count: the same averages, later.
    skipping = averages([True, False, True, False], ema_decay=0.6, ema_warmup=True)
    np.testing.assert_allclose(skipping, np.array(expected)[[1, 1, 2, 2, 3]], rtol=1e-6)


@pytest.mark.parametrize("updates", [1, 2, 30])
@pytest.mark.parametrize("warmup", [False, True])
def test_how_much_of_the_average_is_the_start(updates, warmup):
    loss = enat_task.Loss(ema_decay=0.99, ema_warmup=warmup)
    decays = [float(loss.decay_at(jnp.asarray(n))) for n in range(updates)]
    assert loss.initial_share(updates) == pytest.approx(np.prod(decays), rel=1e-4, abs=1e-10)
