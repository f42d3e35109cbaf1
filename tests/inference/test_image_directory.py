"""A directory of images: completed by the same call again, never mixed with another's."""

import dataclasses
import errno
import pathlib

import jax
import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax.inference import image_directory


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator()


def read(path):
    return np.asarray(PIL.Image.open(path))[..., None]


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_same_again_draws_only_what_is_missing(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(image_directory, "GRID_COLUMNS", 2)
    arguments = (model, [2, 0], 4, tmp_path)
    image_directory.draw(*arguments, batch_size=4)
    before = contents(tmp_path)
    drawn, draw = [], image_directory.draw_batch
    monkeypatch.setattr(
        image_directory,
        "draw_batch",
        lambda images, batch, size: drawn.append(batch[0]) or draw(images, batch, size),
    )
    image_directory.draw(*arguments, batch_size=4)
    assert not drawn and contents(tmp_path) == before
    # Cut off, of another seed, removed: drawn anew, in the batch of four that it belongs to.
    for damage in (
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes((tmp_path / "00001_tench_Tinca_tinca.png").read_bytes()),
        pathlib.Path.unlink,
    ):
        damage(tmp_path / "00006_cat.png")
        image_directory.draw(*arguments, batch_size=4)
        assert drawn == [4] and contents(tmp_path) == before
        drawn.clear()
    assert "4 of 8 images are there already" in capsys.readouterr().out
    with pytest.raises(
        ValueError,
        match=r"other settings \(seed is 0, not 1\): set as before, or choose another dir",
    ):
        image_directory.draw(*arguments, seed=1)
    (tmp_path / "settings.json").write_text("[")
    with pytest.raises(ValueError, match="settings.json is damaged, .* another directory"):
        image_directory.draw(*arguments)


def test_an_image_that_the_system_does_not_give_is_not_drawn_anew(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    path = out / "00000_cat.png"
    path.symlink_to(path.name)
    with pytest.raises(OSError, match="symbolic links: .*00000_cat.png"):
        image_directory.draw(model, [0], 1, out)
    assert sorted(x.name for x in out.iterdir()) == [".lock", path.name, "settings.json"]


def test_long_names_of_classes_make_file_names_that_fit(model, tmp_path):
    letter = "\U00020000"  # of four bytes
    names = (letter * 80, "a/b/../c", "x" * 300)
    images = image_directory.Images(
        dataclasses.replace(model, class_names=names), [0, 1, 2], 1, 0, tmp_path
    )
    assert [images.path(i).name for i in range(3)] == [
        f"00000_{letter * 45}.png",
        "00001_a_b_c.png",
        f"00002_{'x' * 60}.png",
    ]


def test_a_full_disk_loses_nothing(model, tmp_path, monkeypatch):
    replace = pathlib.Path.replace

    def full(path, target):
        if "00002" in path.name:
            path.write_bytes(path.read_bytes()[:7])
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(path, target)

    with monkeypatch.context() as context, pytest.raises(OSError) as failed:
        context.setattr(pathlib.Path, "replace", full)
        image_directory.draw(model, [2, 0], 2, tmp_path, batch_size=4)
    assert failed.value.filename == str(tmp_path / "00002_cat.png")
    found = contents(tmp_path)
    assert "00001_tench_Tinca_tinca.png" in found and not [x for x in found if "unfinished" in x]
    assert len(image_directory.draw(model, [2, 0], 2, tmp_path, batch_size=4)) == 4


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 1), (1, 7), (8, 7), (8, 64)])
def test_batches_and_devices_change_no_pixel(model, tmp_path, devices, batch_size):
    devices = tuple(jax.local_devices()[:devices])
    codec = dataclasses.replace(model.tokenizer, devices=devices)
    divided = dataclasses.replace(model, devices=devices, tokenizer=codec)
    found = image_directory.draw(divided, [1, 0], 5, tmp_path, seed=2, batch_size=batch_size)
    assert np.array_equal(found, model.sample([1] * 5 + [0] * 5, seed=2, batch_size=64))


@pytest.mark.parametrize(
    ("labels", "each", "columns"),
    [(1, 1, 1), (2, 1, 1), (3, 1, 2), (10, 1, 3), (1000, 1, 32), (10, 4, 8), (10, 6, 6)]
    + [(250, 10, 50), (10, 10, 10), (50, 50, 50), (1, 50, 50), (4, 2, 2)],
)
def test_the_grid_is_no_column(labels, each, columns):
    assert each * image_directory._labels_in_a_row(labels, each) == columns
    assert -(-labels * each // columns) <= 2 * columns


def test_the_grid_has_a_row_per_label_and_whole_rows_only(model, tmp_path, monkeypatch):
    monkeypatch.setattr(image_directory, "GRID_IMAGES", 5)
    monkeypatch.setattr(image_directory, "GRID_COLUMNS", 2)
    found = image_directory.draw(model, [0, 1, 2], 3, tmp_path, batch_size=4)
    expected = model.sample([0] * 3 + [1] * 3, batch_size=4)
    assert np.array_equal(found, expected[[0, 1, 3, 4]])
    assert read(tmp_path / "grid.png").shape == (22, 22, 1)
    assert len(list(tmp_path.glob("0*.png"))) == 9
    image_directory.draw(model, [0, 1, 2, 0, 1], 1, tmp_path / "one", batch_size=4)
    assert read(tmp_path / "one" / "grid.png").shape == (32, 22, 1)  # 3 rows of 2
    monkeypatch.setattr(image_directory, "GRID_PIXELS", 8 * 8 * 3)
    assert len(image_directory.draw(model, [0, 1, 2], 3, tmp_path, batch_size=4)) == 2
