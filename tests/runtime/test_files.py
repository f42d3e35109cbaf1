"""Files that are whole or not there: full disks, races, names that are no UTF-8."""

import errno
import os
import pathlib
import threading

import pytest

from enat_jax.runtime import files


def test_a_file_appears_whole(tmp_path):
    files.write_atomically(tmp_path / "a.json", b"one")
    files.write_atomically(tmp_path / "a.json", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"two"


def test_a_new_directory_is_there_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with files.new_directory(out) as directory:
        (directory / "a").write_text("one")
        assert not out.exists()
    assert (out / "a").read_text() == "one"
    with pytest.raises(KeyError), files.new_directory(tmp_path / "other") as directory:
        (directory / "a").write_text("two")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    with pytest.raises(OSError), files.new_directory(out) as directory:
        (directory / "a").write_text("three")
    assert (out / "a").read_text() == "one" and len(list(out.parent.iterdir())) == 1


def test_an_error_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_atomically(tmp_path / "a.json", b"one")
    assert caught.value.filename == str(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError) as caught:
        files.write_atomically(tmp_path / "gone" / "a.json", b"one")
    assert caught.value.filename == str(tmp_path / "gone" / "a.json")


def test_another_process_may_tidy_up_what_it_takes_for_a_leftover(tmp_path, monkeypatch):
    """It does so when all files are there, and then this one is, too."""
    replace = pathlib.Path.replace

    def tidied(path, target):
        path.unlink()
        return replace(path, target)

    monkeypatch.setattr(pathlib.Path, "replace", tidied)
    with pytest.raises(FileNotFoundError):
        files.write_atomically(tmp_path / "a.json", b"one")
    (tmp_path / "a.json").write_bytes(b"one")
    files.write_atomically(tmp_path / "a.json", b"one")
    assert (tmp_path / "a.json").read_bytes() == b"one"


def test_many_write_the_same(tmp_path):
    path, wrong = tmp_path / "a.json", []
    files.write_atomically(path, b"x" * 10_000)

    def work():
        for _ in range(20):
            files.write_atomically(path, b"x" * 10_000)
            wrong.extend([1] if path.read_bytes() != b"x" * 10_000 else [])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_leftovers_are_told_by_their_names(tmp_path):
    assert files.is_unfinished(tmp_path / ".plan.json.0af3.unfinished")
    assert not files.is_unfinished(tmp_path / "plan.json")
    assert not files.is_unfinished(tmp_path / ".thesis.tex.swp")


def test_names_that_are_not_utf8_come_back(tmp_path):
    values = {"path": os.fsdecode(b"/data/\xff"), "class": "犬"}
    content = files.json_bytes(values)
    assert "犬".encode() in content and content.endswith(b"}\n")
    (tmp_path / "a.json").write_bytes(content)
    assert files.read_json(tmp_path / "a.json", "do this") == values


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 10**5])
def test_what_is_no_json_is_said_with_advice(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is damaged, it is not JSON \(.*\): do this"):
        files.read_json(tmp_path / "a.json", "do this")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_files_of_users_may_begin_with_a_byte_order_mark(tmp_path, mark):
    (tmp_path / "a").write_bytes(mark + '{"é": 1}'.encode())
    assert files.read_text(tmp_path / "a") == '{"é": 1}'
    assert files.read_json(tmp_path / "a", "do this") == {"é": 1}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_text_that_is_not_utf8_is_named(tmp_path, encoding):
    (tmp_path / "a").write_text("é, e", encoding=encoding)
    with pytest.raises(ValueError, match=r"a is not .*UTF-8.*: save it as UTF-8"):
        files.read_text(tmp_path / "a")


def test_a_directory_belongs_to_one_process_at_a_time(tmp_path):
    with files.lock_directory(tmp_path / "run"):
        with pytest.raises(ValueError, match="another process is at work in .*run"):
            with files.lock_directory(tmp_path / "run"):
                pass
    with files.lock_directory(tmp_path / "run"):
        pass


def test_whether_files_can_be_made_is_tried_and_leaves_nothing(tmp_path):
    files.require_writable(tmp_path / "not" / "there" / "yet")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(NotADirectoryError) as raised:
            files.require_writable(path)
        assert raised.value.filename == str(tmp_path / "file")
    if os.geteuid():  # root may do everything
        (tmp_path / "closed").mkdir(mode=0o555)
        with pytest.raises(PermissionError, match="closed"):
            files.require_writable(tmp_path / "closed")
