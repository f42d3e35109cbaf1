"""Records by index out of files on disk: the same ones as in memory, and damage is noticed."""

import concurrent.futures
import errno
import os
import pickle
import resource

import numpy as np
import pytest

from enat_jax.data import records

RECORD = records.dtype(4, 300)


def rows(n, seed=0):
    out = np.zeros(n, RECORD)
    out["tokens"] = np.random.default_rng(seed).integers(0, 300, (n, 4))
    out["label"], out["image"] = np.arange(n) % 3, np.arange(n)
    return out


@pytest.fixture
def files(tmp_path):
    """Ten records in files of three, none, five and two."""
    paths = [tmp_path / f"{i}.npy" for i in range(4)]
    for path, part in zip(paths, np.split(rows(10), [3, 3, 8]), strict=True):
        path.write_bytes(records.npy_bytes(part))
    return paths


@pytest.mark.parametrize(("codebook_size", "size"), [(256, 1), (257, 2), (1 << 16, 2), (70_000, 4)])
def test_tokens_take_the_smallest_type(codebook_size, size):
    record = records.dtype(16, codebook_size)
    assert record["tokens"].base.itemsize == size and record["tokens"].base.kind == "u"
    assert record.itemsize == 16 * size + 9  # label, flip flag, image


def test_files_are_one_row_of_records(files):
    found = records.Files(files, [3, 0, 5, 2], RECORD)
    assert len(found) == 10
    indices = np.array([9, 2, 3, 3, 0, 7, 8])
    np.testing.assert_array_equal(found[indices], rows(10)[indices])
    assert found[np.array([], np.int64)].shape == (0,)
    for wrong in ([10], [-1]):
        with pytest.raises(IndexError):
            found[np.array(wrong)]


def test_files_travel_to_other_processes(files):
    found = records.Files(files, [3, 0, 5, 2], RECORD)
    sent = pickle.dumps(found)
    assert len(sent) < 2000  # names, no records
    np.testing.assert_array_equal(pickle.loads(sent)[np.arange(10)], rows(10))


def test_a_file_that_does_not_fit_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"1\.npy holds 0"):
        records.Files(files, [3, 1, 5, 2], RECORD)
    with pytest.raises(ValueError, match=r"0\.npy holds 3"):
        records.Files(files, [3, 0, 5, 2], records.dtype(4, 16))
    files[3].write_bytes(files[3].read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"3\.npy .* cut off"):
        records.Files(files, [3, 0, 5, 2], RECORD)
    files[3].write_text("no array")
    with pytest.raises(ValueError, match=r"3\.npy is not a \.npy file"):
        records.Files(files, [3, 0, 5, 2], RECORD)
    files[3].unlink()
    with pytest.raises(FileNotFoundError):
        records.Files(files, [3, 0, 5, 2], RECORD)


def test_a_file_that_is_cut_off_later_is_an_error_and_no_crash(files):
    found = records.Files(files, [3, 0, 5, 2], RECORD)
    with open(files[2], "r+b") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match=r"2\.npy was cut off"):
        found[np.arange(10)]


def reference_file(path):
    values = np.array([[1, 5, 6, 7, 8], [0, 9, 0, 2, 3], [2, 1, 1, 1, 1]], np.int64)
    np.save(path, values)
    return path, values


def test_rows_of_the_reference_are_records(tmp_path):
    path, values = reference_file(tmp_path / "train.npy")
    found = records.Reference(path, codebook_size=10, num_classes=3)
    assert (len(found), found.num_tokens) == (3, 4)
    picked = found[np.array([2, 0])]
    np.testing.assert_array_equal(picked["tokens"], values[[2, 0], 1:])
    assert picked["label"].tolist() == [2, 1] and picked["tokens"].dtype == np.uint8
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(found))[np.array([1])], found[np.array([1])]
    )


def test_rows_of_the_reference_must_fit(tmp_path):
    path, _ = reference_file(tmp_path / "train.npy")
    with pytest.raises(ValueError, match=r"train\.npy: token 0 of row 1 is 9, not within \[0, 9\)"):
        records.Reference(path, 9, 3)[np.array([0, 1])]
    with pytest.raises(ValueError, match=r"the label of row 2 is 2, not within \[0, 2\)"):
        records.Reference(path, 10, 2)[np.array([0, 2])]
    np.save(path, np.zeros((3, 5), np.int32))
    with pytest.raises(ValueError, match="int64"):
        records.Reference(path, 10, 3)


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts the files of a process")
def test_few_files_are_open_and_none_when_the_set_is_gone(files, monkeypatch):
    before = open_files()
    found = records.Files(files, [3, 0, 5, 2], RECORD)
    assert open_files() == before  # they are opened when they are read
    found[np.arange(10)]
    assert open_files() == before + 3
    del found
    assert open_files() == before
    monkeypatch.setattr(records, "_most_open", lambda: 1)
    found = records.Files(files, [3, 0, 5, 2], RECORD)
    indices = np.random.default_rng(0).integers(0, 10, (200, 7))

    def right(indices):
        return found[indices].tobytes() == rows(10)[indices].tobytes()

    # A file that is no longer kept is not closed under a thread that reads it.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, indices))
    assert open_files() == before + 1


def test_two_sets_of_many_files_are_read_where_few_may_be_open(tmp_path):
    paths = [tmp_path / f"{i}.npy" for i in range(40)]
    for path, part in zip(paths, np.split(rows(80), 40), strict=True):
        path.write_bytes(records.npy_bytes(part))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(paths[0]) as file:  # descriptors are numbered from 0 on, the lowest free one first
        least = file.fileno()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (least + 40, limit[1]))
        sets = [records.Files(paths, [2] * 40, RECORD) for _ in range(2)]
        for found in sets * 2:
            np.testing.assert_array_equal(found[np.arange(80)], rows(80))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_what_the_system_says_names_the_file(files, monkeypatch):
    found = records.Files(files, [3, 0, 5, 2], RECORD)

    def stale(descriptor, buffers, position):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "preadv", stale)
    with pytest.raises(OSError, match=r"Stale file handle: .*2\.npy"):
        found[np.array([5])]
