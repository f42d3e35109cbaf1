"""The training program: resuming exactly, refusing what does not fit, what a run leaves behind."""

import dataclasses
import errno
import os
import re
import subprocess
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from small_runs import COMMAND, ROOT, lines, small_config

from enat_jax import train
from enat_jax.checkpoints import manifest, model_files
from enat_jax.data import tokens
from enat_jax.inference.generator import Generator
from enat_jax.runtime import sharding
from enat_jax.training import enat_task, rehearsal
from enat_jax.training import finished as runs

EVALUATED = {"train.eval_every": 4, "train.pictures": True}


@pytest.fixture(scope="module")
def finished(data):
    """An uninterrupted run, which evaluates after steps 4 and 6: (directory, final state)."""
    return data / "run", train.train(small_config(data, **EVALUATED), data / "run")


def test_a_run_leaves_metrics_pictures_checkpoints_and_a_model(finished):
    workdir, state = finished
    assert int(state.step) == 6
    logged = lines(workdir)
    assert [x["step"] for x in logged if "loss" in x] == [2, 4, 6]
    assert all(np.isfinite(x["loss"]) for x in logged if "loss" in x)
    evaluations = [x for x in logged if "held_out/loss_0.5_visible" in x]
    assert [x["step"] for x in evaluations] == [4, 6]
    assert 0 <= evaluations[0]["held_out/accuracy_0.0625_visible"] <= 1
    assert (workdir / "pictures" / "samples_0000006.png").stat().st_size > 100
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [4, 6]
    generator = Generator.load(workdir / "model")
    chex.assert_trees_all_equal(generator.params, jax.device_get(state.ema_params))
    assert generator.class_names == ("a", "b", "c")
    assert generator.sample([0, 1, 2, 3]).shape == (4, 8, 8, 1)
    assert generator.provenance["step"] == 6


def test_a_resumed_run_ends_in_the_same_bits(data, finished, tmp_path, other_settings):
    """Also where JAX is set otherwise than before."""
    train.train(small_config(data, **{"train.num_steps": 4}), tmp_path)
    with other_settings():
        state = train.train(small_config(data), tmp_path)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(finished[1]))
    assert [x["step"] for x in lines(tmp_path) if "loss" in x] == [2, 4, 6]


def test_a_finished_run_started_again_does_not_train(data, finished, monkeypatch):
    workdir, state = finished
    before = lines(workdir)
    monkeypatch.setattr(enat_task.Task, "gradients", None)
    again = train.train(small_config(data, **EVALUATED), workdir)
    chex.assert_trees_all_equal(jax.device_get(again), jax.device_get(state))
    assert lines(workdir) == before


def same_run(workdir, finished):
    """Asserts that both runs have written the same numbers and pictures."""
    measured = [
        [{k: v for k, v in x.items() if "/" in k or k in ("step", "loss")} for x in lines(root)]
        for root in (workdir, finished[0])
    ]
    assert measured[0] == measured[1]
    pictures = [
        {p.name: p.read_bytes() for p in (root / "pictures").iterdir()}
        for root in (workdir, finished[0])
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 2


def test_an_evaluation_that_fails_costs_no_step_and_a_rehearsal_changes_nothing(
    data, finished, tmp_path, monkeypatch, capsys
):
    """The state is saved before, and the evaluation is made up for when the run goes on."""
    settings = {"train.rehearse": True, "train.save_every": 100}
    config = small_config(data, **EVALUATED | settings)
    images = enat_task.Task.images
    failing = OSError(errno.ENOSPC, "No space left on device", "pictures")
    with monkeypatch.context() as patch, pytest.raises(OSError) as raised:
        rehearsed = images(enat_task.make(config), *_first_state(config))
        patch.setattr(enat_task.Task, "images", mock.Mock(side_effect=[rehearsed, failing]))
        train.train(config, tmp_path)
    told = "the state after step 4 is saved, but its evaluation failed; see .* start the same "
    assert re.search(f"{told}command again .*: No space left .*: pictures", str(raised.value))
    assert "rehearsing evaluation" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert not (tmp_path / rehearsal.DIRECTORY).exists()
    state = train.train(config, tmp_path)
    assert "rehearsing" not in capsys.readouterr().out
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(finished[1]))
    assert _measured(tmp_path) == _measured(finished[0])


