"""Checkpoints that are damaged, or cannot be read, by what was done to them and how it is told."""

import errno
import gc
import json
import logging
import os
import pathlib
import shutil
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_states import (
    META,
    assert_equal,
    empty_directory,
    make_state,
    on_devices,
    restore,
    save_steps,
)

from enat_jax.checkpoints import checkpoint, model_files


def truncate_data(path):
    files = [p for p in (path / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    for file in files:
        os.truncate(file, file.stat().st_size // 2)


def remove_state(path):
    shutil.rmtree(path / "state")


def remove_meta(path):
    shutil.rmtree(path / "meta")


def garble_meta(path):
    (path / "meta" / "metadata").write_text('{"config": ')


@pytest.fixture
def reads_of_damaged_data_settle():
    """Orbax leaves reads running when one fails; they end on an event loop that is gone by then."""
    yield
    time.sleep(0.2)
    gc.collect()


def reads_damaged_data(test):
    ignore = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return ignore(pytest.mark.usefixtures("reads_of_damaged_data_settle")(test))


DAMAGES = [empty_directory, truncate_data, remove_state, remove_meta, garble_meta]


@reads_damaged_data
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_step_falls_back_loudly(tmp_path, damage, caplog):
    save_steps(tmp_path, [10, 20])
    damage(tmp_path / "20")
    with caplog.at_level(logging.ERROR):
        state, step = restore(tmp_path)
    assert step == 10
    assert_equal(state, make_state(10))
    (message,) = [r.getMessage() for r in caplog.records if "DAMAGED" in r.getMessage()]
    assert "step 20" in message and "from step 10" in message
    # The run reaches the step again and saves it, and the next restore is quiet.
    save_steps(tmp_path, [20])
    caplog.clear()
    assert_equal(restore(tmp_path)[0], make_state(20))
    assert not caplog.records


@reads_damaged_data
def test_a_damaged_step_that_was_named_is_an_error(tmp_path):
    save_steps(tmp_path, [10, 20])
    truncate_data(tmp_path / "20")
    with pytest.raises(ValueError, match=r"step 20 in .* is damaged .*other steps .* \[10\]"):
        restore(tmp_path, step=20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "20"]


def flip_a_byte(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def cut_in_half(file):
    os.truncate(file, file.stat().st_size // 2)


@reads_damaged_data
@pytest.mark.parametrize("harm", [flip_a_byte, cut_in_half, pathlib.Path.unlink])
def test_no_harm_to_any_file_goes_unseen(tmp_path, harm):
    """One file at a time. What comes back, because the file was not needed, is as it was saved."""
    shardings = on_devices(8, large=("data",), small=())
    values = {"large": jax.random.normal(jax.random.key(0), (16, 256)), "small": jnp.arange(5)}
    state = jax.device_put(values, shardings)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    reasons = {}
    with checkpoint.Checkpointer(tmp_path / "run", save_every=10) as checkpointer:
        checkpointer.save(10, state, META)
        checkpointer.wait()
        shutil.copytree(tmp_path / "run" / "10", tmp_path / "whole")
        for file in sorted(p for p in (tmp_path / "whole").rglob("*") if p.is_file()):
            harmed = tmp_path / "run" / "10" / file.relative_to(tmp_path / "whole")
            harm(harmed)
            try:
                assert_equal(checkpointer.restore(target, META, 10)[0], values)
            except ValueError as error:
                assert "is damaged" in str(error)
                reasons[harmed.relative_to(tmp_path / "run" / "10").as_posix()] = str(error)
            shutil.copy(file, harmed)
    largest = max((p for p in (tmp_path / "whole").rglob("*")), key=lambda p: p.stat().st_size)
    assert largest.stat().st_size > 2_000  # most of the arrays; how they are packed varies
    needed = [largest.relative_to(tmp_path / "whole").as_posix()]
    needed += ["meta/metadata", "state/manifest.ocdbt"]
    assert set(needed) <= reasons.keys()
    if harm is flip_a_byte:  # nothing but the checksum tells
        assert "the contents of large have changed" in reasons[needed[0]]


def test_a_changed_value_in_the_meta_is_damage_not_another_configuration(tmp_path):
    save_steps(tmp_path, [10, 20])
    file = tmp_path / "20" / "meta" / "metadata"
    file.write_text(file.read_text().replace('"width": 64', '"width": 65'))
    with pytest.raises(ValueError, match="step 20 .*the contents of its meta have changed"):
        restore(tmp_path, step=20)
    assert restore(tmp_path)[1] == 10


def test_a_checkpoint_without_checksums_is_damaged(tmp_path):
    save_steps(tmp_path, [10])
    file = tmp_path / "10" / "meta" / "metadata"
    described = json.loads(file.read_text())
    file.write_text(json.dumps({key: described[key] for key in ("config", "tree")}))
    with pytest.raises(ValueError, match="no checksums: .* of an earlier version"):
        restore(tmp_path)


def test_a_lack_of_permission_is_not_damage(tmp_path, monkeypatch):
    save_steps(tmp_path, [10, 20])

    def refused(*args, **kwargs):
        raise ValueError("PERMISSION_DENIED: Error reading a file")

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", refused)
    with pytest.raises(PermissionError, match="Permission denied: .*20'"):
        restore(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "20"]


def largest_file(path):
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("part", [lambda path: path / "meta" / "metadata", largest_file])
def test_a_file_that_the_system_does_not_give_is_no_damage(tmp_path, part):
    save_steps(tmp_path, [10, 20])
    file = part(tmp_path / "20")
    file.unlink()
    file.symlink_to(file.name)  # which no one can open, root neither
    with pytest.raises(OSError, match=f"symbolic links: '{tmp_path}.*20.*'"):
        restore(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "20"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        ValueError('RESOURCE_EXHAUSTED: Error reading "a": Failed to open: Too many open files'),
    ],
)
def test_a_lack_of_descriptors_is_no_damage(tmp_path, monkeypatch, error):
    save_steps(tmp_path, [10, 20])
    fails = mock.Mock(side_effect=error)
    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fails)
    with pytest.raises(OSError, match="Too many open files: .*20'") as caught:
        restore(tmp_path)
    assert caught.value.errno == errno.EMFILE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "20"]
    # As for a model, which nothing may call damaged either.
    model_files.save_params(tmp_path / "params", {"a": np.ones(2)})
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fails)
    with pytest.raises(OSError, match="Too many open files"):
        model_files.load_params(tmp_path / "params")


def test_a_lack_of_memory_is_passed_on(tmp_path, monkeypatch):
    save_steps(tmp_path, [10, 20])
    monkeypatch.setattr(
        ocp.StandardCheckpointHandler, "restore", mock.Mock(side_effect=MemoryError)
    )
    with pytest.raises(MemoryError):
        restore(tmp_path)
    assert (tmp_path / "20").is_dir()


@reads_damaged_data
def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    save_steps(tmp_path, [10, 20])
    truncate_data(tmp_path / "10")
    empty_directory(tmp_path / "20")
    with pytest.raises(ValueError, match="every checkpoint.*step 20.*step 10.*move the directory"):
        restore(tmp_path)
    assert (tmp_path / "10").exists() and (tmp_path / "20").exists()
