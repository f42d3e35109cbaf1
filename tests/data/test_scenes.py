"""Scenes of digits: what is seen in training, and what a caption says."""

import collections

import numpy as np
import pytest

from enat_jax.data import scenes
from enat_jax.data.scenes import Scene, Scenes


def test_captions_say_one_scene_in_both_directions():
    assert Scene(3, 7, "row").captions == ("a three left of a seven", "a seven right of a three")
    assert Scene(8, 0, "column").captions == ("an eight above a zero", "a zero below an eight")
    assert Scene(5).captions == ("a five",)
    words = {word for split in scenes.SPLITS for scene in scenes.combinations(split)
             for caption in scene.captions for word in caption.split()}  # fmt: skip
    assert words == set(scenes.WORDS) and len(scenes.WORDS) == 17


def test_unseen_combinations_have_seen_reversals_and_all_else_is_seen():
    unseen, train, test = scenes.unseen(), *map(scenes.combinations, ("train", "test"))
    assert len(unseen) == scenes.NUM_UNSEEN == 40 and set(scenes.combinations("unseen")) == unseen
    assert not unseen & set(train) and len(train) == 200 - 40
    assert all(scene.reversal in train and scene.first != scene.second for scene in unseen)
    assert len(test) == 180 - 80 and set(test) < set(train)
    assert all(scene.reversal in test for scene in test)
    # Every digit occurs at both places of both axes.
    places = {(axis, i, digit) for *pair, axis in train for i, digit in enumerate(pair)}
    assert len(places) == 2 * 2 * 10
    with pytest.raises(ValueError, match="split='val' is unknown"):
        scenes.combinations("val")


def inked(image):
    cells = image[..., 0].reshape(2, 16, 2, 16).transpose(0, 2, 1, 3).reshape(4, 256)
    return tuple(np.flatnonzero(cells.max(axis=1) > 100))


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_a_picture_shows_its_scene(split):
    """The digits of a scene, in its cells, are those of the right split of the right class."""
    source = Scenes(split=split, num=60)
    originals = source.digits.gather(np.arange(len(source.digits)))
    known = {}
    for image, label in zip(originals["images"], originals["labels"], strict=True):
        known.setdefault(image.tobytes(), label)
    places = collections.Counter()
    for index in range(len(source)):
        example, scene = source.load(index), source.scene(index)
        assert (example.key, example.label) == (f"scenes/{index}", 0)
        cells = inked(example.image)
        possible = [scene.cells(place) for place in range(4 if scene.second is None else 2)]
        places[possible.index(cells)] += 1
        for cell, digit in zip(cells, scene[:2], strict=False):
            y, x = 16 * (cell // 2), 16 * (cell % 2)
            pixels = np.ascontiguousarray(example.image[y : y + 16, x : x + 16])
            assert known[pixels.tobytes()] == digit
    assert min(places[0], places[1]) > 10
    singles = sum(source.scene(i).second is None for i in range(60))
    assert (5 < singles < 25) if split == "train" else singles == 0


def test_a_seed_draws_other_handwriting_of_the_same_scene():
    source = Scenes(split="train", num=20, rotation=10.0, shift=0.05)
    one, again, other, plain = (source.load(3, seed).image for seed in (1, 1, 2, None))
    assert np.array_equal(one, again) and np.array_equal(plain, source.load(3).image)
    assert not np.array_equal(one, other) and not np.array_equal(one, plain)
    batch = source.gather(np.array([3, 5]), np.array([1, 2]))
    assert batch["images"].shape == (2, 32, 32, 1) and batch["labels"].tolist() == [0, 0]
    assert np.array_equal(batch["images"][0], one)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(split="val"), "split='val' is unknown"),
        (dict(num=0), "num=0"),
        (dict(size=33), "size=33 is not an even number"),
        (dict(single=1.5), "single=1.5 must be a share"),
        (dict(shift=float("nan")), "shift=nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Scenes(**{"split": "train"} | settings)
