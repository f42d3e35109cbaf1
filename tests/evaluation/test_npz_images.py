"""Images in .npz files as ADM's programs write them, and what is refused."""

import re

import numpy as np
import pytest

from enat_jax.evaluation import npz_images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (10, 4, 6, 3), np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])


def write(tmp_path, *arrays, save=np.savez, **named):
    save(tmp_path / "a.npz", *arrays, **named)
    return str(tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_in_any_parts(tmp_path, save):
    found = npz_images.NpzImages(write(tmp_path, PIXELS, LABELS, save=save))
    assert (len(found), found.image_shape, found.num_classes) == (10, (4, 6, 3), 3)
    np.testing.assert_array_equal(found.labels, LABELS)
    for start, stop in [(0, 4), (4, 8), (8, 10), (4, 8), (8, 9), (9, 10), (0, 10)]:
        np.testing.assert_array_equal(found.read(start, stop), PIXELS[start:stop])
    other = npz_images.NpzImages(write(tmp_path, PIXELS[::-1], LABELS)).identity()
    assert other != found.identity()


def test_labels_may_be_left_out(tmp_path):
    grey = npz_images.NpzImages(write(tmp_path, PIXELS[..., :1]))
    assert (grey.image_shape, grey.num_classes) == ((4, 6, 1), 1)
    assert grey.labels.tolist() == [0] * 10


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((PIXELS / 255,), "arr_0 is float64 [10, 4, 6, 3]: ADM's samples are arr_0, uint8"),
        ((PIXELS.transpose(0, 3, 1, 2),), "arr_0 is uint8 [10, 3, 4, 6]"),
        ((PIXELS[0],), "arr_0 is uint8 [4, 6, 3]"),
        ((PIXELS[:0],), "arr_0 is uint8 [0, 4, 6, 3]"),
        ((PIXELS, LABELS[:9]), "arr_1, int64 [9], are no labels of 10 images"),
        ((PIXELS, LABELS - 1), "arr_1, int64 [10], are no labels"),
        ((PIXELS, LABELS / 2), "arr_1, float64 [10], are no labels"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=re.escape(f"a.npz: {message}")):
        npz_images.NpzImages(write(tmp_path, *arrays))


def test_files_of_other_things_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a.npz holds mu, sigma and no images"):
        npz_images.NpzImages(write(tmp_path, mu=np.zeros(2), sigma=np.eye(2)))
    with pytest.raises(FileNotFoundError, match=r"there is no .*b\.npz"):
        npz_images.NpzImages(str(tmp_path / "b.npz"))


def test_damage_is_found_at_the_start(tmp_path):
    path = write(tmp_path, PIXELS, LABELS)
    with open(path, "r+b") as file:
        file.seek(500)
        byte = file.read(1)
        file.seek(500)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match="a.npz is damaged"):
        npz_images.NpzImages(path)
