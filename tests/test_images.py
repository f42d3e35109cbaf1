"""The digits: a split that never moves, smooth pictures, augmentation from the example's seed."""

import numpy as np
import pytest

from enat_jax.data import images

AUGMENTED = {"rotation": 10.0, "scale": 0.1, "shear": 0.15, "shift": 0.04}


def test_the_split_is_a_fixed_fifth_of_each_class():
    train, test = images._split("train"), images._split("test")
    assert (len(train), len(test)) == (1438, 359)
    assert sorted([*train, *test]) == list(range(1797))
    counts = {s: np.bincount(images.Digits(s).labels, minlength=10) for s in images.SPLITS}
    share = counts["test"] / (counts["test"] + counts["train"])
    np.testing.assert_allclose(share, 0.2, atol=0.003)
    # Whatever changes this makes old measurements and new ones incomparable.
    assert test[:8].tolist() == [5, 9, 12, 14, 16, 17, 19, 23]


def test_images_are_the_digits_enlarged():
    source = images.Digits("test", fill=1.0, threshold=(0.0, 1.0))
    batch = source.gather(np.arange(50))
    assert batch["images"].shape == (50, 32, 32, 1) and batch["images"].dtype == np.uint8
    assert batch["labels"].dtype == np.int32 and set(batch["labels"]) <= set(range(10))
    small = batch["images"].reshape(50, 8, 4, 8, 4).mean((2, 4)) / 255
    originals = images._digits()[0][images._split("test")[:50]]
    correlation = np.corrcoef(small.ravel(), originals.ravel())[0, 1]
    assert correlation > 0.97


def test_images_are_smooth_and_keep_a_margin():
    pictures = images.Digits("test").gather(np.arange(100))["images"].astype(int)
    assert pictures.max() == 255
    assert pictures[:, [0, -1]].max() == pictures[:, :, [0, -1]].max() == 0
    # Enlarged by repetition a digit would jump by full range from one pixel to the next.
    assert np.quantile(np.abs(np.diff(pictures, axis=2)), 0.99) < 140


def test_an_example_depends_on_its_seed_alone():
    source = images.Digits("train", **AUGMENTED)
    many = source.gather(np.array([3, 1, 3]), np.array([7, 8, 9]))["images"]
    one = source.gather(np.array([3]), np.array([9]))["images"]
    np.testing.assert_array_equal(many[2], one[0])
    assert (many[0] != many[2]).any()
    plain = source.gather(np.array([3]))["images"]
    np.testing.assert_array_equal(plain, images.Digits("train").gather(np.array([3]))["images"])
    assert (one != plain).any()


def test_a_shift_shifts():
    """Of all settings the one whose effect can be told exactly: the centre of ink moves."""
    plain, moved = images.Digits("train"), images.Digits("train", shift=0.1)
    rows = np.arange(200)
    x = np.arange(32)

    def centres(batch):
        ink = batch["images"][..., 0].astype(float)
        return (ink.sum(1) @ x) / ink.sum((1, 2))

    shifts = centres(moved.gather(rows, rows)) - centres(plain.gather(rows))
    assert np.abs(shifts).max() < 3.3 and np.abs(shifts).max() > 2.8
    assert abs(shifts.mean()) < 0.5


def test_augmentation_stays_within_its_bounds():
    source = images.Digits("train", **AUGMENTED)
    rows = np.arange(300)
    plain = source.gather(rows)["images"].astype(float)
    augmented = source.gather(rows, rows)["images"].astype(float)
    ink = augmented.sum((1, 2, 3)) / plain.sum((1, 2, 3))
    assert 0.75 < ink.min() < 0.95 and 1.05 < ink.max() < 1.35
    assert augmented[:, 0].mean() < 3  # nothing of note is pushed over the edge


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "flowers", "split": "train"}, "flowers"),
        ({"source": "digits", "split": "valid"}, "valid"),
        ({"source": "digits", "split": "train", "size": 4}, "size=4"),
        ({"source": "digits", "split": "train", "rotate": 1}, "rotate"),
    ],
)
def test_an_unknown_setting_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        images.open_source(**arguments)
