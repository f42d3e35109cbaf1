"""Reveal order: schedules, segments and training splits."""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from enat_jax.schedules import costs, reveal

LENGTHS = [16, 64, 256, 1024]
ENAT_L = costs.Dims(width=1024, encoder_layers=22, decoder_layers=2)


def test_the_schedule_of_the_paper():
    steps = reveal.sampling_steps(256, 8)
    assert steps.num_masked.tolist() == [256, 251, 236, 212, 181, 142, 97, 49]
    assert steps.num_new.tolist() == [0, 5, 15, 24, 31, 39, 45, 48]
    assert steps.num_left.tolist() == [251, 236, 212, 181, 142, 97, 49, 0]


def test_without_reuse_all_visible_tokens_are_new():
    with_reuse, without = (reveal.sampling_steps(256, 8, reuse) for reuse in (True, False))
    assert without.num_cached.tolist() == [0] * 8
    np.testing.assert_array_equal(without.num_new, with_reuse.num_visible)


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_counts_equal_the_reference_for_every_number_of_steps(num_tokens):
    for num_steps in range(1, 65):
        expected = []
        for s in range(1, num_steps):
            # cos(pi s / 2t) is rational only for s / t = 2 / 3 (Niven), where float may fall
            # on either side; elsewhere no product is a whole number and the floor is safe.
            if Fraction(s, num_steps) == Fraction(2, 3):
                expected.append(num_tokens // 2)
            else:
                expected.append(math.floor(num_tokens * math.cos(math.pi * s / num_steps / 2)))
        counts = reveal.mask_counts(num_tokens, num_steps)
        assert counts.tolist() == [num_tokens, *expected, 0]


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 8, 64])
def test_every_token_is_revealed_exactly_once(num_tokens, num_steps):
    steps = reveal.sampling_steps(num_tokens, num_steps)
    revealed = np.zeros(num_tokens, int)
    for visible, masked, left in zip(
        steps.num_visible, steps.num_masked, steps.num_left, strict=True
    ):
        assert visible + masked == num_tokens
        revealed[visible : num_tokens - left] += 1
    assert revealed.tolist() == [1] * num_tokens
    # Everything but what the last step reveals is encoded, once.
    assert steps.num_new.sum() == num_tokens - steps.num_masked[-1]


