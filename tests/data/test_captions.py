"""Captions on disk, and as the loader takes them beside tokens."""

import collections
import json
import pickle

import fake_coco
import numpy as np
import pytest

from enat_jax.data import captioned, captions, loader, text_tokens, tokens

WORDS = text_tokens.Words(tuple("a b c d left right of".split()))
TEXTS = [["a left of b", "b", "c right"], ["d"], ["a", "b"], [], ["left"], [""]]
KEYS = [f"{i}.png" for i in range(len(TEXTS))]


def write(directory, texts=TEXTS, plan="1234", kind=WORDS, mirror_words="swap", keys=KEYS):
    made_of = captions.identity(texts, kind, plan, mirror_words)
    assert captions.begin(directory, made_of)
    ids = kind.encode([text for of_picture in texts for text in of_picture])
    captions.write(directory, made_of, texts, keys, ids)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return captions.Captions.open(write(tmp_path_factory.mktemp("captions") / "out"))


def said(batch):
    names = ("", *WORDS.vocabulary)
    rows = zip(batch["text"], batch["lengths"], strict=True)
    return [" ".join(names[i] for i in text[1:n]) for text, n in rows]


def test_captions_come_back(made):
    every = [text for of_picture in TEXTS for text in of_picture]
    batch = made.window(np.arange(len(every)), 6)
    assert said(batch) == every
    assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {
        "text": (np.int32, (len(every), 6)),
        "lengths": (np.int32, (len(every),)),
    }
    assert made.longest == 5 and made.ids.dtype == np.uint16
    assert said(made.window(np.array([0, 1]), 3)) == ["a left", "b"]
    assert made.has_side.tolist() == [True, False, True, False, False, False, True, False]


def test_mirrored_pictures_have_mirrored_words(made):
    flips = np.array([True, False, True, True])
    assert said(made.window(np.array([0, 0, 2, 3]), 6, flips)) == [
        *("a right of b", "a left of b", "c left", "d"),
    ]


def test_a_seed_alone_chooses(made):
    images = np.array([0, 2, 0, 1])
    assert made.choose(images).tolist() == [0, 4, 0, 3]
    seeds = np.random.default_rng(0).integers(0, 1 << 63, 3000)
    chosen = made.choose(np.zeros(3000, int), seeds)
    counts = collections.Counter(chosen.tolist())
    assert set(counts) == {0, 1, 2} and min(counts.values()) > 900
    order = np.random.default_rng(1).permutation(3000)
    np.testing.assert_array_equal(made.choose(np.zeros(3000, int), seeds[order]), chosen[order])
    # Never change it: runs that are resumed rest on it.
    assert made.choose(np.array([0] * 6), np.arange(6)).tolist() == [1, 2, 1, 0, 1, 2]
    assert captions._mixed(np.array([0]))[0] == 0xE220A8397B1DCDAF  # SplitMix64's first number


def test_neighbouring_seeds_choose_differently(made):
    chosen = made.choose(np.zeros(999, int), np.arange(999) * 3)
    assert min(collections.Counter(chosen.tolist()).values()) > 280


def test_a_picture_without_captions_is_refused(made):
    with pytest.raises(ValueError, match="picture 3 has no caption"):
        made.choose(np.array([0, 3]))
    with pytest.raises(ValueError, match="captions of 6 pictures alone"):
        made.choose(np.array([6]))


SPOILS = {
    "cut": lambda p: (p / "offsets.npy").write_bytes((p / "offsets.npy").read_bytes()[:-1]),
    "gone": lambda p: (p / "first.npy").unlink(),
    "no JSON": lambda p: (p / "metadata.json").write_text("{"),
    "another format": lambda p: change(p, format="enat_jax captions 99"),
    "other words": lambda p: change(p, text_tokens={"kind": "words", "vocabulary": ["a"]}),
    "no words": lambda p: change(p, text_tokens=7),
    "fewer pictures": lambda p: change(p, num_images=5),
    "no checksums": lambda p: change(p, sha256=[]),
    "nonsense": lambda p: change(p, mirror_words="turn"),
}


def change(directory, **values):
    path = directory / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", SPOILS)
def test_damage_is_found(tmp_path, name):
    directory = write(tmp_path / "out")
    SPOILS[name](directory)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        captions.Captions.open(directory)
    message = str(error.value)
    assert str(directory) in message and "\n" not in message, message


