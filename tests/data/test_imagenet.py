"""The classes of ImageNet-2012, and what is found in its tar files."""

import io
import tarfile

import fake_imagenet
import numpy as np
import pytest
from fake_imagenet import pictures_tar, tar

from enat_jax.data import imagenet

VALIDATION_IDS = ["n15075141", "n01440764", "n01443537"]


# ---- Classes -------------------------------------------------------------------------------------


def test_there_are_1000_classes_in_the_order_of_their_labels():
    assert len(imagenet.IDS) == len(imagenet.NAMES) == 1000
    assert list(imagenet.IDS) == sorted(set(imagenet.IDS))
    assert imagenet.IDS[281] == "n02123045" and imagenet.NAMES[281] == "tabby, tabby cat"
    assert (imagenet.NAMES[0], imagenet.NAMES[999]) == (
        "tench, Tinca tinca",
        "toilet tissue, toilet paper, bathroom tissue",
    )


def test_labels_are_those_of_tfds():
    import tensorflow_datasets as tfds

    path = tfds.core.tfds_path("datasets/imagenet2012/labels.txt")
    assert path.read_text().split() == list(imagenet.IDS)


def test_no_two_classes_share_a_name():
    assert len(set(imagenet.NAMES)) == 1000
    cranes = imagenet.readable_names(["n02012849", "n03126707"])
    assert cranes == ("crane (bird)", "crane (machine)")


def test_only_ids_become_readable():
    assert imagenet.readable_names(["n01440764"]) == ("tench, Tinca tinca",)
    assert imagenet.readable_names(["n01440764", "dog"]) == ("n01440764", "dog")
    assert imagenet.readable_names([]) == ()


# ---- Tar files -----------------------------------------------------------------------------------


def scan(tmp_path, content, split="train"):
    path = tmp_path / imagenet.TAR_FILES[split]
    path.write_bytes(content)
    return imagenet.scan(path, split, VALIDATION_IDS)


def read(path, pictures):
    """What lies where the pictures are said to lie, by name."""
    content = path.read_bytes()
    return {
        name.decode(): content[offset : offset + size]
        for name, offset, size in zip(pictures.names, pictures.offsets, pictures.sizes, strict=True)
    }


def test_training_pictures_are_found_in_the_tar_files_of_their_classes(tmp_path):
    tars = fake_imagenet.write_tars(tmp_path / "tars")
    path = tars / "ILSVRC2012_img_train.tar"
    pictures = imagenet.scan(path, "train", VALIDATION_IDS)
    names = [name for names in fake_imagenet.TRAIN.values() for name in names]
    assert read(path, pictures) == {name: fake_imagenet.picture(name) for name in names}
    labels = dict(zip(pictures.names.tolist(), pictures.labels.tolist(), strict=True))
    assert labels[b"n01440764_0.JPEG"] == 0
    assert labels[b"n15075141_7.JPEG"] == 999


def test_validation_labels_go_by_the_number_in_the_name_not_by_position(tmp_path):
    names = ["ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000001.JPEG"]
    pictures = scan(tmp_path, pictures_tar(names), "validation")
    assert pictures.names.tolist() == [name.encode() for name in names]
    assert pictures.labels.tolist() == [1, 999]


@pytest.mark.parametrize("folder", ["", "./", "test/"])
def test_test_pictures_have_no_labels(tmp_path, folder):
    content = tar([(f"{folder}ILSVRC2012_test_00000001.JPEG", b"jpeg")])
    pictures = scan(tmp_path, content, "test")
    assert pictures.labels.tolist() == [imagenet.UNKNOWN]
    assert pictures.sizes.tolist() == [4]
    np.testing.assert_array_equal(pictures.offsets, [512])


def a_class(*names, wordnet_id="n01440764"):
    return tar([(f"{wordnet_id}.tar", pictures_tar(names))])


def two_classes():
    names = [f"n01440764_{i}.JPEG" for i in range(9)]
    return tar([("n01440764.tar", pictures_tar(names)), ("n01443537.tar", pictures_tar([]))])


def without_its_end():
    """A tar file that stops exactly where the next header would begin."""
    content = pictures_tar(["ILSVRC2012_val_00000001.JPEG"])
    used = len(content.rstrip(b"\0"))
    return content[: used + -used % 512]


def a_link():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    return file.getvalue()


def damaged():
    content = bytearray(pictures_tar(["ILSVRC2012_val_00000001.JPEG"] * 3))
    second = content.index(b"ILSVRC", 512)
    content[second : second + 512] = b"\xff" * 512
    return bytes(content)


WRONG = {
    "no tar file": ("train", lambda: b"hello " * 1000, "no uncompressed tar file"),
    "empty": ("train", lambda: b"", "no uncompressed tar file"),
    "nothing in it": ("train", lambda: tar([]), "holds no pictures"),
    "cut within a class": ("train", lambda: two_classes()[:4000], "cut short or damaged"),
    "cut in the middle": ("train", lambda: two_classes()[:9000], "cut short or damaged"),
    "cut before a header": ("validation", without_its_end, "cut short or damaged at byte"),
    "damaged header": ("validation", damaged, "cut short or damaged at byte"),
    "unknown class": (
        "train",
        lambda: a_class("n00000001_1.JPEG", wordnet_id="n00000001"),
        "n00000001.tar in .*train.tar is none of the 1000 classes",
    ),
    "picture beside the classes": (
        "train",
        lambda: tar([("n01440764_1.JPEG", b"jpeg")]),
        "n01440764_1.JPEG in .* is in none of the classes",
    ),
    "picture of another class": (
        "train",
        lambda: a_class("n01443537_1.JPEG"),
        "n01443537_1.JPEG in n01440764.tar in .* is no picture of this class",
    ),
    "class that is no tar file": (
        "train",
        lambda: tar([("n01440764.tar", b"jpeg" * 512)]),
        "n01440764.tar in .* is no uncompressed tar file",
    ),
    "same name twice": (
        "train",
        lambda: a_class("n01440764_1.JPEG", "n01440764_2.JPEG", "n01440764_1.JPEG"),
        "holds n01440764_1.JPEG more than once",
    ),
    "something else": (
        "validation",
        lambda: tar([("README.txt", b"")]),
        "README.txt in .* is no validation picture",
    ),
    "training file as validation": (
        "validation",
        two_classes,
        "n01440764.tar in .*val.tar is no validation picture",
    ),
    "number without a label": (
        "validation",
        lambda: pictures_tar(["ILSVRC2012_val_00000004.JPEG"]),
        "ILSVRC2012_val_00000004.JPEG in .* is in none of the classes: .* from 1 to 3",
    ),
    "number 0": (
        "validation",
        lambda: pictures_tar(["ILSVRC2012_val_00000000.JPEG"]),
        "from 1 to 3",
    ),
    "link": ("validation", a_link, "is no regular file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_belong_there_is_refused(tmp_path, name):
    split, content, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        scan(tmp_path, content(), split)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        imagenet.scan(tmp_path / "nowhere.tar", "train", VALIDATION_IDS)
