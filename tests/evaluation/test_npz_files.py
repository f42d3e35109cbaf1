"""Arrays of .npz files: whole or in parts, and what is refused."""

import struct
import zipfile

import numpy as np
import pytest

from enat_jax.evaluation import npz_files

ADVICE = "make it anew"


def with_member(path, name, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


def npy(header, data=b""):
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def test_arrays_headers_and_rows(tmp_path):
    images = np.arange(7 * 2 * 3, dtype=np.uint8).reshape(7, 2, 3)
    by_columns = np.asfortranarray([[1.0, 2.0], [3.0, 4.0]])
    np.savez(tmp_path / "a.npz", images=images, matrix=by_columns)
    with npz_files.open_npz(tmp_path / "a.npz", ADVICE) as archive:
        assert list(archive) == ["images", "matrix"]
        assert "images" in archive and "other" not in archive
        assert archive.header("images") == ((7, 2, 3), np.uint8)
        np.testing.assert_array_equal(archive.read("matrix"), [[1, 2], [3, 4]])
        parts = list(archive.rows("images", 3))
    assert [len(part) for part in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(parts), images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (2,)}", b"x" * 16), "pickled"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (9,)}", b"x" * 16), "16 bytes for"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-2,)}", b""), "0 bytes for"),
        (
            npy("{'descr': '<f8', 'fortran_order': False, 'shape': (2**62, 4)}", b""),
            "damaged",
        ),
        (npy("__import__('os').abort()"), "damaged"),
        (b"\x93NUMPY\x03\x00", "version"),
        (b"nonsense", "damaged"),
        (b"", "damaged"),
    ],
)
def test_hostile_and_damaged_arrays_are_refused(content, message, tmp_path):
    path = with_member(tmp_path / "a.npz", "x.npy", content)
    with pytest.raises(ValueError, match=message) as caught:
        with npz_files.open_npz(path, ADVICE) as archive:
            archive.read("x")
    assert str(path) in str(caught.value) and str(caught.value).endswith(ADVICE)
    assert "\n" not in str(caught.value)


def test_truncated_at_any_length(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=20))
    content = (tmp_path / "a.npz").read_bytes()
    path = tmp_path / "cut.npz"
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut.npz is (damaged|no .npz)"):
            with npz_files.open_npz(path, ADVICE) as archive:
                archive.read("x")


def test_one_flipped_bit_of_the_data_is_found(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(100))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[600] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        with npz_files.open_npz(tmp_path / "a.npz", ADVICE) as archive:
            archive.read("x")


def test_other_things_are_named(tmp_path):
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    for name, message in (
        ("single.npy", "single array"),
        ("text.npz", "no .npz file"),
        (".", "is a directory"),
        ("absent.npz", "there is no"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            with npz_files.open_npz(tmp_path / name, ADVICE):
                pass


def test_an_array_by_columns_has_no_rows(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(np.ones((2, 3))))
    with pytest.raises(ValueError, match="stored by columns"):
        with npz_files.open_npz(tmp_path / "a.npz", ADVICE) as archive:
            list(archive.rows("x", 1))
