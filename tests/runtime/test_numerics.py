"""What JAX is set to changes no token, no picture and no step; what users choose is recorded."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from enat_jax.inference import image_directory
from enat_jax.runtime import cli, numerics, sharding
from enat_jax.training import config as train_config
from enat_jax.training import train_step

ROOT = pathlib.Path(__file__).parents[2]
LABELS = [0, 1, 2, 3]
VQGAN = ["--config.model.channels=8", "--config.model.codebook_size=16"]


def drawn():
    """What a generator makes, by name."""
    model = tiny.make_generator()
    tokens = model.sample_tokens(LABELS, seed=2**32 - 1)
    loss, hits = model.masked_scores(tokens, LABELS, 5, seed=1)
    images = model.tokenizer.decode(tokens)
    codes = model.tokenizer.encode(images)
    return {"tokens": tokens, "images": images, "codes": codes, "loss": loss, "hits": hits}


def trained(name):
    """The state and the metrics of a tokenizer or a feature network after three steps."""
    sizes = {
        "vqgan": [*VQGAN, "--config.loss.restart_every=2", "--config.loss.code_noise=0.1"],
        "features": ["--config.model.widths=(8, 8)"],
    }
    config = train_config.load(str(ROOT / "configs" / f"digits_{name}.py"), sizes[name])
    task = train_config.build(config)[-1]
    mesh = sharding.make_mesh(sharding.Sharding(), jax.devices()[:1])
    steps = train_step.CompiledSteps(task, mesh, (), seed=3)
    state, batches, found = steps.init(), task.batches(0), []
    for step in range(3):
        state, metrics = steps(state, [sharding.global_batch(next(batches), mesh)], step)
        found.append(metrics)
    return jax.device_get((state, found))


def same(found, expected):
    equal = lambda a, b: a.dtype == b.dtype and np.array_equal(a, b)  # noqa: E731
    return all(jax.tree.leaves(jax.tree.map(equal, found, expected)))


def test_settings_of_jax_change_no_image(other_settings):
    expected = drawn()
    with other_settings():
        assert same(drawn(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqgan", "features"])
def test_settings_of_jax_change_no_step(name, other_settings):
    expected = trained(name)
    with other_settings():
        assert same(trained(name), expected)


def test_a_key_is_that_of_jax():
    for seed in (0, 7, 2**31, 2**32 - 1):
        assert numerics.key(seed) == jax.random.key(seed)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"seed={seed} must lie in \[0, 2\*\*32\)"):
            numerics.key(seed)


def test_programs_pin_the_settings(other_settings):
    with other_settings(), jax.transfer_guard("disallow"):
        with pytest.raises(SystemExit):
            cli.run(lambda _: None, [])
        assert {name: getattr(jax.config, name) for name in numerics.PINNED} == numerics.PINNED


def test_nothing_is_compiled_or_seeded_past_the_settings():
    past = r"jax\.(?:jit|pmap|eval_shape|random\.(?:key|PRNGKey))\b(?!`)"
    exempt = {"runtime/numerics.py", "inference/compiled_sampler.py", "inference/model_card.py"}
    for path in (ROOT / "enat_jax").rglob("*.py"):
        name = path.relative_to(ROOT / "enat_jax").as_posix()
        if name not in exempt and not name.startswith("models/"):
            found = re.findall(past, path.read_text())
            assert not found, f"{name}: use numerics, not {found}"


@pytest.fixture
def flags(monkeypatch):
    """Sets XLA_FLAGS in the environment alone: this process has read them."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_dump_to=/x")
    return lambda text: monkeypatch.setenv("XLA_FLAGS", text)


def test_choices_are_recorded(flags, monkeypatch):
    assert numerics.recorded() == {}
    with jax.default_matmul_precision("highest"):
        assert numerics.recorded() == {"numerics": {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}}
    with jax.default_matmul_precision("default"):
        assert numerics.choices() == {}
    flags(
        "--xla_cpu_enable_fast_math --xla_allow_excess_precision=true --xla_dump_hlo_as_text "
        "--xla_allow_excess_precision=false"
    )
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert numerics.choices() == {
        "XLA_FLAGS": "--xla_allow_excess_precision=false --xla_cpu_enable_fast_math",
        "NVIDIA_TF32_OVERRIDE": "0",
    }


def test_images_of_other_choices_are_not_mixed(flags, tmp_path):
    model, out = tiny.make_generator(), tmp_path / "out"
    draw = lambda: image_directory.draw(model, [0, 1], 2, out, batch_size=4)  # noqa: E731
    draw()
    settings = json.loads((out / "settings.json").read_text())
    assert "numerics" not in settings  # as versions wrote it that knew nothing of them
    words = 'numerics.JAX_DEFAULT_MATMUL_PRECISION is "not set", not "highest"'
    with (
        jax.default_matmul_precision("highest"),
        pytest.raises(ValueError, match=rf"{re.escape(words)}\): set as before, or "),
    ):
        draw()
    draw()  # as it was set before
    settings["numerics"] = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    (out / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match='is "highest", not "not set"'):
        draw()


@pytest.mark.slow
def test_the_environment_of_a_program_changes_nothing(tmp_path):
    """Also where the settings are read when JAX is imported."""
    tiny.make_generator().save(tmp_path / "model", ["safetensors"])
    foreign = {
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_ENABLE_X64": "1",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_RANDOM_SEED_OFFSET": "5",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": "1",
        "JAX_TRANSFER_GUARD": "disallow",
        "PYTHONHASHSEED": "3",
        "LC_ALL": "C",
        "TZ": "Asia/Kolkata",
    }
    for out, variables in (("plain", {}), ("foreign", foreign)):
        command = [sys.executable, "-m", "enat_jax.sample", "--model", tmp_path / "model"]
        command += ["--labels", "0,2", "--num", "2", "--out", tmp_path / out]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        subprocess.run(command, check=True, env=environment, capture_output=True)
    plain, found = (
        {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}
        for out in ("plain", "foreign")
    )
    assert plain == found
