"""What a log line says: every number from literal steps, on a clock that the test moves."""

import inspect
import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from enat_jax.runtime import memory
from enat_jax.training import monitoring


class Clock:
    """Seconds that pass only where the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def scalars(**values):
    return {name: jnp.float32(value) for name, value in values.items()}


def train(monitor, clock, seconds=1.0, **arguments):
    """One step that takes so long."""
    clock.now += seconds
    monitor.step(scalars(loss=1.0), **arguments)


def test_metrics_are_means_over_the_steps(clock):
    monitor = monitoring.Monitor(8, clock=clock)
    for loss, accuracy in ((1.0, 0.25), (2.0, 0.75)):
        clock.now += 1
        monitor.step(scalars(loss=loss, accuracy=accuracy))
    found = monitor.summary()
    assert (found["loss"], found["accuracy"]) == (1.5, 0.5)
    assert "skipped" not in found and "masked_share" not in found
    clock.now += 1
    monitor.step(scalars(loss=5.0, accuracy=0.0))
    assert monitor.summary()["loss"] == 5.0  # the steps before are forgotten


def test_nothing_is_fetched_before_the_summary(clock, monkeypatch):
    fetched = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x) or device_get(x))
    monitor = monitoring.Monitor(8, clock=clock)
    for _ in range(3):
        train(monitor, clock, masked_share=0.5)
    assert not fetched
    monitor.summary()
    assert len(fetched) == 1 and len(fetched[0]) == 3


def test_skipped_steps_are_counted_but_not_averaged(clock):
    monitor = monitoring.Monitor(8, clock=clock)
    for loss, skipped, share in ((1.0, 0, 0.9), (math.nan, 1, 0.1), (3.0, 0, 0.7)):
        clock.now += 1
        monitor.step(scalars(loss=loss, grad_norm=loss, skipped=skipped), masked_share=share)
    found = monitor.summary()
    assert (found["loss"], found["grad_norm"], found["skipped"]) == (2.0, 2.0, 1.0)
    assert found["masked_share"] == pytest.approx(0.8)
    assert "loss/masked_0_25" not in found
    assert found["seconds_per_step"] == 1.0  # they took their time all the same


def test_where_all_steps_are_skipped_there_is_no_loss(clock):
    monitor = monitoring.Monitor(8, clock=clock)
    clock.now += 1
    monitor.step(scalars(loss=7.0, skipped=1), masked_share=0.5)
    found = monitor.summary()
    assert math.isnan(found["loss"]) and math.isnan(found["masked_share"])
    assert found["skipped"] == 1.0
    assert not [name for name in found if name.startswith("loss/")]


def test_losses_are_told_apart_by_the_masked_share(clock):
    monitor = monitoring.Monitor(8, clock=clock)
    for loss, share in ((1.0, 0.5), (2.0, 0.7499), (4.0, 0.75), (8.0, 1.0), (16.0, 0.0)):
        clock.now += 1
        monitor.step(scalars(loss=loss), masked_share=share)
    found = monitor.summary()
    assert {name: value for name, value in found.items() if name.startswith("loss/")} == {
        "loss/masked_0_25": 16.0,
        "loss/masked_50_75": 1.5,
        "loss/masked_75_100": 6.0,
    }


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(clock, share):
    with pytest.raises(ValueError, match="must lie in"):
        monitoring.Monitor(8, clock=clock).step(scalars(loss=1.0), masked_share=share)


def test_waiting_and_dispatching_are_shares_of_training_time(clock):
    monitor = monitoring.Monitor(32, clock=clock)
    for _ in range(2):
        with monitor.waiting():
            clock.now += 1.0
        with monitor.dispatching():
            clock.now += 0.5
        train(monitor, clock, seconds=2.5)
    found = monitor.summary()
    assert (found["seconds_per_step"], found["images_per_second"]) == (4.0, 8.0)
    assert (found["data_wait"], found["dispatch"]) == (0.25, 0.125)


def test_what_is_no_training_does_not_slow_it_down(clock):
    monitor = monitoring.Monitor(32, clock=clock)
    with monitor.compiling():
        clock.now += 4.0
    train(monitor, clock, seconds=2.0)
    with monitor.evaluating():
        clock.now += 8.0
    with monitor.saving():
        clock.now += 2.0
    found = monitor.summary()
    assert (found["seconds_per_step"], found["images_per_second"]) == (2.0, 16.0)
    assert (found["compilation"], found["evaluation"], found["saving"]) == (0.25, 0.5, 0.125)
    assert found["logging"] == 0.0
    with monitor.logging():
        clock.now += 1.0
    train(monitor, clock, seconds=3.0)
    found = monitor.summary()
    assert (found["logging"], found["evaluation"], found["seconds_per_step"]) == (0.25, 0.0, 3.0)


def test_steps_under_way_are_training_wherever_they_are_waited_for(clock, monkeypatch):
    def wait(metrics):
        assert metrics["loss"] == 1.0
        clock.now += 3.0

    monkeypatch.setattr(jax, "block_until_ready", wait)
    monitor = monitoring.Monitor(32, clock=clock)
    train(monitor, clock, seconds=1.0)
    with monitor.evaluating():
        clock.now += 4.0
    found = monitor.summary()
    assert (found["seconds_per_step"], found["evaluation"]) == (4.0, 0.5)


def test_an_error_within_a_context_ends_it(clock):
    monitor = monitoring.Monitor(32, clock=clock)
    with pytest.raises(OSError), monitor.saving():
        clock.now += 1.0
        raise OSError
    train(monitor, clock, seconds=1.0)
    assert monitor.summary()["saving"] == 0.5


def test_of_contexts_within_each_other_the_innermost_counts(clock):
    monitor = monitoring.Monitor(32, clock=clock)
    with monitor.dispatching():
        clock.now += 1.0
        with monitor.compiling():
            clock.now += 4.0
        clock.now += 1.0
    train(monitor, clock, seconds=2.0)
    found = monitor.summary()
    assert (found["seconds_per_step"], found["dispatch"], found["compilation"]) == (4.0, 0.5, 0.5)


def test_making_a_summary_is_logging_but_waiting_for_its_steps_is_not(clock, monkeypatch):
    def fetch(metrics):
        clock.now += 2.0
        return metrics

    monkeypatch.setattr(jax, "device_get", fetch)
    monitor = monitoring.Monitor(32, clock=clock)
    train(monitor, clock, seconds=1.0)
    with monitor.logging():
        first = monitor.summary()
        clock.now += 1.0
    train(monitor, clock, seconds=5.0)
    with monitor.logging():
        second = monitor.summary()
    assert (first["seconds_per_step"], first["logging"]) == (3.0, 0.0)
    assert (second["seconds_per_step"], second["logging"]) == (7.0, 0.125)


def test_no_steps_no_summary(clock):
    with pytest.raises(RuntimeError, match="no step"):
        monitoring.Monitor(32, clock=clock).summary()


def test_work_is_compared_with_the_matrix_rate(clock):
    monitor = monitoring.Monitor(8, matrix_rate=1000.0, clock=clock)
    train(monitor, clock, seconds=1.0, exact_work=300.0, padded_work=500.0)
    train(monitor, clock, seconds=3.0, exact_work=500.0, padded_work=500.0)
    with monitor.evaluating():
        clock.now += 96.0
    found = monitor.summary()
    assert found["matrix_rate_fraction"] == 0.2  # (800 / 4 s) / 1000
    assert found["padding"] == 0.25


def test_without_work_or_rate_there_is_no_fraction(clock):
    monitor = monitoring.Monitor(8, matrix_rate=1000.0, clock=clock)
    train(monitor, clock)
    assert not {"matrix_rate_fraction", "padding"} & monitor.summary().keys()
    monitor = monitoring.Monitor(8, clock=clock)
    train(monitor, clock, exact_work=4.0, padded_work=5.0)
    found = monitor.summary()
    assert "matrix_rate_fraction" not in found and found["padding"] == 0.25


def test_the_documented_names_are_those_of_a_summary(clock, monkeypatch):
    monkeypatch.setattr(memory, "device_peak", lambda: 2**30)
    monitor = monitoring.Monitor(8, matrix_rate=1.0, clock=clock)
    for share in (0.1, 0.3, 0.6, 0.9):
        clock.now += 1
        metrics = scalars(loss=1.0, accuracy=0.5, skipped=0)
        monitor.step(metrics, masked_share=share, exact_work=1.0, padded_work=1.0)
    text = inspect.cleandoc(monitoring.Monitor.summary.__doc__)  # indented up to Python 3.12
    entries = re.findall(r"^    ([a-z][\w/, .]*):", text, re.M)
    documented = set(itertools.chain(*(entry.split(", ") for entry in entries))) - {"..."}
    found = monitor.summary()
    assert documented == set(found)
    assert len(documented) == 20
    assert all(isinstance(value, float) for value in found.values())
    assert found["device_memory_bytes"] == 2**30


def test_a_real_clock_moves():
    monitor = monitoring.Monitor(8)
    with monitor.waiting():
        pass
    monitor.step(scalars(loss=1.0))
    found = monitor.summary()
    assert 0 < found["data_wait"] < 1 and 0 < found["images_per_second"] < math.inf
