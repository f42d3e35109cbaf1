"""Hostile training: full disks, lost workers, settings without sense, updates that overflow."""

import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import hostile
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from small_runs import lines, small_config

from enat_jax import train
from enat_jax.data import loader
from enat_jax.runtime import cli, distributed, exits, sharding
from enat_jax.training import classifier_task, enat_task, metric_writer, optim, train_step
from enat_jax.training import config as train_config
from enat_jax.training.task import TrainState

# --- what is logged ------------------------------------------------------------------------------


def test_a_metrics_file_with_bytes_that_are_no_text_does_not_stop_a_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 2, "loss": 1.5}\n{"step": 4, "lo\xff\xfe\n')
    with metric_writer.MetricWriter(tmp_path, resume_step=4):
        pass
    assert lines(tmp_path) == [{"step": 2, "loss": 1.5}]


def test_a_metrics_file_of_deep_brackets_does_not_stop_a_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("[" * 200_000 + '\n{"step": 2, "loss": 1.5}\n')
    with metric_writer.MetricWriter(tmp_path, resume_step=4):
        pass
    assert lines(tmp_path) == [{"step": 2, "loss": 1.5}]


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit on the size of files")
def test_a_full_disk_is_an_error_and_no_endless_wait(tmp_path):
    """The event file cannot grow: its writer says so, in a process that may hang."""
    program = f"""
import os, pathlib, resource, signal
import numpy as np
from enat_jax.training import metric_writer
writer = metric_writer.MetricWriter({str(tmp_path)!r})
noise = np.random.default_rng(0).integers(0, 256, (200, 200, 1), np.uint8)
writer.images(0, {{"noise": noise}})  # now the event file is the larger one, by 40 kB
(event_file,) = pathlib.Path({str(tmp_path)!r}).glob("events*")
assert event_file.stat().st_size > 40_000
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (event_file.stat().st_size, resource.RLIM_INFINITY))
try:
    for step in range(400):
        writer.scalars(step, {{"loss": 1.0}})
except OSError as error:
    print("failed with", type(error).__name__, flush=True)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30
    )
    assert done.stdout.strip() == "failed with OSError", done.stderr


# --- processes that read -------------------------------------------------------------------------


class Slow:
    """Examples that take a while, and tell which process made them."""

    def __len__(self):
        return 10

    def gather(self, indices, seeds):
        time.sleep(0.05)
        return {"index": indices, "process": np.full(len(indices), os.getpid())}


def slow_batches():
    return loader.train_batches(Slow(), 4, seed=0, workers=1)


def test_workers_go_on_after_the_signals_that_ask_for_a_stop():
    """Ctrl-C and a scheduler's SIGTERM reach them, too, and the step under way needs its batch."""
    batches = slow_batches()
    worker = int(next(batches)["process"][0])
    assert worker != os.getpid()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
    later = list(itertools.islice(batches, 6))
    assert {int(batch["process"][0]) for batch in later} == {worker}
    for child in multiprocessing.active_children():
        child.kill()


@pytest.mark.skipif(not pathlib.Path("/proc").is_dir(), reason="reads /proc")
def test_no_worker_outlives_a_killed_run(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        "import test_hostile_training\n"
        "if __name__ == '__main__':\n"
        "    batches = test_hostile_training.slow_batches()\n"
        "    print(next(batches)['process'][0], flush=True)\n"
        "    while True: next(batches)\n"
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = _runs(worker)
    if left:
        os.kill(worker, signal.SIGKILL)
    process.stdout.close()
    assert not left


def _runs(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


# --- settings without sense ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("ker(nel", (None,)),), r"'ker\(nel' is no expression"),
        (("kernel$", ("fsdp",)), "'kernel\\$' is no pair"),
        ((("kernel$", 3),), "no pair"),
        ((("kernel$", "fsdp"),), "no pair"),
        ((("kernel$",),), "no pair"),
        ("kernel", "no pair"),
        ((("kernel$", ("fsdp", "fsdp")),), "each at most once"),
        ((("kernel$", ("model",)),), "'data', 'fsdp', 'tensor'"),
        ((("kernel$", (("data", "fsdp"), None)),), "each at most once"),
    ],
)
def test_rules_that_are_none_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        sharding.Sharding(rules=rules)


@pytest.mark.parametrize("setting", ["learning_rate", "weight_decay"])
def test_an_infinite_setting_of_the_optimizer_is_refused(setting):
    with pytest.raises(ValueError, match=f"{setting}=inf must be"):
        optim.Optimizer(**{"learning_rate": 1e-3, "warmup_steps": 0} | {setting: math.inf})


@pytest.mark.parametrize("timeout", [0.0, -1.0, math.nan, math.inf, 1e300])
def test_a_watchdog_that_could_not_wait_is_refused(timeout):
    with pytest.raises(ValueError, match="watchdog"):
        distributed.Watchdog(timeout)


# --- steps that are not finite -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Overflowing:
    """A task whose loss and gradients are finite and whose update is not."""

    batch_size: int = 8
    frozen = {}

    def init(self, key):
        del key
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, {"w": jnp.ones((4,))}, {}, (), {})

    def batch_spec(self):
        return {"x": jax.ShapeDtypeStruct((self.batch_size, 4), jnp.float32)}

    def gradients(self, state, batch, traced, key, *, static, frozen):
        del state, traced, key, static, frozen
        return {"w": batch["x"].mean(0)}, {"loss": batch["x"].mean()}, {}

    def update(self, state, grads, extra):
        del extra
        return state.replace(
            params=jax.tree.map(lambda p, g: p - 1e38 * (10 * g), state.params, grads)
        )


