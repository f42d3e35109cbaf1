"""The training program on two hosts: as good as one, and safe from whatever happens to either."""

import json
import pathlib
import signal
import time

import jax
import numpy as np
import pytest
import several

from enat_jax.inference import tokenizer

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
NUM_STEPS = 24
ARGUMENTS = (
    *("-m", "enat_jax.train", "--config", ROOT / "configs" / "digits_vqgan.py"),
    *("--config.model.channels=8", "--config.data.size=8"),
    *("--config.train.batch_size=8", f"--config.train.num_steps={NUM_STEPS}"),
    *("--config.train.log_every=4", "--config.train.eval_every=24", "--config.train.save_every=8"),
    "--config.optimizer.warmup_steps=2",
)
# As for the tests of a single process: machine code that is quickly made.
QUICK = "--xla_backend_optimization_level=0"


def train(workdir, *arguments, **more):
    """Processes that train in a directory; their output is beside it."""
    output = workdir.with_suffix(".output")
    output.mkdir(exist_ok=True)
    several_of = {"number": 2, "devices": 1, "flags": QUICK, **more}
    return several.processes([*ARGUMENTS, "--workdir", workdir, *arguments], output, **several_of)


def wait_for_checkpoint(hosts, workdir, step=8, timeout=120):
    end = time.monotonic() + timeout
    while not (workdir / "checkpoints" / str(step)).exists():
        assert hosts[0].handle.poll() is None, hosts[0].output()
        assert time.monotonic() < end, hosts[0].output()
        time.sleep(0.02)


def finish(workdir, **more):
    """Train to the end; what it leaves."""
    with train(workdir, **more) as hosts:
        assert [host.code(180) for host in hosts] == [0] * len(hosts), hosts[0].output()
    return results(workdir)


def results(workdir):
    """Parameters of the model, and the losses by step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return tokenizer.Tokenizer.load(workdir / "model").params, losses


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
    assert found[1][NUM_STEPS] == expected[1][NUM_STEPS]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("hosts") / "undisturbed")


def test_two_hosts_are_as_good_as_one_with_as_many_devices(undisturbed, tmp_path):
    params, losses = finish(tmp_path / "one", number=1, devices=2)
    assert sorted(losses) == [4, 8, 12, 16, 20, 24]
    for step, loss in losses.items():
        assert loss == pytest.approx(undisturbed[1][step], rel=1e-4), step
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, atol=1e-4), params, undisturbed[0]
    )


def test_hosts_that_are_asked_to_stop_go_on_from_there(undisturbed, tmp_path):
    workdir = tmp_path / "stopped"
    with train(workdir) as hosts:
        # Not a step's line: a fast machine may be done before the first of them is printed.
        hosts[0].wait_for("compiling a step", 120)
        hosts[1].handle.send_signal(signal.SIGTERM)
        assert [host.code(180) for host in hosts] == [75, 75], hosts[0].output()
        start = "stopped: on request, saved after step "
        (line,) = {host.line(start) for host in hosts}
    stopped = int(line.removeprefix(start).partition(";")[0])
    assert 1 <= stopped < NUM_STEPS
    with train(workdir) as hosts:
        hosts[0].wait_for(f"continuing from step {stopped}:", 120)
        assert [host.code(180) for host in hosts] == [0, 0]
    assert_same(results(workdir), undisturbed)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_host_may_die(undisturbed, tmp_path, dead):
    workdir = tmp_path / "died"
    with train(workdir) as hosts:
        wait_for_checkpoint(hosts, workdir)
        hosts[dead].handle.kill()
        assert hosts[1 - dead].code(130) == 76
        assert "stopped: " in hosts[1 - dead].output()
    assert_same(finish(workdir), undisturbed)


def test_a_host_may_hang(undisturbed, tmp_path):
    workdir = tmp_path / "hung"
    with train(workdir, "--config.train.hang_timeout=20.0") as hosts:
        wait_for_checkpoint(hosts, workdir)
        hosts[1].handle.send_signal(signal.SIGSTOP)
        assert hosts[0].code(90) == 76
        assert "stopped: no step has been completed for 20 s" in hosts[0].output()
    assert_same(finish(workdir), undisturbed)