@pytest.mark.parametrize("arguments", [(0, 8), (256, 0), (256, -1)])
def test_counts_refuse_sizes_below_one(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        reveal.mask_counts(*arguments)


@pytest.mark.parametrize("num_segments", [1, 2, 3, 8, 20])
def test_segments_cover_the_steps_and_hold_their_windows(num_segments):
    steps = reveal.sampling_steps(256, 8)
    cost = functools.partial(costs.step_cost, ENAT_L)
    segments = reveal.cut_segments(steps, num_segments, cost)
    assert len(segments) == min(num_segments, 8)
    assert [s for x in segments for s in range(x.start, x.stop)] == list(range(8))
    for segment in segments:
        for s in range(segment.start, segment.stop):
            counts = [steps.num_cached, steps.num_new, steps.num_visible, steps.num_masked]
            assert all(x[s] <= w for x, w in zip(counts, segment.windows, strict=True))


def test_every_cut_is_that_of_its_number():
    steps, cost = reveal.sampling_steps(256, 8), functools.partial(costs.step_cost, ENAT_L)
    every = reveal.every_cut(steps, 20, cost)
    assert every == [reveal.cut_segments(steps, n, cost) for n in range(1, 9)]


def test_the_cut_is_the_best_of_all_cuts():
    steps = reveal.sampling_steps(256, 8)
    cost = functools.partial(costs.step_cost, ENAT_L)

    def work(bounds):
        parts = [reveal._cover(steps, i, j) for i, j in zip(bounds, bounds[1:], strict=False)]
        return sum(cost(*w) * (j - i) for w, i, j in zip(parts, bounds, bounds[1:], strict=False))

    best = min(work([0, i, j, 8]) for i in range(1, 7) for j in range(i + 1, 8))
    segments = reveal.cut_segments(steps, 3, cost)
    assert work([0, *(x.stop for x in segments)]) == pytest.approx(best)


# --- training splits ------------------------------------------------------------------------


def draws(distribution, num_tokens, n, seed=0):
    return [distribution.draw(num_tokens, seed, step) for step in range(n)]


def test_a_split_depends_on_seed_and_step_alone():
    d = reveal.SplitDistribution()
    assert draws(d, 256, 50) == draws(d, 256, 50)
    assert draws(d, 256, 50) != draws(d, 256, 50, seed=1)
    assert len(set(draws(d, 256, 50))) > 30


def test_splits_stay_in_range_and_reuse_corners_occur():
    splits = draws(reveal.SplitDistribution(), 16, 4000)
    assert {s.num_visible for s in splits} >= {1, 2, 3, 4}
    assert all(1 <= s.num_visible <= 15 for s in splits)
    assert all(0 <= s.num_cached <= s.num_visible for s in splits)
    reused = [s for s in splits if s.reuse]
    assert len(reused) == pytest.approx(2000, abs=4 * math.sqrt(1000))
    assert any(s.num_cached == 0 for s in reused)
    assert any(s.num_cached == s.num_visible for s in reused)
    assert all(s.num_cached == 0 for s in splits if not s.reuse)


def test_reveals_that_make_the_cache_lie_within_it_and_change_no_other_draw():
    d = reveal.SplitDistribution(reveals=4)
    splits = draws(d, 256, 2000)
    plain = draws(reveal.SplitDistribution(), 256, 2000)
    assert [s[:3] for s in splits] == [s[:3] for s in plain] and splits == draws(d, 256, 2000)
    assert all(s.earlier == () for s in plain)
    for s in splits:
        ends = [0, *s.earlier, s.num_cached]
        assert len(ends) == 5 and ends == sorted(ends)
    # Where rounding hides none, there are one to four of them, as often each.
    many = [s for s in splits if s.reuse and s.num_cached > 60]
    numbers = np.bincount([sum(x > 0 for x in s.earlier) for s in many], minlength=4) / len(many)
    np.testing.assert_allclose(numbers, 0.25, atol=4 * math.sqrt(0.19 / len(many)))


def test_mask_ratios_are_beta_12_3():
    visible = np.array([s.num_visible for s in draws(reveal.SplitDistribution(), 4096, 4000)])
    masked = (4096 - visible) / 4096
    assert stats.kstest(masked, stats.beta(12, 3).cdf).pvalue > 0.01
    # The test can fail: a neighbouring distribution is told apart.
    assert stats.kstest(masked, stats.beta(11, 3).cdf).pvalue < 1e-4


@pytest.mark.parametrize("ratio", ["beta", "cosine"])
@pytest.mark.parametrize("min_visible", [0, 1])
def test_probabilities_are_those_of_the_draws(ratio, min_visible):
    d = reveal.SplitDistribution(mask_ratio=ratio, min_visible=min_visible, reuse_probability=1.0)
    expected = d.visible_probabilities(16)
    assert expected.sum() == pytest.approx(1)
    splits = draws(d, 16, 6000)
    seen = np.bincount([s.num_visible for s in splits], minlength=17)
    assert not seen[expected == 0].any()
    common = expected * 6000 > 5
    observed = np.append(seen[common], seen[~common].sum())
    predicted = np.append(expected[common], expected[~common].sum()) * 6000
    if predicted[-1] == 0:
        observed, predicted = observed[:-1], predicted[:-1]
    assert stats.chisquare(observed, predicted).pvalue > 0.01
    cached = np.bincount([s.num_cached for s in splits if s.num_visible == 3], minlength=4)
    predicted = d.cached_probabilities(3) * cached.sum()
    assert stats.chisquare(cached, predicted).pvalue > 0.01


@pytest.mark.parametrize(
    "change",
    [
        {"mask_ratio": "gauss"},
        {"reuse_probability": 1.5},
        {"min_visible": 2},
        {"alpha": 0.0},
        {"reveals": 0},
        {"reveals": 2, "reuse_probability": 0.0},
    ],
)
def test_impossible_distributions_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        reveal.SplitDistribution(**change)
