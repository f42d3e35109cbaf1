"""What a run keeps of its pictures: scans are made once, and data are told by names."""

import errno
import gzip
import json
from unittest import mock

import hostile
import pytest
import several

from enat_jax.data import decoding, images, run_pictures, scan

FILES = {f"{'ab'[i % 2]}/{i:02d}.png": hostile.noise(i) for i in range(80)}
BAD = {"a/08.png": FILES["a/08.png"][:60], "b/33.png": b""}


class Run:
    """A run of pictures, that starts again and again."""

    def __init__(self, root):
        self.folder, self.workdir, self.lines = root / "pictures", root / "run", []
        self.workdir.mkdir()
        hostile.write_folder(self.folder, FILES | BAD)

    def start(self, unreadable="refuse", scanned=True, **settings):
        """The run's pictures, and the source that it is trained on."""
        self.lines.clear()
        found = run_pictures.RunPictures(
            self.workdir / "data", unreadable, scanned, self.lines.append
        )
        sources = (
            images.open_source(str(self.folder), split, **{"size": 8, "held_out": 0.2} | settings)
            for split in ("train", "test")
        )
        return found, found.choose(*sources)[0]

    def decoded(self, *arguments, **settings):
        """The keys of what a start decodes."""
        with mock.patch.object(images.Files, "check", autospec=True) as check:
            self.start(*arguments, **settings)
        return sorted({call.args[0].key(call.args[1]) for call in check.call_args_list})

    def mend(self):
        for key in BAD:
            (self.folder / key).write_bytes(FILES[key])

    def remove(self, *keys):
        for key in keys:
            (self.folder / key).unlink()


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_pictures_that_cannot_be_read_are_refused_all_at_once(run):
    with pytest.raises(ValueError, match="2 of 80 pictures cannot be read: .*skip") as caught:
        run.start()
    listed = run.workdir / "data" / "unreadable.txt"
    assert all(key in str(caught.value) for key in (*BAD, str(listed)))
    lines = listed.read_text().splitlines()
    assert sorted(line.partition(": ")[0] for line in lines) == sorted(BAD)


def test_every_remedy_of_the_refusal_works(run):
    with pytest.raises(ValueError):
        run.start()
    _, skipping = run.start("skip")
    assert "left out: 2 of 80 pictures cannot be read" in run.lines[-1]
    run.mend()
    assert len(run.start()[1]) > len(skipping)
    assert (run.workdir / "data" / "unreadable.txt").read_text() == ""
    run.remove(*BAD)
    assert run.start()[1].identity() == skipping.identity()


def test_pictures_are_decoded_once(run):
    run.mend()
    assert run.decoded() == sorted(FILES)
    assert run.decoded() == []
    hostile.write_folder(run.folder, {"a/new.png": hostile.noise(100), "b/01.png": b"other"})
    assert run.decoded() == ["a/new.png", "b/01.png"]
    assert run.decoded(size=4) == sorted([*FILES, "a/new.png"])


def test_those_that_could_not_be_read_are_looked_at_again(run):
    for _ in range(2):
        with pytest.raises(ValueError, match="2 of 80"):
            run.start()
    run.mend()
    assert run.decoded() == sorted(BAD)
    assert run.decoded(scanned=False) == sorted(BAD)


def test_a_scan_can_be_left_out(run):
    assert run.decoded(scanned=False) == []
    assert len(run.start(scanned=False)[1]) > 50
    assert not (run.workdir / "data" / "scanned.json.gz").exists()