def test_an_update_that_overflows_is_not_made():
    mesh = sharding.make_mesh(sharding.Sharding(), jax.devices()[:1])
    steps = train_step.CompiledSteps(Overflowing(), mesh, (), seed=0)
    batch = sharding.global_batch({"x": np.ones((8, 4), np.float32)}, mesh)
    state, metrics = steps(steps.init(), [batch], 0)
    np.testing.assert_array_equal(state.params["w"], np.ones(4))
    assert (int(state.step), int(state.skipped), float(metrics["skipped"])) == (1, 1, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Bad(enat_task.Task):
    """A task without a finite gradient."""

    def gradients(self, *arguments, **named):
        grads, metrics, extra = super().gradients(*arguments, **named)
        return jax.tree.map(lambda g: g * jnp.nan, grads), metrics, extra


@pytest.mark.slow
def test_a_run_whose_last_steps_diverge_does_not_pass_for_done(data, tmp_path, monkeypatch):
    """Nor does starting it again, after too few steps for the loop to have looked at them."""
    make = enat_task.make

    def bad(*arguments):
        task = make(*arguments)
        return Bad(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})

    monkeypatch.setattr(train_config.TASKS["enat"], "make", bad)
    settings = {"train.num_steps": 3, "train.max_skipped": 3, "train.save_every": 100}
    config = small_config(data, **settings)
    for _ in range(2):
        with pytest.raises(cli.Stop, match="3 steps in a row .* step 2") as stop:
            train.train(config, tmp_path, jax.devices()[:1])
        assert stop.value.code == exits.DIVERGED
    assert not (tmp_path / "model").exists()


# --- pictures that cannot be read ----------------------------------------------------------------


def of_pictures(source, **changes):
    """A feature network on the pictures of a folder."""
    config = ml_collections.ConfigDict(
        {
            "task": "classifier",
            "seed": 0,
            "model": {"widths": (4,)},
            "data": {"source": str(source), "size": 8, "held_out": 0.3},
            "loss": {},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
            "train": {
                "batch_size": 2, "num_steps": 12, "log_every": 1, "eval_every": 100,
                "save_every": 1, "matrix_rate": False, "rehearse": False,
            },
        }
    )  # fmt: skip
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def pictures(tmp_path):
    return hostile.write_folder(tmp_path / "pictures")


def test_unreadable_pictures_are_refused_before_anything_is_computed(pictures, tmp_path, capsys):
    for key in (hostile.BAD, "bird/00.png"):
        (pictures / key).write_bytes(b"bad")
    (pictures / "notes.md").write_text("text")
    with mock.patch.object(train, "_train", side_effect=AssertionError):
        with pytest.raises(ValueError, match="2 of 12 pictures cannot be read") as caught:
            train.train(of_pictures(pictures), tmp_path / "run")
    assert "--config.data.unreadable=skip" in str(caught.value)
    assert "files that are not used: .md (1)\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unreadable='drop' is unknown: choose one of"):
        train.train(of_pictures(pictures, **{"data.unreadable": "drop"}), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("remedy", "workers"), [("removed", 0), ("replaced", 0), ("skipped", 1)])
def test_a_picture_that_turns_bad_stops_a_run_that_then_goes_on(tmp_path, capsys, remedy, workers):
    """As the message says, each way."""
    files = {f"{'ab'[i % 2]}/{i}.png": hostile.noise(i) for i in range(60)}
    pictures = hostile.write_folder(tmp_path / "pictures", files)
    changes = {"data.workers": workers, "data.scan": False, "train.batch_size": 1}
    changes["train.num_steps"] = 30
    source = classifier_task.make(of_pictures(pictures, **changes)).source
    late = source.key(int(loader.shuffled(0, len(source), len(source), 0)[25]))
    good = files[late]
    (pictures / late).write_bytes(good[:-30])
    device = jax.devices()[:1]
    with pytest.raises(ValueError, match=f"{late}: is .*remove .*replace .*=skip"):
        train.train(of_pictures(pictures, **changes), tmp_path / "run", device)
    done = max(int(x.name) for x in (tmp_path / "run/checkpoints").iterdir() if x.name.isdecimal())
    match remedy:
        case "removed":
            (pictures / late).unlink()
        case "replaced":
            (pictures / late).write_bytes(good)
        case "skipped":
            changes["data.unreadable"] = "skip"
    capsys.readouterr()
    train.train(of_pictures(pictures, **changes), tmp_path / "run", device)
    said = capsys.readouterr().out
    assert f"({late})" in said and f"continuing from step {done}" in said and done > 15
    other = source.key(0) if source.key(0) != late else source.key(1)
    (pictures / other).unlink()
    more = changes | {"train.num_steps": 31}
    with pytest.raises(ValueError, match="was trained on other pictures; .* missing ") as caught:
        train.train(of_pictures(pictures, **more), tmp_path / "run", device)
    assert other in str(caught.value)
