"""The program: a set is made once, continued when it was interrupted, and mistakes are one line."""

import json
import os
import pathlib
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax import tokenize_images
from enat_jax.data import image_data, images, tokens
from enat_jax.data.digits import Digits
from enat_jax.inference import tokenizer
from enat_jax.runtime import cli
from enat_jax.training import config as train_config

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of a tokenizer that was trained on digits of 8x8 pixels."""
    made = tiny.make_tokenizer()
    data = {"source": "digits", "size": 8, "rotation": 20.0}
    directory = tmp_path_factory.mktemp("model")
    tokenizer.Tokenizer(made.model, made.params, (8, 8), {"config": {"data": data}}).save(directory)
    return directory


def write_pictures(directory, n=40, classes=("bird", "cat")):
    rng = np.random.default_rng(0)
    for i in range(n):
        path = directory / classes[i % len(classes)] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (9, 8), np.uint8)).save(path)
    return directory


def run(model, *arguments):
    tokenize_images.main(["--model", str(model), *[str(x) for x in arguments]])


def content(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_digits_are_read_as_the_tokenizer_was_trained(model, tmp_path, capsys):
    out = tmp_path / "tokens"
    run(model, "--split", "test", "--out", out)
    found = tokens.TokenSet.open(out)
    assert len(found) == 359  # no mirror images of digits
    assert found.preprocessing["source"] == Digits("test", size=8, rotation=20.0).identity()
    assert found.tokenizer == tokenizer.Tokenizer.load(model).fingerprint
    assert "359 records of 4x4 tokens" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    run(model, "--split", "test", "--out", out)
    assert "already holds these tokens" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(ValueError, match="rotation is 20.0, now it would be 5"):
        run(model, "--split", "test", "--out", out, "--set", "rotation=5")


def test_a_folder_of_pictures(model, tmp_path, capsys):
    source = write_pictures(tmp_path / "pictures")
    run(model, "--source", source, "--out", tmp_path / "train")
    run(model, "--source", source, "--out", tmp_path / "all", "--split", "all")
    run(model, "--source", source, "--out", tmp_path / "plain", "--no-flips")
    train, whole = tokens.read_metadata(tmp_path / "train"), tokens.read_metadata(tmp_path / "all")
    assert train["flips"] and not whole["flips"]
    assert train["num_records"] == 80 and whole["num_records"] == 40
    assert train["class_names"] == ["bird", "cat"] and train["class_counts"] == [40, 40]
    assert tokens.read_metadata(tmp_path / "plain")["num_records"] == 40
    out = capsys.readouterr().out
    assert "40 images and their mirror images" in out and "images/s; waited" in out


def test_files_are_read_as_the_tokenizer_was_trained(tmp_path, capsys):
    """Also in another place: what was held out from the tokenizer stays held out."""
    made = tiny.make_tokenizer()
    data = {"source": "/elsewhere/pictures.zip", "size": 8, "channels": 1, "held_out": 0.4}
    provenance = {"config": {"data": data | {"train_split": "train", "workers": 0}}}
    tokenizer.Tokenizer(made.model, made.params, (8, 8), provenance).save(tmp_path / "model")
    source = write_pictures(tmp_path / "pictures")
    seen = {}
    for split in ("train", "test"):
        run(tmp_path / "model", "--source", source, "--split", split, "--out", tmp_path / split)
        shard = json.loads((tmp_path / split / "00000-of-00001.json").read_text())
        seen[split] = set(shard["keys"])
    assert len(seen["train"]) + len(seen["test"]) == 40 and not seen["train"] & seen["test"]
    assert 4 < len(seen["test"]) < 30
    assert f"{source}, train: channels=1, held_out=0.4, size=8" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["/elsewhere/pictures.zip", "tfds:flowers"])
def test_pictures_are_mirrored_as_those_of_training_were(tmp_path, capsys, source):
    made = tiny.make_tokenizer()
    data = {"source": source, "size": 8, "channels": 1, "flip": False}
    codec = tokenizer.Tokenizer(made.model, made.params, (8, 8), {"config": {"data": data}})
    codec.save(tmp_path / "model")
    pictures = ["--source", write_pictures(tmp_path / "pictures", n=4), "--out"]
    run(tmp_path / "model", *pictures, tmp_path / "plain")
    printed = capsys.readouterr().out
    assert "flip=False" in printed and "mirror image" not in printed
    assert tokens.read_metadata(tmp_path / "plain")["num_records"] == 4
    run(tmp_path / "model", *pictures, tmp_path / "mirrored", "--flips")
    run(tmp_path / "model", *pictures, tmp_path / "flip", "--set", "flip=True")
    for name in ("mirrored", "flip"):
        assert tokens.read_metadata(tmp_path / name)["num_records"] == 8


GO_ON = {
    "flips": (("bird", "cat"), ["--flips"], "--flips"),
    "flip": (("bird", "cat"), ["--set", "flip=False"], "--no-flips --set flip=false"),
    "copies": (("bird", "cat"), ["--copies", 2], "--copies 2"),
    "batch size": (("bird", "cat"), ["--batch-size", 3], "--batch-size 3"),
    "split": (("bird", "cat"), ["--split", "all"], "--no-flips --split all"),
    "share": (("bird", "cat"), ["--set", "held_out=0.5"], "--set held_out=0.5"),
    "classes": (("bird", "cat"), ["--set", "classes=none"], "--set classes=none"),
    "numbers of before": (("2", "10"), ["--set", "class_order=text"], "--set class_order=text"),
    "classes of before": (("train", "valid"), ["--set", "splits=none"], "--set splits=none"),
}


@pytest.mark.parametrize("case", GO_ON)
def test_a_set_that_was_begun_otherwise_can_be_gone_on_with(model, tmp_path, case):
    """What the message advises leads on, also for what earlier versions began."""
    classes, begun, advice = GO_ON[case]
    source = write_pictures(tmp_path / "pictures", n=8, classes=classes)
    common = ["--source", source, "--out", tmp_path / "out"]
    now = ["--no-flips"] if case == "flips" else []
    run(model, *common, *begun)
    (tmp_path / "out" / "metadata.json").unlink()
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match="another token set: .*to go on with it, give ") as caught:
        run(model, *common, *now)
    assert str(caught.value).endswith(f"to go on with it, give {advice}")
    run(model, *common, *shlex.split(advice))
    assert before.items() <= content(tmp_path / "out").items()
    assert len(tokens.TokenSet.open(tmp_path / "out")) > 0


def test_other_pictures_have_no_advice(model, tmp_path):
    source = write_pictures(tmp_path / "pictures", n=4)
    run(model, "--source", source, "--out", tmp_path / "out")
    write_pictures(source, n=6)
    with pytest.raises(ValueError, match="choose another directory$"):
        run(model, "--source", source, "--out", tmp_path / "out", "--set", "classes=none")


def test_sets_of_earlier_versions_are_inspected(model, tmp_path, capsys):
    source = write_pictures(tmp_path / "pictures", classes=("2", "10"))
    run(model, "--source", source, "--out", tmp_path / "out", "--set", "class_order=text")
    for name in ("plan.json", "metadata.json"):
        path = tmp_path / "out" / name
        values = json.loads(path.read_text())
        del values["location"]["class_order"]  # which they did not know
        path.write_text(json.dumps(values))
    run(model, "--inspect", tmp_path / "out", "--out", tmp_path / "inspection")
    assert "PSNR" in capsys.readouterr().out


def test_classes_without_a_record_are_said(model, tmp_path, capsys):
    source = write_pictures(tmp_path / "pictures", n=4, classes=("a", "b", "c", "d"))
    path = source / "b" / "0001.png"
    path.write_bytes(b"")
    run(model, "--source", source, "--out", tmp_path / "out", "--on-error", "skip")
    assert "classes without a record: 'b'\n" in capsys.readouterr().out


VALUES = {  # of the settings of sources
    "size": ("12", 12),
    "channels": ("1", 1),
    "classes": ("parent", "parent"),
    "class_order": ("text", "text"),
    "class_names": ("names.tsv", "names.tsv"),
    "splits": ("none", "none"),
    "held_out": ("0.5", 0.5),
    "crop_area": ("(0.5, 0.6)", (0.5, 0.6)),
    "crop_ratio": ("(0.9, 1.1)", (0.9, 1.1)),
    "flip": ("False", False),
    "crop": ("square-lanczos", "square-lanczos"),
    "data_dir": ("data", "data"),
    "image_key": ("picture", "picture"),
    "label_key": ("kind", "kind"),
}


def test_every_setting_of_the_table_means_the_same_everywhere(tmp_path):
    table = (ROOT / "configs" / "README.md").read_text().split("--set NAME=VALUE")[1]
    first = [row.split("|")[1] for row in table.split("\n\n")[0].splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", " ".join(first))) == sorted(VALUES)
    known = images.SETTINGS["files"].keys() | images.SETTINGS["tfds"].keys()
    assert known == VALUES.keys()
    names = tmp_path / "names.tsv"
    names.write_text("bird\tVogel\ncat\tKatze\n")
    source = write_pictures(tmp_path / "pictures")
    for name, (text, value) in VALUES.items():
        if name == "class_names":
            text = value = str(names)
        config = train_config.load(
            str(ROOT / "configs" / "images_vqgan.py"),
            [f"--config.data.source={source}", "--config.data.held_out=None"]
            + [f"--config.data.{name}={text}"],
        )
        data = image_data.Data.of(train_config.complete(config).data.to_dict())
        assert data.settings[name] == value
        (_, parsed) = cli.name_value(f"{name}={text}")
        assert parsed == value
        if name in images.SETTINGS["files"]:
            given = dict(data.settings) | {name: parsed}
            again = images.open_source(str(source), "train", **given)
            assert again.identity() == data.open("train").identity()
            assert again.class_names == data.open("train").class_names
        else:
            with pytest.raises(ValueError, match=f"no settings .*{name}.*set the others to None"):
                data.open("train")


def test_what_a_source_does_not_have_is_left_out_by_none(model, tmp_path):
    source = write_pictures(tmp_path / "pictures", n=4)
    common = ["--source", source, "--out", tmp_path / "out"]
    with pytest.raises(ValueError, match="no settings .*'data_dir'.*set the others to None"):
        run(model, *common, "--set", "data_dir=x")
    run(model, *common, "--set", "data_dir=None")


def test_hosts_share_a_set(model, tmp_path, capsys):
    source = write_pictures(tmp_path / "pictures")
    common = ["--source", source, "--batch-size", 4, "--shard-items", 8, "--out"]
    run(model, *common, tmp_path / "one")
    for host in (1, 0):
        run(model, *common, tmp_path / "two", "--num-hosts", 2, "--host-index", host)
    assert "complete when the others' are" in capsys.readouterr().out
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_inspection_writes_elsewhere(model, tmp_path, capsys):
    source = write_pictures(tmp_path / "pictures")
    run(model, "--source", source, "--out", tmp_path / "tokens")
    before = content(tmp_path / "tokens")
    run(model, "--inspect", tmp_path / "tokens", "--out", tmp_path / "inspection")
    assert "PSNR" in capsys.readouterr().out
    assert (tmp_path / "inspection" / "reconstructions.png").exists()
    assert content(tmp_path / "tokens") == before


def spoilt(name):
    """A folder of four pictures with something wrong about one."""

    def make(tmp_path):
        pictures = write_pictures(tmp_path / "pictures", n=4)
        path = pictures / "bird" / "0002.png"
        path.write_bytes({"truncated": path.read_bytes()[:60], "empty": b""}[name])
        return ["--source", pictures]

    return make


def foreign(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    return ["--source", write_pictures(tmp_path / "pictures", n=4)]


def a_file(tmp_path):
    (tmp_path / "out").write_text("a file")
    return ["--source", write_pictures(tmp_path / "pictures", n=4)]


MISTAKES = {
    "no tokenizer": (lambda tmp: ["--model", tmp / "nothing"], "nothing"),
    "unknown source": (lambda tmp: ["--source", "cats"], "cats"),
    "unknown split": (lambda tmp: ["--split", "half"], "half"),
    "unknown setting": (lambda tmp: ["--set", "rotatoin=5"], "rotatoin"),
    "wrong size": (lambda tmp: ["--set", "size=16"], "do not suit this tokenizer"),
    "truncated picture": (spoilt("truncated"), "bird/0002.png"),
    "empty picture": (spoilt("empty"), "bird/0002.png"),
    "a directory of other things": (foreign, "is no token set"),
    "a file in the way": (a_file, "is no token set"),
    "host out of range": (lambda tmp: ["--num-hosts", 2, "--host-index", 2], "--host-index 2"),
    "nothing to inspect": (lambda tmp: ["--inspect", tmp / "none"], "there is no token set"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_costs_nothing(model, tmp_path, capsys, mistake):
    arguments, words = MISTAKES[mistake]
    arguments = ["--model", model, "--out", tmp_path / "out", *arguments(tmp_path)]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as exit_:
        cli.run(tokenize_images.main, [str(x) for x in arguments])
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("image ")]
    assert exit_.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert all(p.read_bytes() == content for p, content in before.items())
    assert not (tmp_path / "out" / "metadata.json").exists()


def test_skipped_pictures_are_said(model, tmp_path, capsys):
    arguments = spoilt("truncated")(tmp_path)
    run(model, *arguments, "--on-error", "skip", "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert "1 images skipped" in out and "bird/0002.png: " in out
    (skipped,) = tokens.read_metadata(tmp_path / "out")["skipped"]
    assert skipped["key"] == "bird/0002.png" and "truncated" in skipped["reason"]


def test_a_full_disk_is_one_line_and_can_be_continued(model, tmp_path):
    """Files may not grow beyond 3,000 bytes: what a full disk or a quota does to one shard."""
    source = write_pictures(tmp_path / "pictures", n=200)
    arguments = ["--source", source, "--batch-size", 16, "--shard-items", 160]
    command = program(model, tmp_path / "out", *arguments)
    limited = ["bash", "-c", 'ulimit -f 3; trap "" XFSZ; exec "$@"', "bash", *command]
    ended = subprocess.run(limited, capture_output=True, text=True, env=environment())
    assert ended.returncode == 2, ended.stderr
    error = f"error: File too large: {tmp_path / 'out' / '00000-of-00002.npy'}"
    assert ended.stderr.splitlines()[-1].startswith(
        f"{error}: raise the limit of the size of files"
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["plan.json"]
    run(model, *arguments, "--out", tmp_path / "out")
    assert tokens.read_metadata(tmp_path / "out")["num_records"] == 400


def program(model, out, *arguments):
    module = [sys.executable, "-m", "enat_jax.tokenize_images"]
    return [*module, "--model", str(model), "--out", str(out), *[str(x) for x in arguments]]


def environment():
    # Those of the tests, which a set records, but for the devices.
    flags = " ".join(x for x in os.environ["XLA_FLAGS"].split() if "host_platform" not in x)
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(model, tmp_path):
    """Twenty kills -9, spread over the run from its first to its last file."""
    source = write_pictures(tmp_path / "pictures", n=2000)
    arguments = ["--source", source, "--batch-size", 4, "--shard-items", 20]
    subprocess.run(program(model, tmp_path / "whole", *arguments), check=True, env=environment())
    expected = content(tmp_path / "whole")
    out, rng, kills = tmp_path / "killed", random.Random(0), 0
    while True:
        command = program(model, out, *arguments)
        before = len(list(out.iterdir())) if out.exists() else 0
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
        # Until it has written a random number of files, then at a random moment. Where a busy
        # machine looks late, what is left is spread over the kills that are left.
        left = 2 * (len(expected) - before) // max(1, 20 - kills)
        target = before + rng.randrange(0, max(2, left))
        while process.poll() is None and kills < 20:
            if out.exists() and len(list(out.iterdir())) >= target:
                time.sleep(rng.random() * 0.02)
                process.send_signal(signal.SIGKILL)
                break
        kills += process.wait() == -signal.SIGKILL
        if (out / "metadata.json").exists():
            if process.returncode == 0:
                break
    assert kills >= 15
    assert content(out) == expected