def _measured(workdir):
    """The numbers and pictures that do not depend on time."""
    pictures = {p.name: p.read_bytes() for p in (workdir / "pictures").iterdir()}
    assert len(pictures) == 2
    names = ("step", "loss")
    return pictures, [
        {k: v for k, v in x.items() if "held_out/" in k or k in names} for x in lines(workdir)
    ]


def _first_state(config):
    task = enat_task.make(config)
    mesh = sharding.make_mesh(sharding.Sharding())
    return jax.jit(task.init)(jax.random.key(0)), mesh


def test_a_rehearsal_is_due_in_a_new_run_and_after_a_change(data, finished):
    config = small_config(data, **EVALUATED)
    assert not rehearsal.is_due(config, finished[0], restored=True)
    assert rehearsal.is_due(config, finished[0], restored=False)
    config.train.num_steps = 7
    assert rehearsal.is_due(config, finished[0], restored=True)


def test_what_stopped_an_evaluation_is_told_with_any_error():
    with pytest.raises(ValueError, match="^step 4 is saved: x.png is damaged$"):
        with rehearsal.told("step 4 is saved"):
            raise ValueError("x.png\nis damaged")
    with pytest.raises(KeyError) as raised, rehearsal.told("step 4 is saved"):
        raise KeyError("precision")
    assert raised.value.__notes__ == ["step 4 is saved"]
    with pytest.raises(OSError, match="^step 4 is saved: not enough memory"):
        with rehearsal.told("step 4 is saved"):
            raise MemoryError


@pytest.fixture
def rehearse(data, finished, tmp_path, monkeypatch):
    """Rehearses a new run, whose evaluation and pictures are quickly made."""
    config = small_config(data)
    task = enat_task.make(config)
    numbers = dict.fromkeys(task.evaluated, 0.0)
    pictures = {"samples": np.zeros((2, 2, 3), np.uint8)}
    monkeypatch.setattr(enat_task.Task, "evaluate", lambda *_, **__: numbers)
    monkeypatch.setattr(enat_task.Task, "images", lambda *_: pictures)
    state = jax.tree.map(jnp.copy, finished[1])
    yield lambda: rehearsal.rehearse(
        *(config, task, state, state.step.sharding.mesh, tmp_path), pictures=True, restored=False
    )
    assert not (tmp_path / rehearsal.DIRECTORY).exists()


def test_a_rehearsal_gives_the_state_back(rehearse, finished):
    chex.assert_trees_all_equal(jax.device_get(rehearse()), jax.device_get(finished[1]))


@pytest.mark.parametrize(
    "name, result, message",
    [
        ("evaluate", ValueError("x.png is damaged"), "of evaluation failed: x.png is damaged"),
        ("evaluate", {"fid": 1.0}, "of evaluation failed: it gives fid and not held_out/loss_0.0"),
        ("images", OSError(errno.ENOSPC, "No space left", "a.png"), "its pictures .*space.*a.png"),
        ("images", {"samples": np.zeros((2, 2, 3))}, "its pictures failed: a picture of float64"),
    ],
)
def test_an_evaluation_that_would_fail_is_refused_before_the_first_step(
    rehearse, monkeypatch, name, result, message
):
    fails = "side_effect" if isinstance(result, Exception) else "return_value"
    monkeypatch.setattr(enat_task.Task, name, mock.Mock(**{fails: result}))
    with pytest.raises((OSError, ValueError), match=f"before the first step, .*{message}"):
        rehearse()


