"""Pictures of a folder that ``sample`` wrote: the samples and nothing else, also in archives."""

import json
import tarfile
import unicodedata
import zipfile

import pytest
from hostile import noise

from enat_jax.data import drawn, readers

NAMES = ("tench, Tinca tinca", "café")
SAMPLES = [drawn.file_name(i, NAMES[i // 3]) for i in range(6)]


def settings(num=3, names=NAMES, software="enat_jax 0.1.0"):
    return json.dumps({"software": software, "class_names": names, "num": num}).encode()


def write(folder, names, content=None):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        form = "GIF" if name.endswith(".gif") else "PNG"
        (folder / name).write_bytes(noise(i, form))
    if content is not None:
        (folder / "settings.json").write_bytes(content)
    return folder


BESIDE = ["grid.png", "reveal.png", "reveal.gif"]


def test_file_names():
    assert SAMPLES[0] == "00000_tench_Tinca_tinca.png" and SAMPLES[5] == "00005_café.png"
    assert len(drawn.file_name(0, "é" * 300).encode()) <= 190


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_the_samples_and_nothing_else(tmp_path, kind):
    """Of an earlier and larger run, too, and with another directory beside it."""
    root = tmp_path / "all"
    write(root / "one", [*SAMPLES, *BESIDE, "00006_café.png", "00001_café.png"], settings())
    (root / "one" / "samples.npz").write_bytes(b"PK")
    write(root / "two", ["grid.png", "7.png"])
    path = {"folder": root, "zip": tmp_path / "a.zip", "tar": tmp_path / "a.tar"}[kind]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in root.rglob("*.*"):
                archive.write(file, file.relative_to(root))
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(root, ".")
    reader = readers.kind(path)(path)
    expected = sorted([*(f"one/{name}" for name in SAMPLES), "two/7.png", "two/grid.png"])
    assert reader.keys == expected and not reader.missing
    assert reader.ignored[drawn.LEFT_OUT] == 5
    contents = [(root / key).read_bytes() for key in expected]
    assert [reader.read(i) for i in range(len(expected))] == contents


def test_what_is_missing_is_counted(tmp_path):
    reader = readers.Folder(write(tmp_path / "d", [*SAMPLES[:4], "grid.png"], settings()))
    assert (reader.keys, reader.missing) == (SAMPLES[:4], {"": 2})


def test_names_may_have_come_back_in_another_form(tmp_path):
    names = [unicodedata.normalize("NFD", name) for name in SAMPLES]
    reader = readers.Folder(write(tmp_path / "d", [*names, "grid.png"], settings()))
    assert (len(reader.keys), reader.missing) == (6, {})


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"{",
        b"[]",
        b"\xff",
        settings(software="another"),
        settings(num=0),
        settings(num="3"),
        settings(names=None),
    ],
)
def test_without_its_settings_names_tell(tmp_path, content):
    reader = readers.Folder(write(tmp_path / "d", [*SAMPLES, *BESIDE], content))
    assert reader.keys == sorted(SAMPLES) and not reader.missing
    others = ["00000_a.png", "cat.png", "grid.png"]
    assert readers.Folder(write(tmp_path / "e", others, content)).keys == others
    assert readers.Folder(write(tmp_path / "f", ["grid.png"], content)).keys == ["grid.png"]
