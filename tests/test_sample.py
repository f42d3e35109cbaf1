"""Drawing images from the command line: files, settings, and mistakes in one line."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax import sample
from enat_jax.data import imagenet
from enat_jax.inference import label_names
from enat_jax.runtime import cli


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


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


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
    assert "image 4/4, " in stderr and "images/s" in stderr
    names = ["00000_tench_Tinca_tinca", "00001_tench_Tinca_tinca", "00002_cat", "00003_cat"]
    expected = model.sample([2, 2, 0, 0], seed=5)  # batches of 4, as below
    for name, image in zip(names, expected, strict=True):
        assert np.array_equal(read(out / f"{name}.png"), image)
    assert {x.name for x in out.iterdir()} == {
        *(f"{name}.png" for name in names),
        "grid.png",
        "settings.json",
        ".lock",
    }
    grid = read(out / "grid.png")
    assert grid.shape == (22, 22, 1)  # two rows of two images of 8 pixels, 2 between and around
    assert np.array_equal(grid[12:20, 2:10], expected[2])
    settings = json.loads((out / "settings.json").read_text())
    assert settings["labels"] == [2, 0] and settings["seed"] == 5 and settings["num"] == 2
    assert settings["class_names"] == ["tench, Tinca tinca", "cat"]
    assert settings["sampler"]["num_steps"] == 3 and settings["dtype"] == "float32"
    assert settings["transformer"] == model.fingerprint
    assert settings["tokenizer"] == model.tokenizer.fingerprint
    assert settings["provenance"] == {"weights": "random 0"}

    with PIL.Image.open(out / "00003_cat.png") as image:
        assert image.text["Software"].startswith("enat_jax ")
        found = json.loads(image.text["parameters"])
    assert (found["index"], found["label"], found["class_name"], found["seed"]) == (3, 0, "cat", 5)
    for name in ("sampler", "transformer", "tokenizer", "dtype"):
        assert found[name] == settings[name]


def test_all_images_stand_in_an_npz_file_as_adm_s_programs_write_it(model, saved, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--model", saved, "--labels", "dog,3", "--num", 2, "--out", out]
    assert ends(capsys, *arguments)[0] is None
    before = contents(out)
    code, stdout, _ = ends(capsys, *arguments, "--npz")
    assert code is None and str(out / "samples.npz") in stdout
    after = contents(out)
    with np.load(out / "samples.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    expected = model.sample([1, 1, 3, 3], seed=0)
    np.testing.assert_array_equal(images, np.repeat(expected, 3, axis=-1))
    assert labels.tolist() == [1, 1, 3, 3] and labels.dtype == np.int64
    assert after.items() > before.items() and after.keys() - before.keys() == {"samples.npz"}
    assert ends(capsys, *arguments, "--npz")[0] is None and contents(out) == after


def test_options_change_the_sampler(saved, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--guidance-scale", 0, "--token-temperature", 0, "--mask-temperature", 0.5]
    options += ["--guidance-schedule", "interval", "--guidance-interval", "0.25,0.75"]
    options += ["--steps", 2, "--segments", 2, "--num", 1, "--labels", "dog"]
    assert ends(capsys, "--model", saved, "--out", out, *options)[0] is None
    assert json.loads((out / "settings.json").read_text())["sampler"] == {
        "num_steps": 2,
        "guidance_scale": 0.0,
        "token_temperature": 0.0,
        "mask_temperature": 0.5,
        "num_segments": 2,
        "guidance_schedule": "interval",
        "guidance_interval": [0.25, 0.75],
    }


def test_the_reveal_is_drawn_on_request(saved, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--labels", "cat,dog", "--num", 2, "--reveal", "gif,strip"]
    code, stdout, _ = ends(capsys, "--model", saved, "--out", out, *options)
    assert code is None and f"{out / 'reveal.gif'}" in stdout
    with PIL.Image.open(out / "reveal.gif") as image:
        assert image.n_frames == 5  # nothing, three steps, the image
    with PIL.Image.open(out / "reveal.png") as image:
        assert image.height > 8 * 128  # two rows for each of four images
    code, _, stderr = ends(capsys, "--model", saved, "--out", out, "--reveal", "mp4")
    assert code == 2 and "'mp4' is neither gif nor strip" in stderr


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
    assert label_names.parse_labels(text, tiny.CLASSES) == labels


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
    assert label_names.parse_labels(text, IMAGENET) == labels


def test_a_name_of_two_classes_is_refused():
    with pytest.raises(ValueError, match=r"may be 0 \(cat, pet\) or 1 \(dog, pet\)"):
        label_names.parse_labels("pet", ("cat, pet", "dog, pet"))
    with pytest.raises(ValueError, match="did you mean 'tabby cat'"):
        label_names.parse_labels("tabby cta", IMAGENET)


def test_every_class_of_imagenet_can_be_named():
    names = imagenet.NAMES
    everything = list(range(1000))
    for listed in (names, [f'"{name}"' for name in names], imagenet.IDS):
        assert label_names.parse_labels(",".join(listed), names) == everything
    assert label_names.parse_labels("3,tabby, tabby cat,N01440764", names) == [3, 281, 0]
    assert label_names.parse_labels("n01443537", ("goldfish, Carassius auratus", "x")) == [0]
    with pytest.raises(ValueError, match=r"may be 134 \(crane \(bird\)\) or 517 \(crane \(m"):
        label_names.parse_labels("crane", names)


@pytest.mark.parametrize("typed", ["caf\xe9", "cafe\u0301", "CAF\xc9"])
@pytest.mark.parametrize("stored", ["caf\xe9", "cafe\u0301"])
def test_names_are_found_in_any_form_of_unicode(typed, stored):
    assert label_names.parse_labels(f"bar,{typed}", (stored, "bar")) == [1, 0]


@pytest.mark.parametrize(
    ("text", "names", "labels"),
    [
        ("a, b", ("a", "b", "a,b"), [2]),  # the longest name
        ("b,a,b,1", ("a", "b", "a, b"), [1, 2, 1]),
        ('"a", "b"', ("a", "b", "a,b"), [0, 1]),
        ('"cat, wild",dog', ("dog", "cat, wild"), [1, 0]),
        ('"say ""cheese""",1', ('say "cheese"', "x"), [0, 1]),
        ('5" pipe,x', ('5" pipe', "x"), [0, 1]),
        ("cat,Cat", ("cat", "Cat"), [0, 1]),
        ("CAT", ("cat", "dog"), [0]),
        ('cat," cat"', ("cat", " cat"), [0, 1]),
        (" cat ,dog", ("dog", " cat "), [1, 0]),
        ('"all"', ("cat", "all"), [1]),
        ("all", ("cat", "all"), [0, 1]),
        ("Maillot", ("maillot", "maillot, tank suit"), [0]),
        ("cat,no class", ("cat", "dog"), [0, 2]),
        ("10,2", ("2", "10"), [1, 0]),
    ],
)
def test_a_name_can_always_be_told_from_others(text, names, labels):
    assert label_names.parse_labels(text, names) == labels


