"""Runs, models and token sets in buckets: whole or not there, fetched once, refused in one line."""

import os
import random
import signal
import subprocess
import sys
import time

import bucket
import chex
import fsspec
import jax
import numpy as np
import pytest
import tiny
from small_runs import ROOT, lines, small_config, start, write_data

from enat_jax import export, tokenize_images, train
from enat_jax.checkpoints import model_files
from enat_jax.data import tokens
from enat_jax.inference.generator import Generator
from enat_jax.runtime import buckets, cli, files, paths


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where copies are kept."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(path))
        yield path / "enat_jax" / "buckets"


@pytest.fixture(scope="module")
def store():
    """gs://bucket, which all tests of this file share."""
    with pytest.MonkeyPatch.context() as patch, bucket.emulated(patch.setenv) as found:
        yield found


@pytest.fixture
def memory():
    """fsspec's own store, which needs no package."""
    found = fsspec.filesystem("memory")
    yield found
    found.store.clear()


def test_what_is_fetched_is_fetched_once_and_whole(memory, cache, capsys, monkeypatch):
    for name in ("w.safetensors", "w/part", "deep/b.json"):
        memory.pipe(f"/m/{name}", name.encode())
    memory.pipe("/m2/other", b"")
    copy = buckets.fetched("memory://m/")
    assert copy.name == "m" and copy.is_relative_to(cache)
    found = {str(x.relative_to(copy)): x.read_bytes() for x in copy.rglob("*") if x.is_file()}
    assert found == {"w.safetensors": b"w.safetensors", "deep/b.json": b"deep/b.json"}
    assert "fetching 2 files, 0.0 MiB, of memory://m/" in capsys.readouterr().err
    (copy / "deep" / "b.json").unlink()
    assert buckets.fetched("memory://m/") == copy
    assert "fetching 1 files" in capsys.readouterr().err
    assert buckets.fetched("memory://m/") == copy and not capsys.readouterr().err
    memory.pipe("/m/deep/b.json", b"changed")
    other = buckets.fetched("memory://m/")
    assert other != copy and (other / "deep" / "b.json").read_bytes() == b"changed"
    assert buckets.fetched("memory://m/w.safetensors").read_bytes() == b"w.safetensors"
    with pytest.raises(FileNotFoundError, match="nothing at memory://none"):
        buckets.fetched("memory://none")
    memory.pipe("/m/a/../../x", b"")
    monkeypatch.setattr(memory, "find", lambda *_, **__: {"/m/../x": {"type": "file", "size": 1}})
    with pytest.raises(ValueError, match="object of the name '../x'"):
        buckets.fetched("memory://m")


def test_paths_stay_paths_and_other_addresses_are_refused(tmp_path):
    assert buckets.fetched(tmp_path) == paths.place(tmp_path) == tmp_path
    for address in ("s3://b/x", "https://b/x"):
        with pytest.raises(ValueError, match="is an address and no path"):
            paths.place(address)
    for address in ("gs://", "gs:///x", "gs://A B/x"):
        with pytest.raises(ValueError, match="names no bucket"):
            paths.place(address)
    with pytest.raises(ValueError, match="nosuch://x: Protocol not known"):
        buckets.fetched("nosuch://x")
    place = paths.place("gs://bucket/a b/x")
    assert str(place) == "gs://bucket/a b/x" == str(paths.place(place))
    assert paths.address(place / "y") == "gs://bucket/a b/x/y" and place.parent.name == "a b"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ImportError("Please install gcsfs"), ValueError, r"pip install 'enat_jax\[gcs\]'"),
        (OSError("Forbidden: b\nno"), OSError, "may not do that there .* Storage Object Admin"),
        (OSError("Anonymous caller has no access"), OSError, "no credentials .*gcloud auth"),
        (FileNotFoundError("b/x"), OSError, "no such bucket, or nothing of this name"),
    ],
)
def test_errors_of_a_bucket_are_one_line(error, kind, words):
    library = {"__name__": "gcsfs.core"}
    exec("def fail(error): raise error", library)
    with pytest.raises(kind, match=f"^gs://b/x.*{words}") as found, buckets.explained("gs://b/x"):
        library["fail"](error)
    assert "\n" not in str(found.value)


