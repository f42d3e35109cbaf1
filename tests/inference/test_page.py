"""The page without Gradio: what it offers, draws, fills and refuses, each in one sentence."""

import json
import zipfile

import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax.inference import page
from enat_jax.runtime import png


@pytest.fixture
def made(tmp_path):
    return page.Page(tiny.make_generator(), tmp_path)


def asked(made, **changes):
    values = {name: of.start for name, of in made.ranges().items()} | changes.pop("settings", {})
    given = dict(labels=[0, 2], prompts="", negative="", num=2, seed=5, settings=values)
    return made.drawn(**given | changes)


def filled(made, mask, **changes):
    values = {name: of.start for name, of in made.ranges().items()}
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 1)).astype(np.uint8)
    given = dict(
        picture=page.Picture("a.png", pixels), label=1, prompt="", negative="", num=2, seed=5,
        settings=values,
    )  # fmt: skip
    return made.filled(mask=mask, **given | changes)


def read(path):
    with PIL.Image.open(path) as picture:
        return np.asarray(picture)[..., None]


def corner():
    mask = np.zeros((8, 8), bool)
    mask[0, 0] = True
    return mask


def test_sliders_begin_with_the_model_s_own_settings(made):
    found = {name: of.start for name, of in made.ranges().items()}
    settings = made.model.settings
    assert found == {name: getattr(settings, name) for name in found} and len(found) == 4
    assert all(of.low <= of.start <= of.high for of in made.ranges().values())
    many = page.Page(made.model.with_settings(num_steps=100, mask_temperature=25.0), made.folder)
    assert many.ranges()["num_steps"].high == 100 and many.ranges()["mask_temperature"].high == 50
    # A model's own value is taken as it is, however fine.
    fine = page.Page(made.model.with_settings(guidance_scale=1.2345), made.folder)
    assert asked(fine).model.settings == fine.model.settings


def test_classes_have_names_that_differ(made):
    assert made.classes() == [*((name, i) for i, name in enumerate(tiny.CLASSES)), ("no class", 3)]
    assert made.words() == ""


def test_pictures_are_those_of_the_generator(made):
    images = asked(made, settings={"num_steps": 2})
    *_, paths = made.draw(images)
    expected = made.model.with_settings(num_steps=2).sample([0, 0, 2, 2], 5, batch_size=4)
    np.testing.assert_array_equal([read(path) for path in paths], expected)
    with PIL.Image.open(paths[3]) as picture:
        inside = json.loads(picture.text["parameters"])
    assert (inside["seed"], inside["index"], inside["sampler"]["num_steps"]) == (5, 3, 2)
    assert inside["class_name"] == tiny.CLASSES[2]
    with zipfile.ZipFile(page.zipped(paths)) as archive:
        assert archive.namelist() == [path.name for path in paths]
        assert archive.read(paths[0].name) == paths[0].read_bytes()
    animation, strip = made.reveal(images)
    with PIL.Image.open(animation) as moving, PIL.Image.open(strip) as still:
        assert moving.n_frames == 4 and still.height > 128


def test_batches_are_few_sizes_and_come_one_by_one(made, monkeypatch):
    sizes = []

    def draw(images, batch, size):
        sizes.append((len(batch), size))
        return np.zeros((len(batch), 8, 8, 1), np.uint8)

    monkeypatch.setattr(page.image_directory, "draw_batch", draw)
    for num, expected in ((1, [(1, 1)]), (3, [(3, 4)]), (5, [(5, 8)]), (17, [(16, 16), (1, 16)])):
        sizes.clear()
        found = [len(paths) for paths in made.draw(asked(made, labels=[0], num=num))]
        assert sizes == expected and found == list(np.cumsum([n for n, _ in expected]))
    for _ in range(page.KEPT):
        assert len(list(made.draw(asked(made, labels=[0], num=1)))) == 1
    assert len(list(made.folder.iterdir())) == page.KEPT