def test_an_interrupted_scan_goes_on_where_it_was(run, monkeypatch):
    run.mend()
    monkeypatch.setattr(scan, "_CHUNK", 10)
    whole = scan.scan

    def interrupted(pictures):
        for number, part in enumerate(whole(pictures)):
            if number == 3:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(scan, "scan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.start()
    monkeypatch.setattr(scan, "scan", whole)
    assert len(run.decoded()) == 50


@pytest.mark.parametrize(
    "content",
    [b"", b"\x1f\x8b\x08", gzip.compress(b"[1"), gzip.compress(b"[]")],
    ids=["empty", "cut", "no JSON", "no notes"],
)
def test_damaged_notes_are_made_anew(run, content):
    run.mend()
    run.start()
    for path in (run.workdir / "data").iterdir():
        path.write_bytes(content)
    (run.workdir / "data" / "reported.jsonl").write_bytes(b'{"key": "a/08.png"}\n{"ke\n\xff\n[]\n')
    assert run.decoded() == sorted(FILES)


# --- the same data, or others --------------------------------------------------------------------


def broken_off(run):
    """A run without a scan, and the identity of its data, that met with a picture in training."""
    pictures, source = run.start(scanned=False)
    index = [key for key, *_ in source.listing()].index("a/08.png")
    with pytest.raises(
        ValueError, match="a/08.png: is .*remove this .*same command.*skip"
    ) as caught:
        with pictures.reporting():
            try:
                source.gather([0, index, 1])
            except images.UnreadableImage as error:
                raise ValueError(f"the evaluation failed: {error}") from error
    assert str(caught.value).startswith("the evaluation failed: a/08.png")
    return json.loads(json.dumps(source.identity()))


@pytest.mark.parametrize("remedy", ["removed", "replaced", "skipped"])
@pytest.mark.parametrize("scanned", [False, True])
def test_a_run_goes_on_after_each_remedy(run, remedy, scanned):
    (run.folder / "b/33.png").write_bytes(FILES["b/33.png"])
    before = broken_off(run)
    policy = "refuse"
    if remedy == "removed":
        run.remove("a/08.png")
    elif remedy == "replaced":
        (run.folder / "a/08.png").write_bytes(FILES["a/00.png"] + b"\n")
    else:
        policy = "skip"
    pictures, source = run.start(policy, scanned)
    now = source.identity()
    assert now != before
    assert pictures.recognise(before) == pictures.recognise(now) == now
    said = [line for line in run.lines if line.startswith("goes on although")]
    what = "1 of another size (a/08.png)" if remedy == "replaced" else "1 missing (a/08.png)"
    assert said == [f"goes on although pictures have changed: {what}"]
    if remedy == "skipped":  # and is then removed: the data stay the same
        run.remove("a/08.png")
        assert run.start()[1].identity() == now


def test_a_run_goes_on_when_what_was_left_out_is_mended(run):
    _, source = run.start("skip")
    before = source.identity()
    run.mend()
    pictures, source = run.start("skip")
    assert len(source) == before["num_images"] + len(BAD.keys() & {k for k, *_ in source.listing()})
    assert pictures.recognise(before) == source.identity()


def test_other_data_are_told_by_names(run):
    run.mend()
    before = run.start()[1].identity()
    keys = [key for key, *_ in run.start()[1].listing()]
    run.remove(*keys[:5])
    hostile.write_folder(
        run.folder, {"a/new.png": hostile.noise(100), keys[7]: hostile.noise(0) + b"1"}
    )
    pictures, source = run.start(held_out=0.2)
    with pytest.raises(ValueError, match="was trained on other pictures") as caught:
        pictures.recognise(before)
    message = str(caught.value)
    assert f"5 missing ({', '.join(keys[:3])}, ...)" in message
    assert f"1 of another size ({keys[7]})" in message
    assert len(message) < 500
    hostile.write_folder(run.folder, {k: FILES[k] for k in keys[:8]})
    (run.folder / "a/new.png").unlink()
    pictures, source = run.start()
    assert pictures.recognise(before) == source.identity() == before


def test_more_than_what_was_reported_is_refused(run):
    before = run.start("skip")[1].identity()
    run.remove("a/00.png", "a/08.png")
    with pytest.raises(ValueError, match=r"now there are 1 missing \(a/00.png\)"):
        run.start("skip")[0].recognise(before)


def test_what_nobody_kept_is_compared_as_it_stands(run):
    """Of runs of earlier versions, and of other settings, the checkpoint says what differs."""
    run.mend()
    pictures, source = run.start()
    other = source.identity() | {"listing": "0" * 64, "num_images": 7}
    assert pictures.recognise(other) == other
    settings = source.identity() | {"size": 16}
    assert pictures.recognise(settings) == settings


def test_pictures_that_earlier_versions_passed_over_are_named(run):
    run.mend()
    before = run.start()[1].identity()  # as an earlier version wrote it, without a listing
    for path in (run.workdir / "data").glob("listing-*"):
        path.unlink()
    hostile.write_folder(
        run.folder, {"a/1.tif": hostile.noise(1, "TIFF"), "b/2.JPE": FILES["b/01.png"]}
    )
    pictures, _ = run.start()
    with pytest.raises(ValueError, match=r"now there are . new \(.*earlier versions did not take"):
        pictures.recognise(before)


def test_what_the_system_does_not_give_is_no_reason_to_remove_it(run, monkeypatch):
    run.mend()
    with monkeypatch.context() as patch:
        refusing = mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
        patch.setattr("os.open", refusing)
        with pytest.raises(ValueError, match="80 of 80 .*let this user have it .*Mend") as caught:
            run.start()
    assert "remove this picture" not in str(caught.value)
    assert len(run.start()[1])


def test_the_limit_of_pixels_is_skipped_by_the_same_setting(run, monkeypatch):
    run.mend()
    monkeypatch.setattr(decoding, "MAX_PIXELS", 100)
    hostile.write_folder(run.folder, {"a/large.png": hostile.noise(0, side=11)})
    with pytest.raises(ValueError, match="a/large.png: has 11 x 11 pixels"):
        run.start()
    run.start("skip")
    assert "a/large.png" in run.lines[-1]


def test_another_error_stays_what_it_is(run):
    run.mend()
    pictures, _ = run.start()
    with pytest.raises(ZeroDivisionError), pictures.reporting():
        raise ZeroDivisionError
    assert not (run.workdir / "data" / "reported.jsonl").exists()


SCRIPT = """
import json, pathlib, sys
import jax
from enat_jax.data import images, run_pictures
from enat_jax.runtime import agreement, distributed
distributed.initialize("auto")
root = pathlib.Path(sys.argv[1])
seen = []
check = images.Files.check
images.Files.check = lambda source, i: (seen.append(source.key(i)), check(source, i))[1]
def start(policy):
    found = run_pictures.RunPictures(root / "run" / "data", policy, True, lambda line: None)
    source = images.open_source(str(root / "pictures"), "train", size=8)
    try:
        return found, found.choose(source)[0]
    except ValueError as error:
        return found, str(error)
refused = start("refuse")[1]
scanned = len(seen)
found, source = start("skip")
if jax.process_index() == 1:
    try:
        agreement.gather(lambda: 1 / 0)
    except ZeroDivisionError:
        pass
else:
    try:
        agreement.gather(lambda: 1)
    except OSError as error:
        print("error", error)
print("found", json.dumps([refused, scanned, len(seen), len(source), source.identity()["listing"]]))
"""


@pytest.mark.slow
def test_several_processes_scan_a_part_each_and_find_the_same(run, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    with several.processes([tmp_path / "script.py", tmp_path], tmp_path) as started:
        for process in started:
            assert process.code() == 0, process.output()
        one, other = (json.loads(process.line("found")[6:]) for process in started)
        assert "process 1 failed with ZeroDivisionError" in started[0].line("error")
    assert one[0] == other[0] and "2 of 80 pictures cannot be read" in one[0]
    assert (one[1], other[1], one[2] + other[2]) == (40, 40, 82)
    assert one[3:] == other[3:] and one[3] == 78
