"""From tar files to a data set: the program as a whole, its mistakes, and its death at any moment.

What is right is what TFDS's own machinery makes of the same pictures.
"""

import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import fake_imagenet
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from enat_jax import prepare
from enat_jax.data import imagenet, imagenet_records
from enat_jax.runtime import cli, files

ENCODED_ANEW = {*fake_imagenet.CMYK, fake_imagenet.PNG}
NUM_SHARDS = 3


def arguments(tars, out, *more):
    return ["--tars", str(tars), "--out", str(out), "--processes", "1", *more]


def run(capsys, *given):
    """What the program says, and its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.run(prepare.main, [str(value) for value in given])
    captured = capsys.readouterr()
    return captured.out + captured.err, ended.value.code


def error(capsys, *given):
    """The one line that the program says about a mistake."""
    said, code = run(capsys, *given)
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return fake_imagenet.write_tars(tmp_path_factory.mktemp("imagenet") / "tars")


@pytest.fixture(scope="module")
def prepared(tars, tmp_path_factory):
    """The data_dir of a data set that two processes wrote."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare.prepare(tars, out, processes=2, allow_incomplete=True, num_shards=NUM_SHARDS)
    return out


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The directory of the same data set as TFDS writes it, but that it encodes nothing anew."""
    return fake_imagenet.build_with_tfds(tmp_path_factory.mktemp("expected"), NUM_SHARDS)


def records(path):
    reader = array_record_module.ArrayRecordReader(str(path))
    found = [tf_example_pb2.Example.FromString(record) for record in reader.read_all()]
    reader.close()
    return [record.features.feature for record in found]


# ---- The result ----------------------------------------------------------------------------------


def test_records_order_and_files_are_those_of_tfds(prepared, expected):
    ours = prepared / "imagenet2012" / "5.1.0"
    names = sorted(path.name for path in expected.glob("*array_record*"))
    assert names == sorted(path.name for path in ours.glob("*array_record*"))
    assert len(names) == 3 * NUM_SHARDS
    seen = set()
    for name in names:
        pairs = list(zip(records(ours / name), records(expected / name), strict=True))
        for record, wanted in pairs:
            file_name = wanted["file_name"].bytes_list.value[0].decode()
            seen.add(file_name)
            assert record["file_name"] == wanted["file_name"]
            assert record["label"] == wanted["label"]
            # The other builder does not encode anything anew.
            assert (record["image"] == wanted["image"]) == (file_name not in ENCODED_ANEW)
    assert ENCODED_ANEW < seen and len(seen) == 70


def test_splits_are_described_as_tfds_does(prepared, expected):
    ours = json.loads((prepared / "imagenet2012/5.1.0/dataset_info.json").read_text())
    wanted = json.loads((expected / "dataset_info.json").read_text())
    assert [split["name"] for split in ours["splits"]] == ["train", "validation", "test"]
    for split, other in zip(ours["splits"], wanted["splits"], strict=True):
        # Three pictures of "train" were encoded anew, and so are of another size.
        compared = split.keys() - ({"numBytes"} if split["name"] == "train" else set())
        assert {key: split[key] for key in compared} == {key: other[key] for key in compared}
    for key in ("name", "version", "fileFormat"):
        assert ours[key] == wanted[key]
    for name in ("features.json", "label.labels.txt"):
        assert (prepared / "imagenet2012/5.1.0" / name).read_bytes() == (
            expected / name
        ).read_bytes()


def test_tfds_reads_it_by_name_and_by_directory(prepared):
    by_name = tfds.builder("imagenet2012", data_dir=prepared).as_data_source(
        split="validation", decoders={"image": tfds.decode.SkipDecoding()}
    )
    directory = prepared / "imagenet2012" / "5.1.0"
    by_directory = tfds.builder_from_directory(directory).as_data_source(split="validation")
    assert len(by_name) == len(by_directory) == 5
    ids = imagenet_records.validation_ids()
    for i in range(5):
        name = by_name[i]["file_name"].decode()
        assert by_name[i]["image"] == fake_imagenet.picture(name)
        assert imagenet.IDS[by_name[i]["label"]] == ids[int(name[15:23]) - 1]
        pixels = np.asarray(PIL.Image.open(io.BytesIO(fake_imagenet.picture(name))))
        np.testing.assert_array_equal(by_directory[i]["image"], pixels)
    with_names = tfds.builder_from_directory(directory).info.features["label"]
    assert with_names.int2str(0) == "n01440764"


def test_nothing_but_the_data_set_is_left(prepared):
    assert [path.name for path in (prepared / "imagenet2012").iterdir()] == ["5.1.0"]
    assert len(contents(prepared / "imagenet2012" / "5.1.0")) == 3 * NUM_SHARDS + 3


def test_the_program_needs_no_tensorflow_and_takes_no_accelerator(tars, tmp_path):
    code = (
        "import sys; from enat_jax import prepare; prepare.main(sys.argv[1:]); import jax\n"
        "print({m.split('.')[0] for m in sys.modules} & {'tensorflow', 'torch'}, jax.devices())"
    )
    environment = {key: os.environ[key] for key in os.environ.keys() - {"JAX_PLATFORMS"}}
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments(tars, tmp_path / "data", "--allow-incomplete")],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert "set() [CpuDevice" in ended.stdout, ended.stdout
    assert "70 images" in ended.stdout
    assert "step 70/70" in ended.stderr
    again = prepare.is_done(tmp_path / "data/imagenet2012/5.1.0", ["train", "validation", "test"])
    assert again


def test_running_again_says_that_it_is_there_and_writes_nothing(prepared, capsys):
    before = contents(prepared / "imagenet2012" / "5.1.0")
    leftover = prepared / "imagenet2012" / "5.1.0.unfinished"  # killed just before removing it
    leftover.mkdir()
    prepare.main(["--tars", "nowhere", "--out", str(prepared)])
    assert "5.1.0 is already there" in capsys.readouterr().out
    assert contents(prepared / "imagenet2012" / "5.1.0") == before
    assert not leftover.exists()


# ---- Mistakes ------------------------------------------------------------------------------------


def test_missing_tar_files_are_named_with_where_to_get_them(tars, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    said = error(capsys, *arguments(empty, tmp_path / "data"))
    assert f"{empty / 'ILSVRC2012_img_train.tar'} (for the split train)" in said
    assert "https://image-net.org/download-images" in said
    shutil.copy(tars / "ILSVRC2012_img_val.tar", empty)
    said = error(capsys, *arguments(empty, tmp_path / "data", "--splits", "validation,test"))
    assert f"{empty / 'ILSVRC2012_img_test.tar'} (for the split test)" in said
    assert not (tmp_path / "data").exists()


def test_an_incomplete_tar_file_is_refused_unless_allowed(tars, tmp_path, capsys):
    for split, file, numbers in (
        ("train", "ILSVRC2012_img_train.tar", "62 pictures, not 1281167"),
        ("validation", "ILSVRC2012_img_val.tar", "5 pictures, not 50000"),
        ("test", "ILSVRC2012_img_test.tar", "3 pictures, not 100000"),
    ):
        said = error(capsys, *arguments(tars, tmp_path / "data", "--splits", split))
        assert f"{tars / file} holds {numbers}" in said and "--allow-incomplete" in said
        shutil.rmtree(tmp_path / "data")


def test_a_tar_file_cut_short_is_named(tars, tmp_path, capsys):
    cut = tmp_path / "ILSVRC2012_img_val.tar"
    cut.write_bytes((tars / cut.name).read_bytes()[:5000])
    more = ("--splits", "validation", "--allow-incomplete")
    said = error(capsys, *arguments(tmp_path, tmp_path / "data", *more))
    assert str(cut) in said and "cut short" in said


def test_unknown_splits_and_numbers_are_refused(tars, tmp_path, capsys):
    said = error(capsys, *arguments(tars, tmp_path / "data", "--splits", "train,val"))
    assert "there is no split 'val': choose among train, validation, test" in said
    said, code = run(capsys, "--tars", tars, "--out", tmp_path, "--processes", 0)
    assert code == 2 and "'0' is not a whole number from 1 to" in said


def test_an_output_that_cannot_be_written_is_named(tars, tmp_path, capsys):
    (tmp_path / "file").write_text("no directory")
    said = error(capsys, *arguments(tars, tmp_path / "file", "--allow-incomplete"))
    assert str(tmp_path / "file") in said


def test_a_disk_that_is_too_small_is_noticed_before_the_work(tars, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    said = error(capsys, *arguments(tars, tmp_path / "data", "--allow-incomplete"))
    assert "is too small" in said and "0.0 GB are free" in said


def test_what_is_no_finished_data_set_is_not_taken_for_one(prepared, tmp_path, capsys):
    def said(*more):
        return error(capsys, *arguments("nowhere", tmp_path, *more))

    final = tmp_path / "imagenet2012" / "5.1.0"
    final.mkdir(parents=True)
    assert f"{final} is there, but is no TFDS data set" in said()
    final.rmdir()
    shutil.copytree(prepared / "imagenet2012" / "5.1.0", final)
    info = final / "dataset_info.json"
    described = json.loads(info.read_text())
    info.write_text(json.dumps(described | {"fileFormat": "tfrecord"}))
    assert "is of format tfrecord, not array_record" in said()
    info.write_text(json.dumps(described | {"splits": described["splits"][:1]}))
    assert "has no split validation: remove it" in said("--splits", "train,validation")


def test_only_one_process_prepares_a_data_set(tars, tmp_path):
    unfinished = tmp_path / "imagenet2012" / "5.1.0.unfinished"
    unfinished.mkdir(parents=True)
    with (
        files.lock_directory(unfinished),
        pytest.raises(ValueError, match="another process is at work in .*5.1.0.unfinished"),
    ):
        prepare.prepare(tars, tmp_path, allow_incomplete=True)


# ---- Interruptions -------------------------------------------------------------------------------


def begun(tars, out, monkeypatch):
    """Leaves a preparation as it is when all is planned and no file is written."""

    def killed(shards, processes):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prepare, "_write_missing", killed)
        prepare.prepare(tars, out, allow_incomplete=True, num_shards=NUM_SHARDS)
    return out / "imagenet2012" / "5.1.0.unfinished"


def test_finished_files_are_kept_and_unfinished_ones_are_not(tars, prepared, tmp_path, monkeypatch):
    directory = begun(tars, tmp_path, monkeypatch) / "records"
    whole = contents(prepared / "imagenet2012" / "5.1.0")
    kept = directory / "imagenet2012-train.array_record-00001-of-00003"
    kept.write_bytes(whole[kept.name])
    os.utime(kept, (1, 1))
    for name in (f"{kept.name[:-14]}00002-of-00003.4711.unfinished", "dataset_info.json"):
        (directory / name).write_bytes(b"cut sho")
    scanned = []
    monkeypatch.setattr(imagenet, "scan", lambda *arguments: scanned.append(arguments))
    final = prepare.prepare(tars, tmp_path, allow_incomplete=True, num_shards=NUM_SHARDS)
    assert contents(final) == whole
    assert (final / kept.name).stat().st_mtime == 1
    assert scanned == []  # the index was kept, too


def test_other_tar_files_are_not_mixed_in(tars, tmp_path, monkeypatch):
    copied = shutil.copytree(tars, tmp_path / "tars")
    unfinished = begun(copied, tmp_path, monkeypatch)
    # Copied anew, with the same content: nothing to complain about but the time.
    os.utime(copied / "ILSVRC2012_img_val.tar", (1, 1))
    assert begun(copied, tmp_path, monkeypatch) == unfinished
    (copied / "ILSVRC2012_img_val.tar").write_bytes(
        fake_imagenet.pictures_tar(fake_imagenet.VALIDATION[:4])
    )
    message = f"{unfinished} was begun with other tar files.*remove {unfinished} to start anew"
    with pytest.raises(ValueError, match=message):
        prepare.prepare(copied, tmp_path, allow_incomplete=True, num_shards=NUM_SHARDS)


COMMAND = """
import pathlib, sys
from enat_jax import prepare

