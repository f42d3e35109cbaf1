"""Model directories of runs: under way, finished, damaged; and what they may not replace."""

import errno
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
import tiny
from safetensors import numpy as safetensors

from enat_jax import export
from enat_jax.checkpoints import checkpoint, model_files
from enat_jax.inference.generator import Generator
from enat_jax.inference.tokenizer import Tokenizer
from enat_jax.models import conversion
from enat_jax.runtime import cli, sharding
from enat_jax.training import config as train_config
from enat_jax.training import finished


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """The config of a run, and its states at steps 2 and 4: random numbers, nothing is trained."""
    root = tmp_path_factory.mktemp("data")
    codec = tiny.make_tokenizer()
    codec.save(root / "tokenizer")
    labels = np.arange(8) % 3
    made = tiny.token_set(
        np.zeros((8, tiny.NUM_TOKENS), int),
        labels,
        codebook_size=tiny.CODES,
        class_names=("a", "b", "c"),
        tokenizer=codec.fingerprint,
    )
    tiny.write_tokens(root / "tokens", made)
    config = small_runs.small_config(root, **{"model.codebook_size": tiny.CODES})
    *_, task = train_config.build(config)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    shapes = jax.eval_shape(task.init, jax.random.key(0))
    return config, task, {step: jax.tree.map(draw, shapes) for step in (2, 4)}


@pytest.fixture(scope="module")
def under_way(states, tmp_path_factory):
    """The directory of a run that has saved twice and is not at its end."""
    config, task, saved = states
    workdir = tmp_path_factory.mktemp("run")
    (workdir / "config.json").write_text(config.to_json_best_effort())
    meta = train_config.identity(config, task)
    with checkpoint.Checkpointer(workdir / "checkpoints", save_every=2) as checkpointer:
        for step, state in saved.items():
            checkpointer.save(step, state, meta)
    return workdir


@pytest.fixture
def run(under_way, tmp_path):
    return shutil.copytree(under_way, tmp_path / "run")


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "model"
    model.save(directory)
    return directory


