"""Sources as programs see them: opened by name, alike wherever their pictures lie."""

import io
import json
import pathlib
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from enat_jax.data import decoding, images

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def png(colour, size=(20, 12)):
    file = io.BytesIO()
    Image.new("RGB", size, tuple(colour)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Nine pictures: {red,green,blue}/{0,1,2}.png, and two other files."""
    root = tmp_path / "colours"
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(3):
            (root / name / f"{i}.png").write_bytes(png([c // (i + 1) for c in colour]))
    (root / "README").write_text("Colours.")
    (root / "red" / "notes.txt").write_text("Red.")
    return root


def pack(folder, kind):
    path = folder.parent / f"packed.{kind}"
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(folder))
    else:
        with tarfile.open(path, "w") as archive:
            for file in files:
                archive.add(file, file.relative_to(folder))
    return path


@pytest.fixture(params=["folder", "zip", "tar"])
def path(request, folder):
    return str(folder if request.param == "folder" else pack(folder, request.param))


def test_pictures_are_the_same_from_a_folder_and_from_archives(path):
    source = images.open_source(path, "train", size=8)
    assert (len(source), source.class_names) == (9, ("blue", "green", "red"))
    assert source.image_shape == (8, 8, 3) and source.mirrored
    assert source.ignored == {"": 1, ".txt": 1}
    assert [source.key(i) for i in (0, 8)] == ["blue/0.png", "red/2.png"]
    example = source.load(7)
    assert (example.label, example.key) == (2, "red/1.png")
    assert (example.image == (127, 0, 0)).all() and example.image.shape == (8, 8, 3)
    batch = source.gather(np.array([8, 0]))
    assert batch["images"].dtype == np.uint8 and batch["labels"].dtype == np.int32
    assert batch["images"][:, 0, 0].tolist() == [[85, 0, 0], [0, 0, 255]]
    assert batch["labels"].tolist() == [2, 0]


def test_the_augmentation_is_that_of_the_seed(folder):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8))
    noise.save(folder / "red" / "0.png")
    source = images.open_source(str(folder), "train", size=8, crop_area=(0.5, 0.6))
    data = (folder / "red" / "0.png").read_bytes()
    framing = decoding.Framing(8, crop_area=(0.5, 0.6))
    np.testing.assert_array_equal(source.load(6, 5).image, framing.pixels(data, 5))
    batch = source.gather([0, 6, 6], [1, 5, 6])["images"]
    np.testing.assert_array_equal(batch[1], framing.pixels(data, 5))
    assert (batch[1] != batch[2]).any()


def test_a_source_can_be_sent_to_a_worker(path):
    source = images.open_source(path, "train", size=8)
    again = pickle.loads(pickle.dumps(source))
    assert again.identity() == source.identity()
    np.testing.assert_array_equal(
        again.gather(range(9))["images"], source.gather(range(9))["images"]
    )


def test_the_identity_is_that_of_the_pictures_not_of_their_place(folder):
    here = images.open_source(str(folder), "all", size=8).identity()
    assert json.loads(json.dumps(here)) == here
    assert str(folder.parent) not in json.dumps(here)
    listing = here.pop("listing")
    assert here == {
        **{"source": "files", "split": "all", "classes": "first", "held_out": 0.0},
        **{"size": 8, "channels": 3, "crop_area": [0.8, 1.0], "crop_ratio": [0.75, 1.3333]},
        **{"flip": True, "num_images": 9, "plain_crop": decoding.PLAIN_CROP},
    }
    for kind in ("zip", "tar"):
        packed = images.open_source(str(pack(folder, kind)), "all", size=8)
        assert packed.identity() == here | {"listing": listing}
    moved = folder.rename(folder.with_name("moved"))
    assert images.open_source(str(moved), "all", size=8).identity()["listing"] == listing


@pytest.mark.parametrize("change", ["file added", "file renamed", "size", "label"])
def test_another_listing_is_another_source(folder, change):
    def listing():
        return images.open_source(str(folder), "all", size=8).identity()["listing"]

    before = listing()
    first = folder / "blue" / "0.png"
    match change:
        case "file added":
            shutil.copy(first, folder / "blue" / "x.png")
        case "file renamed":
            first.rename(folder / "blue" / "x.png")
        case "size":
            first.write_bytes(first.read_bytes() + b"\n")
        case "label":
            shutil.copytree(folder / "blue", folder / "a")
    assert listing() != before


def test_rules_of_earlier_versions_stay_what_they_were(folder):
    """Where rules changed, the identity says so; by the settings of before it is that of before."""

    def identity(**settings):
        return images.open_source(str(folder), "all", size=8, **settings).identity()

    for before, name in zip(COLOURS, ("1", "2", "10"), strict=True):
        (folder / before).rename(folder / name)
    now, before = identity(), identity(class_order="text")
    assert now["class_order"] == "numeric" and now["listing"] != before["listing"]
    assert "class_order" not in before
    location = {"source": str(folder), "split": "all", "size": 8}
    assert images.open_again(location, before).class_names == ("1", "10", "2")
    assert images.open_again(location, now).class_names == ("1", "2", "10")
    for before, name in zip(("1", "2"), ("train", "Dev"), strict=True):
        (folder / before).rename(folder / name)
    shutil.rmtree(folder / "10")
    now, before = identity(), identity(splits="none")
    assert now["splits"] == ["Dev", "train"] and "splits" not in before
    assert images.open_again(location, before).class_names == ("Dev", "train")
    with pytest.raises(ValueError, match="has changed since"):
        images.open_again(location, before | {"size": 9})


def test_a_picture_that_is_not_to_be_mirrored(folder):
    assert not images.open_source(str(folder), "train", size=8, flip=False).mirrored


def test_a_share_is_held_out(folder):
    train, test = (
        images.open_source(str(folder), split, size=8, held_out=0.5) for split in ("train", "test")
    )
    keys = [s.key(i) for s in (train, test) for i in range(len(s))]
    assert len(set(keys)) == len(keys) == 9 and len(test) > 0
    assert train.class_names == test.class_names
    assert train.identity()["listing"] != test.identity()["listing"]


def test_what_is_not_used_is_said_in_one_line(folder):
    source = images.open_source(str(folder), "train", size=8)
    line = "files that are not used: without extension (1), .txt (1)"
    assert images.describe_unused(source.ignored) == line
    source = images.open_source(str(folder), "train", size=8, held_out=0.5)
    others = images.open_source(str(folder), "test", size=8, held_out=0.5)
    assert images.describe_unused(source.ignored).endswith(f"other splits ({len(others)})")
    assert images.describe_unused({}) == ""


def test_grey_pictures_and_names_of_ones_own(folder, tmp_path):
    names = tmp_path / "names"
    names.write_text("red\trot\ngreen\tgrün\nblue\tblau\n", encoding="utf-8")
    source = images.open_source(
        str(folder), "train", size=8, channels=1, class_names=str(names), classes="parent"
    )
    assert source.class_names == ("blau", "grün", "rot")
    assert source.image_shape == source.load(0).image.shape == (8, 8, 1)


BAD = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "text": (b"Colours.", "is not a JPEG, PNG, WebP, GIF"),
    "truncated": (png((9, 9, 9), (300, 300))[:90], "is truncated|is damaged"),
    "elongated": (png((9, 9, 9), (1, 2_000_000)), "is too elongated"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_bad_picture_is_named(folder, bad, kind):
    data, words = BAD[bad]
    (folder / "green" / "1.png").write_bytes(data)
    place = folder if kind == "folder" else pack(folder, kind)
    source = images.open_source(str(place), "train", size=8)
    assert source.load(3).key == "green/0.png"
    for seed in (None, 3):
        with pytest.raises(images.UnreadableImage, match=f"^green/1.png: ({words})") as caught:
            source.load(4, seed)
        assert caught.value.key == "green/1.png"
    with pytest.raises(images.UnreadableImage, match="green/1.png: .*remove this picture"):
        source.gather(range(9))


def test_a_picture_that_has_vanished_is_named(folder):
    source = images.open_source(str(folder), "train", size=8)
    (folder / "blue" / "0.png").unlink()
    with pytest.raises(images.UnreadableImage, match="blue/0.png: .*No such file"):
        source.load(0)


@pytest.mark.parametrize("index", [-1, 9])
def test_there_is_no_such_picture(folder, index):
    source = images.open_source(str(folder), "train", size=8)
    for method in (source.key, source.load, lambda i: source.gather([0, i])):
        with pytest.raises(IndexError, match=rf"{index} is not in \[0, 9\)"):
            method(index)


def test_digits_are_opened_by_name():
    source = images.open_source("digits", "test", size=16)
    assert source == images.Digits("test", size=16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"source": "flowers"},
            "'flowers' does not exist: a source is 'digits', 'scenes', 'tfds:NAME'",
        ),
        ({"source": __file__}, "is none of these: a source is 'digits'"),
        ({"source": "digits", "split": "valid"}, "valid"),
        ({"source": "digits", "size": 4}, "size=4"),
        ({"source": "digits", "rotate": 1}, r"no settings \['rotate'\]: it has \['fill'"),
        ({"source": ".", "size": 8, "rotation": 1}, r"no settings \['rotation'\]: .*'held_out'"),
        (
            {"source": "tfds:x", "size": 8, "held_out": 1},
            r"no settings \['held_out'\]: .*'data_dir'",
        ),
        ({"source": "."}, "needs a setting size"),
        ({"source": ".", "size": -1}, "size=-1"),
    ],
)
def test_an_unknown_source_or_setting_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        images.open_source(**{"split": "train", **arguments})


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=f"{tmp_path} holds no pictures"):
        images.open_source(str(tmp_path), "train", size=8)


def shared(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip("the archive is not here")
    return str(path)


def test_a_real_set_of_small_pictures():
    source = images.open_source(shared("cifar10_train.zip"), "train", size=32)
    assert len(source) == 50_000 and len(source.class_names) == 10
    assert source.class_names[:3] == ("airplane", "automobile", "bird")
    assert np.bincount(source.labels).tolist() == [5000] * 10
    batch = source.gather(np.arange(0, 50_000, 1000), np.arange(50))
    assert batch["labels"].tolist() == np.repeat(np.arange(10), 5).tolist()
    assert batch["images"].std() > 40


def test_a_real_set_of_large_pictures():
    source = images.open_source(shared("imagenet_sample_900.zip"), "all", size=256)
    assert (len(source), len(set(source.class_names))) == (900, 900)
    assert source.class_names[0] == "tench, Tinca tinca"
    example = source.load(0)
    assert example.key == "n01440764/n01440764_tench.JPEG"
    assert example.image.shape == (256, 256, 3) and example.image.std() > 20