def test_filling_is_editing(made):
    images = filled(made, corner(), grow=0, blend=0.5)
    *_, paths = made.draw(images)
    pixels = images.originals.images.repeat(2, axis=0)
    masks = np.stack([corner()] * 2)
    expected = made.model.edit(pixels, masks, [1, 1], 5, batch_size=2, grow=0, blend=0.5)
    np.testing.assert_array_equal([read(path) for path in paths], expected)
    with PIL.Image.open(paths[0]) as picture:
        inside = json.loads(picture.text["parameters"])
    assert (inside["image"], inside["grow"], inside["blend"]) == ("a.png", 0, 0.5)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(labels=[]), "Choose a class first"),
        (dict(num=33), "66 pictures are more than the 64 that the page draws at once"),
        (dict(num=1e300), "Pictures of each must be a whole number from 1 to 64"),
        (dict(num=None), "Pictures of each must be a whole number from 1 to 64"),
        (dict(seed=-1), "The seed must be a whole number from 0 to 4,294,967,295"),
        (dict(seed=0.5), "The seed must be a whole number"),
        (dict(seed=float("nan")), "The seed must be a whole number"),
        (dict(seed="7"), "The seed must be a whole number"),
        (dict(settings={"num_steps": 65}), "Steps must be a whole number from 1 to 64"),
        (dict(settings={"guidance_scale": float("inf")}), "Guidance must be a number from 0 to 10"),
    ],
)
def test_what_is_refused(made, changes, words):
    with pytest.raises(ValueError) as caught:
        asked(made, **changes)
    assert str(caught.value).startswith(words)
    assert not list(made.folder.iterdir())


def test_what_cannot_be_filled(made):
    for words, mask, changes in (
        ("Upload a picture first", corner(), dict(picture=None)),
        ("Paint over what is to change first", ~corner() & corner(), {}),
        ("Nothing of the picture would be kept: paint over less or choose", ~corner(), {}),
        ("Nothing of the picture would be kept: paint over less$", corner() | True, dict(grow=0)),
        ("Fade over tokens must be a number from 0 to 8", corner(), dict(blend=9)),
        ("Grow the mask by tokens must be a whole number", corner(), dict(grow=0.5)),
    ):
        with pytest.raises(ValueError, match=words):
            filled(made, mask, **changes)


def test_prompts(tmp_path):
    made = page.Page(tiny.make_word_generator(), tmp_path)
    assert made.words().startswith("It knows the words a, two, red")
    images = asked(made, labels=[], prompts=" a cat \n\ntwo cats", num=1, negative=" red")
    assert images.labels == [0, 0] and images.texts.negative == "red"
    assert list(images.texts.prompts) == ["a cat", "two cats"]
    with pytest.raises(ValueError, match="Write a prompt first"):
        asked(made, labels=[], prompts=" \n")
    with pytest.raises(ValueError, match="the word 'zebra' of the text"):
        asked(made, labels=[], prompts="a zebra")


def test_uploads_become_the_model_s_size(made, tmp_path):
    rng = np.random.default_rng(0)
    for shape in ((8, 8, 1), (20, 12, 3)):
        pixels = rng.integers(0, 256, shape).astype(np.uint8)
        png.write_png(tmp_path / "upload" / "a.png", pixels)
        found = made.read(tmp_path / "upload" / "a.png")
        assert found.name == "a.png" and found.pixels.shape == (8, 8, 1)
        if shape == (8, 8, 1):
            np.testing.assert_array_equal(found.pixels, pixels)
    bad = tmp_path / "upload" / "bad.png"
    for content, words in ((b"no picture", "is not a JPEG"), (b"", "is empty")):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=f"bad.png: {words}"):
            made.read(bad)
    with bad.open("wb") as file:
        file.truncate(64 * 2**20 + 1)  # a hole, no bytes on the disk
    with pytest.raises(ValueError, match="bad.png has more than the 64 MiB"):
        made.read(bad)


def test_strokes_become_a_mask_of_pixels():
    layer = np.zeros((448, 448, 4), np.uint8)
    layer[..., :3] = 255  # colour alone is no paint
    assert not page.painted([layer], (32, 32)).any()
    layer[14, 447, 3] = 1  # a single point hides its pixel
    found = page.painted([layer], (32, 32))
    assert np.argwhere(found).tolist() == [[1, 31]]
    other = np.zeros((5, 5, 4), np.uint8)  # smaller than the picture
    other[2:, :, 3] = 255
    assert page.painted([layer, other], (32, 32))[13:].all()
    assert not page.painted([], (32, 32)).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_small_pictures_are_enlarged_by_whole_pixels(channels):
    pixels = np.arange(8 * 10 * channels, dtype=np.uint8).reshape(8, 10, channels)
    found = page.enlarged(pixels)
    assert found.shape == (448, 560, 3)
    np.testing.assert_array_equal(found[::56, ::56], np.broadcast_to(pixels, (8, 10, 3)))
