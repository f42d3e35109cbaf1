"""The program that measures models of scenes."""

import dataclasses
import json
import types

import fake_scenes
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax import evaluate_scenes
from enat_jax.data import scenes, text_tokens
from enat_jax.inference import generator, text_encoder, tokenizer

WORDS = text_tokens.Words(scenes.WORDS)


def token_set(model, source=fake_scenes.SOURCE):
    """Tokens of eight scenes."""
    codec = model.tokenizer
    codes = codec.encode(source.gather(np.arange(8))["images"])
    return tiny.token_set(
        codes,
        np.zeros(8, int),
        codebook_size=16,
        class_names=("scene",),
        tokenizer=codec.fingerprint,
        preprocessing={"source": source.identity()},
    )


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Runs `main` with models that are stand-ins, by the name of their directory."""
    models = {"m": fake_scenes.Model(), "bag": fake_scenes.Model(fake_scenes.of_seen)}
    tiny.write_tokens(tmp_path / "tokens", token_set(models["m"]))
    loader = types.SimpleNamespace(load=lambda path, **more: models[str(path)])
    monkeypatch.setattr(evaluate_scenes.generator, "Generator", loader)

    def run(*extra, **changes):
        models.update(changes)
        arguments = ["--model", "m", "--tokens", str(tmp_path / "tokens"), "--num", "100"]
        evaluate_scenes.main([*arguments, "--out", str(tmp_path / "out"), *extra])
        return tmp_path / "out"

    return run


def test_program_writes_and_prints_tables_and_pictures(program, capsys):
    out = program("--compare", "bag of words=bag", "--guidance", "0")
    printed = capsys.readouterr().out
    assert printed.strip() == (out / "evaluation.md").read_text().strip()
    assert "| ours | seen | 100 | 100.0 ± 0.0 |" in printed
    stored = json.loads((out / "evaluation.json").read_text())
    in_place = {(x["name"], x["combinations"]): x["in_place"]["mean"] for x in stored["rows"]}
    assert in_place["ours", "held out"] > 0.8 and in_place["bag of words", "held out"] == 0
    assert stored["differences"]["bag of words"]["mean"] > 0.8
    assert [row["name"] for row in stored["by_guidance"]] == ["0"]
    assert set(stored["text_use"]) == {"ours", "bag of words"}
    for name in ("unseen.png", "swapped.png", "negative.png"):
        assert f"- `{name}`: " in printed and (out / name).is_file()
    with pytest.raises(ValueError, match="seed is 0, now it would be 1: name another --out"):
        program("--compare", "bag of words=bag", "--guidance", "0", "--seed", "1")


def test_models_that_cannot_be_measured_are_refused(program, tmp_path):
    of_classes = fake_scenes.Model(text=None)
    with pytest.raises(ValueError, match="m reads no texts: name a model .*evaluate_digits"):
        program(m=of_classes)
    with pytest.raises(ValueError, match="classes reads no texts"):
        program("--compare", "NAT=classes", m=fake_scenes.Model(), classes=of_classes)
    numerals = text_encoder.TextEncoder(text_tokens.Words(scenes.WORDS[:-1]), 7)
    with pytest.raises(ValueError, match="does not read the words of scenes: the word 'nine'"):
        program(m=fake_scenes.Model(text=numerals))
    large = types.SimpleNamespace(
        image_size=(32, 32),
        model=types.SimpleNamespace(image_channels=3),
        fingerprint=fake_scenes.Tokenizer.fingerprint,
    )
    with pytest.raises(ValueError, match=r"m draws images of \(32, 32, 3\)"):
        program(m=dataclasses.replace(fake_scenes.Model(), tokenizer=large))
    assert not (tmp_path / "out").exists()


def test_tokens_that_are_not_of_the_training_scenes_are_refused(program, tmp_path):
    made = token_set(fake_scenes.Model())
    held_out = dataclasses.replace(fake_scenes.SOURCE, split="unseen").identity()
    for name, changes, message in [
        ("foreign", {"tokenizer": "another"}, "another tokenizer"),
        ("held_out", {"preprocessing": {"source": held_out}}, "--split train, not with"),
        ("digits", {"preprocessing": {"source": {"source": "digits"}}}, "--source scenes"),
        ("nothing", {"preprocessing": {}}, "--source scenes"),
    ]:
        tiny.write_tokens(tmp_path / name, dataclasses.replace(made, **changes))
        with pytest.raises(ValueError, match=message):
            program("--tokens", str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="none"):
        program("--tokens", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", "99"], "give --num 100 or more"),
        (["--guidance=-1"], "guidance_scale=-1.0 must be a number"),
        (["--compare", "NAT"], "NAME=DIR"),
    ],
)
def test_arguments_out_of_range_are_refused(program, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        program(*arguments)
    assert not (tmp_path / "out").exists()


def test_scales_of_guidance_are_numbers(program, capsys):
    with pytest.raises(SystemExit, match="2"):
        program("--guidance", "1;2")
    assert "'1;2' is not numbers with commas between them" in capsys.readouterr().err


@pytest.mark.slow  # compiles the sampler with and without guidance and a negative prompt
def test_a_model_on_disk_is_measured(tmp_path, capsys):
    codec = dataclasses.replace(tiny.make_tokenizer(), image_size=(16, 16))
    assert isinstance(codec, tokenizer.Tokenizer)
    model = tiny.text_transformer(
        num_tokens=64, num_classes=0, text_vocabulary=WORDS.size, text_tokens=7
    )
    inputs = jnp.zeros((1, 64), jnp.int32), jnp.zeros((1,), jnp.int32)
    params = tiny.random_params(model.init, *inputs, seed=0)
    text = text_encoder.TextEncoder(WORDS, 7)
    made = generator.Generator(model, params, codec, (), tiny.SETTINGS, {}, text)
    made.save(tmp_path / "model")
    tiny.write_tokens(tmp_path / "tokens", token_set(made))
    arguments = ["--model", str(tmp_path / "model"), "--tokens", str(tmp_path / "tokens")]
    evaluate_scenes.main(
        [*arguments, "--num", "100", "--guidance", "0", "--out", str(tmp_path / "out")]
    )
    assert "| ours | held out | 100 |" in capsys.readouterr().out
    with PIL.Image.open(tmp_path / "out" / "unseen.png") as picture:
        assert picture.size[1] == 10 * 68 + 4
