"""A file that draws the generator's images where this package cannot be imported."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from jax import export

from enat_jax.checkpoints import model_files
from enat_jax.inference import compiled_sampler, model_directory
from enat_jax.models.blocks import Prompt

LABELS = [0, 1, 2, 3, 1]  # 3: no class

# What the README of a model directory shows, in a process without this package and without Flax.
STRANGER = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("enat_jax", "flax"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refuse())
%s
def draw(labels, image_index, number):
    seed = np.uint32([0, number])
    draw = jax.jit(exported.call)
    return np.asarray(draw(weights, np.int32(labels), np.int32(image_index), seed, schedule))

np.savez("images.npz", all=draw([0, 1, 2, 3, 1], range(5), 7), third=draw([2], [2], 7))
assert not {"enat_jax", "flax"} & sys.modules.keys()
"""


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator()


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("compiled") / "model"
    model_directory.write(model, out, ["safetensors", "compiled"])
    return out


def test_a_process_without_this_package_draws_the_same_images(model, directory):
    readme = (directory / "README.md").read_text()
    shown = readme.split("```python\n")[2].split("```")[0]
    assert shown.count("\n") <= 12 and "images = " in shown
    # -I: neither PYTHONPATH nor the current directory; JAX on the CPU, as here.
    subprocess.run(
        [sys.executable, "-I", "-c", STRANGER % shown],
        cwd=directory,
        env=os.environ,
        check=True,
        timeout=300,
    )
    expected = model.sample(LABELS, seed=7)
    with np.load(directory / "images.npz") as found:
        assert found["all"].dtype == np.uint8
        assert np.array_equal(found["all"], expected)
        assert np.array_equal(found["third"], expected[2:3])


def test_its_description(model, directory):
    program = (directory / "sampler.jaxexport").read_bytes()
    description = json.loads((directory / "sampler.json").read_text())
    assert export.deserialize(bytearray(program)).platforms == ("cpu", "cuda", "tpu")
    assert description["platforms"] == ["cpu", "cuda", "tpu"]
    assert description["result"] == "uint8 [b, 8, 8, 1]"
    assert description["fingerprint"]["transformer"] == model.fingerprint
    assert description["schedule"]["guidance"] == [0.0, float(np.float32(1 / 3)), np.float32(2 / 3)]
    for path in description["weights"].values():
        assert (directory / path).is_file()


def test_weights_are_not_inside(model, directory):
    program = (directory / "sampler.jaxexport").read_bytes()
    words = np.asarray(model.params["embed"]["word"])
    weights = (directory / "transformer.safetensors").read_bytes()
    assert words.tobytes() in weights and words.tobytes()[:64] not in program


@pytest.mark.slow
def test_half_the_precision_takes_the_same_files(model, directory):
    program, description = compiled_sampler.make(model.with_dtype("bfloat16"))
    exported = export.deserialize(bytearray(program))
    whole = export.deserialize(bytearray((directory / "sampler.jaxexport").read_bytes()))
    assert str(exported.in_avals) == str(whole.in_avals)
    assert description["dtype"] == "bfloat16"
    assert description["fingerprint"]["transformer"] == model.fingerprint


@pytest.mark.slow
def test_a_stranger_draws_texts(tmp_path):
    """With the lines of the README; its prompt is the last word of the vocabulary."""
    reader = tiny.make_word_generator()
    model_directory.write(reader, tmp_path / "model", ["safetensors", "compiled"])
    description = json.loads((tmp_path / "model" / "sampler.json").read_text())
    assert description["text"]["tokens"]["vocabulary"] == list(tiny.WORDS)
    assert description["arguments"]["prompt"].startswith("(int32 [b, 5], words, and int32 [b]")
    readme = (tmp_path / "model" / "README.md").read_text()
    shown = readme.split("```python\n")[2].split("```")[0]
    stranger = STRANGER % shown
    stranger = stranger[: stranger.index("def draw")] + "np.save('images.npy', images)\n"
    subprocess.run(
        [sys.executable, "-I", "-c", stranger],
        cwd=tmp_path / "model",
        env=os.environ,
        check=True,
        timeout=300,
    )
    expected = reader.sample(prompts=["dog"] * 3, seed=0)
    assert np.array_equal(np.load(tmp_path / "model" / "images.npy"), expected)


@pytest.mark.slow
def test_states_and_a_negative_prompt_are_arguments():
    reader = tiny.make_clip_generator()
    rng = np.random.default_rng(0)
    states = rng.normal(size=(4, tiny.TEXT_TOKENS, reader.text.width)).astype(np.float16)
    lengths = np.array([4, 2, 5, 3], np.int32)
    program, description = compiled_sampler.make(reader)
    assert "float16 [b, 5, 6], states" in description["arguments"]["prompt"]
    weights = {
        "transformer": model_files.flat(reader.params),
        "tokenizer": model_files.flat(reader.tokenizer.params),
    }
    schedule = {k: np.float32(v) for k, v in description["schedule"].items()}
    call = jax.jit(export.deserialize(bytearray(program)).call)
    numbers = np.zeros(3, np.int32), np.arange(3, dtype=np.int32), np.uint32([0, 7])
    prompt = states[:3], lengths[:3]
    given = reader.text.null_prompt, Prompt(states[3:], lengths[3:])
    for null, negative in zip(
        given, (None, Prompt(*(x.repeat(3, 0) for x in given[1]))), strict=True
    ):
        found = call(weights, *numbers, schedule, prompt, tuple(null))
        expected = reader.sample(prompts=Prompt(*prompt), negative_prompts=negative, seed=7)
        assert np.array_equal(found, expected)
