"""A config is completed and checked, and checkpoints of earlier versions go on."""

import json
import pathlib
import runpy
import types

import ml_collections
import pytest
from absl import flags

from enat_jax.checkpoints import manifest
from enat_jax.data import image_data
from enat_jax.training import config as train_config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
# What the first versions wrote into the checkpoints of these configs.
IDENTITIES = {
    "digits": """{"task": "enat", "seed": 0, "model": {"kind": "enat", "num_tokens": 64,
        "codebook_size": 16, "num_classes": 10, "width": 64, "num_heads": 4, "encoder_layers": 2,
        "decoder_layers": 2, "dropout": 0.0, "position_init": "sincos", "word_std": 0.2,
        "gate_bias": 0.3}, "mask": {"mask_ratio": "cosine", "min_visible": 0,
        "reuse_probability": 0.5}, "training": {"label_smoothing": 0.0, "label_drop": 0.1,
        "ema_decay": 0.99, "max_shapes": 4, "words_from_codebook": true}, "optimizer":
        {"learning_rate": 0.004, "warmup_steps": 100, "schedule": "cosine", "b1": 0.9, "b2": 0.99,
        "weight_decay": 0.03}, "batch_size": 32, "accumulate": 1, "data": {"images": 5},
        "num_steps": 2000}""",
    "images": """{"task": "enat", "seed": 0, "model": {"kind": "enat", "num_tokens": null,
        "codebook_size": null, "num_classes": null, "width": 366, "num_heads": 6,
        "encoder_layers": 15, "decoder_layers": 1, "dropout": 0.1, "dtype": "bfloat16"}, "mask":
        {"mask_ratio": "beta", "alpha": 12.0, "beta": 3.0, "min_visible": 1,
        "reuse_probability": 0.5}, "training": {"label_smoothing": 0.1, "label_drop": 0.235,
        "ema_decay": 0.9999, "max_shapes": 16}, "optimizer": {"learning_rate": 0.0002,
        "warmup_steps": 5000, "schedule": "constant", "b1": 0.9, "b2": 0.99, "weight_decay": 0.03},
        "batch_size": 256, "accumulate": 1, "data": {"images": 5}}""",
    "digits_vqgan": """{"task": "vqgan", "seed": 0, "model": {"channels": 16,
        "channel_multipliers": [1, 1, 2], "num_res_blocks": 1, "embed_dim": 8, "codebook_size": 16,
        "num_groups": 4, "image_channels": 1}, "optimizer": {"learning_rate": 0.004,
        "warmup_steps": 50, "schedule": "cosine", "b1": 0.9, "b2": 0.99, "weight_decay": 0.0},
        "loss": {"reconstruction": "l1", "usage_decay": 0.9, "restart_every": 25,
        "restart_until": 250, "code_noise": 0.2}, "batch_size": 32, "accumulate": 1, "data":
        {"images": 5}, "num_steps": 400}""",
    "digits_features": """{"task": "classifier", "seed": 0, "model": {"widths": [16, 32, 64]},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 50, "schedule": "cosine", "b1": 0.9,
        "b2": 0.99, "weight_decay": 0.01}, "loss": {"label_smoothing": 0.0}, "batch_size": 64,
        "accumulate": 1, "data": {"images": 5}, "num_steps": 1000}""",
}
AS_THEY_WERE = ("digits", "digits_vqgan", "digits_features")  # images has more settings now
TASK = types.SimpleNamespace(data_identity=lambda: {"images": 5})


def load(name, *overrides):
    return train_config.load(str(CONFIGS / f"{name}.py"), overrides)


def differences(saved, config):
    """What keeps a config from going on from a checkpoint of an identity."""
    expected = train_config.identity(config, TASK)
    found = {"config": saved, "tree": {}}
    return manifest.differences(found, expected, {}, train_config.complete_identity)


@pytest.mark.parametrize("name", AS_THEY_WERE)
def test_checkpoints_of_earlier_versions_go_on(name):
    saved = json.loads(IDENTITIES[name])
    assert differences(saved, load(name)) == ""
    # As config.json has it, as a complete config has it, and with what may change.
    written = json.loads(load(name).to_json_best_effort())
    assert differences(saved, ml_collections.ConfigDict(written)) == ""
    assert differences(saved, train_config.complete(load(name))) == ""
    free = ["--config.train.keep=5", "--config.sharding.fsdp=2", "--config.train.log_every=7"]
    assert differences(saved, load(name, *free)) == ""
    # Earlier versions compare without defaults, and go on from the checkpoints of this one.
    assert json.loads(json.dumps(train_config.identity(load(name, *free), TASK))) == saved


def begun(workdir, values, step=100):
    """A run's directory with its config.json, and what is there of a checkpoint."""
    (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(values))
    return workdir