def test_other_errors_stay_as_they_are(tmp_path):
    for error in (ImportError("x"), KeyError("x"), FileNotFoundError("x")):
        with pytest.raises(type(error)) as found, buckets.explained("gs://b/x"):
            raise error
        assert found.value is error
    with pytest.raises(FileNotFoundError, match="^x$"), buckets.explained(tmp_path):
        raise FileNotFoundError("x")


def test_files_in_a_bucket(store):
    place = paths.place("gs://bucket/files")
    files.write_json(place / "a" / "b.json", {"x": 1})
    assert files.read_json(place / "a" / "b.json", "") == {"x": 1}
    files.append(place / "log", b"1\n")
    files.append(place / "log", b"2\n")
    assert store.read("files/log") == b"1\n2\n"
    with files.lock_directory(place), files.lock_directory(place):
        pass  # nobody is kept out
    with files.new_directory(place / "new", "model.json") as made:
        (made / "sub").mkdir()
        for name in ("a", "model.json", "sub/z"):
            (made / name).write_text(name)
        assert not store.names("files/new")
    assert store.names("files/new/") == [f"files/new/{x}" for x in ("a", "model.json", "sub/z")]
    assert store.generation("files/new/model.json") > store.generation("files/new/sub/z")
    files.remove_tree(place)
    files.remove_tree(place)
    assert not store.names("files/")


