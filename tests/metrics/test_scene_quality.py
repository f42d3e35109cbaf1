"""What pictures of digits in cells show, and whether it is what was asked for."""

import numpy as np
import pytest

from enat_jax.metrics.scene_quality import BLANK, Reader, Share, judge, share

# A three left of a seven: in the upper row, or in the lower one.
THREE_SEVEN = [[3, 7, BLANK, BLANK], [BLANK, BLANK, 3, 7]]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ([3, 7, BLANK, BLANK], (True, True, True)),
        ([BLANK, BLANK, 3, 7], (True, True, True)),
        ([7, 3, BLANK, BLANK], (True, True, False)),  # swapped
        ([3, BLANK, 7, BLANK], (False, True, False)),  # the other axis
        ([3, BLANK, BLANK, 7], (False, True, False)),  # across
        ([3, 8, BLANK, BLANK], (True, False, False)),
        ([3, 3, BLANK, BLANK], (True, False, False)),  # one of them twice
        ([BLANK] * 4, (False, False, False)),
        ([3, 7, 3, BLANK], (False, False, False)),  # one too many
        ([3, BLANK, BLANK, BLANK], (False, False, False)),
        ([3, 7, 3, 7], (False, False, False)),
    ],
)
def test_verdicts(shown, expected):
    verdicts = judge(np.array([shown]), np.array([THREE_SEVEN]))
    assert tuple(bool(x[0]) for x in verdicts) == expected


def test_verdicts_are_of_each_picture():
    wanted = np.array([THREE_SEVEN, [[1, BLANK, 2, BLANK], [BLANK, 1, BLANK, 2]]])
    verdicts = judge(np.array([[3, 7, BLANK, BLANK], [3, 7, BLANK, BLANK]]), wanted)
    assert verdicts.in_place.tolist() == verdicts.layout.tolist() == [True, False]
    with pytest.raises(ValueError, match=r"shown.shape=\(2, 3\)"):
        judge(np.zeros((2, 3), int), wanted)


def digits():
    """Three of each of two made-up digits of 8x8 pixels: white above, and white at the left."""
    images = np.zeros((6, 8, 8, 1), np.uint8)
    for i in range(3):
        images[i, : 3 + i], images[3 + i, :, : 3 + i] = 255, 255
    return images, np.array([4, 4, 4, 9, 9, 9])


def test_a_reader_reads_the_digits_that_it_knows():
    images, labels = digits()
    reader = Reader.of(images, labels)
    assert reader.least_ink == pytest.approx(3 / 16)
    scenes = np.zeros((3, 16, 16, 1), np.uint8)
    scenes[0, :8, :8], scenes[0, 8:, :8] = images[1], images[4]
    scenes[1, :8, 8:], scenes[1, 8:, 8:] = images[5], images[0]
    reading = reader.read(scenes)
    assert reading.digits.tolist() == [[4, BLANK, 9, BLANK], [BLANK, 9, BLANK, 4], [BLANK] * 4]
    np.testing.assert_array_equal(reading.features[0, 2], images[4].reshape(-1) / 255)
    np.testing.assert_array_equal(reading.features[1, 1], images[5].reshape(-1) / 255)
    # Little ink is none; a digit that has lost a part of it is still there.
    scenes[2, 0, 0], scenes[2, 8:, 8:] = 255, images[1] // 2 + 20
    assert reader.read(scenes).digits[2].tolist() == [BLANK, BLANK, BLANK, 4]
    with pytest.raises(ValueError, match="size=16 does not divide"):
        reader.read(np.zeros((1, 24, 24, 1), np.uint8))


def test_pictures_of_different_requests_have_the_usual_error():
    hits = np.array([True, True, True, False])
    found = share(hits, np.arange(4))
    assert found.mean == 0.75
    assert found.standard_error == pytest.approx(hits.std(ddof=1) / np.sqrt(4))


def test_pictures_of_one_request_are_no_independent_evidence():
    hits = np.array([True, False])
    once, often = share(hits, np.arange(2)), share(hits.repeat(50), np.arange(2).repeat(50))
    assert often == once and once.standard_error == pytest.approx(0.5)


def test_a_share_of_some_pictures():
    hits, among = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert share(hits, np.arange(4), among) == share(hits[among], np.arange(2))
    assert share(hits, np.zeros(4, int)) == Share(0.5, None)
    assert share(hits, np.arange(4), np.zeros(4, bool)) == Share(None, None)


def test_differences():
    assert Share(0.9, 0.03).minus(Share(0.5, 0.04)) == Share(
        pytest.approx(0.4), pytest.approx(0.05)
    )
    assert Share(0.9, None).minus(Share(0.4, 0.1)) == Share(0.5, None)
    assert Share(None, None).minus(Share(0.4, 0.1)) == Share(None, None)
