import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several
from checkpoint_states import (
    META,
    abstract,
    assert_equal,
    empty_directory,
    make_state,
    on_devices,
    restore,
    save_steps,
)

from enat_jax.checkpoints import best, checkpoint, model_files


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
        saved, _ = checkpointer.restore(target, META)
    for i in range(4):
        np.testing.assert_array_equal(saved[str(i)], i)
        np.testing.assert_array_equal(state[str(i)], i + 5)


def test_a_state_of_eight_devices_comes_back_on_any_number(tmp_path):
    values = {"split": jax.random.normal(jax.random.key(0), (16, 8, 4)), "count": jnp.int32(3)}
    eight = on_devices(8, split=("data",), count=())
    with checkpoint.Checkpointer(tmp_path, save_every=10) as checkpointer:
        checkpointer.save(10, jax.device_put(values, eight), META)
        for number, spec in ((4, (None, "data")), (2, (None, None, "data")), (1, ()), (8, ())):
            shardings = on_devices(number, split=spec, count=())
            target = {
                name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
                for name, x in values.items()
            }
            state, _ = checkpointer.restore(target, META)
            assert_equal(state, values)
            assert {name: x.sharding for name, x in state.items()} == shardings


BEST_FID = best.Best("fid", "min")


def evaluated(checkpointer, step, metrics):
    assert checkpointer.save(step, make_state(step), META)
    if metrics is not None:
        checkpointer.record(step, metrics)


def test_keeps_the_newest_the_multiples_and_the_best(tmp_path):
    fids = {10: 9.0, 20: 3.0, 30: 7.0, 40: 8.0, 50: 4.0, 60: 4.5, 70: 6.0}
    settings = {"keep": 2, "keep_every": 40, "best": BEST_FID}
    with checkpoint.Checkpointer(tmp_path, save_every=10, **settings) as checkpointer:
        for step, fid in fids.items():
            evaluated(checkpointer, step, {"fid": fid, "loss": 0.5})
        assert checkpointer.best.best_of(checkpointer.all_steps()) == 20
        assert checkpointer.all_steps() == [20, 40, 60, 70]
    # What is best is known from the disk, too.
    with checkpoint.Checkpointer(tmp_path, save_every=10, **settings) as checkpointer:
        evaluated(checkpointer, 80, {"fid": 5.0})
        assert checkpointer.best.best_of(checkpointer.all_steps()) == 20
        evaluated(checkpointer, 90, {"fid": 2.0})
        assert checkpointer.best.best_of(checkpointer.all_steps()) == 90
        # The one that was the best goes with the next save, and not before.
        assert checkpointer.all_steps() == [20, 40, 80, 90]
        evaluated(checkpointer, 100, None)
        assert checkpointer.all_steps() == [40, 80, 90, 100]
        assert_equal(checkpointer.restore(abstract(make_state(0)), META, 40)[0], make_state(40))


def test_a_checkpoint_without_the_metric_is_never_the_best_nor_kept_for_it(tmp_path):
    given = {10: None, 20: {"fid": math.nan}, 30: {"fid": 9.0}, 40: {"loss": 0.1}}
    given |= {50: {"fid": -math.inf}, 60: None}
    with checkpoint.Checkpointer(tmp_path, save_every=10, keep=1, best=BEST_FID) as checkpointer:
        for step, metrics in given.items():
            evaluated(checkpointer, step, metrics)
            assert checkpointer.best.best_of(checkpointer.all_steps()) == (
                30 if step >= 30 else None
            )
        assert checkpointer.all_steps() == [30, 60]


def test_the_best_survives_a_kill_between_the_save_and_the_evaluation(tmp_path):
    """The score of a step is forgotten when a run goes through it again."""
    with checkpoint.Checkpointer(tmp_path, save_every=10, keep=1, best=BEST_FID) as checkpointer:
        evaluated(checkpointer, 10, {"fid": 2.0})
        evaluated(checkpointer, 20, None)
        assert checkpointer.all_steps() == [10, 20]
    with checkpoint.Checkpointer(tmp_path, save_every=10, keep=1, best=BEST_FID) as checkpointer:
        assert checkpointer.is_evaluated(10) and not checkpointer.is_evaluated(20)
        checkpointer.record(20, {"fid": 1.0})
        assert checkpointer.is_evaluated(20)
        evaluated(checkpointer, 30, None)
        assert checkpointer.all_steps() == [20, 30]
        checkpointer.restore(abstract(make_state(0)), META, step=20)
        evaluated(checkpointer, 30, {"fid": 0.5})
        checkpointer.restore(abstract(make_state(0)), META, step=20)
        evaluated(checkpointer, 30, None)
        assert checkpointer.best.best_of(checkpointer.all_steps()) == 20
    assert not checkpoint.Checkpointer(tmp_path, save_every=10).is_evaluated(30)