tars, out = map(pathlib.Path, sys.argv[1:])
prepare.prepare(tars, out, ["train"], processes=2, allow_incomplete=True, num_shards=60)
"""


def start(tars, out):
    command = [sys.executable, "-c", COMMAND, str(tars), str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_files(process, out, number):
    """Returns when so many files are finished, or the process has ended."""
    directory = out / "imagenet2012" / "5.1.0.unfinished" / "records"
    while process.poll() is None and len(list(directory.glob("*-of-00060"))) < number:
        time.sleep(0.001)


def workers_of(process):
    """The process ids of those that write."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(child)
        for child in children
        if "spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_text()
    ]


@pytest.mark.skipif(
    not pathlib.Path(f"/proc/self/task/{os.getpid()}/children").exists(),
    reason="this system does not list the children of a process",
)
def test_a_killed_worker_ends_the_program_which_then_can_go_on(tars, tmp_path):
    process = start(tars, tmp_path)
    wait_for_files(process, tmp_path, 1)
    process.send_signal(signal.SIGSTOP)  # the workers soon have nothing to do, but much is left
    os.kill(workers_of(process)[0], signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "OSError: a worker was killed, perhaps for lack of memory: run the same again" in said
    process = start(tars, tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert prepare.is_done(tmp_path / "imagenet2012" / "5.1.0", ["train"])


@pytest.mark.slow
def test_killed_again_and_again_the_result_is_the_same_to_the_byte(tars, tmp_path):
    process = start(tars, tmp_path / "whole")
    started = time.monotonic()
    process.communicate(timeout=60)
    seconds = time.monotonic() - started
    assert process.returncode == 0

    kills = 0
    delays = np.random.default_rng(0).uniform(0, seconds, 6)  # while it starts, scans or ends, too
    for number, delay in zip([1, 10, 25, 40, 50, 59], delays, strict=True):
        for out, wait in (
            (tmp_path / "by-files", lambda p, o, n=number: wait_for_files(p, o, n)),
            (tmp_path / "by-time", lambda p, o, d=delay: time.sleep(d)),
        ):
            process = start(tars, out)
            wait(process, out)
            process.kill()
            # Its workers hold the pipe: this returns when they have ended, too.
            process.communicate(timeout=20)
            kills += process.returncode == -signal.SIGKILL
    assert kills >= 6
    for out in (tmp_path / "by-files", tmp_path / "by-time"):
        process = start(tars, out)
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert [path.name for path in (out / "imagenet2012").iterdir()] == ["5.1.0"]
        whole = tmp_path / "whole" / "imagenet2012" / "5.1.0"
        assert contents(out / "imagenet2012" / "5.1.0") == contents(whole)