def going_on(workdir, name, *overrides):
    """What is said, and the config, of a run that goes on."""
    values = flags.FlagValues()
    holder = train_config.define(values)
    values(["", f"--config={CONFIGS / name}.py", *overrides])
    return list(train_config.keep_what_began(workdir, values)), holder.value


def test_runs_go_on_without_what_their_config_did_not_have(tmp_path):
    saved = json.loads(IDENTITIES["images"])
    earlier = saved | {"train": {"num_steps": 200_000}}
    said, config = going_on(begun(tmp_path, earlier), "images")
    assert said == ["loss.ema_warmup stays False, as this run began; a new one would have True"]
    assert differences(saved, config) == ""
    # A run with it keeps it, and says nothing; what is given must fit.
    later = json.loads(load("images").to_json_best_effort())
    assert going_on(begun(tmp_path, later, 200), "images")[0] == []
    (tmp_path / "config.json").write_text(json.dumps(earlier))
    said, config = going_on(tmp_path, "images", "--config.training.ema_warmup=true")
    assert said == [] and "ema_warmup is False in the" in differences(saved, config)


def test_runs_go_on_with_what_follows_from_the_number_of_steps(tmp_path):
    earlier = json.loads(load("images").to_json_best_effort())
    earlier["train"]["num_steps"] = 400
    steps = "--config.train.num_steps=800"
    said, config = going_on(begun(tmp_path, earlier), "images", steps)
    assert said == ["optimizer.warmup_steps stays 5000, as this run began; a new one would have 40"]
    assert (config.optimizer.warmup_steps, config.train.eval_every) == (5000, 200)
    said, config = going_on(tmp_path, "images", steps, "--config.optimizer.warmup_steps=7")
    assert said == [] and config.optimizer.warmup_steps == 7
    assert going_on(tmp_path, "digits") == ([], load("digits"))
    assert going_on(tmp_path / "new", "images", steps)[0] == []
    # Nothing has been trained with what stands there.
    (tmp_path / "checkpoints" / "100").rmdir()
    assert going_on(tmp_path, "images", steps)[1].optimizer.warmup_steps == 40