def test_what_was_saved_is_read_back(tmp_path):
    with checkpoint.Checkpointer(tmp_path, save_every=10) as checkpointer:
        state = jax.tree.map(jnp.asarray, make_state(10))
        checkpointer.save(10, state, META)
        assert_equal(checkpointer.read_back(10, state, META), make_state(10))
        assert state.params["dense"]["kernel"].is_deleted()
        checkpointer.save(20, make_state(20), META)
        checkpointer.wait()
        empty_directory(tmp_path / "20")
        with pytest.raises(ValueError, match="the checkpoint of step 20 in .* is damaged"):
            checkpointer.read_back(20, make_state(20), META)


def test_without_a_metric_to_go_by_there_is_no_best_step(tmp_path):
    with checkpoint.Checkpointer(tmp_path, save_every=10) as checkpointer:
        evaluated(checkpointer, 10, {"fid": 1.0})
        assert checkpointer.best is None and checkpointer.is_evaluated(10)


def test_a_step_by_name_sets_newer_ones_aside(tmp_path, caplog):
    save_steps(tmp_path, [10, 20, 30], keep=3)
    state, step = restore(tmp_path, step=10)
    assert step == 10
    assert_equal(state, make_state(10))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "20.set_aside", "30.set_aside"]
    assert "step 30 is now 30.set_aside" in caplog.text and "from step 10" in caplog.text
    save_steps(tmp_path, [20])
    restore(tmp_path, step=10)
    assert (tmp_path / "20.set_aside.2").is_dir()  # an earlier one is not overwritten
    caplog.clear()
    assert restore(tmp_path)[1] == 10
    assert not caplog.records


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    save_steps(tmp_path, [10, 20])
    with pytest.raises(ValueError, match=r"no checkpoint of step 15 in .*steps=\[10, 20\]"):
        restore(tmp_path, step=15)
    with pytest.raises(ValueError, match=r"no checkpoint of step 10 in .*steps=\[\]"):
        restore(tmp_path / "new", step=10)


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
            checkpointer.restore(jax.eval_shape(lambda: make_state(0)), META)


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="save_every=0"):
        checkpoint.Checkpointer(tmp_path, save_every=0)
    with pytest.raises(ValueError, match="keep_every=15 must be a positive multiple"):
        checkpoint.Checkpointer(tmp_path, save_every=10, keep_every=15)


def test_a_state_of_other_things_than_arrays_is_refused_by_name(tmp_path):
    with checkpoint.Checkpointer(tmp_path, save_every=10) as checkpointer:
        with pytest.raises(ValueError, match="extra/count of the state is a int, not a jax.Array"):
            checkpointer.save(10, make_state(10).replace(extra={"count": 3}), META)


FULL_DISK = """
    import pathlib, resource, sys
    import jax, jax.numpy as jnp
    from enat_jax.checkpoints import checkpoint
    directory = pathlib.Path(sys.argv[1])
    def state(step):
        return {"a": jax.random.normal(jax.random.key(step), (300, 300))}
    def save(step):
        checkpointer.save(step, state(step), {})
    def told(function):
        try:
            function()
        except OSError as error:
            print(f"{function.__name__}: {error}")
    def limit(size):  # of a file, which is the nearest to a full disk that needs no rights
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    with checkpoint.Checkpointer(directory, save_every=1, keep=2) as checkpointer:
        for step in (1, 2):
            save(step)
        checkpointer.wait()
        limit(100_000)
        save(3)
        told(checkpointer.wait)
        save(4)
        def save_5(): save(5)
        told(save_5)
        print(checkpointer.all_steps(), sorted(path.name for path in directory.iterdir()))
        limit(resource.RLIM_INFINITY)
        save(6)
        print(checkpointer.all_steps(), sorted(path.name for path in directory.iterdir()))
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
        )
        for step in (6, 2):
            restored, _ = checkpointer.restore(target, {}, step)
            print(step, bool((restored["a"] == state(step)["a"]).all()))
    try:
        with checkpoint.Checkpointer(directory, save_every=1) as checkpointer:
            limit(100_000)
            save(7)
            raise ZeroDivisionError
    except ZeroDivisionError:
        print("the first error is the one to leave by")
"""


