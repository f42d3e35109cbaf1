"""Parameters of finished models: saved whole or not at all, read as numpy, known by fingerprint."""

import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.checkpoints import model_files


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


PARAMS = {
    "encoder": {"kernel": jnp.full((3, 4), 1.5, jnp.bfloat16), "bias": np.arange(4.0)},
    "empty": {},
    "count": jnp.int32(7),
}


def test_params_come_back_as_numpy(tmp_path):
    model_files.save_params(tmp_path / "model" / "params", PARAMS)
    loaded = model_files.load_params(tmp_path / "model" / "params")
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(loaded))
    assert loaded["encoder"]["kernel"].dtype == jnp.bfloat16
    assert_equal(loaded, PARAMS)


def test_params_replace_earlier_ones_and_leave_nothing_behind(tmp_path):
    model_files.save_params(tmp_path / "params", {"a": np.zeros(2), "b": np.zeros(2)})
    model_files.save_params(tmp_path / "params", {"a": np.ones(2)})
    assert_equal(model_files.load_params(tmp_path / "params"), {"a": np.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["params"]


def test_params_killed_between_the_two_renames_are_the_earlier_ones(tmp_path, monkeypatch):
    model_files.save_params(tmp_path / "params", {"a": np.zeros(2)})
    rename = pathlib.Path.rename

    def killed(self, target):
        if self.name == ".params.new":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            model_files.save_params(tmp_path / "params", {"a": np.ones(2)})
    assert_equal(model_files.load_params(tmp_path / "params"), {"a": np.zeros(2)})
    model_files.save_params(tmp_path / "params", {"a": np.full(2, 2.0)})
    assert_equal(model_files.load_params(tmp_path / "params"), {"a": np.full(2, 2.0)})


def test_missing_or_damaged_params_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no parameters at"):
        model_files.load_params(tmp_path / "params")
    (tmp_path / "params").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        model_files.load_params(tmp_path / "params")


def test_params_of_eight_devices_load_on_one(tmp_path):
    script = f"""
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from enat_jax.checkpoints import model_files
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        array = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, PartitionSpec("data")))
        model_files.save_params({str(tmp_path / "params")!r}, {{"a": array}})
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **flags},
        check=True,
    )
    assert_equal(model_files.load_params(tmp_path / "params"), {"a": np.arange(16.0)})


def test_a_fingerprint_tells_any_change():
    params = {"a": np.arange(4.0), "b": {"c": np.ones((2, 2), np.float32)}}
    same = {"b": {"c": np.ones((2, 2), np.float32)}, "a": np.arange(4.0)}
    assert model_files.fingerprint(params) == model_files.fingerprint(same)
    others = [
        {**params, "a": np.array([0.0, 1.0, 2.0, 3.5])},
        {**params, "a": np.arange(4.0).reshape(2, 2)},
        {**params, "a": np.arange(4.0, dtype=np.float32)},
        {"d": params["a"], "b": params["b"]},
    ]
    assert len({model_files.fingerprint(p) for p in [params, *others]}) == 5
