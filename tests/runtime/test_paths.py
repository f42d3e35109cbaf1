"""Paths as people type them."""

import ast
import pathlib

import numpy as np
import pytest
import tiny

from enat_jax import analyze, evaluate, export, import_torch, prepare, sample, tokenize_images
from enat_jax.data import images, token_data
from enat_jax.evaluation import statistics
from enat_jax.inference import tokenizer
from enat_jax.inference.generator import Generator
from enat_jax.runtime import cli, paths

PACKAGE = pathlib.Path(paths.__file__).parents[1]


def test_a_home_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/homes/me")
    assert paths.local("~/x") == cli.path("~/x") == pathlib.Path("/homes/me/x")
    assert paths.local("~root/x").is_absolute()
    assert paths.local(paths.local("./~/x")) == pathlib.Path("./~/x")  # a folder of that name
    with pytest.raises(ValueError, match="no user ~nobody-of-this-name"):
        paths.local("~nobody-of-this-name/x")


@pytest.mark.parametrize(
    "path", ["runs/a[1]", "C:\\x", "a:b/c", "run:/x", "a//b", "é\n", "a\udcff"]
)
def test_other_names_are_taken_as_they_are(path):
    assert paths.local(path) == paths.local(pathlib.Path(path)) == pathlib.Path(path)


@pytest.mark.parametrize("scheme", ["gs", "s3", "hdfs", "file", "https", "abfss"])
def test_an_address_is_no_path(scheme):
    address = f"{scheme}://bucket/x"
    for path in (address, pathlib.Path(address)):
        with pytest.raises(ValueError, match=f"^{address} is an address and no path"):
            paths.local(path)
    with pytest.raises(ValueError, match="an empty text is no path"):
        paths.local("")


COMMANDS = {
    "sample": (sample.main, "--model M"),
    "export": (export.main, "--model M"),
    "tokenize_images": (tokenize_images.main, "--model M"),
    "import_torch": (import_torch.main, "--vqgan V"),
    "prepare": (prepare.main, "--tars T"),
    "analyze": (analyze.main, "costs"),
    "evaluate": (evaluate.main, "--model M --reference digits"),
}
TO_BUCKETS = ("export", "tokenize_images")  # see test_buckets.py


@pytest.mark.parametrize("name", COMMANDS)
def test_no_program_writes_to_an_address(name, tmp_path, monkeypatch, capsys):
    main, arguments = COMMANDS[name]
    scheme = "s3" if name in TO_BUCKETS else "gs"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.run(main, [*arguments.split(), "--out", f"{scheme}://bucket/x"])
    assert end.value.code == 2 and not list(tmp_path.iterdir())
    assert f"{scheme}://bucket/x is an address" in capsys.readouterr().err.splitlines()[-1]


def test_no_library_call_writes_to_an_address_or_into_a_folder_of_tildes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model = tiny.make_generator()
    with pytest.raises(ValueError, match="s3://bucket/x is an address"):
        model.save("s3://bucket/x")
    model.save("~/model", ["safetensors"])
    assert Generator.load("~/model").fingerprint == model.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_paths_in_a_config_have_homes(monkeypatch, tmp_path):
    codec = tiny.make_tokenizer()
    codec.save(tmp_path / "codec", ["safetensors"])
    made = tiny.token_set(
        np.zeros((3, tiny.NUM_TOKENS), int),
        np.arange(3),
        codebook_size=tiny.CODES,
        class_names=tiny.CLASSES,
        tokenizer=codec.fingerprint,
    )
    tiny.write_tokens(tmp_path / "set", made)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = tokenizer.Tokenizer.load("~/codec")
    assert len(token_data.open_tokens("~/set", {}, found)) == 3
    np.save(tmp_path / "set.npy", np.zeros((5, 1 + tiny.NUM_TOKENS), np.int64))
    assert len(token_data.open_tokens("~/set.npy", {"num_classes": 3}, found)) == 5
    for call in (lambda path: images.open_source(path, "train"), statistics.Statistics.load):
        with pytest.raises(ValueError, match="^gs://bucket/x is an address"):
            call("gs://bucket/x")


def test_no_argument_is_a_plain_path():
    """One that is, takes ``~`` and ``gs://`` for names of directories."""
    for file in [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/arguments.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                kinds = {ast.unparse(x.value) for x in node.keywords if x.arg == "type"}
                assert not kinds & {"pathlib.Path", "Path"}, f"{file.name}, line {node.lineno}"
