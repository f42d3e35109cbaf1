"""Shape buckets: every split is held, and the padding is what the choice promises."""

import dataclasses
import functools

import expected_work
import pytest

from enat_jax.schedules import costs, reveal, shape_buckets

ENAT_L = costs.Dims(width=1024, encoder_layers=22, decoder_layers=2)


def test_expected_work_counted_split_by_split():
    d = reveal.SplitDistribution(min_visible=0, reuse_probability=0.25)
    dims = dataclasses.replace(ENAT_L, num_tokens=16)
    cost = functools.partial(costs.training_cost, dims)
    buckets = shape_buckets.choose(16, d, 4, cost)
    mass, padded, exact = d.visible_probabilities(16), 0.0, 0.0
    for visible in range(16):
        for reuse, share in ((False, 0.75), (True, 0.25)):
            for c, p in enumerate(d.cached_probabilities(visible) if reuse else [1.0]):
                windows = shape_buckets.find(buckets, reveal.Split(reuse, c, visible)).windows
                padded += share * mass[visible] * p * costs.training_cost(dims, *windows)
                exact += share * mass[visible] * p * costs.exact_training_cost(dims, c, visible)
    assert expected_work.of(16, d, buckets, cost) == pytest.approx((padded, exact))


def test_forty_shapes_pad_enat_l_by_at_most_a_quarter():
    d = reveal.SplitDistribution()
    cost = functools.partial(costs.training_cost, ENAT_L)
    buckets = shape_buckets.choose(256, d, 40, cost)
    padded, exact = expected_work.of(256, d, buckets, cost)
    assert len({b.windows for b in buckets}) <= 40
    assert 1.0 <= padded / exact <= 1.25


@pytest.mark.parametrize("num_tokens", [16, 64])
@pytest.mark.parametrize("max_shapes", [2, 3, 4, 9])
@pytest.mark.parametrize("ratio", ["beta", "cosine"])
def test_buckets_hold_every_split(num_tokens, max_shapes, ratio):
    d = reveal.SplitDistribution(mask_ratio=ratio, min_visible=0)
    cost = functools.partial(costs.training_cost, ENAT_L)
    buckets = shape_buckets.choose(num_tokens, d, max_shapes, cost)
    assert len(buckets) <= max_shapes
    for visible in range(num_tokens):
        for cached in [None, *range(visible + 1)]:
            split = reveal.Split(cached is not None, cached or 0, visible)
            held = [b for b in buckets if b.holds(split)]
            assert len(held) == 1
            windows = held[0].windows
            assert split.num_cached <= windows.num_cached
            assert visible - split.num_cached <= windows.num_new
            assert visible <= windows.num_visible <= windows.num_cached + windows.num_new
            assert num_tokens - visible <= windows.num_masked <= num_tokens


def test_windows_are_rounded_up():
    cost = functools.partial(costs.training_cost, ENAT_L)
    d = reveal.SplitDistribution(min_visible=0)
    exact, rounded = (shape_buckets.choose(60, d, 9, cost, multiple) for multiple in (1, 8))
    for one, other in zip(exact, rounded, strict=True):
        assert one[:3] == other[:3]
        for before, after in zip(one.windows, other.windows, strict=True):
            assert after == min(-(-before // 8) * 8, 60)


@pytest.mark.parametrize("reuse_probability", [0.0, 1.0])
def test_one_kind_of_step_needs_one_kind_of_bucket(reuse_probability):
    d = reveal.SplitDistribution(reuse_probability=reuse_probability)
    cost = functools.partial(costs.training_cost, ENAT_L)
    buckets = shape_buckets.choose(16, d, 3, cost)
    assert {b.reuse for b in buckets} == {bool(reuse_probability)}
    assert len(buckets) == 3


def test_too_few_shapes_and_foreign_splits_are_refused():
    cost = functools.partial(costs.training_cost, ENAT_L)
    with pytest.raises(ValueError, match="max_shapes=1"):
        shape_buckets.choose(16, reveal.SplitDistribution(), 1, cost)
    buckets = shape_buckets.choose(16, reveal.SplitDistribution(), 4, cost)
    with pytest.raises(ValueError, match="no bucket holds"):
        shape_buckets.find(buckets, reveal.Split(False, 0, 16))
