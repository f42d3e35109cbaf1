"""The stream of batches depends on (seed, step) alone: not on where it starts, nor on the hosts."""

import itertools

import numpy as np
import pytest

from enat_jax.data import loader


def gather(indices, seeds):
    return {"index": indices, "seed": seeds}


def take(count, n=10, global_batch=4, **settings):
    stream = loader.train_batches(gather, n, global_batch, **{"seed": 0} | settings)
    return list(itertools.islice(stream, count))


def test_every_epoch_is_a_new_shuffle_of_all_examples():
    order = np.concatenate([batch["index"] for batch in take(5)])
    first, second = order[:10], order[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert (first != second).any() and (first != np.arange(10)).any()


def test_an_example_gets_another_seed_each_time():
    seeds = np.concatenate([batch["seed"] for batch in take(50)])
    assert len(np.unique(seeds)) == 200
    assert seeds.min() >= 0


@pytest.mark.parametrize("start_step", [1, 2, 3, 7])
def test_a_stream_resumes_anywhere(start_step):
    whole = take(10)[start_step:]
    resumed = take(10 - start_step, start_step=start_step)
    np.testing.assert_equal(resumed, whole)


def test_another_seed_is_another_stream():
    first, second = take(5), take(5, seed=1)
    assert any((a["index"] != b["index"]).any() for a, b in zip(first, second, strict=True))
    assert all((a["seed"] != b["seed"]).all() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_same_global_batches(hosts):
    parts = [take(6, process_index=i, process_count=hosts) for i in range(hosts)]
    for batch, *shares in zip(take(6), *parts, strict=True):
        for name in batch:
            joined = np.concatenate([share[name] for share in shares])
            np.testing.assert_array_equal(joined, batch[name])


def test_a_batch_may_be_larger_than_the_data():
    (batch,) = take(1, n=3, global_batch=6)
    assert sorted(batch["index"]) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"process_count": 3}, "global_batch=4 is not divisible"),
        ({"process_index": 2, "process_count": 2}, "process_index=2"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        take(1, **settings)
