"""A tokenizer's further judges: a perceptual network, a discriminator, and its moving average."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from ml_collections import ConfigDict
from PIL import Image

from enat_jax import train
from enat_jax.checkpoints import model_files, weight_files
from enat_jax.inference import tokenizer
from enat_jax.models import losses, perceptual
from enat_jax.runtime import sharding
from enat_jax.training import adversarial, finished, train_step, vqgan_task
from enat_jax.training import config as train_config

FIRST, START = 2, 4  # steps: the discriminator begins to learn, its term begins to count
MODEL = {
    "channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "embed_dim": 4,
    "codebook_size": 16, "num_groups": 2, "image_channels": 1,
}  # fmt: skip


def get_config(**changes):
    config = ConfigDict(
        {
            "task": "vqgan",
            "seed": 0,
            "model": MODEL,
            "data": {"source": "digits", "size": 8},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "eps": 1e-4},
            "loss": {"restart_every": 5, "restart_until": 20, "ema_decay": 0.9},
            "perceptual": {},
            "discriminator": {
                "weight": 0.1, "channels": 8, "stages": 1, "start": START,
                "lead_steps": START - FIRST, "ramp_steps": 2, "penalty": 0.5, "penalty_every": 3,
            },
            "discriminator_optimizer": {"learning_rate": 1e-3, "eps": 1e-4},
            "train": {"batch_size": 16, "num_steps": 40},
        }
    )  # fmt: skip
    for path, value in changes.items():
        section, name = path.split(".")
        config[section][name] = value
    return config


class Edges(adversarial.PerceptualLoss):
    """A stand-in for a network: distances of weighted differences of neighbours."""

    measures = ("lpips",)

    def distances(self, params, images, others):
        difference = params["weight"] * (images - others)
        return jnp.square(difference[:, 1:] - difference[:, :-1]).mean((1, 2, 3))


def make_task(**changes):
    task = vqgan_task.make(get_config(**changes))
    judge = Edges(adversarial.Perceptual(weight=2.0), {"weight": np.float32([3.0])}, "abc")
    return dataclasses.replace(task, perceptual=judge)


def make_steps(task, policy=None, devices=1, accumulate=1):
    mesh = sharding.make_mesh(policy or sharding.Sharding(), jax.devices()[:devices])
    return train_step.CompiledSteps(task, mesh, vqgan_task.RULES, seed=0, accumulate=accumulate)


def run(task, steps, begin, end, state=None, micro=1):
    """The state after step ``end - 1`` and the metrics of each step, as numpy arrays."""
    state = steps.init() if state is None else jax.device_put(state, placed(steps))
    batches, history = task.batches(begin), []
    for index in range(begin, end):
        batch = next(batches)
        parts = [jax.tree.map(lambda x, i=i: np.split(x, micro)[i], batch) for i in range(micro)]
        parts = [sharding.global_batch(part, steps._mesh) for part in parts]
        state, metrics = steps(state, parts, index)
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


def placed(steps):
    return jax.tree.map(lambda x: x.sharding, steps.abstract_state)


@pytest.fixture(scope="module")
def task():
    return make_task()


@pytest.fixture(scope="module")
def steps(task):
    return make_steps(task)


@pytest.fixture(scope="module")
def whole(task, steps):
    return run(task, steps, 0, 9)


def test_it_costs_nothing_and_changes_nothing_before_its_first_step(task, steps, whole):
    assert [task.shapes(i)[0] for i in range(7)] == [
        *[(False, False)] * 2, (True, False), (True, True), *[(True, False)] * 2, (True, True),
    ]  # fmt: skip
    _, history = whole
    before, after = history[FIRST - 1], history[FIRST]
    assert before.keys() == after.keys()
    own = [name for name in before if "logits" in name or "discriminator" in name]
    assert len(own) == 6 and all(before[name] == 0 for name in own)
    assert after["discriminator_loss"] == pytest.approx(1, abs=0.1)  # it knows nothing yet
    start, early = jax.device_get(steps.init()), run(task, steps, 0, FIRST)[0]
    for name in ("discriminator", "lecam"):
        chex.assert_trees_all_equal(early.extra[name], start.extra[name])


def test_its_weight_rises_and_the_shares_add_up(task, whole):
    _, history = whole
    norms = [x["image_gradient/adversarial"] for x in history]
    assert all(x == 0 for x in norms[:START]) and all(x > 0 for x in norms[START:])
    weights = [
        float(task.adversary.term({"discriminator": {"params": {}}}, i, (True, False))[0])
        for i in (FIRST, START - 1, START, START + 1, START + 2)
    ]
    np.testing.assert_allclose(weights, [0, 0, 0.05, 0.1, 0.1], rtol=1e-6)
    for metrics in history:
        shares = [x for name, x in metrics.items() if name.startswith("image_gradient_share/")]
        assert len(shares) == 3 and sum(shares) == pytest.approx(1, abs=1e-6)
    penalised = [i for i, x in enumerate(history) if x["gradient_penalty"] > 0]
    assert penalised == [3, 6]


@pytest.mark.parametrize("stop", [FIRST - 1, FIRST, START, START + 2])
def test_a_stopped_run_continues_to_the_same_bits(task, steps, whole, stop):
    half, _ = run(task, steps, 0, stop)
    resumed, _ = run(task, steps, stop, 9, half)
    chex.assert_trees_all_equal(resumed, whole[0])


def test_the_gradient_is_that_of_the_sum_of_all_terms(task, whole):
    """The discriminator's own is that of its own loss, and each leaves the other alone."""
    state, _ = whole
    state = state.replace(step=np.int32(30))
    batch, key = next(task.batches(30)), jax.random.key(0)
    images = tokenizer.to_float(batch["images"])
    found, metrics, extra = jax.jit(
        functools.partial(task.gradients, static=(True, False), frozen=task.frozen)
    )(state, batch, {}, key)
    judge, own = task.adversary, state.extra["discriminator"]["params"]

    def total(params):
        (made, of_codes), _ = task._forward(params, images, key, 0.0)
        logits = judge.network.apply({"params": own}, made)
        return (
            jnp.square(made - images).mean()
            + sum(of_codes)
            + 2.0 * task.perceptual.distances(task.frozen["perceptual"], images, made).mean()
            - 0.1 * logits.mean()
        )

    loss, expected = jax.jit(jax.value_and_grad(total))(state.params)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)

    def of_discriminator(own):
        (made, _), _ = task._forward(state.params, images, key, 0.0)
        real, fake = (judge.network.apply({"params": own}, x) for x in (images, made))
        lecam = losses.lecam(real.mean(), fake.mean(), state.extra["lecam"])
        return losses.discriminator_loss("hinge", real, fake) + 0.001 * lecam

    expected = jax.jit(jax.grad(of_discriminator))(own)
    chex.assert_trees_all_close(extra["adversary"]["gradients"], expected, rtol=1e-4, atol=1e-6)


