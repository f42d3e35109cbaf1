"""The windows of the reveal order, cut for counts of a batch and of each image."""

import jax
import numpy as np
import pytest

from enat_jax.inference import windows
from enat_jax.schedules import reveal

IDS = np.array([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]], np.int32)
ORDER = np.array([[5, 3, 0, 1, 4, 2], [0, 1, 2, 3, 4, 5]], np.int32)


def test_an_exact_cut_needs_no_counts():
    cut = windows.cut(IDS, ORDER, 1, 3, reveal.Windows(1, 2, 3, 3), exact=True)
    assert cut.cached.ids.tolist() == [[10], [20]]
    assert cut.new.ids.tolist() == [[11, 12], [21, 22]]
    assert cut.new.positions.tolist() == [[3, 0], [1, 2]]
    assert cut.masked.positions.tolist() == [[1, 4, 2], [3, 4, 5]]
    assert cut.num_cached is cut.num_new is cut.num_visible is cut.num_masked is None
    assert cut.masked_is_real is None


def test_padding_is_behind_the_new_tokens_and_before_the_masked_ones():
    sizes = reveal.Windows(3, 4, 5, 5)
    cut = jax.jit(lambda *counts: windows.cut(IDS, ORDER, *counts, sizes)._replace(sizes=None))(
        np.int32(2), np.int32(4)
    )
    assert cut.cached.ids[:, :2].tolist() == [[10, 11], [20, 21]]
    assert cut.new.ids[:, :2].tolist() == [[12, 13], [22, 23]]
    assert cut.new.ids.shape == (2, 4)
    assert cut.masked.ids[:, -2:].tolist() == [[14, 15], [24, 25]]
    assert cut.masked_is_real.tolist() == [[False, False, False, True, True]]
    assert [int(x) for x in (cut.num_cached, cut.num_new, cut.num_visible)] == [2, 2, 4]


def test_a_new_window_that_starts_at_the_end_is_not_moved():
    cut = windows.cut(IDS, ORDER, 6, 6, reveal.Windows(6, 3, 6, 1))
    assert cut.new.ids.shape == (2, 3) and int(cut.num_new) == 0
    assert cut.cached.ids.tolist() == IDS.tolist()


def test_counts_of_each_image_cut_each_as_if_alone():
    cached, visible = np.array([1, 3]), np.array([4, 5])
    sizes = reveal.Windows(3, 3, 5, 2)
    cut = windows.cut(IDS, ORDER, cached, visible, sizes)
    for i in range(2):
        alone = windows.cut(
            IDS[i : i + 1], ORDER[i : i + 1], int(cached[i]), int(visible[i]), sizes
        )
        for window in ("cached", "new", "masked"):
            for found, expected in zip(getattr(cut, window), getattr(alone, window), strict=True):
                np.testing.assert_array_equal(found[i], expected[0])
        np.testing.assert_array_equal(cut.masked_is_real[i], alone.masked_is_real[0])
    assert cut.num_new.tolist() == [3, 2] and cut.num_masked.tolist() == [2, 1]


@pytest.mark.parametrize(
    "ids, order, num_cached, words",
    [
        (IDS[0], ORDER, 1, r"ids must have the shape \[b, l\], not \[6\]"),
        (IDS, ORDER[:, :5], 1, r"order must have the shape \[b=2, l=6\], not \[2, 5\]"),
        (IDS, ORDER, np.array([1]), r"num_cached must have the shape \[b=2\], not \[1\]"),
    ],
)
def test_other_shapes_are_refused_in_a_sentence(ids, order, num_cached, words):
    with pytest.raises(ValueError, match=words):
        windows.cut(ids, order, num_cached, 3, reveal.Windows(1, 2, 3, 3))
