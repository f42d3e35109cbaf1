"""COCO's names: which pictures two of its splits share."""

import fake_coco
import pytest

from enat_jax.data import coco


def test_a_picture_has_one_number_in_both_layouts():
    for key in (
        *("000000000042.jpg", "val2014/COCO_val2014_000000000042.jpg", "000000000042"),
        *("a/b/train2017/000000000042.png", "coco_train2014_000000000042.JPG"),
    ):
        assert coco.image_id(key) == 42
    for key in ("42.jpg", "0000000000042.jpg", "COCO_42.jpg", "train[42]", "x000000000042.jpg", ""):
        assert coco.image_id(key) is None


def test_pictures_of_two_sets():
    training = [fake_coco.file_name(n, 2017) for n in (1, 2, 3, 900)] + ["cat/1.jpg"]
    val2014 = [f"val2014/{fake_coco.file_name(n, 2014, 'val')}" for n in (3, 2, 7)] + ["cat/1.jpg"]
    assert coco.shared(training, val2014) == [2, 3]
    assert coco.shared(training, ["cat/1.jpg"]) == []  # of two archives it may be two pictures
    with pytest.raises(ValueError, match="2 pictures of B are in A as well, such as COCO's 2, 3"):
        coco.refuse_shared(training, val2014, ("A", "B"))
    coco.refuse_shared(training[:1], val2014, ("A", "B"))
