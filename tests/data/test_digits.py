"""The digits: a split that never moves, smooth pictures, augmentation from the example's seed."""

import pickle

import numpy as np
import pytest

from enat_jax.data import digits

AUGMENTED = {"rotation": 10.0, "scale": 0.1, "shear": 0.15, "shift": 0.04}


def test_the_split_is_a_fixed_fifth_of_each_class():
    train, test = digits._split("train"), digits._split("test")
    assert (len(train), len(test)) == (1438, 359)
    assert sorted([*train, *test]) == list(range(1797))
    counts = {s: np.bincount(digits.Digits(s).labels, minlength=10) for s in digits.SPLITS}
    share = counts["test"] / (counts["test"] + counts["train"])
    np.testing.assert_allclose(share, 0.2, atol=0.003)
    # Whatever changes this makes old measurements and new ones incomparable.
    assert test[:8].tolist() == [5, 9, 12, 14, 16, 17, 19, 23]


def test_images_are_the_digits_enlarged():
    source = digits.Digits("test", fill=1.0, threshold=(0.0, 1.0))
    batch = source.gather(np.arange(50))
    assert batch["images"].shape == (50, 32, 32, 1) and batch["images"].dtype == np.uint8
    assert batch["labels"].dtype == np.int32 and set(batch["labels"]) <= set(range(10))
    small = batch["images"].reshape(50, 8, 4, 8, 4).mean((2, 4)) / 255
    originals = digits._digits()[0][digits._split("test")[:50]]
    correlation = np.corrcoef(small.ravel(), originals.ravel())[0, 1]
    assert correlation > 0.97


def test_images_are_smooth_and_keep_a_margin():
    pictures = digits.Digits("test").gather(np.arange(100))["images"].astype(int)
    assert pictures.max() == 255
    assert pictures[:, [0, -1]].max() == pictures[:, :, [0, -1]].max() == 0
    # Enlarged by repetition a digit would jump by full range from one pixel to the next.
    assert np.quantile(np.abs(np.diff(pictures, axis=2)), 0.99) < 140


def test_an_example_depends_on_its_seed_alone():
    source = digits.Digits("train", **AUGMENTED)
    many = source.gather(np.array([3, 1, 3]), np.array([7, 8, 9]))["images"]
    one = source.gather(np.array([3]), np.array([9]))["images"]
    np.testing.assert_array_equal(many[2], one[0])
    assert (many[0] != many[2]).any()
    plain = source.gather(np.array([3]))["images"]
    np.testing.assert_array_equal(plain, digits.Digits("train").gather(np.array([3]))["images"])
    assert (one != plain).any()


def test_a_shift_shifts():
    """Of all settings the one whose effect can be told exactly: the centre of ink moves."""
    plain, moved = digits.Digits("train"), digits.Digits("train", shift=0.1)
    rows = np.arange(200)
    x = np.arange(32)

    def centres(batch):
        ink = batch["images"][..., 0].astype(float)
        return (ink.sum(1) @ x) / ink.sum((1, 2))

    shifts = centres(moved.gather(rows, rows)) - centres(plain.gather(rows))
    assert np.abs(shifts).max() < 3.3 and np.abs(shifts).max() > 2.8
    assert abs(shifts.mean()) < 0.5


def test_augmentation_stays_within_its_bounds():
    source = digits.Digits("train", **AUGMENTED)
    rows = np.arange(300)
    plain = source.gather(rows)["images"].astype(float)
    augmented = source.gather(rows, rows)["images"].astype(float)
    ink = augmented.sum((1, 2, 3)) / plain.sum((1, 2, 3))
    assert 0.75 < ink.min() < 0.95 and 1.05 < ink.max() < 1.35
    assert augmented[:, 0].mean() < 3  # nothing of note is pushed over the edge


def test_a_digit_goes_by_its_place_in_the_data():
    source = digits.Digits("test", **AUGMENTED)
    assert [source.key(i) for i in range(3)] == ["digits/5", "digits/9", "digits/12"]
    assert len({source.key(i) for i in range(359)}) == 359
    with pytest.raises(IndexError, match="359"):
        source.key(359)


def test_one_example_is_that_of_a_batch():
    source = digits.Digits("train", **AUGMENTED)
    for seed in (None, 7):
        example = source.load(3, seed)
        batch = source.gather(np.array([3]), None if seed is None else np.array([seed]))
        np.testing.assert_array_equal(example.image, batch["images"][0])
        assert (example.label, example.key) == (batch["labels"][0], source.key(3))


def test_what_decides_the_images():
    source = digits.Digits("train", size=16)
    assert source.identity() == {
        "source": "digits",
        **{"split": "train", "size": 16, "fill": 0.8125, "threshold": [0.1, 0.85]},
        **{"rotation": 0.0, "scale": 0.0, "shear": 0.0, "shift": 0.0},
    }
    assert not source.mirrored and source.ignored == {}


def test_digits_can_be_sent_to_a_worker():
    source = digits.Digits("train", rotation=10.0)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.load(5, 1).image, source.load(5, 1).image)


@pytest.mark.parametrize(
    ("settings", "message"), [({"split": "valid"}, "valid"), ({"split": "train", "size": 4}, "=4")]
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        digits.Digits(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        *[{"size": size} for size in (7, 8.0, "8", [8])],
        *[{"fill": 0}, {"rotation": "10"}, {"shift": float("nan")}, {"shear": True}],
        *[{"threshold": 0.5}, {"threshold": (0.5, 0.1)}, {"threshold": "ab"}],
    ],
)
def test_settings_that_make_no_sense_are_named(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"^{name}="):
        digits.Digits("train", **settings)
