"""Drawing prompts from the command line: files, settings, what is resumed, and what is printed."""

import io
import json
import sys

import jax
import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax import export, sample
from enat_jax.data import drawn, readers
from enat_jax.evaluation import drawing_arguments
from enat_jax.inference import image_directory, reveal_pictures
from enat_jax.inference.generator import Generator
from enat_jax.models.blocks import Prompt


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Compiled for one device, the sampler is ready much sooner."""
    with pytest.MonkeyPatch.context() as patch:
        device = jax.devices()[:1]
        patch.setattr(jax, "local_devices", lambda: device)
        yield


@pytest.fixture(scope="module")
def model():
    return tiny.make_word_generator()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sample") / "model"
    model.save(directory, ["safetensors"])
    return directory


def read(path):
    return np.asarray(PIL.Image.open(path))[..., None]


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def draw(model, out, *arguments):
    arguments = ["--model", model, "--out", out, "--batch-size", 4, *arguments]
    sample.main([str(x) for x in arguments])


def parameters(path):
    with PIL.Image.open(path) as image:
        return json.loads(image.text["parameters"])


def test_the_files(model, saved, tmp_path, capsys):
    out = tmp_path / "pictures"
    prompts = ["a red cat", "", "two blue cats a dog dog"]
    draw(saved, out, "--prompt", *prompts, "--num", 2, "--seed", 5)
    assert capsys.readouterr().out.splitlines() == [
        "[sample] the prompt 'two blue cats a dog dog' is longer than the 5 tokens that the model "
        "reads; left out: 'dog dog'",
        f"[sample] images and grid.png in {out}",
    ]
    names = ["00000_a_red_cat", "00001_a_red_cat", "00002_", "00003_"]
    names += [f"0000{i}_two_blue_cats_a_dog_dog" for i in (4, 5)]
    twice = [prompt for prompt in [*prompts[:2], "two blue cats a"] for _ in range(2)]
    expected = model.sample(prompts=twice, seed=5, batch_size=4)
    for name, image in zip(names, expected, strict=True):
        assert np.array_equal(read(out / f"{name}.png"), image)
    images = {f"{name}.png" for name in names}
    assert contents(out).keys() == {*images, "grid.png", "settings.json", ".lock"}
    assert read(out / "grid.png").shape == (32, 22, 1)  # a row for each of three prompts
    settings = json.loads((out / "settings.json").read_text())
    assert settings["prompts"] == prompts and settings["num"] == 2
    assert not {"labels", "class_names", "negative_prompt", "states"} & settings.keys()
    found = parameters(out / f"{names[5]}.png")
    assert found["prompt"] == prompts[2] and found["index"] == 5 and found["seed"] == 5
    assert not {"label", "class_name", "negative_prompt"} & found.keys()
    reader = readers.Folder(out)
    assert reader.keys == sorted(images) and reader.ignored[drawn.LEFT_OUT] == 1

    # What is missing or of another prompt is drawn again, in the batch that it belongs to.
    before = contents(out)
    (out / "00004_two_blue_cats_a_dog_dog.png").unlink()
    (out / "00002_.png").write_bytes((out / "00000_a_red_cat.png").read_bytes())
    draw(saved, out, "--prompt", *prompts, "--num", 2, "--seed", 5)
    assert contents(out) == before
    with pytest.raises(ValueError, match="other settings .prompts is .*: set as before, or choose"):
        draw(saved, out, "--prompt", "a dog", "", prompts[2], "--num", 2, "--seed", 5)


def test_prompts_of_a_file_and_of_stdin(saved, tmp_path, monkeypatch):
    lines = "a red cat\n\na dog\n"
    (tmp_path / "p.txt").write_text(lines)
    (tmp_path / "p.jsonl").write_text('{"text": "a red cat"}\n{"prompt": "a dog"}\n')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    found = []
    for name, source in (("text", tmp_path / "p.txt"), ("json", tmp_path / "p.jsonl"), ("in", "-")):
        draw(saved, tmp_path / name, "--prompts", source, "--num", 2)
        found.append(contents(tmp_path / name))
    assert found[0] == found[1] == found[2] and len(found[0]) == 4 + 3


def test_a_negative_prompt(model, saved, tmp_path):
    draw(saved, tmp_path, "--prompt", "a red cat", "a dog", "--negative-prompt", "a", "--num", 2)
    texts = ["a red cat"] * 2 + ["a dog"] * 2
    expected = model.sample(prompts=texts, negative_prompts=["a"] * 4)
    assert np.array_equal(read(tmp_path / "00002_a_dog.png"), expected[2])
    assert json.loads((tmp_path / "settings.json").read_text())["negative_prompt"] == "a"
    assert parameters(tmp_path / "00002_a_dog.png")["negative_prompt"] == "a"


HOSTILE = [
    "a\0b/../../etc/passwd",
    "\u202egnp.exe\u2066",
    "line\none\r\n\ttwo",
    "x" * 10_000,
    "\U00020000" * 5000,
    "..",
    "-rf *",
    "CON",
    '"; rm -rf / #',
    "e\u0301\u200d\U0001f468",
]


def test_whatever_a_prompt_holds_files_are_safe_and_the_text_is_whole(model, tmp_path):
    kinds = tmp_path / "out"
    texts = image_directory.Texts(HOSTILE, states=Prompt(np.zeros((10, 5), np.int32), [1] * 10))
    image_directory.draw(model, [0] * 10, 1, kinds, texts=texts, batch_size=4)
    names = sorted(x.name for x in kinds.glob("0*.png"))
    assert len(names) == 10
    for i, (name, text) in enumerate(zip(names, HOSTILE, strict=True)):
        assert name == drawn.file_name(i, text) and len(name.encode()) <= 190
        stem = name.removesuffix(".png")
        assert all(c.isalnum() or c in "_-" for c in stem), name
        assert parameters(kinds / name)["prompt"] == text
    assert json.loads((kinds / "settings.json").read_text())["prompts"] == HOSTILE
    before = contents(kinds)
    image_directory.draw(model, [0] * 10, 1, kinds, texts=texts, batch_size=4)
    assert contents(kinds) == before


def test_names_in_pictures_of_the_reveal():
    width = 88
    assert reveal_pictures.wrapped("a nine", width) == ["a nine"]
    two = reveal_pictures.wrapped("a three left of a seven", width)
    assert two == ["a three left of", "a seven"]
    lines = reveal_pictures.wrapped("a\n\u202eb\0c\t d", width)
    assert lines == ["a b c d"]
    for text in (*HOSTILE, "", "word " * 3000):
        lines = reveal_pictures.wrapped(text, width)
        assert 1 <= len(lines) <= 4 and all(line.isprintable() for line in lines)
    assert lines[-1].endswith("…")


def test_labels_and_prompts_together():
    class Both:
        class_names = tiny.CLASSES
        model = tiny.text_transformer(text_vocabulary=8)

        @staticmethod
        def reading_texts():
            return None

    def shown(*arguments):
        options = sample._parser().parse_args(["--model", "m", "--out", "o", *arguments])
        labels, texts = drawing_arguments.shown(options, Both)
        return labels, None if texts is None else list(texts.prompts)

    assert shown() == ([0, 1, 2], None)
    assert shown("--prompt", "a", "b") == ([3, 3], ["a", "b"])
    assert shown("--labels", "dog", "--prompt", "a", "b") == ([1, 1], ["a", "b"])
    assert shown("--labels", "dog,cat", "--prompt", "a", "b") == ([1, 0], ["a", "b"])
    assert shown("--labels", "all", "--prompt", "a") == ([0, 1, 2], ["a"] * 3)
    assert shown("--prompt", "a", "--prompt", "b", "c") == ([3, 3, 3], ["a", "b", "c"])
    with pytest.raises(ValueError, match="3 labels and 2 prompts: give as many, or one of either"):
        shown("--labels", "all", "--prompt", "a", "b")


@pytest.mark.slow
def test_the_reveal_shows_the_prompts(saved, tmp_path):
    draw(saved, tmp_path, "--prompt", "a red cat", "a", "--num", 1, "--reveal", "gif,strip")
    with PIL.Image.open(tmp_path / "reveal.gif") as image:
        assert image.size == (
            2 * 132 + 4,
            128 + 8 + 2 * 20,
        )  # a line of the prompt, and of the step
    with PIL.Image.open(tmp_path / "reveal.png") as image:
        assert image.height == 40 + 2 * 268


@pytest.mark.slow
def test_a_model_of_states_with_its_encoder_beside_it_within_it_or_as_stored_states(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("ftfy")
    model, encoder = tiny.make_clip_generator(), tmp_path / "encoder"
    model.save(tmp_path / "model", ["safetensors"])
    tiny.make_clip().save(encoder, ["safetensors"])
    texts = ["a cat", "a dog"]
    more = ["--prompt", *texts, "--num", 2]
    draw(tmp_path / "model", tmp_path / "beside", *more, "--text-encoder", encoder)
    arguments = ["--model", tmp_path / "model", "--out", tmp_path / "whole"]
    export.main([str(x) for x in [*arguments, "--text-encoder", encoder]])
    draw(tmp_path / "whole", tmp_path / "within", *more)
    beside = contents(tmp_path / "beside")
    assert contents(tmp_path / "within") == beside
    again = ["--model", tmp_path / "whole", "--out", tmp_path / "again", "--with-text-encoder"]
    export.main([str(x) for x in [*again, "--format", "safetensors"]])
    inside = [x / "text_encoder" for x in (tmp_path / "again", tmp_path / "whole")]
    assert contents(inside[0]) == contents(inside[1]) and len(contents(inside[0])) == 3

    states, lengths = model.text.prompt(texts)
    padded = np.pad(states, ((0, 0), (0, 3), (0, 0)))
    stored = {"embeddings": padded, "lengths": lengths, "null": model.text.null_states}
    np.savez(tmp_path / "stored.npz", **stored, prompts=np.array(texts))
    options = ["--embeddings", tmp_path / "stored.npz", "--num", 2]
    draw(tmp_path / "model", tmp_path / "states", *options)
    name = "00003_a_dog.png"
    assert np.array_equal(read(tmp_path / "states" / name), read(tmp_path / "beside" / name))
    found = parameters(tmp_path / "states" / name)
    assert found["prompt"] == "a dog" and len(found["states"]) == 64
    with pytest.raises(ValueError, match="holds images of other settings"):
        stored["embeddings"] = padded * np.float16(1.5)
        np.savez(tmp_path / "stored.npz", **stored, prompts=np.array(texts))
        draw(tmp_path / "model", tmp_path / "states", *options)
    np.savez(tmp_path / "bare.npz", embeddings=states, lengths=lengths)
    draw(tmp_path / "model", tmp_path / "bare", "--embeddings", tmp_path / "bare.npz", "--num", 1)
    assert (tmp_path / "bare" / "00001_.png").is_file()
    assert Generator.load(tmp_path / "whole").text.clip is not None