def test_what_cannot_be_written_is_refused_before_the_work(store, monkeypatch, capsys):
    with pytest.raises(OSError, match="^gs://missing/run: there is no such bucket"):
        buckets.require(paths.place("gs://missing/run"))
    monkeypatch.setattr(store, "denied", True)
    with pytest.raises(OSError, match="^gs://bucket/run: this user may not do that there"):
        buckets.require(paths.place("gs://bucket/run"))
    for main, arguments in (
        (tokenize_images.main, "--model M --out gs://bucket/tokens"),
        (export.main, "--model M --out gs://bucket/model"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.run(main, arguments.split())
        assert end.value.code == 2
        assert "error: gs://bucket/" in capsys.readouterr().err
    assert not store.names("run") and not store.names("tokens") and not store.names("model")


@pytest.mark.slow
def test_a_token_set_is_made_there_and_read_from_there(store, tmp_path, capsys):
    made = tiny.token_set(
        np.arange(64).reshape(4, 16) % 20,
        np.arange(4) % 3,
        codebook_size=20,
        class_names=("a", "b", "c"),
        tokenizer="none",
    )
    tiny.write_tokens(tmp_path / "here", made)
    tiny.write_tokens("gs://bucket/tokens", made)
    names = store.names("tokens/")
    assert {x.removeprefix("tokens/") for x in names} == {
        x.name for x in (tmp_path / "here").iterdir()
    }
    for name in names:
        assert store.read(name) == (tmp_path / "here" / name.removeprefix("tokens/")).read_bytes()
    found, here = (
        tokens.TokenSet.open("gs://bucket/tokens"),
        tokens.TokenSet.open(tmp_path / "here"),
    )
    chex.assert_trees_all_equal(found.gather(np.arange(4)), here.gather(np.arange(4)))


SMALL = {"train.num_steps": 4, "train.save_every": 2, "train.eval_every": 2, "train.pictures": True}


def run(root, workdir, num_steps=4, **named):
    """The state after so many steps, as numpy arrays."""
    config = small_config(root, **SMALL | {"train.num_steps": num_steps})
    config.train.rehearse = num_steps == 2
    return jax.device_get(train.train(config, workdir, jax.devices()[:1], **named))


@pytest.mark.slow
def test_a_run_in_a_bucket_makes_what_one_on_disk_makes(store, tmp_path, capsys):
    """And it goes on, its model is read from there, and one is exported there."""
    write_data(tmp_path)
    here = tmp_path / "run"
    expected = run(tmp_path, here)
    run(tmp_path, "gs://bucket/run", num_steps=2)
    assert not store.names("run/rehearsal") and store.newest("run") == 2
    chex.assert_trees_all_equal(run(tmp_path, "gs://bucket/run"), expected)
    written = [*(here / "model").rglob("*.json"), *(here / "model").rglob("*.safetensors")]
    written += [*(here / "pictures").iterdir(), here / "config.json", here / "metrics.jsonl"]
    names = {str(path.relative_to(here)) for path in written}
    assert len(names) > 6 and names <= {x.removeprefix("run/") for x in store.names("run/")}
    assert [x["step"] for x in store.lines("run")] == [x["step"] for x in lines(here)]
    images = Generator.load("gs://bucket/run/model").sample([0, 1, 2], seed=0)
    np.testing.assert_array_equal(images, Generator.load(here / "model").sample([0, 1, 2], seed=0))
    chex.assert_trees_all_equal(run(tmp_path, "gs://bucket/run", from_step=2), expected)
    assert store.names("run/checkpoints/4.set_aside/")
    export.main("--workdir gs://bucket/run --step 2 --out gs://bucket/exported".split())
    assert "[export] gs://bucket/exported: step 2" in capsys.readouterr().out
    assert Generator.load("gs://bucket/exported").provenance["step"] == 2
    with pytest.raises(ValueError, match="in a bucket nothing is added"):
        export.main("--model gs://bucket/exported --out gs://bucket/exported".split())


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bits(store, tmp_path):
    """kill -9 between saves to the bucket and within them."""
    write_data(tmp_path)
    settings = [f"--config.train.{x}" for x in ("num_steps=40", "pictures=False", "rehearse=False")]
    begin = lambda workdir: start(tmp_path, workdir, tmp_path / "compiled", *settings)  # noqa: E731

    def finish(process):
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output

    finish(begin(tmp_path / "whole"))
    rng = random.Random(0)
    for step in (5, 15, 30):
        process = begin("gs://bucket/killed")
        wanted = rng.randrange(24)  # objects after that step
        while store.newest("killed") < step and process.poll() is None:
            time.sleep(0.01)
        before = store.objects_written
        while store.objects_written < before + wanted and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert store.newest("killed") >= step and not store.names("killed/model/")
    finish(begin("gs://bucket/killed"))
    theirs = model_files.load_params(tmp_path / "whole" / "checkpoints" / "40" / "state")
    ours = model_files.load_params("gs://bucket/killed/checkpoints/40/state")
    chex.assert_trees_all_equal(ours, theirs)
    logged = [
        [{k: v for k, v in x.items() if k in ("step", "loss") or "held_out/" in k} for x in y]
        for y in (store.lines("killed"), lines(tmp_path / "whole"))
    ]
    for name in ("loss", "held_out/loss_0.5_visible"):
        ours, theirs = ([x["step"] for x in y if name in x] for y in logged)
        assert ours == theirs


@pytest.mark.slow
def test_a_missing_package_is_named(tmp_path):
    """In a process in which gcsfs cannot be imported."""
    program = (
        "import sys; sys.modules['gcsfs'] = None\n"
        "from enat_jax import export; from enat_jax.runtime import cli\n"
        "cli.run(export.main, ['--model', 'gs://bucket/model', '--out', sys.argv[1]])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 2, found.stderr
    assert found.stderr.startswith("error: gs://bucket/model needs a package"), found.stderr
    assert "pip install 'enat_jax[gcs]'" in found.stderr and found.stderr.count("\n") == 1