@pytest.mark.parametrize("name", ["images", "images_vqgan"])
def test_what_follows_from_the_number_of_steps(name):
    file = runpy.run_path(str(CONFIGS / f"{name}.py"))
    assert load(name).to_dict() == file["get_config"]().to_dict()
    own = load(name).train.num_steps
    assert load(name, f"--config.train.num_steps={own}") == load(name)
    for num_steps in (1, 40, 400, own, 10 * own):
        config = load(name, f"--config.train.num_steps={num_steps}")
        train_config.Loop(**train_config.complete(config).train)
        assert config.optimizer.warmup_steps <= num_steps // 20
        assert config.train.eval_every <= max(1, num_steps // 4)
        follows = file["scaled"](num_steps)
        assert (follows == file["scaled"](own)) == (num_steps >= own)
    # What is given stays, wherever it stands.
    given = ["--config.optimizer.warmup_steps=9", "--config.train.eval_every=77"]
    for arguments in ([*given, "--config.train.num_steps=400"], ["--config.train.num_steps=400"]):
        config = load(name, *arguments, *given)
        assert (config.optimizer.warmup_steps, config.train.eval_every) == (9, 77)
        assert config.train.save_every == 50


@pytest.mark.parametrize("name", AS_THEY_WERE)
def test_checkpoints_of_other_settings_do_not_go_on(name):
    saved = json.loads(IDENTITIES[name])
    assert differences(saved, load(name, "--config.optimizer.clip_norm=1")) == (
        "optimizer.clip_norm is None in the checkpoint but 1.0 is expected"
    )
    assert differences(saved, load(name, "--config.seed=1")) == (
        "seed is 0 in the checkpoint but 1 is expected"
    )
    assert "batch_size is" in differences(saved, load(name, "--config.train.batch_size=8"))


def test_a_run_on_numbered_classes_is_told_how_to_go_on(tmp_path):
    """Earlier versions put "10" before "2"."""
    for name in ("1", "2", "10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"never read")

    def identity(*arguments):
        config = load("images_vqgan", f"--config.data.source={tmp_path}", *arguments)
        source = image_data.Data.of(train_config.complete(config).data.to_dict()).open("train")
        return train_config.identity(config, types.SimpleNamespace(data_identity=source.identity))

    def found(saved, now):
        described = {"config": saved, "tree": {}}
        return manifest.differences(described, now, {}, train_config.complete_identity)

    before = identity("--config.data.held_out=0", "--config.data.class_order=text")
    assert "class_order" not in before["data"]  # as earlier versions wrote it
    now = identity("--config.data.held_out=0")
    assert "data.class_order is text in the checkpoint but numeric is exp" in found(before, now)
    assert not found(before, before)
    # Where the order is the same, nothing has changed.
    (tmp_path / "10").rename(tmp_path / "3")
    assert "class_order" not in identity("--config.data.held_out=0")["data"]


def test_the_section_loss_may_have_its_old_name(tmp_path):
    text = (CONFIGS / "digits.py").read_text().replace("config.loss", "config.training")
    (tmp_path / "old.py").write_text(text)
    saved = json.loads(IDENTITIES["digits"])
    for flag in ("training", "loss"):
        config = train_config.load(
            str(tmp_path / "old.py"), [f"--config.{flag}.max_shapes=9", "--config.seed=4"]
        )
        assert (config.loss.max_shapes, config.loss.label_drop, config.seed) == (9, 0.1, 4)
    assert differences(saved, train_config.load(str(tmp_path / "old.py"))) == ""
    given = load("digits").to_dict()
    given["training"] = given.pop("loss")
    old = ml_collections.ConfigDict(given)
    assert train_config.complete(old).loss.max_shapes == 4
    assert differences(saved, old) == ""
    assert train_config.identity(old, TASK) == train_config.identity(load("digits"), TASK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimiser": {}}, "config: 'optimiser' is unknown; did you mean optimizer?"),
        ({"model": {"widht": 3}}, "config.model: 'widht' is unknown; did you mean width?"),
        ({"model": {"num_layers": 3}}, "config.model: 'num_layers' is unknown; did you mean "),
        ({"model": {"kind": "gan"}}, r"model.kind='gan' is unknown: one of \['enat', 'nat'\]"),
        ({"train": {"keep": 1.5}}, "config.train.keep=1.5 must be int$"),
        ({"train": {"keep": None}}, "config.train.keep=None must be int$"),
        ({"train": {"pictures": 1}}, "config.train.pictures=1 must be bool$"),
        ({"train": {"hang_timeout": "1"}}, "config.train.hang_timeout='1' must be float or None$"),
        (
            {"sampler": {"guidance_interval": (0.0,)}},
            r"config.sampler.guidance_interval=\(0.0,\) must be tuple\[float, float\]$",
        ),
        ({"task": "gan"}, "task='gan' is unknown: one of "),
        ({"seed": None}, "config.seed=None must be int$"),
        ({"optimizer": {"learning_rate": None}}, "config.optimizer.learning_rate is not set: give"),
        ({"evaluation": {"reference": "digits"}}, "evaluation.features is not set"),
        ({"evaluation": {"features": "random:0"}}, "evaluation.reference is not set"),
    ],
)
def test_what_is_wrong_is_named(data, change, message):
    config = load("digits")
    paths = {"tokens": data / "tokens", "tokenizer": data / "tokenizer"}
    sizes = {"num_tokens": 16, "codebook_size": 20, "num_classes": 3}
    with config.unlocked(), config.ignore_type():
        config.update({"data": {k: str(v) for k, v in paths.items()}, "model": sizes})
        config.data.held_out_tokens = None
        config.update(change)
    with pytest.raises(ValueError, match=message):
        train_config.build(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.num_stepz=3"], "Unknown .* Did you mean: config.train.num_steps "),
        (["--config.optimiser.b1=3"], "Unknown .* Did you mean: config.optimizer.b1 "),
        (["stray"], "arguments that mean nothing: stray"),
        (["--config.train.keep=None"], "flag --config.train.keep=None: must be int$"),
        (["--config.train.keep"], "Missing value for flag --config.train.keep"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises((flags.Error, ValueError), match=message):
        load("digits", *arguments)


def test_arguments_may_be_written_as_other_flags_are():
    config = load(
        *("digits", "--noconfig.train.pictures", "-config.train.keep", "3"),
        *("--config.train.matrix_rate", "--config.model.width=1", "--config.model.width=2"),
    )
    assert not config.train.pictures and config.train.matrix_rate
    assert (config.train.keep, config.model.width) == (3, 2)


def test_configs_that_are_not_there_or_of_no_task(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no config file .*no.py"):
        train_config.load(str(tmp_path / "no.py"))
    path = tmp_path / "config.py"
    path.write_text("import ml_collections\ndef get_config(): return ml_collections.ConfigDict()")
    with pytest.raises(flags.IllegalFlagValueError, match="task=None is unknown: one of"):
        train_config.load(str(path))


def test_what_a_config_leaves_out_has_defaults():
    config = ml_collections.ConfigDict({"task": "vqgan", "data": {"crop_area": [0.5, 1]}})
    found = train_config.complete(config)
    assert found.seed == 0 and found.sharding.data == -1 and found.train.keep == 2
    assert found.data.crop_area == (0.5, 1.0) and found.data.size is None
    assert train_config.complete(found) == found
    assert config.to_dict() == {"task": "vqgan", "data": {"crop_area": [0.5, 1]}}