def test_a_model_or_state_that_cannot_be_read_back_is_refused_before_the_first_step(
    rehearse, tmp_path, monkeypatch
):
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(OSError, match="writing the model failed: .*irectory.*model"):
        rehearse()
    (tmp_path / "model").unlink()
    save = model_files.save_params

    def rounded(directory, params):
        save(directory, jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), params))

    with monkeypatch.context() as patch:
        patch.setattr(model_files, "save_params", rounded)
        with pytest.raises(ValueError, match="writing the model failed: .* not those that were"):
            rehearse()
    monkeypatch.setattr(manifest, "changed", lambda *_: "params/x")
    with pytest.raises(ValueError, match="reading it back failed: .*contents of params/x have"):
        rehearse()


def test_it_learns(data, finished):
    logged = [x["loss"] for x in lines(finished[0]) if "loss" in x]
    assert logged[-1] < logged[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.width": 32}, "model.width is 16 in the checkpoint but 32"),
        ({"seed": 1}, "seed is 0 in the checkpoint but 1"),
        ({"train.batch_size": 16}, "batch_size is 8"),
        ({"train.num_steps": 5}, "has been trained for 6 steps already"),
    ],
)
def test_a_run_is_not_continued_with_another_config(data, finished, change, message):
    with pytest.raises(ValueError, match=message):
        train.train(small_config(data, **change), finished[0])


