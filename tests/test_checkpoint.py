import gc
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from enat_jax import checkpoint

META = {"model": {"width": 64, "sizes": (1, 2)}, "seed": 0}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    extra: dict


def make_state(step, width=3):
    params = {"dense": {"kernel": jnp.full((width, 4), 1.5 * step), "bias": jnp.arange(4.0) + step}}
    return State(
        step=jnp.int32(step),
        params=params,
        opt_state=optax.adamw(1e-3).init(params),
        extra={},
    )


def abstract(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), state)


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def save_steps(directory, steps, **settings):
    with checkpoint.Checkpointer(directory, save_every=10, **settings) as checkpointer:
        for step in steps:
            assert checkpointer.save(step, make_state(step), META)


def restore(directory, meta=META, state=None):
    with checkpoint.Checkpointer(directory, save_every=10) as checkpointer:
        return checkpointer.restore_latest(abstract(state or make_state(0)), meta)


def test_the_newest_state_comes_back(tmp_path):
    save_steps(tmp_path, [10, 20])
    state, step = restore(tmp_path)
    assert step == 20
    assert_equal(state, make_state(20))


def test_nothing_saved_is_none(tmp_path):
    assert restore(tmp_path / "new") is None


def test_saves_at_multiples_once_and_when_forced(tmp_path):
    with checkpoint.Checkpointer(tmp_path, save_every=10) as checkpointer:
        assert not checkpointer.save(9, make_state(9), META)
        assert checkpointer.save(10, make_state(10), META)
        assert not checkpointer.save(10, make_state(10), META)
        assert checkpointer.save(13, make_state(13), META, force=True)
        assert not checkpointer.save(13, make_state(13), META, force=True)
    assert restore(tmp_path)[1] == 13


def test_keeps_only_the_newest(tmp_path):
    save_steps(tmp_path, [10, 20, 30], keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "30"]


def test_the_caller_may_donate_at_once(tmp_path):
    """Large enough to be still on its way to disk while the next steps overwrite its memory."""
    step = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    state = {str(i): jnp.full((1 << 20,), float(i)) for i in range(4)}
    target = abstract(state)
    step(jax.tree.map(jnp.copy, state))  # compiled beforehand: the real one must start at once
    with checkpoint.Checkpointer(tmp_path, save_every=10) as checkpointer:
        checkpointer.save(10, state, META)
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
        saved, _ = checkpointer.restore_latest(target, META)
    for i in range(4):
        np.testing.assert_array_equal(saved[str(i)], i)
        np.testing.assert_array_equal(state[str(i)], i + 5)


def test_restores_under_another_sharding(tmp_path):
    save_steps(tmp_path, [10])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), make_state(0)
    )
    with checkpoint.Checkpointer(tmp_path, save_every=10) as checkpointer:
        state, _ = checkpointer.restore_latest(target, META)
    assert state.params["dense"]["bias"].sharding == sharding


def empty_directory(path):
    shutil.rmtree(path)
    path.mkdir()


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
def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    save_steps(tmp_path, [10, 20])
    truncate_data(tmp_path / "10")
    empty_directory(tmp_path / "20")
    with pytest.raises(ValueError, match="every checkpoint.*step 20.*step 10.*delete"):
        restore(tmp_path)
    assert (tmp_path / "10").exists() and (tmp_path / "20").exists()


def test_another_config_is_refused_by_name(tmp_path):
    save_steps(tmp_path, [10])
    meta = {"model": {"width": 128, "sizes": [1, 2]}, "data": {"flip": True}}
    with pytest.raises(ValueError) as error:
        restore(tmp_path, meta)
    assert "model.width is 64 in the checkpoint but 128 is expected" in str(error.value)
    assert "seed is only in the checkpoint (0)" in str(error.value)
    assert "data is missing in the checkpoint" in str(error.value)
    assert "sizes" not in str(error.value)  # a tuple saved, a list asked for


def test_another_tree_is_refused_by_name_even_behind_a_damaged_step(tmp_path):
    save_steps(tmp_path, [10, 20])
    empty_directory(tmp_path / "20")
    expected = r"params/dense/kernel is float32\[3, 4\] in the checkpoint but float32\[5, 4\]"
    with pytest.raises(ValueError, match=expected):
        restore(tmp_path, state=make_state(0, width=5))
    assert (tmp_path / "20").exists()  # nothing is set aside by a run that does not fit


def test_missing_and_extra_arrays_are_named(tmp_path):
    save_steps(tmp_path, [10])
    other = make_state(0).replace(extra={"usage": jnp.zeros(8)})
    with pytest.raises(ValueError, match="extra/usage is missing in the checkpoint"):
        restore(tmp_path, state=other)


def test_a_target_without_shardings_is_not_taken_for_damage(tmp_path):
    save_steps(tmp_path, [10])
    with checkpoint.Checkpointer(tmp_path, save_every=10) as checkpointer:
        with pytest.raises(ValueError, match="step of the abstract state has no sharding"):
            checkpointer.restore_latest(jax.eval_shape(lambda: make_state(0)), META)


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="save_every=0"):
        checkpoint.Checkpointer(tmp_path, save_every=0)


