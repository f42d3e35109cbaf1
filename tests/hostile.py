"""Broken and hostile input for programs that tokenize or import: how it is made, run and judged."""

import io
import os
import tarfile
import zipfile

import jax
import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax import import_torch, tokenize_images
from enat_jax.data import tokens
from enat_jax.runtime import cli

BAD = "cat/05.png"
KEYS = [f"{'cat' if i % 2 else 'bird'}/{i:02d}.png" for i in range(12)]


def noise(seed, form="PNG", side=9):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, form)
    return file.getvalue()


GOOD = {key: noise(i) for i, key in enumerate(KEYS)}


def write_folder(path, files=GOOD):
    for key, data in files.items():
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(data)
    return path


def write_zip(path, files=GOOD):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, data in files.items():
            archive.writestr(key, data)
    return path


def write_tar(path, files=GOOD):
    with tarfile.open(path, "w") as archive:
        for key, data in files.items():
            info = tarfile.TarInfo(key)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def one_device():
    """Compiled for one device, the tokenizer is ready much sooner."""
    with pytest.MonkeyPatch.context() as patch:
        device = jax.devices()[:1]
        patch.setattr(jax, "local_devices", lambda: device)
        yield


@pytest.fixture(scope="module")
def model(one_device, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny.make_tokenizer().save(directory)
    return directory


def command(model, out, *arguments):
    common = ["--model", model, "--out", out, "--batch-size", 2, "--shard-items", 4, "--no-flips"]
    return [str(x) for x in [*common, *arguments]]


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A token set of twelve good pictures in three shards, and the folder they came from."""
    root = tmp_path_factory.mktemp("finished")
    source = write_folder(root / "pictures")
    tokenize_images.main(command(model, root / "set", "--source", source))
    return root / "set"


def records_by_key(directory):
    rows = tokens.TokenSet.open(directory).rows
    keys = tokens.image_keys(directory)
    names = tokens.read_metadata(directory)["class_names"]
    return {
        keys[row["image"]]: (names[row["label"]], row["tokens"].tolist())
        for row in rows[np.arange(len(rows))]
    }


def snapshot(root, out):
    """Every file, folder and link below ``root`` but for ``out``, links as what they say."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in root.rglob("*")
        if path != out and out not in path.parents
    }


def run(arguments, capsys):
    """(exit code, lines on stderr that are no progress)"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.run(tokenize_images.main, arguments)
    lines = capsys.readouterr().err.splitlines()
    return exit_.value.code or 0, [x for x in lines if not x.startswith("image ")]


def refused(arguments, words, capsys):
    code, lines = run(arguments, capsys)
    assert code == 2, lines
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for word in words:
        assert word in lines[0], (word, lines[0])


def import_weights(capsys, *arguments):
    """Exit code, stdout and stderr of ``import_torch``."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.run(import_torch.main, [str(x) for x in arguments])
    return end.value.code, *capsys.readouterr()


def refused_import(capsys, words, *arguments):
    code, _, err = import_weights(capsys, *arguments)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert words in err, err


@pytest.fixture
def untouched(tmp_path, monkeypatch):
    """The working directory is an empty one; at the end nothing but ``out`` may have changed."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    out, before = tmp_path / "out", {}

    def begin():
        before.update(snapshot(tmp_path, out))

    yield begin
    assert before and snapshot(tmp_path, out) == before
    assert not [p.name for p in tmp_path.rglob("*") if p.name.endswith(".unfinished")]


def same_files(one, other):
    def content(directory):
        return {path.name: path.read_bytes() for path in directory.iterdir()}

    return content(one) == content(other)
