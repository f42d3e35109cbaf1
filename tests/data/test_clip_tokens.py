"""CLIP's tokens against those of OpenAI's tokenizer."""

import gzip
import hashlib
import json
import pathlib

import numpy as np
import pytest

from enat_jax.data import clip_tokens, text_tokens
from enat_jax.data.text_tokens import Clip

pytest.importorskip("tokenizers")
pytest.importorskip("ftfy")
GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "clip_tokens.json").read_text())
PROMPTS = GOLDEN["prompts"]


def test_the_merges_are_openai_s():
    merges = gzip.decompress(clip_tokens._MERGES.read_bytes())
    assert hashlib.sha256(merges).hexdigest() == GOLDEN["source"]["merges_sha256"]
    notice = clip_tokens._MERGES.with_name("clip_merges.LICENSE").read_text()
    assert "MIT License" in notice and "Copyright (c) 2021 OpenAI" in notice


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_tokens_equal_the_reference(prompt):
    assert clip_tokens.clean(prompt["text"]) == prompt["cleaned"]
    expected = prompt.get("ids_plain", prompt["ids"])
    found = text_tokens.window(Clip(), [prompt["text"]], clip_tokens.CONTEXT)
    assert found.ids[0, : found.lengths[0]].tolist() == expected
    if "ids_plain" not in prompt:
        (tokens,) = clip_tokens.encode([prompt["text"]])
        assert len(tokens) + 2 == prompt["untruncated"]
        assert bool(found.dropped[0]) == (prompt["untruncated"] > 77)


def test_some_prompts_have_what_tells_tokenizers_apart():
    assert sum("huggingface_ids" in prompt for prompt in PROMPTS) == 10
    assert sum("ids_plain" in prompt for prompt in PROMPTS) == 2


def test_symbols_have_openai_s_numbers():
    words = clip_tokens._byte_pairs().get_vocab()
    assert {word: words[word] for word in GOLDEN["vocab_samples"]} == GOLDEN["vocab_samples"]
    assert len(words) == 49408


def test_a_window_is_padded_and_says_what_it_drops():
    found = text_tokens.window(Clip(pad=0), ["", "a photo of a cat", "one two three four"], 5)
    assert found.ids.tolist()[0] == [clip_tokens.START, clip_tokens.END, 0, 0, 0]
    assert found.ids.dtype == np.int32
    assert found.lengths.tolist() == [2, 5, 5]
    assert found.dropped == ("", "a cat", "four")
    assert (found.ids[1:, -1] == clip_tokens.END).all()


@pytest.mark.parametrize(
    "text", ["\0", "\u200f\u202e right to left", "\ud7ff\U0001f9ff", "x" * 10_000, "\t\n"]
)
def test_no_text_is_too_odd(text):
    found = text_tokens.window(Clip(), [text], clip_tokens.CONTEXT)
    assert 2 <= found.lengths[0] <= 77
    assert 0 <= found.ids.min() and found.ids.max() <= clip_tokens.END
