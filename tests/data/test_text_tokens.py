"""Texts as the words of a vocabulary and as CLIP's tokens, in windows."""

import json

import numpy as np
import pytest

from enat_jax.data import clip_tokens, scenes, text_tokens
from enat_jax.data.text_tokens import Clip, Words

WORDS = Words(("a", "cat", "left", "right", "of"))


def test_words_have_a_window_with_a_token_in_front():
    found = text_tokens.window(WORDS, ["", "A  cat\n", "a cat left of a cat"], 4)
    assert found.ids.tolist() == [[0, 0, 0, 0], [0, 1, 2, 0], [0, 1, 2, 3]]
    assert found.lengths.tolist() == [1, 3, 4] and found.ids.dtype == np.int32
    assert found.dropped == ("", "", "of a cat")
    assert WORDS.size == 6 and text_tokens.added(WORDS) == 1


def test_an_unknown_word_lists_the_vocabulary():
    with pytest.raises(ValueError, match=r"'dog' of the text 'A Dog' is not in .*: a cat left"):
        WORDS.encode(["a cat", "A Dog"])
    many = Words(tuple(f"w{i}" for i in range(40)))
    with pytest.raises(ValueError, match=r"w29 and 10 more$") as error:
        many.encode(["x" * 10_000])
    assert len(str(error.value)) < 500


def test_left_and_right_change_places():
    assert text_tokens.mirrored(WORDS).tolist() == [0, 1, 2, 4, 3, 5]
    assert text_tokens.mirrored(Words(("left",))).tolist() == [0, 1]  # not knowing right


def test_identities_come_back():
    for kind in (WORDS, Clip(), Words(scenes.WORDS)):
        identity = json.loads(json.dumps(kind.identity()))
        assert text_tokens.of_identity(identity) == kind
    assert Clip(pad=0).identity() == Clip().identity()  # stored texts are not padded
    wrong = [{}, {"kind": "t5"}, {"kind": "words"}, {"kind": "words", "vocabulary": [1]}]
    for identity in [*wrong, {"kind": "clip", "pad": 0}, {"kind": "words", "vocabulary": "ab"}]:
        with pytest.raises(ValueError, match="names no tokens of texts"):
            text_tokens.of_identity(identity)


def test_a_window_has_room_for_start_and_end():
    for kind, least in ((WORDS, 1), (Clip(), 2)):
        ids = np.array([3, 4])
        text, lengths = text_tokens.framed(kind, ids, np.array([0]), np.array([2]), least)
        assert text.shape == (1, least) and lengths.tolist() == [least]
        with pytest.raises(ValueError, match=f"at least {least}"):
            text_tokens.framed(kind, ids, np.array([0]), np.array([2]), least - 1)


@pytest.mark.parametrize("pad", [clip_tokens.END, 0])
@pytest.mark.parametrize("context", [2, 3, 5, 77])
def test_stored_tokens_of_clip_give_the_window_of_their_texts(pad, context):
    pytest.importorskip("tokenizers")
    pytest.importorskip("ftfy")
    kind, texts = Clip(pad), ["", "a cat", "left", "a photo of a dog left of a cat", "right"]
    ids = kind.encode(texts)
    assert ids[2] + ids[4] == list(kind.sides)
    counts = np.array([len(x) for x in ids])
    flat = np.array([token for x in ids for token in x], np.uint16)
    text, lengths = text_tokens.framed(kind, flat, np.cumsum(counts) - counts, counts, context)
    rows = [[clip_tokens.START, *x[: context - 2], clip_tokens.END] for x in ids]
    np.testing.assert_array_equal(text, [x + [pad] * (context - len(x)) for x in rows])
    np.testing.assert_array_equal(lengths, [len(x) for x in rows])
