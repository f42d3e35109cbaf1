import numpy as np
import pytest

from enat_jax.metrics import digit_quality

# Two well separated classes on a line; class 0 spreads over 0, 1, 2, class 1 over 10, 11, 12.
TRAINING = np.array([[0.0], [1], [2], [10], [11], [12]])
TRAINING_LABELS = np.array([0, 0, 0, 1, 1, 1])


def test_pixel_features_average_blocks():
    image = np.array([[0, 100, 10, 10], [100, 200, 10, 10], [0, 0, 255, 255], [0, 0, 255, 255]])
    features = digit_quality.pixel_features(image.astype(np.uint8)[None, :, :, None], size=2)
    np.testing.assert_allclose(features * 255, [[100, 10, 0, 255]])


def test_pixel_features_keep_colours_apart():
    images = np.zeros((1, 4, 4, 3), np.uint8)
    images[..., 2] = 255
    np.testing.assert_array_equal(digit_quality.pixel_features(images, size=1), [[0, 0, 1]])


def test_pixel_features_refuse_sizes_and_types_that_do_not_fit():
    with pytest.raises(ValueError, match="size=3 does not divide"):
        digit_quality.pixel_features(np.zeros((1, 8, 8, 1), np.uint8), size=3)
    with pytest.raises(ValueError, match="uint8"):
        digit_quality.pixel_features(np.zeros((1, 8, 8, 1), np.float32), size=8)


def test_nearest_distances():
    queries = np.array([[0.25], [-3], [12]])
    np.testing.assert_allclose(digit_quality.nearest_distances(queries, TRAINING), [0.25, 3, 0])


def test_nearest_distance_to_others_of_the_same_set():
    rows = np.array([[0.0, 0], [3, 4], [3, 5]])
    np.testing.assert_allclose(
        digit_quality.nearest_distances(rows, rows, own=np.arange(3)), [5, 1, 1]
    )
    np.testing.assert_allclose(
        digit_quality.nearest_distances(rows[[2, 0]], rows, own=[2, 0]), [1, 5]
    )


def test_chunks_do_not_show():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(519, 3))
    expected = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    np.fill_diagonal(expected, np.inf)
    got = digit_quality.nearest_distances(rows, rows, own=np.arange(len(rows)))
    np.testing.assert_allclose(got, expected.min(axis=1), rtol=1e-9)


def test_classifier_takes_the_majority():
    queries = np.array([[1.0], [5.9], [6.1], [11]])
    predictions = digit_quality.knn_classify(queries, TRAINING, TRAINING_LABELS, k=3)
    np.testing.assert_array_equal(predictions, [0, 0, 1, 1])


def test_classifier_gives_ties_to_the_nearest():
    references, labels = np.array([[0.0], [1], [2.5], [3]]), np.array([2, 0, 0, 2])
    query = np.array([[0.2]])
    assert digit_quality.knn_classify(query, references, labels, k=2) == [
        2
    ]  # 2 and 0: one vote each
    assert digit_quality.knn_classify(query, references, labels, k=3) == [0]  # 0 has two
    assert digit_quality.knn_classify(query, references, labels, k=4) == [
        2
    ]  # two each, 2 is nearest


def test_leave_one_out_does_not_see_the_answer():
    rows, labels = np.array([[0.0], [1], [2], [1.1]]), np.array([0, 0, 0, 1])
    own = digit_quality.knn_classify(rows, rows, labels, k=1)
    others = digit_quality.knn_classify(rows, rows, labels, k=1, own=np.arange(4))
    np.testing.assert_array_equal(own, labels)
    np.testing.assert_array_equal(others, [0, 1, 1, 0])


def test_class_accuracy_counts_requested_classes():
    queries = np.array([[0.5], [1.5], [10.5], [1.5]])
    accuracy = digit_quality.class_accuracy(queries, [0, 0, 1, 1], TRAINING, TRAINING_LABELS, k=3)
    assert accuracy == 0.75


def test_spread_is_the_mean_pairwise_distance_within_classes():
    # Class 0: 1, 1, 2; class 1: 5.
    rows = np.array([[0.0], [1], [2], [10], [15]])
    assert digit_quality.class_spread(rows, [0, 0, 0, 1, 1]) == pytest.approx((4 / 3 + 5) / 2)


def test_copies_of_a_row_count_as_distance_zero():
    rows = np.array([[7.0, 1], [7, 1], [7, 2], [7, 2]])
    assert digit_quality.class_spread(rows, [0, 0, 0, 0]) == pytest.approx(4 / 6)


