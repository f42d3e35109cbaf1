"""Classes and splits from folders: every rule by a listing written out."""

import collections
import hashlib

import numpy as np
import pytest

from enat_jax.data import layout

FLOWERS = ("daisy/1.jpg", "daisy/2.jpg", "rose/red/3.jpg", "rose/white/4.jpg")


def arrange(*keys, split="all", folders=(), packed=False, **settings):
    found = frozenset(folders)
    return layout.arrange(sorted(keys), found, split, where="SOURCE", packed=packed, **settings)


def test_the_first_folder_is_the_class():
    found = arrange(*FLOWERS)
    assert found.class_names == ("daisy", "rose")
    assert found.labels.tolist() == [0, 0, 1, 1] and found.labels.dtype == np.int32
    assert found.rows.tolist() == [0, 1, 2, 3]


def test_the_folder_that_holds_a_picture_is_the_class():
    found = arrange(*FLOWERS, classes="parent")
    assert found.class_names == ("daisy", "rose/red", "rose/white")
    assert found.labels.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("keys", "classes"),
    [(FLOWERS, "none"), (("1.jpg", "2.jpg"), "first"), (("1.jpg", "2.jpg"), "parent")],
)
def test_without_classes_all_are_images(keys, classes):
    found = arrange(*keys, classes=classes)
    assert found.class_names == ("image",) and set(found.labels) == {0}
    assert len(found.rows) == len(keys)


def test_classes_are_sorted_by_code_points():
    found = arrange("b/1.jpg", "B/1.jpg", "é/1.jpg", "10/1.jpg", "9/1.jpg", "a-b/1.jpg", "a/1.jpg")
    assert found.class_names == ("10", "9", "B", "a", "a-b", "b", "é")
    names = [found.class_names[label] for label in found.labels]
    assert names == ["10", "9", "B", "a-b", "a", "b", "é"]  # the keys' order: "a-b/" before "a/"


def test_imagenet_folders_get_readable_names():
    found = arrange("n01440764/1.JPEG", "n01443537/2.JPEG")
    assert found.class_names == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    assert arrange("n01440764/1.JPEG", "mine/2.JPEG").class_names == ("mine", "n01440764")


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["pets/cat/1.jpg", "pets/dog/2.jpg"], ("cat", "dog")),
        (["a/pets/cat/1.jpg", "a/pets/dog/2.jpg"], ("cat", "dog")),
        (["cat/1.jpg", "cat/2.jpg"], ("cat",)),
        (["cat/1.jpg", "dog/deep/2.jpg"], ("cat", "dog")),
        (["pets/1.jpg", "pets/dog/2.jpg"], ("pets",)),
        (["train/cat/1.jpg", "train/dog/2.jpg"], ("cat", "dog")),
        (["pets/train/cat/1.jpg", "pets/test/cat/2.jpg"], ("cat",)),
    ],
)
def test_an_archive_packed_from_outside(keys, names):
    assert arrange(*keys, packed=True).class_names == names


def test_a_folder_is_taken_as_it_is():
    assert arrange("pets/cat/1.jpg", "pets/dog/2.jpg").class_names == ("pets",)


BOTH = ("train/cat/1.jpg", "train/dog/2.jpg", "test/cat/3.jpg", "test/dog/4.jpg")


def keys_of(keys, split, **settings):
    return [sorted(keys)[row] for row in arrange(*keys, split=split, **settings).rows]


@pytest.mark.parametrize(
    ("test_folders", "split", "chosen"),
    [
        (["test"], "test", "test"),
        (["val"], "test", "val"),
        (["validation"], "test", "validation"),
        (["val"], "val", "val"),
        (["val", "test"], "test", "test"),
        (["val", "test"], "val", "val"),
        (["val"], "train", "train"),
    ],
)
def test_split_folders(test_folders, split, chosen):
    keys = [f"{part}/{c}/1.jpg" for part in ["train", *test_folders] for c in ("cat", "dog")]
    assert keys_of(keys, split) == [f"{chosen}/cat/1.jpg", f"{chosen}/dog/1.jpg"]
    found = arrange(*keys, split=split)
    assert found.class_names == ("cat", "dog") and found.labels.tolist() == [0, 1]


def test_all_are_those_of_every_split_folder():
    assert keys_of(BOTH, "all") == sorted(BOTH)
    assert arrange(*BOTH, split="all").labels.tolist() == [0, 1, 0, 1]


def test_split_folders_of_pictures_without_classes():
    assert arrange("train/1.jpg", "test/2.jpg", split="test").class_names == ("image",)
    assert keys_of(["train/cat/1.jpg", "val/dog/2.jpg"], "test", classes="none") == [
        "val/dog/2.jpg"
    ]