def contents(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def same(params, others):
    jax.tree.map(np.testing.assert_array_equal, params, others)


def command(*arguments):
    export.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """The one line that a mistake ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.run(export.main, [str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_the_newest_of_a_run_that_goes_on(states, run, tmp_path, capsys):
    config, _, saved = states
    before = contents(run)
    command("--workdir", run, "--out", tmp_path / "model")
    said = capsys.readouterr().out
    assert "step 4" in said and "still is 66% the initial parameters after 4 steps" in said
    assert contents(run) == before  # nothing is set aside, renamed or locked
    loaded = Generator.load(tmp_path / "model")
    same(loaded.params, saved[4].ema_params)  # the averages
    assert loaded.class_names == ("a", "b", "c")
    assert loaded.settings.num_steps == 3
    assert loaded.provenance["step"] == 4
    assert loaded.provenance["config"]["optimizer"]["learning_rate"] == 1e-2
    tokenizer = Tokenizer.load(config.data.tokenizer).fingerprint
    assert loaded.provenance["data"]["tokenizer"] == loaded.tokenizer.fingerprint == tokenizer
    assert loaded.provenance["versions"]["jax"] == jax.__version__


def test_a_step_by_its_number(states, under_way):
    found = finished.of_run(under_way, 2)
    assert found.provenance["step"] == 2
    same(found.params, states[2][2].ema_params)


def test_a_finished_run_and_one_that_was_made_longer(states, run):
    config, task, saved = states
    params = sharding.to_host(saved[4].ema_params)
    finished.trained(config, task, params, 4).save(run / "model")
    (run / "config.json").rename(run / "config.away")  # which the finished model does not need
    assert (
        finished.of_run(run).provenance["step"] == finished.of_run(run, 4).provenance["step"] == 4
    )
    (run / "config.away").rename(run / "config.json")
    older = jax.tree.map(lambda x: 3 * x, params)
    shutil.rmtree(run / "model")
    finished.trained(config, task, older, 3).save(run / "model")
    same(finished.of_run(run).params, params)
    same(finished.of_run(run, 3).params, older)


def test_a_damaged_checkpoint(run, capsys):
    # Whole, readable, and not what was saved.
    shutil.rmtree(run / "checkpoints" / "4" / "state")
    shutil.copytree(run / "checkpoints" / "2" / "state", run / "checkpoints" / "4" / "state")
    assert finished.of_run(run).provenance["step"] == 2
    assert (
        "checkpoint cannot be read, step 4: the contents of ema_params" in capsys.readouterr().out
    )
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4"]
    shutil.rmtree(run / "checkpoints" / "4" / "state")
    with pytest.raises(ValueError, match="no checkpoint in .* can be read .step 4: .*Error"):
        finished.of_run(run, 4)


def test_a_run_that_was_made_longer_and_whose_newest_checkpoint_is_damaged(states, run):
    config, task, saved = states
    params = sharding.to_host(saved[2].ema_params)
    finished.trained(config, task, params, 2).save(run / "model")
    shutil.rmtree(run / "checkpoints" / "4" / "state")
    with pytest.raises(ValueError, match=r"no checkpoint of step 3: it has \[2, 4\]"):
        finished.of_run(run, 3)
    found = finished.of_run(run)
    assert found.provenance["step"] == 2
    same(found.params, params)


def test_another_config_than_the_checkpoints(run):
    values = json.loads((run / "config.json").read_text())
    values["model"]["width"] = 32
    (run / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"not of the run's config.json: model.width is 16"):
        finished.of_run(run)


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "error: there is no .*config.json: name the --workdir of a run"),
        ("checkpoints", "error: .* has neither a finished model nor a checkpoint yet"),
    ],
)
def test_no_run(run, tmp_path, capsys, remove, message):
    path = run / remove
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    line = refused(capsys, "--workdir", run, "--out", tmp_path / "out")
    assert re.match(message, line), line
    assert not (tmp_path / "out").exists()


def test_a_step_that_is_not_there(under_way, tmp_path, capsys):
    line = refused(capsys, "--workdir", under_way, "--step", 3, "--out", tmp_path / "out")
    assert line.endswith("has no checkpoint of step 3: it has [2, 4]")


def test_formats_are_added_to_the_same_model(model, saved, tmp_path):
    out = tmp_path / "out"
    command("--model", saved, "--out", out, "--format", "safetensors")
    assert sorted(contents(out)) == [
        *("README.md", "model.json", "tokenizer/params.safetensors"),
        *("tokenizer/tokenizer.json", "transformer.safetensors"),
    ]
    command("--model", out, "--out", out, "--format", "orbax,reference")
    assert (out / "transformer" / "_METADATA").is_file()
    same(model_files.load_params(out / "transformer"), model.params)
    enat = safetensors.load_file(out / "reference" / "enat.safetensors")
    vqgan = safetensors.load_file(out / "reference" / "vqgan.safetensors")
    assert enat["blocks.0.attn.q.weight"].shape == (16, 16)
    same(conversion.enat_params(enat, model.model), model.params)
    same(conversion.vqgan_params(vqgan, model.tokenizer.model), model.tokenizer.params)


def test_f_once_is_another_model_of_the_same_weights(model, saved, tmp_path, capsys):
    out = tmp_path / "out"
    command("--model", saved, "--out", out, "--format", "safetensors", "--project-once")
    made = Generator.load(out)
    assert made.model == model.model.clone(project_once=True) != model.model
    same(made.params, model.params)
    message = "error: --project-once is of a transformer that reuses features"
    tokens = "--model", saved / "tokenizer", "--project-once", "--out", tmp_path / "more"
    assert refused(capsys, *tokens).startswith(message)
    once = "--model", saved, "--project-once", "--push", "me/it"
    assert "name it by --out" in refused(capsys, *once)


def test_a_tokenizer(model, tmp_path, capsys):
    model.tokenizer.save(tmp_path / "tokenizer", ["orbax"])
    out = tmp_path / "out"
    command("--model", tmp_path / "tokenizer", "--out", out, "--format", "safetensors,reference")
    assert Tokenizer.load(out).fingerprint == model.tokenizer.fingerprint
    assert (out / "reference" / "vqgan.safetensors").is_file()
    line = refused(capsys, "--model", out, "--out", out, "--format", "compiled")
    assert "a tokenizer draws nothing" in line


def test_what_was_written_is_opened_before_it_is_reported(saved, tmp_path, capsys, monkeypatch):
    save = model_files.save_params

    def rounded(directory, params):
        save(directory, jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), params))

    monkeypatch.setattr(model_files, "save_params", rounded)
    line = refused(capsys, "--model", saved, "--out", tmp_path / "out", "--format", "orbax")
    assert "are not those that were saved" in line
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_replaced(saved, tmp_path, capsys):
    tiny.make_generator(seed=1).save(tmp_path / "other", ["safetensors"])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "of_mine.txt").write_text("dear diary")
    (tmp_path / "file").write_text("a file")
    before = contents(tmp_path)
    line = refused(capsys, "--model", saved, "--out", tmp_path / "other")
    assert "other holds another model: name another directory" in line
    line = refused(capsys, "--model", saved, "--out", tmp_path / "notes")
    assert "notes holds something else than a model" in line
    assert "file" in refused(capsys, "--model", saved, "--out", tmp_path / "file")
    line = refused(capsys, "--model", saved, "--out", tmp_path / "file" / "out")
    assert line == f"error: File exists: {tmp_path / 'file'}"
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_nothing_half_done(saved, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "out"
    line = refused(capsys, "--model", saved, "--out", out, "--format", "safetensors")
    assert line.startswith("error: No space left on device: ") and "safetensors" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx"], "'onnx' is none of orbax, safetensors, compiled, reference"),
        (["--format", "compiled"], "is new and needs weights: add safetensors or orbax"),
        (["--format", "orbax,compiled"], "a compiled sampler needs weights: add safetensors"),
        (["--step", "4"], "--step is of a run"),
        (["--dtype", "bfloat16"], "--dtype is of a compiled sampler: add compiled to --format"),
        (["--push", "digits"], "hf://digits is no address such as hf://owner/name"),
    ],
)
def test_wrong_arguments(saved, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        cli.run(export.main, ["--model", str(saved), "--out", str(tmp_path / "out"), *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_sources_that_are_none(saved, tmp_path, capsys):
    assert "name it by --model" in refused(capsys, "--workdir", saved, "--out", tmp_path / "out")
    assert "there is no" in refused(capsys, "--model", tmp_path / "x", "--out", tmp_path / "out")
    assert "name a directory by --out" in refused(capsys, "--model", saved)


def test_only_whole_models_are_pushed(model, tmp_path, capsys):
    model.tokenizer.save(tmp_path / "tokenizer", ["safetensors"])
    line = refused(capsys, "--model", tmp_path / "tokenizer", "--push", "owner/digits")
    assert line.endswith("model.json: push a model directory")
