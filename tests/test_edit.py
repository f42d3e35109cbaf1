"""Editing pictures from the command line: files, settings, and mistakes in one line."""

import json

import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax import edit
from enat_jax.data import drawn
from enat_jax.runtime import cli, png


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator()


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    """A folder with a model, pictures, and masks."""
    place = tmp_path_factory.mktemp("edit")
    model.save(place / "model")
    rng = np.random.default_rng(0)
    for name, shape in (("a", (8, 8)), ("b c", (8, 8)), ("small", (8, 5)), ("large", (12, 16))):
        png.write_png(place / f"{name}.png", rng.integers(0, 256, (*shape, 1)).astype(np.uint8))
    hole = np.zeros((8, 8, 1), np.uint8)
    hole[:3, :3] = 255
    for name, mask in (("hole", hole), ("nothing", 0 * hole), ("all", 0 * hole + 255)):
        png.write_png(place / f"{name}.png", mask)
    half = np.zeros((12, 16, 1), np.uint8)
    half[:, :7] = 255
    png.write_png(place / "wide.png", half)
    (place / "bad.png").write_bytes(b"no picture")
    return place


def read(path):
    return np.asarray(PIL.Image.open(path))[..., None]


def ends(capsys, place, arguments, out):
    """Exit code, stdout and stderr of the program; names in ``arguments`` are of ``place``."""
    capsys.readouterr()
    given = [str(place / x) if x.endswith(".png") else x for x in arguments]
    with pytest.raises(SystemExit) as end:
        cli.run(edit.main, ["--model", str(place / "model"), *given, "--out", str(out)])
    return end.value.code, *capsys.readouterr()