@pytest.mark.parametrize(
    ("text", "names"), [("CAT", ("cat", "Cat")), ("crane", ("crane", "crane"))]
)
def test_a_name_of_two_classes_is_given_with_both_numbers(text, names):
    with pytest.raises(ValueError, match=f"'{text}' may be 0 .* or 1 .*: give its number"):
        label_names.parse_labels(text, names)
    assert label_names.parse_labels("0,1", names) == [0, 1]


def test_what_is_quoted_is_no_number():
    with pytest.raises(ValueError, match="label '1' is neither"):
        label_names.parse_labels('"1"', tiny.CLASSES)


def test_a_name_goes_before_a_number():
    assert label_names.parse_labels("7,1", ("7", "3")) == [0, 1]


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
        label_names.parse_labels(text, tiny.CLASSES)


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
        (("--model", saved, "--out", out, "--guidance-schedule", "sine"), "is none of linear, "),
        (
            ("--model", saved, "--out", out, "--guidance-interval", "0.2,0.8"),
            "--guidance-interval needs --guidance-schedule interval",
        ),
        (("--model", saved, "--out", out, "--seed", "-1"), "seed=-1 must be"),
        (("--model", saved, "--out", out, "--num", "1000000000"), "more than the 10,000,000 that"),
    ]:
        code, _, stderr = ends(capsys, *arguments)
        assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, arguments
        assert message in stderr
        assert not out.exists()


@pytest.mark.slow
def test_as_a_program(saved, tmp_path):
    damaged = shutil.copytree(saved, tmp_path / "model")
    shutil.rmtree(damaged / "transformer")
    (damaged / "transformer.safetensors").unlink()
    command = [sys.executable, "-m", "enat_jax.sample", "--model", str(damaged)]
    command += ["--out", str(tmp_path / "out")]
    root = pathlib.Path(__file__).parents[1]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: no parameters at")
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_killed_at_any_time_the_same_command_makes_the_same_files(saved, tmp_path):
    def start(out):
        command = [sys.executable, "-m", "enat_jax.sample", "--model", str(saved)]
        command += ["--out", str(out), "--num", "200", "--batch-size", "16", "--reveal", "gif"]
        root = pathlib.Path(__file__).parents[1]
        return subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "undisturbed").wait() == 0
    expected = contents(tmp_path / "undisturbed")
    assert len(expected) == 600 + 4
    out, kills = tmp_path / "killed", 0
    for wanted in (1, 300):
        process = start(out)
        while process.poll() is None and len(list(out.glob("0*.png"))) < wanted:
            time.sleep(0.001)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills == 2
    assert start(out).wait() == 0
    assert contents(out) == expected
