"""The stream of batches depends on (seed, step) alone: not on where it starts, nor on the hosts."""

import itertools

import numpy as np
import pytest
import tiny
from PIL import Image

from enat_jax.data import images, loader, tokens


class Echo:
    """Examples that can be sent to other processes."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def gather(self, indices, seeds):
        return {"index": indices, "seed": seeds}


def take(count, n=10, global_batch=4, **settings):
    stream = loader.train_batches(Echo(n), global_batch, **{"seed": 0} | settings)
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


def test_an_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    epochs = [loader.shuffled(e * 1000, 1000, 1000, seed=3) for e in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(1000))
    assert (epochs[0] != epochs[1]).mean() > 0.9 and (epochs[1] != epochs[2]).mean() > 0.9
    # Any cut out of it is the same, and what comes before does not matter.
    np.testing.assert_array_equal(
        loader.shuffled(990, 1020, 1000, seed=3),
        np.concatenate([epochs[0][990:], epochs[1], epochs[2][:10]]),
    )
    # Neighbours in the data are no neighbours in the order.
    assert np.abs(np.diff(epochs[0])).mean() == pytest.approx(1000 / 3, rel=0.1)


def test_one_example_is_repeated():
    assert loader.shuffled(5, 3, 1, seed=0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(workers):
    found = take(5, start_step=3, workers=workers)
    np.testing.assert_equal(found, take(8)[3:])
    # Of shared memory, which is of another type, some would be left behind by a run that is killed.
    assert {type(x) for batch in found for x in batch.values()} == {np.ndarray}


def test_batches_are_put_ahead_and_in_order():
    put = []

    def begin(batch):
        put.append(batch)
        return -batch

    stream = loader.prefetch(iter(range(1, 6)), begin, ahead=2)
    assert next(stream) == -1 and put == [1, 2, 3]  # the next two are on their way
    assert next(stream) == -2 and put == [1, 2, 3, 4]
    assert list(stream) == [-3, -4, -5]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_same_global_batches(hosts):
    parts = [take(6, share=(i, hosts)) for i in range(hosts)]
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
        ({"workers": -1}, "workers=-1"),
        ({"share": (0, 3)}, "global_batch=4 is not divisible"),
        ({"share": (2, 2)}, "process_index=2"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        take(1, **settings)


def test_token_sets_and_images_are_read_by_workers(tmp_path):
    """Whatever they hold open is opened again in the worker, and the batches are the same."""
    codes = np.random.default_rng(0).integers(0, 8, (20, 4))
    made = tiny.token_set(
        codes, np.arange(20) % 3, codebook_size=8, class_names="abc", tokenizer="1234"
    )
    token_set = tokens.TokenSet.open(tiny.write_tokens(tmp_path / "tokens", made))
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)
        (tmp_path / "pictures" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "pictures" / str(i % 2) / f"{i}.png")
    pictures = images.open_source(str(tmp_path / "pictures"), "train", size=8)
    for source in (token_set, pictures):
        streams = [loader.train_batches(source, 8, seed=0, workers=workers) for workers in (0, 1)]
        for threaded, remote, _ in zip(*streams, range(4), strict=False):
            np.testing.assert_equal(remote, threaded)