def test_a_restart_moves_the_average_too_and_forgets_moments(task, whole):
    state, _ = whole
    usage = np.where(np.arange(16) < 8, 0.0, 1 / 8).astype(np.float32)
    state = state.replace(step=np.int32(10), extra=state.extra | {"usage": usage})
    batch = next(task.batches(10))
    new, metrics = jax.jit(task.prepare)(state, batch, jax.random.key(0))
    assert metrics["codes_restarted"] == 8
    codes, average = new.params["codebook"], new.ema_params["codebook"]
    np.testing.assert_array_equal(average[:8], codes[:8])
    assert (np.asarray(codes)[:8] != state.params["codebook"][:8]).all()
    np.testing.assert_array_equal(average[8:], state.ema_params["codebook"][8:])
    adam = optax.tree.get(new.opt_state, "ScaleByAdamState")
    for moments in (adam.mu["codebook"], adam.nu["codebook"]):
        np.testing.assert_array_equal(moments[:8], 0)
        assert np.asarray(moments)[8:].any()


def test_the_average_is_evaluated(task, whole):
    state, _ = whole
    decays = [min(0.9, (1 + n) / (10 + n)) for n in range(9)]
    assert decays[0] == 0.1
    mesh = sharding.make_mesh(sharding.Sharding(), jax.devices()[:1])
    found = dict(task.evaluate(state, mesh, few=True))
    of_average = dict(task.evaluate(state.replace(params=None), mesh, few=True))
    assert found == of_average and tuple(found) == task.evaluated
    assert found["held_out/lpips"] > 0


