"""The training program: resuming exactly, refusing what does not fit, what a run leaves behind."""

import dataclasses
import os
import subprocess

import chex
import jax
import numpy as np
import pytest
import tiny
from small_runs import COMMAND, ROOT, lines, small_config

from enat_jax import train
from enat_jax.data import tokens
from enat_jax.inference.generator import Generator
from enat_jax.training import enat_task


@pytest.fixture(scope="module")
def finished(data):
    """An uninterrupted run: (directory, final state)."""
    config = small_config(data)
    config.train.pictures = True
    return data / "run", train.train(config, data / "run")


def test_a_run_leaves_metrics_pictures_checkpoints_and_a_model(finished):
    workdir, state = finished
    assert int(state.step) == 6
    logged = lines(workdir)
    assert [x["step"] for x in logged if "loss" in x] == [2, 4, 6]
    assert all(np.isfinite(x["loss"]) for x in logged if "loss" in x)
    (evaluation,) = [x for x in logged if "held_out/loss_0.5_visible" in x]
    assert 0 <= evaluation["held_out/accuracy_0.0625_visible"] <= 1
    assert (workdir / "pictures" / "samples_0000006.png").stat().st_size > 100
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [4, 6]
    generator = Generator.load(workdir / "model")
    chex.assert_trees_all_equal(generator.params, jax.device_get(state.ema_params))
    assert generator.class_names == ("a", "b", "c")
    assert generator.sample([0, 1, 2, 3]).shape == (4, 8, 8, 1)
    assert generator.provenance["step"] == 6


def test_a_resumed_run_ends_in_the_same_bits(data, finished, tmp_path):
    train.train(small_config(data, **{"train.num_steps": 4}), tmp_path)
    state = train.train(small_config(data), tmp_path)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(finished[1]))
    assert [x["step"] for x in lines(tmp_path) if "loss" in x] == [2, 4, 6]


def test_a_finished_run_started_again_does_not_train(data, finished, monkeypatch):
    workdir, state = finished
    before = lines(workdir)
    monkeypatch.setattr(enat_task.Task, "gradients", None)
    again = train.train(small_config(data), workdir)
    chex.assert_trees_all_equal(jax.device_get(again), jax.device_get(state))
    assert lines(workdir) == before


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
        ({"train.best_metric": "x", "train.eval_every": 3}, "eval_every=3 must be a multiple"),
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
        ({"class_names": ("a", "b", "x")}, "has other classes than"),
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