def test_a_full_disk_is_told_and_earlier_checkpoints_stay_good(tmp_path):
    result = subprocess.run(
        [*python(FULL_DISK), str(tmp_path / "run")],
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    wait, save, full, freed, *restored = result.stdout.splitlines()
    for line, name in ((wait, "wait"), (save, "save_5")):
        assert line.startswith(f"{name}: a checkpoint could not be written to {tmp_path}/run (")
    assert full.startswith("[1, 2] ['1', '2', ")
    assert freed == "[2, 6] ['2', '6']"  # and what the failed saves left is gone
    assert restored == ["6 True", "2 True", "the first error is the one to leave by"]
    assert f"could not be written to {tmp_path}/run (" in result.stderr


def test_a_directory_that_is_gone_is_told_when_leaving(tmp_path):
    directory = tmp_path / "run"
    with pytest.raises(OSError, match=f"could not be written to {directory}.*Not a directory"):
        with checkpoint.Checkpointer(directory, save_every=10) as checkpointer:
            directory.rmdir()
            directory.write_text("no directory")
            checkpointer.save(10, make_state(10), META)


def test_leaving_by_an_exception_keeps_the_save_and_the_exception(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with checkpoint.Checkpointer(tmp_path / "good", save_every=10) as checkpointer:
            checkpointer.save(10, make_state(10), META)
            raise KeyboardInterrupt
    assert restore(tmp_path / "good")[1] == 10


def test_two_processes_come_to_the_same_decisions(tmp_path):
    worker = pathlib.Path(__file__).parents[1] / "checkpoint_worker.py"
    with several.processes([worker, tmp_path], tmp_path, devices=2) as processes:
        end = time.monotonic() + 120
        while None in (codes := [process.handle.poll() for process in processes]):
            assert time.monotonic() < end, [process.output() for process in processes]
            if any(codes):
                break
            time.sleep(0.05)
        assert codes == [0, 0], "\n".join(process.output() for process in processes)
    first, second = (json.loads((tmp_path / f"seen_{i}.json").read_text()) for i in range(2))
    assert first.pop("cannot rename") == "PermissionError: not yours"
    assert second.pop("cannot rename") == "OSError: the first process failed with " + (
        "PermissionError: not yours"
    )
    assert first.pop("no memory") == "OSError: process 1 failed, and says why"
    assert second.pop("no memory").endswith("30: too large")
    assert first == second
    assert first.pop("no such step").startswith("ValueError: no checkpoint of step 25")
    assert first == {
        "best": [10, [10, 30]],
        "newest": [30, True, [10, 30]],
        "one process cannot read": [10, True, [10]],
        "a step by name": [20, True, [20]],
        "after an exception": [30, True, [20, 30]],
    }
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["20", "30", "30.damaged", "30.set_aside"]


def python(script):
    return [sys.executable, "-c", textwrap.dedent(script)]


SAVE_FOREVER = """
    import itertools, sys
    import jax.numpy as jnp
    from enat_jax.checkpoints import checkpoint, model_files
    directory, start = sys.argv[1], int(sys.argv[2])
    with checkpoint.Checkpointer(directory, save_every=1) as checkpointer:
        for step in itertools.count(start):
            state = {str(i): jnp.full((200, 200), step) for i in range(8)}
            checkpointer.save(step, state, {"seed": 0})
            print(step, flush=True)
            if step % 3 == 0:
                model_files.save_params(f"{directory}/../params", {"a": jnp.full((300, 300), step)})
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
            state, step = checkpointer.restore(target, {"seed": 0})
        # Saves are asynchronous: the one before the last that began is complete.
        assert reached - 1 <= step <= reached + 1
        for leaf in state.values():
            np.testing.assert_array_equal(leaf, step)
        params = model_files.load_params(tmp_path / "params")["a"]
        np.testing.assert_array_equal(params, params[0, 0])
        start = step + 1
    assert not list((tmp_path / "run").glob("*.damaged"))
    assert len(list((tmp_path / "run").glob("*.orbax-checkpoint-tmp"))) <= 1  # of the last kill


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
    assert stored["checksums"].keys() == stored["tree"].keys()