SPLIT_NAMES = [
    ("train", "Valid"),
    ("training", "testing"),
    ("TRAIN", "TEST"),
    ("Training_Set", "test set"),
    ("train", "dev"),
    ("train", "eval"),
    ("training", "Evaluation"),
    ("train", "held-out"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("train", "test"), SPLIT_NAMES)
def test_split_folders_have_the_usual_names_in_any_capitals(train, test, packed):
    keys = [f"{part}/{c}/1.jpg" for part in (train, test) for c in ("cat", "dog")]
    for split, part in {"train": train, train: train, "test": test, test: test}.items():
        assert keys_of(keys, split, packed=packed) == [f"{part}/cat/1.jpg", f"{part}/dog/1.jpg"]
    found = arrange(*keys, packed=packed)
    assert found.class_names == ("cat", "dog") and found.new == {"splits": sorted([train, test])}
    # As earlier versions took them.
    found = arrange(*keys, packed=packed, splits="none")
    assert found.class_names == tuple(sorted([train, test])) and found.new == {}


def test_a_split_goes_by_every_name_of_its_own():
    keys = ["Train/cat/1.jpg", "valid/cat/2.jpg", "dev/cat/3.jpg"]
    assert keys_of(keys, "validation") == keys_of(keys, "test") == ["valid/cat/2.jpg"]
    assert keys_of(keys, "development") == ["dev/cat/3.jpg"]


def test_names_of_before_are_recorded_as_before():
    assert arrange(*BOTH).new == {}
    assert arrange("pets/train/1.jpg", "pets/val/2.jpg", packed=True).new == {}
    assert arrange(*BOTH, splits="none").new == {"splits": []}
    assert arrange(*BOTH, splits="none").class_names == ("test", "train")
    alone = ["Train/cat/1.jpg", "Train/dog/2.jpg"]
    assert arrange(*alone, packed=True).class_names == ("cat", "dog")
    assert arrange(*alone).class_names == ("cat", "dog")


def test_folders_without_pictures_beside_split_folders_do_not_count():
    found = arrange(*BOTH, folders=["annotations/cat"])
    assert found.class_names == ("cat", "dog")


def test_a_class_of_trains_is_no_split():
    assert arrange("train/1.jpg", "car/2.jpg").class_names == ("car", "train")
    keys = ["train/cat/1.jpg", "train/dog/2.jpg"]
    with pytest.raises(ValueError, match="holds 'train', .* beside them the folder 'unlabeled'"):
        arrange(*keys, "unlabeled/3.jpg")


MIXTURES = [
    (["train/cat/1.jpg", "valid/cat/2.jpg", "cat/3.jpg"], "'train', 'valid'.*folder 'cat'"),
    (["train/1.jpg", "test/2.jpg", "car/3.jpg"], "'test', 'train'.*the folder 'car'"),
    (["cat/1.jpg", "dog/2.jpg", "Test/3.jpg"], "holds 'Test'.*the folder 'cat'"),
    (["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/2.jpg", "x/y/1.jpg"], "the folder 'x'"),
    (["train/cat/1.jpg", "val/cat/2.jpg", "valid/cat/2.jpg"], "'val' and 'valid'"),
    (["Train/cat/1.jpg", "train/cat/2.jpg", "test/cat/3.jpg"], "'Train' and 'train'"),
    (["pets/train/cat/1.jpg", "pets/valid/cat/2.jpg"], "'pets' holds 'train', 'valid'"),
    (["cat/train/1.jpg", "cat/test/2.jpg", "dog/test/3.jpg"], "'cat' holds 'test', 'train'"),
]


@pytest.mark.parametrize(("keys", "words"), MIXTURES)
def test_a_doubt_about_splits_is_refused_and_the_setting_ends_it(keys, words):
    for classes in ("first", "none"):
        with pytest.raises(ValueError, match=f"SOURCE.*{words}.*set splits to 'none'"):
            arrange(*keys, classes=classes)
    found = arrange(*keys, splits="none")
    assert found.class_names == tuple(sorted({key.split("/")[0] for key in keys}))
    assert len(found.rows) == len(keys)


def test_pictures_beside_split_folders_are_refused():
    with pytest.raises(ValueError, match="'test', 'train', .* pictures in no folder"):
        arrange(*BOTH, "cover.jpg", classes="none")


MANY = [f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(1000)]


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_pictures_are_held_out_by_their_names(prefix):
    keys = [prefix + key for key in MANY]
    test = keys_of(keys, "test", held_out=0.2)
    train = keys_of(keys, "train", held_out=0.2)
    assert sorted(test + train) == sorted(keys) and 350 < len(test) < 450
    for key in keys[::100]:
        fraction = int(hashlib.sha256(key.encode()).hexdigest(), 16) / 2**256
        assert (key in test) == (fraction < 0.2)
    # More pictures, or a larger share, take none back.
    assert set(test) <= set(keys_of([*keys, f"{prefix}cat/new.jpg"], "test", held_out=0.2))
    assert set(test) <= set(keys_of(keys, "test", held_out=0.3))
    assert keys_of(keys, "all", held_out=0.2) == sorted(keys)
    assert keys_of(keys, "train") == sorted(keys)


def test_classes_are_those_of_all_splits():
    """A share that holds out pictures of some classes only must not renumber them."""
    keys = [f"{c}/{i}.jpg" for c in "abcdefghij" for i in (1, 2)]
    found = arrange(*keys, split="test", held_out=0.3)
    assert found.class_names == tuple("abcdefghij") and 0 < len(set(found.labels)) < 10
    assert [sorted(keys)[r][0] for r in found.rows] == [found.class_names[i] for i in found.labels]


def test_every_class_keeps_a_picture_to_train_on():
    keys = [f"{c}/{i}.jpg" for c in "abcdefghij" for i in range(3)] + ["single/1.jpg"]
    train = arrange(*keys, split="train", held_out=0.8)
    test = arrange(*keys, split="test", held_out=0.8)
    assert set(train.labels) == set(range(11)) and 10 not in test.labels
    kept = train.new["kept_to_train_on"]
    assert kept == test.new["kept_to_train_on"] > 0
    # It is the last one of its class, and nothing else is changed.
    values = {key: int(hashlib.sha256(key.encode()).hexdigest(), 16) / 2**256 for key in keys}
    trained = [sorted(keys)[row] for row in train.rows]
    below = [key for key in trained if values[key] < 0.8]
    assert len(below) == kept
    assert all(values[x] == max(values[k] for k in keys if k[:2] == x[:2]) for x in below)
    assert sorted(trained + [sorted(keys)[row] for row in test.rows]) == sorted(keys)


def test_numbers_are_classes_in_their_order():
    keys = [f"{n}/x.jpg" for n in (0, 1, 2, 10, 11, 100)]
    found = arrange(*keys)
    assert found.class_names == ("0", "1", "2", "10", "11", "100")
    assert [found.class_names[i] for i in found.labels] == [k[:-6] for k in sorted(keys)]
    assert found.new == {"class_order": "numeric"}
    found = arrange(*keys, class_order="text")
    assert found.class_names == ("0", "1", "10", "100", "11", "2") and found.new == {}
    assert arrange("-1/1.jpg", "0.5/2.jpg", "-10/3.jpg").class_names == ("-10", "-1", "0.5")
    assert arrange("7/1.jpg", "007/2.jpg", "10/1.jpg").class_names == ("007", "7", "10")
    # Where both orders are one, and where not all are numbers.
    assert arrange(*[f"{n}/x.jpg" for n in range(10)]).new == {}
    assert arrange("2/1.jpg", "10/1.jpg", "cat/1.jpg").class_names == ("10", "2", "cat")


def test_one_name_in_two_forms_is_refused():
    with pytest.raises(ValueError, match=r"'cafe\\u0301' and 'caf\\xe9' have one name"):
        arrange("cafe\u0301/1.jpg", "caf\xe9/2.jpg")


CAT, DOG = "cat/1.jpg", "dog/1.jpg"
REFUSED = [
    ({"keys": []}, "SOURCE holds no pictures"),
    ({"keys": [CAT, "2.jpg"]}, r"cat/1.jpg, and outside of them, such as 2.jpg"),
    ({"keys": ["train/cat/1.jpg", "test/2.jpg"]}, "outside of them, such as test/2.jpg"),
    ({"keys": [CAT], "folders": ["dog"]}, "no pictures in the folder 'dog'"),
    ({"keys": ["a/cat/1.jpg"], "folders": ["a/cat", "a/dog"], "packed": True}, "folder 'a/dog'"),
    (
        {"keys": [CAT], "folders": ["cat/red"], "classes": "parent"},
        "no pictures in the .*'cat/red'",
    ),
    ({"keys": BOTH, "folders": ["train/cow"]}, "no pictures in the folder 'train/cow'"),
    (
        {"keys": ["train/cat/1.jpg"], "folders": ["test"]},
        "'cat' has no picture in the folder 'test'",
    ),
    ({"keys": BOTH[:3]}, "'dog' has no picture in the folder 'test'"),
    ({"keys": BOTH, "split": "val"}, r"no split 'val': choose one of \['all', 'test', 'train'\]"),
    ({"keys": [CAT], "split": "validation"}, "no split 'validation': choose one of"),
    ({"keys": ["test/cat/1.jpg"], "split": "train"}, r"no split 'train': .*\['all', 'test'\]"),
    ({"keys": [CAT, DOG], "split": "test"}, "set held_out to the share"),
    (
        {"keys": BOTH, "split": "test", "held_out": 0.1},
        "'test' to test on, so held_out=0.1 must be 0",
    ),
    ({"keys": [CAT], "split": "test", "held_out": 1e-9}, "leaves none for 'test'"),
    ({"keys": [CAT], "held_out": 1.0}, "held_out=1.0"),
    ({"keys": [CAT], "held_out": -0.1}, "held_out=-0.1"),
    ({"keys": [CAT], "held_out": "some"}, "held_out='some'"),
    ({"keys": [CAT], "classes": "second"}, "classes='second'"),
    ({"keys": [CAT], "splits": "off"}, "splits='off'"),
    ({"keys": [CAT], "class_order": "natural"}, "class_order='natural'"),
    ({"keys": [CAT, DOG], "split": "test", "held_out": 0.5}, "add pictures or set classes to"),
    ({"keys": ["eval/1.jpg"], "split": "train"}, "or set splits to 'none' if that folder is no"),
]


@pytest.mark.parametrize(("case", "words"), REFUSED)
def test_what_makes_no_sense_is_refused(case, words):
    arguments = dict(case)
    with pytest.raises(ValueError, match=words):
        arrange(*arguments.pop("keys"), **arguments)


def test_empty_folders_that_are_no_class_are_none_of_our_business():
    assert arrange("cat/1.jpg", folders=["cat/notes"]).class_names == ("cat",)
    assert arrange("1.jpg", folders=["notes"]).class_names == ("image",)
    assert arrange("cat/1.jpg", folders=["dog"], classes="none").class_names == ("image",)


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_file_renames_classes(tmp_path, start):
    path = tmp_path / "names.tsv"
    path.write_text(f"{start}rose\tRose, rot\n\ndaisy\t Gänseblümchen \n", encoding="utf-8")
    found = arrange(*FLOWERS, class_names=str(path))
    assert found.class_names == ("Gänseblümchen", "Rose, rot")
    assert found.labels.tolist() == [0, 0, 1, 1]


def test_a_file_typed_today_renames_the_folders_of_a_mac(tmp_path):
    path = tmp_path / "names.tsv"
    path.write_text("caf\xe9\tCaf\xe9\nbar\tBar\n", encoding="utf-8")
    found = arrange("cafe\u0301/1.jpg", "bar/2.jpg", class_names=path)
    assert found.class_names == ("Bar", "Caf\xe9")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"rose\tRose\ntulip\tTulpe\n", "line 2: there is no class folder 'tulip'"),
        (b"rose\tRose\n", "no line for the class folder 'daisy'"),
        (b"rose\tRose\ndaisy\tD\nrose\tR\n", "line 3: .* twice"),
        (b"rose\tRose\ndaisy\tRose\n", "line 2: .* twice"),
        (b"rose,Rose\ndaisy,D\n", "line 1: 'rose,Rose' is not FOLDER<TAB>NAME"),
        (b"rose\t\n", "line 1: .* is not FOLDER<TAB>NAME"),
        (b"rose\tRos\xe9\n", "is not UTF-8"),
        ("rose\tRose\ndaisy\tD\n".encode("utf-16"), "is not UTF-8"),
        ("rose\tRose\ndaisy\tD\n".encode("utf-16-le"), "is not text in UTF-8"),
        (b"\n", "is empty"),
    ],
)
def test_a_file_of_names_that_does_not_fit_is_refused(tmp_path, content, words):
    path = tmp_path / "names.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"names.tsv.*{words}"):
        arrange(*FLOWERS, class_names=path)
    with pytest.raises(FileNotFoundError, match="other.tsv"):
        arrange(*FLOWERS, class_names=tmp_path / "other.tsv")


def test_the_rows_of_splits_part_the_pictures():
    rows = [arrange(*MANY, split=split, held_out=0.4).rows for split in ("train", "test")]
    assert collections.Counter(np.concatenate(rows).tolist()) == dict.fromkeys(range(2000), 1)