PARAMS = {
    "encoder": {"kernel": jnp.full((3, 4), 1.5, jnp.bfloat16), "bias": np.arange(4.0)},
    "empty": {},
    "count": jnp.int32(7),
}


def test_params_come_back_as_numpy(tmp_path):
    checkpoint.save_params(tmp_path / "model" / "params", PARAMS)
    loaded = checkpoint.load_params(tmp_path / "model" / "params")
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(loaded))
    assert loaded["encoder"]["kernel"].dtype == jnp.bfloat16
    assert_equal(loaded, PARAMS)


def test_params_replace_earlier_ones_and_leave_nothing_behind(tmp_path):
    checkpoint.save_params(tmp_path / "params", {"a": np.zeros(2), "b": np.zeros(2)})
    checkpoint.save_params(tmp_path / "params", {"a": np.ones(2)})
    assert_equal(checkpoint.load_params(tmp_path / "params"), {"a": np.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["params"]


def test_params_killed_between_the_two_renames_are_the_earlier_ones(tmp_path, monkeypatch):
    checkpoint.save_params(tmp_path / "params", {"a": np.zeros(2)})
    rename = pathlib.Path.rename

    def killed(self, target):
        if self.name == ".params.new":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_params(tmp_path / "params", {"a": np.ones(2)})
    assert_equal(checkpoint.load_params(tmp_path / "params"), {"a": np.zeros(2)})
    checkpoint.save_params(tmp_path / "params", {"a": np.full(2, 2.0)})
    assert_equal(checkpoint.load_params(tmp_path / "params"), {"a": np.full(2, 2.0)})


@reads_damaged_data
def test_missing_or_damaged_params_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no parameters at"):
        checkpoint.load_params(tmp_path / "params")
    (tmp_path / "params").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load_params(tmp_path / "params")


def test_params_of_eight_devices_load_on_one(tmp_path):
    script = f"""
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from enat_jax import checkpoint
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        array = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, PartitionSpec("data")))
        checkpoint.save_params({str(tmp_path / "params")!r}, {{"a": array}})
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run(
        [*python(script)], env={**os.environ, "JAX_PLATFORMS": "cpu", **flags}, check=True
    )
    assert_equal(checkpoint.load_params(tmp_path / "params"), {"a": np.arange(16.0)})


def python(script):
    return [sys.executable, "-c", textwrap.dedent(script)]


SAVE_FOREVER = """
    import itertools, sys
    import jax.numpy as jnp
    from enat_jax import checkpoint
    directory, start = sys.argv[1], int(sys.argv[2])
    with checkpoint.Checkpointer(directory, save_every=1) as checkpointer:
        for step in itertools.count(start):
            state = {str(i): jnp.full((200, 200), step) for i in range(8)}
            checkpointer.save(step, state, {"seed": 0})
            print(step, flush=True)
            if step % 3 == 0:
                checkpoint.save_params(f"{directory}/../params", {"a": jnp.full((300, 300), step)})
"""


def kill_while_saving(tmp_path, rounds):
    """Every round kills the saving process somewhere, checks what is left and goes on from it."""
    rng = random.Random(0)
    target = abstract({str(i): jnp.full((200, 200), 0) for i in range(8)})
    start = 1
    for _ in range(rounds):
        command = [*python(SAVE_FOREVER), str(tmp_path / "run"), str(start)]
        process = subprocess.Popen(
            command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True
        )
        reached = [int(process.stdout.readline()) for _ in range(4)][-1]
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        reached = max([reached, *(int(line) for line in process.stdout)])
        process.wait()
        process.stdout.close()
        with checkpoint.Checkpointer(tmp_path / "run", save_every=1) as checkpointer:
            state, step = checkpointer.restore_latest(target, {"seed": 0})
        # Saves are asynchronous: the one before the last that began is complete.
        assert reached - 1 <= step <= reached + 1
        for leaf in state.values():
            np.testing.assert_array_equal(leaf, step)
        params = checkpoint.load_params(tmp_path / "params")["a"]
        np.testing.assert_array_equal(params, params[0, 0])
        start = step + 1
    assert not list((tmp_path / "run").glob("*.damaged"))


def test_survives_kill_9_while_saving(tmp_path):
    kill_while_saving(tmp_path, rounds=2)


@pytest.mark.slow
def test_survives_many_kills_while_saving(tmp_path):
    kill_while_saving(tmp_path, rounds=15)


def test_meta_is_plain_json_on_disk(tmp_path):
    save_steps(tmp_path, [10])
    stored = json.loads((tmp_path / "10" / "meta" / "metadata").read_text())
    assert stored["config"] == {"model": {"width": 64, "sizes": [1, 2]}, "seed": 0}
    assert stored["tree"]["params/dense/bias"] == "float32[4]"
