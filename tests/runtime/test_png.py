"""Pictures as PNG files and in grids."""

import errno
import pathlib

import numpy as np
import PIL.Image
import pytest

from enat_jax.runtime import png


def test_grid_of_literal_pixels():
    images = np.arange(1, 4, dtype=np.uint8).reshape(3, 1, 1, 1) * np.ones((1, 2, 1, 1), np.uint8)
    picture = png.grid(images, columns=2, pad=1, background=9)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(
        picture[..., 0],
        [
            [9, 9, 9, 9, 9],
            [9, 1, 9, 2, 9],
            [9, 1, 9, 2, 9],
            [9, 9, 9, 9, 9],
            [9, 3, 9, 9, 9],
            [9, 3, 9, 9, 9],
            [9, 9, 9, 9, 9],
        ],
    )


def test_grid_keeps_colours_and_needs_images():
    assert png.grid(np.zeros((4, 5, 6, 3), np.uint8), 4, pad=0).shape == (5, 24, 3)
    with pytest.raises(ValueError, match="n > 0"):
        png.grid(np.zeros((0, 5, 6, 3), np.uint8), 4)
    with pytest.raises(ValueError, match="columns=0"):
        png.grid(np.zeros((4, 5, 6, 3), np.uint8), 0)


def test_png_text_and_bytes(tmp_path):
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    text = {"Software": "us", "parameters": '{"label": 3}', "name": "Kynkäänniemi, 猫"}
    for name in ("a.png", "b.png"):
        png.write_png(tmp_path / name, picture, text)
    with PIL.Image.open(tmp_path / "a.png") as image:
        assert image.text == text
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    png.write_png(path, np.zeros((2, 2, 1), np.uint8))
    before = path.read_bytes()

    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "replace", full)
    with pytest.raises(OSError) as failed:
        png.write_png(path, np.ones((2, 2, 1), np.uint8))
    assert failed.value.filename == str(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    picture = np.random.default_rng(1).integers(0, 256, (7, 5, channels), dtype=np.uint8)
    png.write_png(tmp_path / "deep" / "grid.png", picture)
    with PIL.Image.open(tmp_path / "deep" / "grid.png") as image:
        np.testing.assert_array_equal(np.asarray(image).reshape(7, 5, channels), picture)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["grid.png"]