def test_an_update_that_is_not_finite_skips_the_whole_step(task, steps, whole):
    """Of the discriminator alone: the tokenizer's gradients are as they should be."""
    state, _ = whole
    own = state.extra["discriminator"]
    bad = jax.tree.map(lambda x: x * np.float32(np.nan), own["opt_state"][1][0].mu)
    adam = own["opt_state"][1][0]._replace(mu=bad)
    moments = (own["opt_state"][0], (adam, *own["opt_state"][1][1:]))
    before = state.replace(extra=state.extra | {"discriminator": own | {"opt_state": moments}})
    after, (metrics,) = run(task, steps, 9, 10, before)
    assert metrics["skipped"] == 1 and np.isfinite(metrics["grad_norm"])
    skipped_alone = after.replace(step=before.step, skipped=before.skipped)
    chex.assert_trees_all_equal(skipped_alone, before)


class Poisoned(adversarial.Adversary):
    """A discriminator whose gradients are not finite at step 5."""

    def gradients(self, kept, images, made, static):
        found, metrics = super().gradients(kept, images, made, static)
        bad = kept["discriminator"]["opt_state"][1][0].count == 5 - FIRST
        poison = lambda x: jnp.where(bad, jnp.nan, x)  # noqa: E731
        return found | {"gradients": jax.tree.map(poison, found["gradients"])}, metrics


@pytest.mark.slow
def test_gradients_of_the_discriminator_that_are_not_finite_skip_the_whole_step(task):
    judge = task.adversary
    fields = {x.name: getattr(judge, x.name) for x in dataclasses.fields(judge)}
    task = dataclasses.replace(task, adversary=Poisoned(**fields))
    steps = make_steps(task)
    before, _ = run(task, steps, 0, 5)
    after, (metrics,) = run(task, steps, 5, 6, before)
    assert metrics["skipped"] == 1 and int(after.skipped) == 1 and int(after.step) == 6
    for part in ("params", "ema_params", "opt_state"):
        chex.assert_trees_all_equal(getattr(after, part), getattr(before, part))
    own = ("discriminator", "lecam")
    chex.assert_trees_all_equal(*({k: x.extra[k] for k in own} for x in (after, before)))


@pytest.mark.slow
def test_every_mesh_trains_like_one_device(task, whole):
    steps = make_steps(task, sharding.Sharding(2, 2, 2), devices=8)
    state, history = run(task, steps, 0, 9)
    chex.assert_trees_all_close(history, whole[1], rtol=5e-3, atol=1e-4)
    for part in ("params", "ema_params", "extra"):
        got, expected = getattr(state, part), getattr(whole[0], part)
        chex.assert_trees_all_close(got, expected, rtol=5e-3, atol=1e-4)
    own = jax.tree.leaves(steps.abstract_state.extra["discriminator"])
    assert all(x.sharding.is_fully_replicated for x in own)


@pytest.mark.slow
def test_two_micro_batches_train_like_one_batch():
    changes = {"discriminator.lecam": 0.0, "loss.restart_every": 0}
    whole = make_task(**changes)
    expected, history = run(whole, make_steps(whole), 0, 8)
    halves = dataclasses.replace(whole, batch_size=8, accumulate=2)
    steps = make_steps(halves, accumulate=2)
    state, again = run(whole, steps, 0, 8, micro=2)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-3, atol=1e-5)
    chex.assert_trees_all_close(state.extra, expected.extra, rtol=1e-3, atol=1e-5)
    assert again[-1]["discriminator_loss"] == pytest.approx(
        float(history[-1]["discriminator_loss"]), rel=1e-4
    )


def test_without_weights_nothing_is_there():
    """The state of a run is that of earlier versions, so their checkpoints fit."""
    changes = {"discriminator.weight": 0.0, "loss.ema_decay": 0.0}
    changes |= {"perceptual.kind": "lpips_vgg", "perceptual.weight": 0.0}
    task = vqgan_task.make(get_config(**changes))
    assert task.adversary is None and task.perceptual is None and task.frozen == {}
    state = jax.eval_shape(task.init, jax.random.key(0))
    assert list(state.extra) == ["usage"] and state.ema_params == {}
    assert task.shapes(7) == ((), {})
    assert "perceptual_weights" not in task.data_identity()