def test_the_files(model, place, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--image", "a.png", "b c.png", "--mask", "hole.png", "--labels", "2,cat"]
    arguments += ["--num", "2", "--seed", "5", "--grow", "0", "--blend", "0.5"]
    code, stdout, _ = ends(capsys, place, arguments, out)
    assert code is None and f"grid.png in {out}" in stdout
    names = ["00000_a", "00001_a", "00002_b_c", "00003_b_c"]
    found = {path.name for path in out.iterdir()}
    assert found == {*(f"{x}.png" for x in names), "grid.png", "settings.json", ".lock"}
    pictures = np.stack([read(place / f"{name}.png") for name in ("a", "b c")]).repeat(2, axis=0)
    masks = np.broadcast_to(read(place / "hole.png")[..., 0] > 127, (4, 8, 8))
    expected = model.edit(pictures, masks, [2, 2, 0, 0], 5, grow=0, blend=0.5)
    for name, image in zip(names, expected, strict=True):
        np.testing.assert_array_equal(read(out / f"{name}.png"), image)
    grid = read(out / "grid.png")
    assert grid.shape == (22, 42, 1)  # the picture, what is hidden of it, and two results
    np.testing.assert_array_equal(grid[2:10, 2:10], pictures[0])
    assert (grid[2:5, 12:15] == 128).all() and (grid[12:20, 32:40] == expected[3]).all()
    settings = json.loads((out / "settings.json").read_text())
    assert settings["images"] == ["a.png", "b c.png"] and settings["labels"] == [2, 0]
    assert (settings["grow"], settings["blend"], settings["keep"]) == (0, 0.5, 1.0)
    with PIL.Image.open(out / "00002_b_c.png") as image:
        parameters = json.loads(image.text["parameters"])
    assert parameters["image"] == "b c.png" and parameters["class_name"] == "cat"
    assert parameters["pixels"] == settings["pixels"][1]
    assert drawn.pictures_beside(
        [name for name in found if name.endswith(".png")],
        drawn.Drawn.read((out / "settings.json").read_bytes()),
    ) == ["grid.png"]

    # The same command draws what is missing, and another one leaves the directory alone.
    before = (out / "00001_a.png").read_bytes()
    (out / "00001_a.png").unlink()
    code, stdout, _ = ends(capsys, place, arguments, out)
    assert code is None and "[edit] 0 of 4 images are there" not in stdout
    assert (out / "00001_a.png").read_bytes() == before
    code, _, stderr = ends(capsys, place, [*arguments, "--grow", "1"], out)
    assert code == 2 and "grow is 0, not 1" in stderr


def test_boxes_outpainting_variations_and_crops(model, place, tmp_path, capsys):
    a, small, large = (read(place / f"{name}.png") for name in ("a", "small", "large"))
    run = lambda out, *arguments: ends(  # noqa: E731
        capsys, place, [*arguments, "--num", "1", "--grow", "0", "--blend", "0"], tmp_path / out
    )
    assert run("boxes", "--image", "a.png", "--mask", "0,0,8,2", "4,4,8,8")[0] is None
    found = [read(tmp_path / "boxes" / f"0000{i}_a.png") for i in range(2)]
    np.testing.assert_array_equal(found[0][2:], a[2:])
    np.testing.assert_array_equal(found[1][:4], a[:4])
    assert run("wider", "--image", "small.png", "--outpaint", "left=3")[0] is None
    np.testing.assert_array_equal(read(tmp_path / "wider" / "00000_small.png")[:, 3:], small)
    assert run("varied", "--image", "a.png", "--variation", "0.5", "--labels", "1")[0] is None
    expected = model.edit(a[None], labels=[1], keep=0.5)[0]
    np.testing.assert_array_equal(read(tmp_path / "varied" / "00000_a.png"), expected)
    cropped = ["--image", "large.png", "--mask", "wide.png", "--crop", "adm"]
    assert run("cropped", *cropped)[0] is None
    with PIL.Image.open(place / "large.png") as image:
        expected = edit.decoding.center_crop(image, 8)
    found = read(tmp_path / "cropped" / "00000_large.png")
    np.testing.assert_array_equal(found[:, 4:], expected[:, 4:])
    assert (found[:, :3] != expected[:, :3]).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--image a.png", "nothing is to change: give --mask, --outpaint or --variation"),
        ("--image gone.png --mask hole.png", "gone.png"),
        ("--image bad.png --mask hole.png", "bad.png: is not a"),
        ("--image a.png --mask bad.png", "bad.png: is not a"),
        ("--image large.png --mask 0,0,1,1", "16x12 pixels, and this model takes 8x8: resize it"),
        ("--image large.png --mask hole.png", "8x8 pixels and"),
        ("--image a.png --mask nothing.png", "hides nothing of"),
        ("--image a.png --mask all.png", "hides all of"),
        ("--image a.png --mask 0,0,8,6", "choose --grow 0, or hide less"),
        ("--image a.png --mask 0,0,8,7", "with one: hide less"),
        ("--image a.png --mask 0,0,8,8", "the mask 0,0,8,8 hides all of"),
        ("--image a.png --mask 0,0,9,1", "give LEFT,TOP,RIGHT,BOTTOM"),
        ("--image a.png --mask 4,4,4,5", "does not lie within"),
        ("--image a.png --outpaint left=8", "choose another --outpaint"),
        (
            "--image small.png --outpaint left=2",
            "small.png is 5 pixels wide and must be at least 6",
        ),
        ("--image a.png --outpaint up=3", "sides are left, right, top, bottom"),
        ("--image a.png --outpaint left=0", "makes no room"),
        ("--image a.png --variation 2", "'2' is not a share"),
        ("--image a.png --variation 0.5 --blend x", "'x' is not none or tokens"),
        ("--image a.png --variation 0.5 --grow -1", "whole number of tokens"),
        ("--image a.png a.png --variation 0.5 --labels 0,1,2", "2 pictures of 3 images"),
        ("--image a.png --variation 0.5 --labels 9", "label 9 is out of range"),
        ("--image a.png --variation 0.5 --prompt x", "reads no texts"),
        ("--image a.png --variation 0.5 --num 0", "num=0 must be at least 1"),
        ("--image a.png --variation 0.5 --steps 0", "num_steps=0"),
    ],
)
def test_mistakes_are_one_line(place, tmp_path, capsys, arguments, words):
    code, _, stderr = ends(capsys, place, arguments.split(), tmp_path / "out")
    assert code == 2 and words in stderr and stderr.count("\n") == 1, stderr
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.slow
def test_a_model_of_texts_fills_without_a_prompt_and_with_one(place, tmp_path, capsys):
    model = tiny.make_word_generator()
    model.save(tmp_path / "model")
    for name, more in (
        ("empty", []),
        ("cat", ["--prompt", "a cat", "red", "--negative-prompt", "a dog"]),
    ):
        arguments = ["--model", str(tmp_path / "model"), "--image", "a.png", "--mask", "hole.png"]
        code, _, stderr = ends(capsys, place, [*arguments, *more, "--num", "1"], tmp_path / name)
        assert code is None, stderr
    assert len(list((tmp_path / "cat").glob("0*.png"))) == 2
    assert json.loads((tmp_path / "empty" / "settings.json").read_text())["prompts"] == [""]