KEPT = [fake_coco.file_name(n, 2014) for n in range(20)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tokens of 20 pictures and their mirror images, of which number 4 could not be read."""
    root = tmp_path_factory.mktemp("tokens")
    fake_coco.write_tokens(root / "tokens", KEPT, flips=True, unreadable=[KEPT[4]])
    return root


def of_twenty(root, name, mirror_words="swap", empty=()):
    texts = [[] if i in empty else [f"{'abcd'[i % 4]} left", "b", "c"] for i in range(20)]
    plan = tokens.read_metadata(root / "tokens")["digest"]
    if not (root / name).exists():
        write(root / name, texts, plan, mirror_words=mirror_words, keys=KEPT)
    found = captioned.open_captions(root / name, root / "tokens")
    return captioned.Captioned.of(tokens.TokenSet.open(root / "tokens"), found, 4)


def test_batches_have_text_of_their_pictures(root):
    found = of_twenty(root, "swap")
    plain = tokens.TokenSet.open(root / "tokens")
    assert len(found) == len(plain) == 38
    batch = found.gather(np.arange(38))
    expected = plain.gather(np.arange(38))
    for name in expected:
        np.testing.assert_array_equal(batch[name], expected[name])
    for tokens_, text in zip(batch["tokens"], said(batch), strict=True):
        image, flip = tokens_[:2]
        assert text == f"{'abcd'[image % 4]} {'right' if flip else 'left'}"
    assert found.without_text().gather([1])["tokens"].tolist() == [[0, 1, 0, 0]]


def test_mirrored_pictures_keep_their_words_or_are_taken_as_they_were(root):
    kept = of_twenty(root, "keep", "keep").gather(np.array([0, 1]))
    assert said(kept) == ["a left", "a left"] and kept["tokens"][:, 1].tolist() == [0, 1]
    found = of_twenty(root, "unflipped", "unflipped")
    for examples in (found, found.in_memory()):
        seeds = np.arange(38)
        batch = examples.gather(np.arange(38), seeds)
        mirrored = batch["tokens"][:, 1].astype(bool)
        sided = np.array(["left" in text for text in said(batch)])
        assert not any("right" in text for text in said(batch))
        np.testing.assert_array_equal(mirrored, (np.arange(38) % 2 == 1) & ~sided)
        assert mirrored.any() and sided[1::2].any()
        np.testing.assert_array_equal(batch["tokens"][::2, 0], batch["tokens"][1::2, 0])


def test_pictures_without_captions_are_left_out(root):
    found = of_twenty(root, "skip", empty=(0, 7, 19))
    assert len(found) == 32
    images = found.gather(np.arange(32))["tokens"][:, 0]
    assert set(images.tolist()) == set(range(20)) - {0, 4, 7, 19}
    assert len(found.in_memory()) == 32


def test_no_caption_at_all_and_no_room(root):
    with pytest.raises(ValueError, match="no record of the token set has a caption"):
        of_twenty(root, "nothing", empty=range(20))
    found = of_twenty(root, "swap")
    with pytest.raises(ValueError, match="a text of 0 tokens is too short: at least 1"):
        captioned.Captioned.of(found.without_text(), found.captions, 0)


def test_the_stream_is_resumed_and_shared_exactly(root):
    found = of_twenty(root, "swap")
    assert pickle.loads(pickle.dumps(found)).captions.plan == found.captions.plan
    stream = loader.train_batches(found, 8, seed=3)
    batches = [next(stream) for _ in range(12)]
    assert len({text for batch in batches for text in said(batch)}) == 10
    resumed = loader.train_batches(found, 8, seed=3, start_step=7)
    parts = [loader.train_batches(found, 8, seed=3, start_step=7, share=(i, 2)) for i in (0, 1)]
    for batch in batches[7:]:
        pieces = [next(part) for part in parts]
        for name, values in next(resumed).items():
            np.testing.assert_array_equal(values, batch[name])
            np.testing.assert_array_equal(np.concatenate([p[name] for p in pieces]), values)


def test_captions_to_train_and_to_evaluate_on_fit_each_other(root, tmp_path):
    of_twenty(root, "swap")
    ours = root / "tokens", root / "swap"
    training, held_out = captioned.open_both(*ours, *ours)
    assert training.longest == 3 and held_out.plan == training.plan

    other = fake_coco.write_tokens(tmp_path / "other", ["a.png"])
    plan = tokens.read_metadata(other)["digest"]
    write(tmp_path / "fits", [["a"]], plan, keys=["a.png"])
    fewer = text_tokens.Words(("a",))
    write(tmp_path / "fewer words", [["a"]], plan, fewer, keys=["a.png"])
    leaked = fake_coco.write_tokens(tmp_path / "leaked", [fake_coco.file_name(3, 2017)])
    plan = tokens.read_metadata(leaked)["digest"]
    write(tmp_path / "of leaked", [["a"]], plan, keys=["a.png"])
    assert captioned.open_both(*ours, other, tmp_path / "fits")[1]
    for wrong, words in (
        ((*ours, other, root / "swap"), "are not of the tokens in"),
        ((*ours, other, tmp_path / "fewer words"), "with different text tokens"),
        ((*ours, leaked, tmp_path / "of leaked"), "1 pictures of .*leaked are in .*tokens as well"),
        (("train.npy", root / "swap", *ours), "can have no captions"),
        ((root / "tokens", tmp_path, *ours), "there is no .*metadata.json: make captions with"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            captioned.open_both(*wrong)
