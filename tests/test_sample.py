"""Drawing images from the command line: files, settings, and mistakes in one line."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax import cli, sample


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sample") / "model"
    model.save(directory)
    return directory


def read(path):
    return np.asarray(PIL.Image.open(path))[..., None]


def ends(capsys, *arguments):
    """Exit code, stdout and stderr of the program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.run(sample.main, [str(x) for x in arguments])
    return end.value.code, *capsys.readouterr()


def test_the_files(model, saved, tmp_path, capsys):
    out = tmp_path / "a" / "pictures"
    arguments = ["--model", saved, "--labels", "2,cat", "--num", 2, "--seed", 5, "--out", out]
    code, stdout, stderr = ends(capsys, *arguments, "--batch-size", 3)
    assert code is None and f"grid.png in {out}" in stdout
    assert "3/4 images" in stderr and "4/4 images" in stderr
    names = ["00000_tench_Tinca_tinca", "00001_tench_Tinca_tinca", "00002_cat", "00003_cat"]
    expected = model.sample([2, 2, 0, 0], seed=5)
    for name, image in zip(names, expected, strict=True):
        assert np.array_equal(read(out / f"{name}.png"), image)
    assert {x.name for x in out.iterdir()} == {
        *(f"{name}.png" for name in names),
        "grid.png",
        "settings.json",
    }
    grid = read(out / "grid.png")
    assert grid.shape == (22, 22, 1)  # two rows of two images of 8 pixels, 2 between and around
    assert np.array_equal(grid[12:20, 2:10], expected[2])
    settings = json.loads((out / "settings.json").read_text())
    assert settings["labels"] == [2, 0] and settings["seed"] == 5 and settings["num"] == 2
    assert settings["class_names"] == ["tench, Tinca tinca", "cat"]
    assert settings["sampler"]["num_steps"] == 3
    assert settings["transformer"] == model.fingerprint
    assert settings["tokenizer"] == model.tokenizer.fingerprint
    assert settings["provenance"] == {"weights": "random 0"}

    # The same again is no mistake, something else is: the files would be mixed up.
    (out / names[0]).with_suffix(".png").unlink()
    assert ends(capsys, *arguments)[0] is None
    assert np.array_equal(read(out / f"{names[0]}.png"), expected[0])
    code, _, stderr = ends(capsys, *arguments, "--steps", 2)
    assert (code, stderr) == (
        2,
        f"error: {out} holds images of other settings: choose another directory\n",
    )


def test_options_change_the_sampler(saved, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--guidance-scale", 0, "--token-temperature", 0, "--mask-temperature", 0.5]
    options += ["--steps", 2, "--segments", 2, "--num", 1, "--labels", "dog"]
    assert ends(capsys, "--model", saved, "--out", out, *options)[0] is None
    assert json.loads((out / "settings.json").read_text())["sampler"] == {
        "num_steps": 2,
        "guidance_scale": 0.0,
        "token_temperature": 0.0,
        "mask_temperature": 0.5,
        "num_segments": 2,
    }


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_change_nothing(model, tmp_path, batch_size):
    found = sample.sample(model, [1, 0], 3, tmp_path, seed=2, batch_size=batch_size)
    assert np.array_equal(found, model.sample([1, 1, 1, 0, 0, 0], seed=2))


def test_the_grid_has_whole_rows_only(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "GRID_IMAGES", 5)
    found = sample.sample(model, [0, 1, 2], 2, tmp_path)
    assert len(found) == 4
    assert len(list(tmp_path.glob("0*.png"))) == 6


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("all", [0, 1, 2]),
        ("1", [1]),
        ("2, 0,2", [2, 0, 2]),
        ("3", [3]),
        ("dog,0", [1, 0]),
        ("tench, Tinca tinca", [2]),
    ],
)
def test_labels(text, labels):
    assert sample.parse_labels(text, tiny.CLASSES) == labels


IMAGENET = ("tabby, tabby cat", "tiger cat", "crane (bird)", "maillot", "maillot, tank suit")


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("tabby cat", [0]),
        ("Tabby", [0]),
        ("tiger_cat,tank suit, 2", [1, 4, 2]),
        ("tabby, tabby cat", [0]),  # the whole name, not two labels
        ("maillot", [3]),  # a name goes before a part of another
    ],
)
def test_any_name_of_a_class_will_do(text, labels):
    assert sample.parse_labels(text, IMAGENET) == labels


def test_a_name_of_two_classes_is_refused():
    with pytest.raises(ValueError, match=r"may be 0 \(cat, pet\) or 1 \(dog, pet\)"):
        sample.parse_labels("pet", ("cat, pet", "dog, pet"))
    with pytest.raises(ValueError, match="did you mean 'tabby cat'"):
        sample.parse_labels("tabby cta", IMAGENET)


def test_a_name_goes_before_a_number():
    assert sample.parse_labels("7,1", ("7", "3")) == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "label 4 is out of range: this model has the classes 0 to 2"),
        ("-1", "label -1 is out of range"),
        ("dgo", "label 'dgo' is neither .* did you mean 'dog'\\?"),
        ("zebra", r"label 'zebra' is neither .*: this model has the classes 0 \(cat\) to 2"),
        ("1.0", "label '1.0' is neither"),
        ("", "label '' is neither"),
        ("1,", "label '' is neither"),
    ],
)
def test_wrong_labels(text, message):
    with pytest.raises(ValueError, match=message):
        sample.parse_labels(text, tiny.CLASSES)


def test_mistakes_are_one_line(saved, tmp_path, capsys):
    out = tmp_path / "out"
    a_file = tmp_path / "file"
    a_file.write_text("")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.json").write_text('{"format": "of somebody else"}')
    for arguments, message in [
        (("--model", tmp_path / "no", "--out", out), "there is no "),
        (("--model", foreign, "--out", out), "is of format 'of somebody else'"),
        (("--model", saved, "--out", a_file), "File exists: "),
        (("--model", saved, "--out", a_file / "below"), "Not a directory: "),
        (("--model", saved, "--out", out, "--labels", "9"), "label 9 is out of range"),
        (("--model", saved, "--out", out, "--num", "0"), "num=0 must be at least 1"),
        (("--model", saved, "--out", out, "--batch-size", "0"), "batch_size=0 must be"),
        (("--model", saved, "--out", out, "--steps", "0"), "num_steps=0 must be"),
        (("--model", saved, "--out", out, "--guidance-scale", "nan"), "guidance_scale=nan"),
    ]:
        code, _, stderr = ends(capsys, *arguments)
        assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, arguments
        assert message in stderr
        assert not out.exists()


@pytest.mark.slow
def test_as_a_program(saved, tmp_path):
    damaged = shutil.copytree(saved, tmp_path / "model")
    shutil.rmtree(damaged / "transformer")
    command = [sys.executable, "-m", "enat_jax.sample", "--model", str(damaged), "--out", "out"]
    root = pathlib.Path(__file__).parents[1]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: no parameters at")
    assert "Traceback" not in ended.stderr