def test_diversity_is_relative_to_real():
    assert digit_quality.relative_diversity(
        0.5 * TRAINING, TRAINING_LABELS, TRAINING, TRAINING_LABELS
    ) == pytest.approx(0.5)
    collapsed = np.array([[1.0], [1], [1], [11], [11], [11]])
    assert (
        digit_quality.relative_diversity(collapsed, TRAINING_LABELS, TRAINING, TRAINING_LABELS) == 0
    )


def test_diversity_needs_the_same_classes():
    with pytest.raises(ValueError, match=r"\[0\] and \[0, 1\]"):
        digit_quality.relative_diversity(
            TRAINING[:3], TRAINING_LABELS[:3], TRAINING, TRAINING_LABELS
        )
    with pytest.raises(ValueError, match="class 1 has one row"):
        digit_quality.class_spread(TRAINING[:4], TRAINING_LABELS[:4])


def test_copies_are_closer_than_held_out_data_ever_is():
    held_out = np.arange(0, 12, 0.25)[:, None] + 0.1
    held_out_share = digit_quality.copy_share(held_out, TRAINING, held_out)
    assert held_out_share <= 0.05
    assert digit_quality.copy_share(TRAINING + 0.01, TRAINING, held_out) == 1
    assert digit_quality.copy_share(TRAINING + 0.5, TRAINING, held_out) == 0
    half = np.concatenate([TRAINING, TRAINING + 0.5])
    assert digit_quality.copy_share(half, TRAINING, held_out) == 0.5


def test_training_rows_are_no_copies_of_each_other():
    held_out = TRAINING + 0.2
    assert digit_quality.copy_share(TRAINING, TRAINING, held_out) == 1
    assert digit_quality.copy_share(TRAINING, TRAINING, held_out, own=np.arange(6)) == 0


def test_control_keeps_frequencies_and_drops_dependence():
    # Class 0: the two tokens always agree and are 1 in three quarters; class 1 is constant.
    tokens = np.array([[0, 0], [1, 1], [1, 1], [1, 1], [5, 6]])
    labels = np.array([0, 0, 0, 0, 1])
    wanted = np.tile([0, 1], 4000)
    drawn = digit_quality.independent_tokens(tokens, labels, wanted, 8, np.random.default_rng(0))
    assert drawn.dtype == np.int32
    np.testing.assert_array_equal(drawn[wanted == 1], [[5, 6]] * 4000)
    zeros = drawn[wanted == 0]
    np.testing.assert_allclose(zeros.mean(axis=0), 0.75, atol=0.03)
    # Independent: P(equal) = 0.75^2 + 0.25^2 = 0.625, where the training set has 1.
    assert np.mean(zeros[:, 0] == zeros[:, 1]) == pytest.approx(0.625, abs=0.03)


def test_control_is_reproducible():
    tokens = np.random.default_rng(1).integers(0, 8, (30, 16))
    labels = np.arange(30) % 3
    first, second = (
        digit_quality.independent_tokens(tokens, labels, [0, 1, 2], 8, np.random.default_rng(5))
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_control_refuses_what_it_cannot_draw():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="class 3 does not occur"):
        digit_quality.independent_tokens(np.zeros((2, 4), int), [0, 1], [0, 3], 8, rng)
    with pytest.raises(ValueError, match="codebook_size=8"):
        digit_quality.independent_tokens(np.full((2, 4), 8), [0, 1], [0], 8, rng)


def test_balanced_draws():
    np.testing.assert_array_equal(np.bincount(digit_quality.balanced_labels(500, 10)), [50] * 10)
    with pytest.raises(ValueError, match="num=501.*multiple of 10"):
        digit_quality.balanced_labels(501, 10)
    labels = np.array([0] * 5 + [1] * 30)
    rng = np.random.default_rng(0)
    subset = digit_quality.balanced_subset(labels, 8, rng)
    assert len(set(subset.tolist())) == 8
    np.testing.assert_array_equal(np.bincount(labels[subset]), [4, 4])
    all_of_class_0 = digit_quality.balanced_subset(labels, 20, rng)
    np.testing.assert_array_equal(np.bincount(labels[all_of_class_0]), [5, 5])


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 1], "need 6"), ([0.0] * 6, "integers"), ([-1] * 6, "negative")]
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        digit_quality.class_spread(TRAINING, np.array(labels))


def test_empty_or_mismatched_features_are_refused():
    with pytest.raises(ValueError, match="empty"):
        digit_quality.nearest_distances(np.zeros((0, 1)), TRAINING)
    with pytest.raises(ValueError, match="shape"):
        digit_quality.nearest_distances(np.zeros((2, 3)), TRAINING)
    with pytest.raises(ValueError, match="k=7"):
        digit_quality.knn_classify(TRAINING, TRAINING, TRAINING_LABELS, k=7)
    with pytest.raises(ValueError, match="one reference for each row"):
        digit_quality.nearest_distances(TRAINING[:2], TRAINING, own=np.arange(6))
