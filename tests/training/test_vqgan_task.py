"""Training the tokenizer: it learns, no code stays dead, and nothing depends on history."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

from enat_jax.models import vqgan
from enat_jax.runtime import sharding
from enat_jax.training import config as train_config
from enat_jax.training import train_step, vqgan_task

ROOT = pathlib.Path(__file__).parents[2]


def get_config(**changes):
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = {
        "channels": 4,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "embed_dim": 4,
        "codebook_size": 16,
        "num_groups": 2,
        "image_channels": 1,
    }
    config.data = {"source": "digits", "size": 8, "rotation": 5.0}
    config.optimizer = {"learning_rate": 3e-3, "warmup_steps": 0, "b1": 0.9, "weight_decay": 0.0}
    config.loss = {"restart_every": 5, "usage_decay": 0.8}
    config.train = {"batch_size": 16, "num_steps": 60}
    for path, value in changes.items():
        section, name = path.split(".")
        config[section][name] = value
    return config


@pytest.fixture(scope="module")
def task():
    return vqgan_task.make(get_config())


MESH = sharding.make_mesh(sharding.Sharding(), jax.devices()[:1])


@pytest.fixture(scope="module")
def step(task):
    return make_step(task)


def make_step(task):
    steps = train_step.CompiledSteps(task, MESH, vqgan_task.RULES, seed=1)

    def one(state, batch, index):
        state = jax.tree.map(jnp.copy, state)  # what goes in is overwritten
        return steps(state, [sharding.global_batch(batch, MESH)], index)

    return one


@pytest.fixture(scope="module")
def start(task):
    return jax.jit(task.init)(jax.random.key(0))


def run(task, step, state, begin, end):
    """The state and the metrics of each step."""
    history = []
    batches = task.batches(begin)
    for i in range(begin, end):
        state, metrics = step(state, next(batches), i)
        history.append(jax.tree.map(float, metrics))
    return state, history


@pytest.fixture(scope="module")
def trained(task, step, start):
    return run(task, step, start, 0, 60)


def test_it_learns_to_reconstruct(task, start, trained):
    state, history = trained
    assert int(state.step) == 60
    losses = [metrics["reconstruction_loss"] for metrics in history]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    before, after = dict(task.evaluate(start, MESH)), dict(task.evaluate(state, MESH))
    assert after["held_out/squared_error"] < 0.5 * before["held_out/squared_error"]
    assert after["held_out/codebook_usage"] >= 0.8
    assert 5 < after["held_out/codebook_perplexity"] <= 16


def test_a_stopped_run_continues_to_the_same_bits(task, step, start, trained):
    half, _ = run(task, step, start, 0, 13)  # not where codes are restarted
    resumed, _ = run(task, step, half, 13, 60)
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(trained[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_first_step_gives_every_code_a_place(trained):
    assert trained[1][0]["codes_restarted"] == 16
    assert all(m["codes_restarted"] == 0 for i, m in enumerate(trained[1]) if i % 5)


def test_dead_codes_come_back_and_others_stay(task, step, trained):
    """Half of the codes are thrown far away, where nothing is nearest to them."""
    state, _ = trained
    codebook = state.params["codebook"]
    far = state.replace(
        step=jnp.array(10, jnp.int32),
        params={**state.params, "codebook": codebook.at[:8].set(1e3)},
        extra={"usage": jnp.where(jnp.arange(16) < 8, 0.0, 1 / 8)},
    )
    batch = next(task.batches(60))
    new, metrics = step(far, batch, 10)
    assert metrics["codes_restarted"] == 8
    assert jnp.abs(new.params["codebook"]).max() < 100
    np.testing.assert_allclose(new.params["codebook"][8:], codebook[8:], atol=0.02)
    # Between the steps for restarts nothing is moved.
    new, metrics = step(far.replace(step=jnp.array(11, jnp.int32)), batch, 10)
    assert metrics["codes_restarted"] == 0
    assert jnp.abs(new.params["codebook"][:8]).min() > 900


def test_restarts_end_when_told(start):
    task = vqgan_task.make(get_config(**{"loss.restart_until": 20}))
    images = jnp.zeros((16, 8, 8, 1))
    for at, moved in [(15, 16), (20, 0)]:
        state = start.replace(step=jnp.array(at, jnp.int32))
        *_, restarted = jax.jit(task._restart_dead_codes)(state, images, jax.random.key(0))
        assert restarted == moved


def test_the_decoder_alone_learns_in_the_end(start):
    task = vqgan_task.make(get_config(**{"loss.decoder_from": 2, "loss.code_noise": 0.5}))
    step = make_step(task)
    before, _ = run(task, step, start, 0, 2)
    after, history = run(task, step, before, 2, 7)  # codes would have been restarted at 5
    for name in ("encoder", "codebook"):
        chex.assert_trees_all_equal(after.params[name], before.params[name])
    old, new = (jax.tree.leaves(state.params["decoder"]) for state in (before, after))
    assert all((a != b).any() for a, b in zip(old, new, strict=True))
    assert all(metrics["codes_restarted"] == 0 for metrics in history)
    noisy, quiet = (task._code_noise(jnp.int32(at)) for at in (1, 2))
    assert (noisy, quiet) == (0.5, 0.0)


def test_gradients_pass_straight_through(task, start):
    """Encoder: from the decoder and the commitment. Codebook: from its own loss alone."""
    batch, key = next(task.batches(0)), jax.random.key(0)

    def gradients(name):
        without = vqgan_task.make(get_config(**{name: 0.0}))
        find = functools.partial(without.gradients, static=(), frozen={})
        return jax.jit(find)(start, batch, {}, key)[0]

    np.testing.assert_array_equal(gradients("loss.codebook_weight")["codebook"], 0)
    grads = gradients("loss.commitment_weight")
    assert jnp.abs(grads["encoder"]["conv_in"]["kernel"]).max() > 0
    assert jnp.abs(grads["codebook"]).max() > 0


def test_code_statistics_of_known_counts():
    usage, perplexity = vqgan.code_statistics(jnp.array([5.0, 5.0, 0.0, 0.0]))
    np.testing.assert_allclose([usage, perplexity], [0.5, 2.0], rtol=1e-6)
    counts = vqgan.count_codes(jnp.array([[0, 3], [3, 3]]), 4)
    np.testing.assert_array_equal(counts, [1, 0, 0, 3])


def test_pictures_show_originals_above_reconstructions(task, trained):
    ((name, picture),) = task.images(trained[0], MESH)
    assert name == "reconstructions"
    assert picture.shape == (8 * 8, 8 * 8, 1) and picture.dtype == np.uint8
    np.testing.assert_array_equal(
        picture[:8, 8:16], task.held_out.gather([11])["images"][0]
    )  # even


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.reconstruction": "l3"}, "l3"),
        ({"data.size": 9}, "do not suit"),
        ({"model.image_channels": 3}, "do not suit"),
        ({"model.codebook_size": 1024}, "positions"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        vqgan_task.make(get_config(**changes))


def test_grey_pictures_are_trained_on_as_the_message_says(tmp_path):
    for i in range(4):
        Image.new("RGB", (9, 8), (i * 60, 0, 0)).save(tmp_path / f"{i}.png")
    data = {"data.source": str(tmp_path), "data.held_out": 0.5, "data.channels": 1}
    config = str(ROOT / "configs" / "images_vqgan.py")
    arguments = [f"--config.{name}={value}" for name, value in data.items()]
    arguments += ["--config.data.size=16"]
    with pytest.raises(ValueError, match=r"data.channels and model.image_channels the same value"):
        vqgan_task.make(train_config.complete(train_config.load(config, arguments)))
    arguments += ["--config.model.image_channels=1", "--config.loss.restart_every=0"]
    task = vqgan_task.make(train_config.complete(train_config.load(config, arguments)))
    assert task.source.image_shape == (16, 16, 1)


QUANTIZERS = {
    "unit vectors": {"normalize": True, "gradient": "rotation"},
    "projection": {"projection": True},
    "fsq": {"quantizer": "fsq", "levels": (4, 4), "embed_dim": 2},
    "lfq": {"quantizer": "lfq"},
}


def quantizing(name):
    """A task with a quantizer, noise of near codes and weight decay, and without restarts."""
    changes = {f"model.{name}": value for name, value in QUANTIZERS[name].items()}
    noise = {"loss.code_noise": 0.1, "loss.code_noise_kind": "nearest", "loss.restart_every": 0}
    return vqgan_task.make(get_config(**changes, **noise, **{"optimizer.weight_decay": 0.1}))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_has_its_losses(name):
    task = quantizing(name)
    state = jax.eval_shape(task.init, jax.random.key(0))
    find = functools.partial(task.gradients, static=(), frozen={})
    _, metrics, _ = jax.eval_shape(find, state, task.batch_spec(), {}, jax.random.key(0))
    found = {x for x in metrics if x.endswith("_loss")} - {"reconstruction_loss"}
    expected = {"fsq": set(), "lfq": {"commitment_loss", "entropy_loss"}}
    assert found == expected.get(name, {"codebook_loss", "commitment_loss"})


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_learns(name):
    task = quantizing(name)
    start = jax.jit(task.init)(jax.random.key(0))
    state, history = run(task, make_step(task), start, 0, 30)
    losses = [metrics["reconstruction_loss"] for metrics in history]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    if task.model.projection:  # weight decay leaves it alone, too
        np.testing.assert_array_equal(state.params["codebook"], start.params["codebook"])
        assert (state.params["code_projection"] != start.params["code_projection"]).all()


def test_codes_that_cannot_move_are_not_restarted():
    for changes in ({"model.projection": True}, {"model.quantizer": "lfq"}):
        with pytest.raises(ValueError, match=r"--config\.loss\.restart_every=0"):
            vqgan_task.make(get_config(**changes))
        vqgan_task.make(get_config(**changes, **{"loss.restart_every": 0}))


def test_a_moved_code_is_a_unit_vector_where_codes_are():
    task = vqgan_task.make(get_config(**{"model.normalize": True}))
    state = jax.jit(task.init)(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (16, 8, 8, 1))
    moved, restarted = jax.jit(task._restart_dead_codes)(state, images, jax.random.key(0))
    assert restarted == 16
    lengths = jnp.linalg.norm(moved.params["codebook"], axis=-1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)
