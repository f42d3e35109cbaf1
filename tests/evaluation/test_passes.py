"""One pass over images: what is summed and kept, stops and hosts, and what is refused."""

import errno
import json
import pathlib
from unittest import mock

import numpy as np
import pytest

from enat_jax.evaluation import accumulate, passes
from enat_jax.runtime import files

NUM, CLASSES = 37, 3
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM, 2, 2, 1)).astype(np.uint8)
LABELS = np.arange(NUM) % CLASSES
SPEC = accumulate.PassSpec(NUM, CLASSES, keep=10, identity={"seed": 0}, chunk=5)


def load(start, stop):
    return accumulate.Batch(
        PIXELS[start:stop],
        LABELS[start:stop],
        {"number": np.arange(start, stop, dtype=np.float32)[:, None]},
    )


def network(images):
    """Features of a linear map, not of round numbers."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    return {"pool": flat / 7, "spatial": flat[:, :2] + 0.1}


def run(directory, spec=SPEC, load=load, network=network, **more):
    passes.run(load, network, spec, directory, **more)
    return passes.collect(spec, directory, more.get("num_hosts", 1))


def bits(collected):
    moments = collected.totals.moments.items()
    arrays = {f"{n}/{k}": x for n, value in moments for k, x in value.arrays().items()}
    arrays |= collected.rows | {"counts": collected.totals.class_counts}
    return {name: np.asarray(x).tobytes() for name, x in arrays.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"))


def test_sums_are_those_of_all_images_and_kept_rows_are_spread_evenly(undisturbed):
    pool = network(PIXELS)["pool"].astype(np.float64)
    found = undisturbed.totals.moments["pool"]
    np.testing.assert_allclose(found.mean, pool.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance(), np.cov(pool.T), rtol=1e-13)
    assert undisturbed.totals.moments["spatial"].count == NUM
    assert undisturbed.totals.class_counts.tolist() == [13, 12, 12]
    # 37 images, of which 10 at most are kept: every fourth.
    np.testing.assert_array_equal(undisturbed.rows["pool"], network(PIXELS[::4])["pool"])
    np.testing.assert_array_equal(undisturbed.rows["number"][:, 0], np.arange(NUM))
    assert undisturbed.rows["pool"].dtype == np.float32


def stopping_at(chunk, error):
    def load_or_stop(start, stop):
        if start == chunk * SPEC.chunk:
            raise error
        return load(start, stop)

    return load_or_stop


@pytest.mark.parametrize("read_ahead", [False, True])
def test_a_pass_that_was_stopped_anywhere_ends_with_the_same_bits(
    tmp_path, undisturbed, read_ahead
):
    """By Ctrl-C, after which what was done is saved, and by what leaves no time for that."""
    asked = []

    def counting(start, stop):
        asked.append(start)
        return load(start, stop)

    for chunk in range(8):
        for error in (KeyboardInterrupt(), RuntimeError("killed")):
            directory = tmp_path / f"{chunk} {type(error).__name__}"
            with pytest.raises(type(error)):
                run(directory, load=stopping_at(chunk, error), read_ahead=read_ahead)
            assert passes.collect(SPEC, directory) is None
            asked.clear()
            found = run(directory, load=counting, read_ahead=read_ahead)
            assert bits(found) == bits(undisturbed)
            first = chunk * SPEC.chunk if isinstance(error, KeyboardInterrupt) else 0
            assert asked == list(range(first, NUM, SPEC.chunk))


def test_saving_every_so_often_loses_one_chunk_at_most(tmp_path, undisturbed):
    with pytest.raises(RuntimeError):
        run(tmp_path, load=stopping_at(3, RuntimeError()), save_every=0)
    asked = []
    run(tmp_path, progress=asked.append)
    assert asked[:2] == [15, 20]
    assert bits(passes.collect(SPEC, tmp_path)) == bits(undisturbed)


@pytest.mark.parametrize("hosts", [2, 3, 11])
def test_hosts_take_whole_chunks_and_their_sums_are_merged_in_order(tmp_path, undisturbed, hosts):
    shares = [SPEC.share(i, hosts) for i in range(hosts)]
    assert shares[0][0] == 0 and shares[-1][1] == NUM
    assert all(a[1] == b[0] for a, b in zip(shares[:-1], shares[1:], strict=True))
    assert all(first % SPEC.chunk == 0 for first, end in shares if first < end)
    for i in reversed(range(1, hosts)):
        assert run(tmp_path, host_index=i, num_hosts=hosts) is None
    found = run(tmp_path, host_index=0, num_hosts=hosts)
    for name, rows in undisturbed.rows.items():
        np.testing.assert_array_equal(found.rows[name], rows)
    np.testing.assert_array_equal(found.totals.class_counts, undisturbed.totals.class_counts)
    for name, value in undisturbed.totals.moments.items():
        other = found.totals.moments[name]
        np.testing.assert_allclose(other.scatter, value.scatter, rtol=1e-12)
        np.testing.assert_allclose(other.mean, value.mean, rtol=1e-14)


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path, undisturbed, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, load=stopping_at(2, KeyboardInterrupt()))

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", full)
        with pytest.raises(OSError, match=r"No space left on device: .*state\.npz"):
            run(tmp_path)
    asked = []
    assert bits(run(tmp_path, progress=asked.append)) == bits(undisturbed)
    assert asked[0] == 10


def test_a_disk_that_is_full_for_features_names_the_file(tmp_path, monkeypatch):
    def full(file, data, at):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device: .*pool\.npy"):
        run(tmp_path)


def test_features_that_are_not_finite_are_refused(tmp_path):
    def broken(images):
        found = network(images)
        found["spatial"][-1] = np.nan
        return found

    with pytest.raises(ValueError, match="spatial features of images 0 to 4 are not finite"):
        run(tmp_path, network=broken)


def test_a_state_of_something_else_or_damaged_is_refused(tmp_path):
    run(tmp_path)
    other = accumulate.PassSpec(NUM, CLASSES, keep=10, identity={"seed": 1}, chunk=5)
    with pytest.raises(ValueError, match="of another evaluation: name another --out"):
        run(tmp_path, spec=other)
    state = tmp_path / "00000-of-00001" / "state.npz"
    with pytest.MonkeyPatch.context() as patch:  # what the system says is no damage
        patch.setattr(np, "load", mock.Mock(side_effect=OSError(errno.ESTALE, "Stale file handle")))
        with pytest.raises(OSError, match=r"Stale file handle: .*state\.npz"):
            run(tmp_path)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"state\.npz is damaged .*remove the folder"):
        run(tmp_path)


def test_a_directory_belongs_to_one_evaluation(tmp_path):
    settings = {"seed": 0, "sampler": {"num_steps": 8, "interval": (0.0, 1.0)}}
    passes.claim(tmp_path / "out", settings)
    passes.claim(tmp_path / "out", settings)
    with pytest.raises(ValueError, match=r"sampler\.num_steps is 8, now it would be 16 \(and 1"):
        passes.claim(
            tmp_path / "out", {"seed": 1, "sampler": settings["sampler"] | {"num_steps": 16}}
        )
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        passes.claim(tmp_path / "theirs", settings)
    assert [x.name for x in (tmp_path / "theirs").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("spoil", ["missing", "cut short"])
def test_rows_that_are_gone_are_not_taken_for_zeros(tmp_path, spoil):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, load=stopping_at(3, KeyboardInterrupt()))
    rows = passes.host_directory(tmp_path, 0, 1) / "pool.npy"
    if spoil == "missing":
        rows.unlink()
    else:
        rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(ValueError, match="pool.npy is missing or damaged: remove the folder"):
        run(tmp_path)


def test_hosts_that_begin_at_the_same_time_do_not_refuse_each_other(tmp_path, monkeypatch):
    """Another host claims the directory right after this one has looked for a claim."""
    exists, other = pathlib.Path.exists, []

    def claimed_after(path):
        found = exists(path)
        if path.name == "plan.json" and not other:
            other.append(path)
            passes.claim(tmp_path, {"num": 9})
        return found

    monkeypatch.setattr(pathlib.Path, "exists", claimed_after)
    passes.claim(tmp_path, {"num": 9})
    assert json.loads((tmp_path / "plan.json").read_text())["num"] == 9
