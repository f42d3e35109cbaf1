"""Which checkpoint counts as the best."""

import dataclasses

import pytest

from enat_jax.checkpoints import best


@dataclasses.dataclass
class Checkpoint:
    step: int


def kept(policy, steps):
    flags = policy.should_preserve([Checkpoint(step) for step in steps], context=None)
    return [step for step, flag in zip(steps, flags, strict=True) if flag]


@pytest.mark.parametrize("mode, expected", [("min", 20), ("max", 30)])
def test_one_step_is_the_best(mode, expected):
    policy = best.KeepBest(best.Best("fid", mode))
    for step, fid in ((10, 5.0), (20, 2.0), (30, 9.0)):
        policy.note(step, {"fid": fid, "loss": -1.0})
    assert policy.best_of([30, 10, 20]) == expected
    assert kept(policy, [10, 20, 30]) == [expected]
    assert kept(policy, [10]) == [10]  # of those that are there


def test_the_earliest_of_equal_ones_is_the_best():
    policy = best.KeepBest(best.Best("fid", "max"))
    for step in (30, 10, 20):
        policy.note(step, {"fid": 1.0})
    assert policy.best_of([30, 20, 10]) == 10


def test_a_step_without_the_metric_is_not():
    policy = best.KeepBest(best.Best("fid", "min"))
    policy.note(10, {"fid": 5.0})
    policy.note(20, {"fid": None})
    policy.note(30, {"loss": 1.0})
    assert kept(policy, [10, 20, 30]) == [10]
    assert policy.best_of([20, 30, 40]) is None and kept(policy, [20, 30, 40]) == []
    policy.note(10, {})  # the run went through this step again, and did not evaluate it
    assert policy.best_of([10]) is None


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="mode='lowest' of the best fid must be 'min' or 'max'"):
        best.Best("fid", "lowest")