def test_weights_are_part_of_the_identity(task):
    assert task.data_identity()["perceptual_weights"] == "abc"


@pytest.mark.slow
def test_weights_of_lpips_are_an_argument_and_others_are_refused(tmp_path):
    """They are in no program and no checkpoint; what a run leaves are the averages."""
    rng = np.random.default_rng(0)
    for i in range(16):
        pixels = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    fingerprints = []
    for name, scale in (("a", 0.05), ("b", 0.06)):
        draw = lambda x, scale=scale: np.abs(rng.normal(size=x.shape) * scale).astype(np.float32)  # noqa: E731
        params = jax.tree.map(draw, perceptual.shapes("lpips_alex"))
        fingerprints.append(model_files.fingerprint(params))
        flat = traverse_util.flatten_dict(params, sep="/")
        weight_files.write_safetensors(tmp_path / f"{name}.safetensors", flat)
    changes = {"data.source": str(tmp_path), "data.held_out": 0.25, "model.image_channels": 3}
    changes |= {"train.save_every": 3, "train.batch_size": 4}
    changes |= {"loss.restart_every": 0, "train.pictures": False, "data.scan": False}
    changes |= {"perceptual.kind": "lpips_alex", "optimizer.schedule": "constant"}
    changes |= {"perceptual.weights": str(tmp_path / "a.safetensors"), "loss.restart_until": 6}
    changes |= {"train.num_steps": 4, "train.rehearse": False, "discriminator.weight": 0.0}
    config = train_config.complete(get_config(**changes))
    task = vqgan_task.make(config)
    assert len(make_steps(task).lower(()).as_text()) < 2e6
    state = train.train(config, tmp_path / "run", jax.devices()[:1])
    assert task.evaluated[-1] == "held_out/lpips"
    made = finished.of_run(tmp_path / "run", 3)
    whole = finished.of_run(tmp_path / "run")
    chex.assert_trees_all_equal(whole.params, jax.device_get(state.ema_params))
    saved = model_files.load_params(tmp_path / "run" / "checkpoints" / "3" / "state")
    chex.assert_trees_all_equal(made.params["codebook"], saved["ema_params"]["codebook"])
    config.perceptual.weights = str(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="perceptual_weights") as refused:
        train.train(config, tmp_path / "run", jax.devices()[:1])
    assert all(fingerprint in str(refused.value) for fingerprint in fingerprints)
    (tmp_path / "a.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(FileNotFoundError, match="a.safetensors with the weights of lpips_alex"):
        vqgan_task.make(train_config.complete(get_config(**changes)))
    config.perceptual.weights = str(tmp_path / "moved.safetensors")
    again = train_config.identity(config, vqgan_task.make(config))
    assert again == train_config.identity(train_config.complete(get_config(**changes)), task)


LONG = {"warmup_steps": 50, "schedule": "cosine"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perceptual.kind": "vgg"}, "perceptual.kind='vgg' is unknown: one of lpips_vgg"),
        ({"perceptual.kind": "lpips_alex"}, "judges pictures of 3 channels and .* is 1"),
        ({"perceptual.weights": "a.pth"}, "has no use without a network"),
        ({"discriminator.kind": "patch"}, "discriminator.kind='patch' is unknown"),
        ({"discriminator.loss": "wgan"}, "discriminator.loss='wgan' is unknown: one of hinge"),
        ({"discriminator.start": 40}, "start=40 must come before .*num_steps=40: give .*start=4,"),
        ({"discriminator.lead_steps": 5}, "lead_steps=5 are more than .*start=4"),
        ({"discriminator.weight": -1.0}, "discriminator.weight=-1.0 must not be negative"),
        ({f"discriminator_optimizer.{name}": x for name, x in LONG.items()}
         | {"discriminator.lead_steps": 2}, "config.discriminator_optimizer, for the 38 steps"),
        ({"loss.restart_until": None}, "restart_until=16, or --config.loss.ema_decay=0"),
        ({"loss.restart_until": 39}, "the last twentieth of train.num_steps=40"),
        ({"loss.ema_decay": 1.0}, "ema_decay=1.0 must lie in"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        vqgan_task.make(get_config(**changes))
