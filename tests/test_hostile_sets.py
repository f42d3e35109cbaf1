"""Damaged, mixed up and unfinished token sets, end to end: never taken for good ones."""

import json
import os
import re
import shutil
import struct

import jax
import numpy as np
import pytest
import tiny
from hostile import (
    BAD,
    command,
    finished,
    model,
    noise,
    one_device,
    refused,
    run,
    same_files,
    snapshot,
    untouched,
    write_folder,
)

from enat_jax.data import records, tokens
from enat_jax.inference import tokenization

__all__ = ["finished", "model", "one_device", "untouched"]  # fixtures


def test_a_tokenizer_that_is_none(model, tmp_path, capsys, untouched):
    source = write_folder(tmp_path / "pictures")
    broken = shutil.copytree(model, tmp_path / "tokenizer")
    for file in (broken / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:500])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tokenizer.json").write_bytes(b"\xff\xfe not JSON")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text('{"format": "something else"}')
    untouched()
    for name, words in {
        "tokenizer": ["tokenizer"],
        "text": ["text/tokenizer.json", "not JSON"],
        "other": ["other/tokenizer.json", "something else"],
        "nothing": ["nothing/tokenizer.json"],
    }.items():
        refused(command(tmp_path / name, tmp_path / "out", "--source", source), words, capsys)
    assert not (tmp_path / "out").exists()


def spoil_json(name):
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:30])


def flip_a_bit(out):
    path = out / "00001-of-00003.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def swap_within(out):
    for end in (".npy", ".json"):
        first, second = out / f"00000-of-00003{end}", out / f"00001-of-00003{end}"
        other = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(other)


def drop(name):
    return lambda out: (out / name).unlink()


def strange(name, values):
    return lambda out: (out / name).write_text(json.dumps(values))


SHARD = "00001-of-00003"
DAMAGED = {  # kind: what happened to a finished set, words of the message
    "records cut off": (lambda out: os.truncate(out / f"{SHARD}.npy", 150), f"remove {SHARD}.json"),
    "a flipped bit": (flip_a_bit, f"remove {SHARD}.json"),
    "records gone": (drop(f"{SHARD}.npy"), f"remove {SHARD}.json"),
    "list of images cut off": (spoil_json(f"{SHARD}.json"), f"remove {SHARD}.json"),
    "list of images of another kind": (strange(f"{SHARD}.json", []), f"remove {SHARD}.json"),
    "list of images lacks things": (
        strange(f"{SHARD}.json", {"num_records": 4}),
        f"remove {SHARD}.json",
    ),
    "two shards swapped": (swap_within, "another place"),
    "plan cut off": (spoil_json("plan.json"), "plan.json is damaged"),
    "plan of another kind": (strange("plan.json", ["x"]), "no token set of ours"),
    "plan gone": (drop("plan.json"), "is no token set"),
}


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_set_is_never_taken_for_a_good_one(
    model, finished, tmp_path, capsys, kind, unfinished
):
    spoil, words = DAMAGED[kind]
    out = shutil.copytree(finished, tmp_path / "out")
    if unfinished:
        (out / "metadata.json").unlink()
    spoil(out)
    before = snapshot(tmp_path, tmp_path / "none")
    arguments = command(model, out, "--source", finished.parent / "pictures")
    refused(arguments, ["out", words], capsys)
    assert snapshot(tmp_path, tmp_path / "none") == before
    if words.startswith("remove 0"):  # as the message says
        (out / f"{SHARD}.json").unlink()
        assert run(arguments, capsys) == (0, [])
        assert same_files(out, finished)


@pytest.mark.parametrize("spoil", [spoil_json("metadata.json"), strange("metadata.json", [1])])
def test_damaged_metadata_are_written_anew(model, finished, tmp_path, capsys, spoil):
    out = shutil.copytree(finished, tmp_path / "out")
    spoil(out)
    inspected = command(model, tmp_path / "inspection", "--inspect", out)
    refused(inspected, ["metadata.json", "again"], capsys)
    arguments = command(model, out, "--source", finished.parent / "pictures")
    assert run(arguments, capsys) == (0, [])
    assert same_files(out, finished)


@pytest.mark.parametrize(
    ("lacking", "words"), [("skipped", "lacks 'skipped'"), ("grid", "damaged ('grid')")]
)
def test_metadata_that_lack_something(model, finished, tmp_path, capsys, lacking, words):
    out = shutil.copytree(finished, tmp_path / "out")
    metadata = json.loads((out / "metadata.json").read_text())
    metadata.pop(lacking)
    (out / "metadata.json").write_text(json.dumps(metadata))
    refused(command(model, tmp_path / "x", "--inspect", out), ["out", words], capsys)


def test_shards_of_another_set_are_noticed(model, finished, tmp_path, capsys):
    """Of the same number of pictures, in the same classes, by another tokenizer."""
    other = tmp_path / "tokenizer"
    tiny.make_tokenizer(seed=1).save(other)
    source = finished.parent / "pictures"
    assert run(command(other, tmp_path / "other", "--source", source), capsys) == (0, [])
    out = shutil.copytree(finished, tmp_path / "out")
    for end in (".npy", ".json"):
        shutil.copy(tmp_path / "other" / f"{SHARD}{end}", out / f"{SHARD}{end}")
    refused(command(model, out, "--source", source), [f"{SHARD}.json", "another token set"], capsys)
    refused(
        command(model, tmp_path / "x", "--inspect", out),
        [f"{SHARD}.json", "another token set"],
        capsys,
    )
    refused(command(other, out, "--source", source), ["its tokenizer is"], capsys)


