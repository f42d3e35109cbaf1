"""Texts to prompts: words or states, with the encoder at hand or without it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from enat_jax.data import text_tokens
from enat_jax.inference import clip_model, text_encoder
from enat_jax.models.blocks import Prompt


@pytest.fixture(scope="module")
def words():
    return text_encoder.TextEncoder(text_tokens.Words(tiny.WORDS), tiny.TEXT_TOKENS)


@pytest.fixture(scope="module")
def clip():
    pytest.importorskip("tokenizers")
    pytest.importorskip("ftfy")
    return text_encoder.of_clip(tiny.make_clip(), tiny.TEXT_TOKENS)


@pytest.fixture(scope="module")
def saved(clip, tmp_path_factory):
    """A model directory, as far as texts go, with the encoder in it and beside it."""
    directory = tmp_path_factory.mktemp("texts")
    clip.save(directory)
    clip.save_encoder(directory, ["safetensors"])
    (directory / "text_encoder").rename(directory / "elsewhere")
    return directory


def load(directory, described, given=None):
    return text_encoder.load(directory, described.description(), given, jax.devices()[:1])


def test_words_are_numbers_and_what_has_no_room_is_named(words):
    window = words.window(["A red CAT", "", "two  cats a dog a", "a\n\u3000cat"])
    assert window.ids.tolist() == [
        [0, 1, 3, 5, 0],
        [0, 0, 0, 0, 0],
        [0, 2, 6, 1, 7],
        [0, 1, 5, 0, 0],
    ]
    assert window.lengths.tolist() == [4, 1, 5, 3]
    assert window.dropped == ("", "", "a", "")
    prompt = words.prompt(["A red CAT", ""])
    assert prompt.tokens.tolist() == window.ids[:2].tolist() and prompt.tokens.dtype == np.int32
    null = words.null_prompt
    assert null.tokens.tolist() == window.ids[1:2].tolist() and null.length.tolist() == [1]
    assert words.width is None and repr(words) == "TextEncoder(5 words)"


def test_states_do_not_depend_on_the_other_texts(clip):
    prompt = clip.prompt(["a cat", "", "a cat"])
    assert prompt.tokens.shape == (3, tiny.TEXT_TOKENS, 6) and prompt.tokens.dtype == np.float16
    assert prompt.length.tolist() == [4, 2, 4]
    np.testing.assert_array_equal(prompt.tokens[0], prompt.tokens[2])
    alone = clip.prompt(["a cat"]).tokens[0]
    np.testing.assert_array_equal(prompt.tokens[0], alone)
    np.testing.assert_array_equal(clip.null_prompt.tokens[0], prompt.tokens[1])
    many = clip.prompt(["a cat", *map(str, range(20))])  # more than one call of the network
    np.testing.assert_array_equal(many.tokens[0], alone)
    assert clip.window(["a photo of a cat"]).dropped == ("a cat",)


def test_what_was_saved_is_loaded(clip, saved):
    without = load(saved, clip)
    assert without.clip is None and without.encoder == clip.encoder
    np.testing.assert_array_equal(without.null_prompt.tokens, clip.null_prompt.tokens)
    found = load(saved, clip, saved / "elsewhere")
    np.testing.assert_array_equal(found.prompt(["a dog"]).tokens, clip.prompt(["a dog"]).tokens)
    assert found.description() == clip.description()


def test_a_model_without_its_encoder_says_what_it_needs(clip, saved):
    without = load(saved, clip)
    for call in (lambda: without.window([""]), lambda: without.prompt(["a cat"])):
        with pytest.raises(ValueError, match="not at hand: name its directory by --text-encoder"):
            call()
    with pytest.raises(ValueError, match="has none at hand: give --text-encoder"):
        without.save_encoder(saved, ["safetensors"])
    states = clip.prompt(["a cat"])
    np.testing.assert_array_equal(without.checked(states).tokens, states.tokens)


def test_words_need_no_encoder(words, saved):
    with pytest.raises(ValueError, match="reads words and needs no text encoder"):
        load(saved, words, saved / "elsewhere")
    with pytest.raises(ValueError, match="this model reads words and has none"):
        words.save_encoder(saved, ["safetensors"])
    assert load(saved, words).kind == words.kind


def test_another_encoder_is_refused(clip, saved, tmp_path):
    tiny.make_clip(1).save(tmp_path, ["safetensors"])
    with pytest.raises(ValueError, match="is not the text encoder that the model was trained with"):
        load(saved, clip, tmp_path)
    other = dataclasses.replace(tiny.make_clip(), pad=0)
    other.save(tmp_path, ["safetensors"])
    with pytest.raises(ValueError, match="is not the text encoder that the model was trained with"):
        load(saved, clip, tmp_path)
    with pytest.raises(ValueError, match="is not the one that the model was trained with"):
        dataclasses.replace(clip, clip=other)
    with pytest.raises(FileNotFoundError, match="there is no .*encoder.json: make one with"):
        load(saved, clip, saved)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-3], "null_text.npy is damaged"),
        (lambda data: b"", "null_text.npy is damaged"),
        (lambda data: b"states", "null_text.npy is damaged"),
        (lambda data: data[:-1] + b"\x00", "null_text.npy is not what was saved: damaged"),
        (lambda data: data[:-2] + b"\xff\x7f", "holds float16 .*, and no states of the empty text"),
        (lambda data: data.replace(b"<f2", b"<i2"), "holds int16 .*, and no states of the empty"),
    ],
)
def test_damaged_states_of_the_empty_text(clip, saved, tmp_path, spoil, message):
    data = (saved / clip_model.NULL).read_bytes()
    for directory in (tmp_path, tmp_path / "elsewhere"):
        directory.mkdir(exist_ok=True)
        (directory / clip_model.NULL).write_bytes(spoil(data))
    with pytest.raises(ValueError, match=message):
        load(tmp_path, clip)
    for name in ("encoder.json", "text.safetensors"):
        (tmp_path / "elsewhere" / name).write_bytes((saved / "elsewhere" / name).read_bytes())
    with pytest.raises(ValueError, match=message):
        clip_model.ClipText.load(tmp_path / "elsewhere")


def test_a_damaged_encoder(saved, clip, tmp_path):
    description = json.loads((saved / "elsewhere" / "encoder.json").read_text())
    description["text"]["model"]["activation"] = "gelu"
    for name in ("text.safetensors", clip_model.NULL):
        (tmp_path / name).write_bytes((saved / "elsewhere" / name).read_bytes())
    (tmp_path / "encoder.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="is not the text encoder that the model was trained with"):
        load(saved, clip, tmp_path)
    del description["text"]
    (tmp_path / "encoder.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="encoder.json is damaged: KeyError"):
        load(saved, clip, tmp_path)


def states(n=2, p=3, e=6, value=0.5):
    return np.full((n, p, e), value, np.float32)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(np.zeros((2, 3), np.int32)), r"prompts are floats \[n, p, 6\], and not int32"),
        (Prompt(states()[0]), "and not float32 .3, 6."),
        (Prompt(np.float32(0)), r"and not float32 \(\)"),
        (Prompt(states(e=5)), "they are of another text encoder"),
        (Prompt(states(p=6)), "a prompt of 6 tokens: this model reads 5 at most"),
        (Prompt(states(value=np.nan)), "prompt 0 has a value that is not finite"),
        (Prompt(states(value=1e6)), "prompt 0 has a value that is not finite in float16"),
        (Prompt(states(), [1]), r"lengths of prompts are a whole number for each, and not int64"),
        (Prompt(states(), [1.0, 2.0]), "and not float64"),
        (Prompt(states(), [3, 0]), r"prompt 1 has the length 0: it must lie in \[1, 3\]"),
        (Prompt(states(), 4), "prompt 0 has the length 4"),
    ],
)
def test_prompts_of_another_model(clip, prompt, message):
    with pytest.raises(ValueError, match=message):
        clip.checked(prompt)


def test_words_of_another_model(words):
    found = words.checked(Prompt(np.ones((2, 3), np.int64), 2))
    assert found.tokens.dtype == found.length.dtype == np.int32 and found.length.tolist() == [2, 2]
    for tokens, message in (([[8]], r"not in \[0, 8\)"), ([[-1]], "not in"), ([[0.0]], "floa")):
        with pytest.raises(ValueError, match=message):
            words.checked(Prompt(np.array(tokens)))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a cat", 7], "must be a list of texts, and 7 is none"),
        (["a \ud800"], "holds half of a surrogate pair"),
        (
            ["a giraffe"],
            "the word 'giraffe' of the text 'a giraffe' is not in the vocabulary: a tw",
        ),
        (["a\0cat"], r"the word 'a\\x00cat' of the text"),
        (["cat\u200b"], r"the word 'cat\\u200b'"),
        (["x" * 10_000], "the word 'xxxx"),
    ],
)
def test_texts_that_cannot_be_read(words, texts, message):
    with pytest.raises(ValueError, match=message) as failed:
        words.window(texts)
    assert len(str(failed.value)) < 400