def test_a_run_is_not_continued_with_other_numerics(finished, data, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_cpu_enable_fast_math=true")
    with (
        jax.default_matmul_precision("highest"),
        pytest.raises(ValueError, match="of another configuration") as error,
    ):
        train.train(small_config(data), finished[0])
    assert (
        "numerics.JAX_DEFAULT_MATMUL_PRECISION is not set in the checkpoint but highest is expected"
    ) in str(error.value)
    assert "--xla_cpu_enable_fast_math=true" in str(error.value)
    # Who only reads the weights may do so with any.
    assert runs.of_run(finished[0], step=4).provenance["step"] == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train.batch_size": 9}, "9 images cannot be divided among 8 devices"),
        ({"train.num_steps": 0}, "train.num_steps=0"),
        ({"model.num_tokens": 9}, "num_tokens=16, but model.num_tokens=9"),
        ({"model.codebook_size": 21}, "codebook_size=20, but model.codebook_size=21"),
        ({"model.num_classes": 10}, "num_classes=3, but model.num_classes=10"),
        ({"model.kind": "gan"}, "model.kind='gan' is unknown"),
        ({"model.reuse": False}, "reuse_probability=0.5 needs a model that reuses"),
        ({"data.tokens": "nowhere"}, "no token set in nowhere"),
        ({"data.tokenizer": "nowhere"}, "no nowhere/tokenizer.json"),
        ({"task": "gan"}, "task='gan' is unknown"),
        ({"seed": -1}, r"seed=-1 must lie in \[0, "),
        ({"train.best_metric": "fid"}, "best_metric='fid' is not evaluated here, only held_out/"),
        ({"train.hang_timeout": 0.0}, "train.hang_timeout=0.0 must be positive"),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(data, tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.train(small_config(data, **change), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_unknown_keys_are_named(data, tmp_path):
    for section, key in [("model", "heads"), ("optimizer", "momentum"), ("mask", "gamma")]:
        config = small_config(data)
        config[section][key] = 1
        with pytest.raises(ValueError, match=key):
            train.train(config, tmp_path)
    config = small_config(data)
    config.extra = {"a": 1}
    with pytest.raises(ValueError, match="extra"):
        train.train(config, tmp_path)


def test_tokens_of_another_tokenizer_are_refused(data, tmp_path):
    foreign = dataclasses.replace(tokens.TokenSet.open(data / "tokens"), tokenizer="0" * 64)
    tiny.write_tokens(tmp_path / "foreign", foreign)
    config = small_config(data, **{"data.tokens": str(tmp_path / "foreign")})
    with pytest.raises(ValueError, match="was not made by the tokenizer"):
        train.train(config, tmp_path / "run")


def test_sizes_may_be_left_to_the_tokens(data):
    config = small_config(data)
    given = enat_task.make(config).model
    for name in ("num_tokens", "codebook_size", "num_classes"):
        config.model[name] = None
    assert enat_task.make(config).model == given


def test_words_may_start_from_the_codebook(data):
    """As a projection of the codes: alike where they are alike; all else starts as it does."""
    config = small_config(data)
    plain = enat_task.make(config)
    config.loss.words_from_codebook = True
    task = enat_task.make(config)
    usual, found = (jax.jit(t.init)(jax.random.key(0)).params for t in (plain, task))
    words = np.asarray(found["embed"]["word"])
    assert np.linalg.matrix_rank(words[:20], tol=1e-4) == 4  # dimensions of a code
    assert np.linalg.matrix_rank(usual["embed"]["word"][:20], tol=1e-4) == 16
    assert words[:20].std() == pytest.approx(task.model.word_std, rel=0.4)
    codes = np.asarray(task.tokenizer.params["codebook"])
    codes = (codes - codes.mean(0)) / codes.std(0)
    fitted = codes @ np.linalg.lstsq(codes, words[:20], rcond=None)[0]
    np.testing.assert_allclose(fitted, words[:20], atol=1e-5)
    np.testing.assert_array_equal(words[20], usual["embed"]["word"][20])  # of a masked token
    usual["embed"]["word"] = found["embed"]["word"]
    chex.assert_trees_all_equal(found, usual)


def test_tokens_in_memory_are_the_same(data):
    config = small_config(data)
    on_disk = next(enat_task.make(config).batches(3))
    config.data.in_memory = True
    np.testing.assert_equal(next(enat_task.make(config).batches(3)), on_disk)


def test_a_feature_file_of_the_reference_is_trained_on(data, tmp_path):
    """The same batches as from a token set, and what does not fit the config is refused."""
    rows = tokens.TokenSet.open(data / "tokens").gather(np.arange(50))
    features = np.concatenate([rows["labels"][:, None], rows["tokens"]], axis=1).astype(np.int64)
    np.save(tmp_path / "train.npy", features)
    config = small_config(data)
    expected = next(enat_task.make(config).batches(0))
    config.data.tokens = str(tmp_path / "train.npy")
    np.testing.assert_equal(next(enat_task.make(config).batches(0)), expected)
    assert enat_task.make(config).tokens.class_names == ("0", "1", "2")
    features[7, 3] = 20
    np.save(tmp_path / "train.npy", features)
    with pytest.raises(ValueError, match=r"train\.npy: token 2 of row 7 is 20"):
        for batch, _ in zip(enat_task.make(config).batches(0), range(10), strict=False):
            assert batch["tokens"].max() < 20


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grid": (2, 8)}, r"a grid of \(2, 8\) .* the tokenizer in .*\(4, 4\)"),
        ({"class_names": ("a", "b", "x")}, "has other classes than .* the same class folders"),
        ({"class_names": ("b", "a", "c")}, "numbered otherwise; .* --set class_order=text"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(data, tmp_path, change, message):
    foreign = dataclasses.replace(tokens.TokenSet.open(data / "tokens"), **change)
    tiny.write_tokens(tmp_path / "foreign", foreign)
    config = small_config(data, **{"data.held_out_tokens": str(tmp_path / "foreign")})
    with pytest.raises(ValueError, match=message):
        enat_task.make(config)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.train.num_stepz=3"], "num_stepz"),
        (["--config.model.position_init=learned"], "position_init"),
        (["--config.data.tokens=nowhere"], "no token set in nowhere"),
    ],
)
def test_the_program_says_what_is_wrong_in_one_line(data, tmp_path, arguments, message):
    paths = ["--config.data.tokenizer=" + str(data / "tokenizer")]
    paths += [f"--config.data.{key}={data / 'tokens'}" for key in ("tokens", "held_out_tokens")]
    result = subprocess.run(
        [*COMMAND, f"--workdir={tmp_path / 'run'}", *paths, *arguments],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error:")]
    assert message in line and "Traceback" not in result.stderr