def more_pictures(source):
    (source / "cat" / "99.png").write_bytes(noise(99))


def other_pictures(source):
    (source / BAD).write_bytes(noise(99, side=20))


def fewer_pictures(source):
    (source / BAD).unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (more_pictures, "num_images is 12"),
        (other_pictures, "were renamed or"),
        (fewer_pictures, f"put back what is missing of its pictures: {BAD}"),
    ],
)
def test_pictures_that_changed_before_it_went_on(
    model, finished, tmp_path, capsys, untouched, change, words
):
    source = shutil.copytree(finished.parent / "pictures", tmp_path / "pictures")
    out = shutil.copytree(finished, tmp_path / "out")
    for name in ("metadata.json", f"{SHARD}.json"):
        (out / name).unlink()
    (source / "notes.txt").write_text("what is no picture does not matter")
    change(source)
    untouched()
    refused(command(model, out, "--source", source), ["another token set", words], capsys)


def test_what_lies_beside_the_pictures_does_not_matter(model, finished, tmp_path, capsys):
    source = shutil.copytree(finished.parent / "pictures", tmp_path / "pictures")
    out = shutil.copytree(finished, tmp_path / "out")
    (out / f"{SHARD}.json").unlink()
    (source / "notes.txt").write_text("a new one")
    assert run(command(model, out, "--source", source), capsys) == (0, [])
    assert same_files(out, finished)


def test_a_disk_that_is_full_for_a_while(model, finished, tmp_path, capsys, monkeypatch):
    """Of shards that share a batch of several devices, none is finished with a gap."""
    devices = jax.devices()
    assert len(devices) > 2
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:3])
    source, write = finished.parent / "pictures", tokens.write_shard

    def full(directory, spec, shard, *arguments):
        if shard == 0:
            raise OSError(28, "No space left on device", str(directory / "00000-of-00003.npy"))
        write(directory, spec, shard, *arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(tokens, "write_shard", full)
        refused(command(model, out, "--source", source), ["No space left", "00000-of"], capsys)
    assert [path.name for path in out.iterdir()] == ["plan.json"]
    assert run(command(model, out, "--source", source), capsys) == (0, [])
    assert same_files(out, finished)


def test_a_batch_that_does_not_fit_into_memory(model, finished, tmp_path, capsys, monkeypatch):
    def too_large(*arguments, **settings):
        raise MemoryError

    monkeypatch.setattr(tokenization, "_encoder", too_large)
    source = finished.parent / "pictures"
    refused(command(model, tmp_path / "out", "--source", source), ["--batch-size"], capsys)


def test_records_that_are_damaged_are_not_trained_on(finished, tmp_path):
    """A label or a token that does not exist would be trained on in silence: JAX clips indices."""
    path = shutil.copytree(finished, tmp_path / "out") / f"{SHARD}.npy"
    rows = np.load(path)
    for name, words in (("label", "label outside of [0, 2)"), ("tokens", "tokens outside of")):
        spoilt = rows.copy()
        spoilt[name][2] = 200
        np.save(path, spoilt)
        found = tokens.TokenSet.open(tmp_path / "out")
        assert len(found.gather(np.array([0, 5, 7]))["labels"]) == 3
        with pytest.raises(ValueError, match=re.escape(words)):
            found.gather(np.arange(12))


CUT = np.lib.format.magic(1, 0) + struct.pack("<H", 118)
ODD = b"{'descr': '<i8', 'fortran_order': False, 'shape': (3, 99999999999), }".ljust(117) + b"\n"
REFERENCES = {  # kind: bytes of a feature file, words
    "no bytes": (b"", "is not a .npy file"),
    "a text": (b"features, honestly", "is not a .npy file"),
    "header cut off": (CUT, "is not a .npy file"),
    "header that is no Python": (CUT + b"{'descr': ((((".ljust(117) + b"\n", "is not a .npy file"),
    "enormous rows": (CUT + ODD, "train.npy"),
    "cut off": (records.npy_bytes(np.zeros((4, 17), np.int64))[:-8], "cut off"),
    "fractions": (records.npy_bytes(np.zeros((4, 17))), "a feature file of the reference is"),
    "one number": (records.npy_bytes(np.int64(3)), "no rows"),
    "no rows": (records.npy_bytes(np.zeros((0, 17), np.int64)), "has no rows"),
    "no square": (records.npy_bytes(np.zeros((4, 16), np.int64)), "no square grid"),
    "a label of no class": (records.npy_bytes(np.full((4, 17), 2)), "the label of row 0 is 2"),
    "no code of the tokenizer": (records.npy_bytes(np.eye(4, 17, 2, int) * 8), "token 1 of row 0"),
    "a negative token": (records.npy_bytes(np.eye(4, 17, 2, int) * -1), "token 1 of row 0 is -1"),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_feature_file_of_the_reference_that_is_none(tmp_path, kind):
    content, words = REFERENCES[kind]
    (tmp_path / "train.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.npy") as caught:
        found = tokens.TokenSet.open_reference(tmp_path / "train.npy", 8, ("bird", "cat"))
        found.gather(np.arange(4))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_of_another_precision_are_not_mixed(model, finished, capsys):
    again = command(model, finished, "--source", finished.parent / "pictures")
    with jax.default_matmul_precision("highest"):
        refused(again, ["preprocessing.numerics", "'highest'"], capsys)
    assert run(again, capsys) == (0, [])
