"""Feature similarity, averaged over samples."""

import json

import numpy as np
import pytest
import tiny

from enat_jax.evaluation import similarity, step_similarity


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator()


@pytest.fixture(scope="module")
def measured(model):
    """Five samples in batches of two: the last is filled up with samples that do not count."""
    done = []
    found = similarity.similarities(
        model, 5, seed=3, num_maps=3, batch_size=2, progress=done.append
    )
    assert done == [2, 4, 5]
    return found


def by_hand(model, labels, first):
    """Tokens and similarities of two samples."""
    index = first + np.arange(2)
    args = model.model, model.params
    tokens, step = step_similarity.draw(*args, model.settings, labels, index, seed=3)
    return tokens, step_similarity.similarities_of_passes(*args, tokens, step, labels, 3)


def test_numbers_are_of_all_samples_and_classes_take_turns(model, measured):
    result, maps = measured
    pairs = [by_hand(model, np.array(x), i) for x, i in (([0, 1], 0), ([2, 0], 2), ([1, 1], 4))]
    tokens = np.concatenate([tokens for tokens, _ in pairs])[:5]
    found = zip(*(of_pair for _, of_pair in pairs), strict=True)
    found = step_similarity.Similarities(*(np.concatenate(x)[:5] for x in found))
    np.testing.assert_array_equal(maps["tokens"], tokens[:3])
    np.testing.assert_array_equal(maps["group"], found.group[:3])
    np.testing.assert_allclose(maps["adjacent"], found.adjacent[:3], atol=1e-5)
    newly = np.where(found.group == 1, found.adjacent, 0).sum(-1) / (found.group == 1).sum(-1)
    np.testing.assert_allclose(
        result["adjacent"]["newly revealed"]["mean"], newly.mean(0), atol=1e-5
    )
    np.testing.assert_allclose(
        result["adjacent"]["newly revealed"]["standard_error"],
        newly.std(0, ddof=1) / np.sqrt(5),
        atol=1e-5,
    )
    for name in ("overlap", "same_code"):
        expected = np.nansum(getattr(found, name), axis=-1) / (found.group == 2).sum(-1)
        np.testing.assert_allclose(result[name]["mean"], expected.mean(0), atol=1e-5)
    masked = found.adjacent[found.group == 2].reshape(5, -1).mean()
    assert result["overall"]["masked"]["mean"] == pytest.approx(masked, abs=1e-5)


def test_the_result_says_what_it_is_of(model, measured):
    """16 tokens in 3 steps: 13 are masked after the first, 8 after the second."""
    result = json.loads(json.dumps(measured[0]))
    assert result["tokens"] == {
        "already visible": [0, 3],
        "newly revealed": [3, 5],
        "masked": [13, 8],
    }
    assert (result["num_images"], result["num_labels"], result["kind"]) == (5, 3, "ENAT")
    assert result["transformer"] == model.fingerprint and result["sampler"]["num_steps"] == 3
    assert result["adjacent"]["already visible"]["mean"][0] is None


def test_the_table_has_a_row_a_step(measured):
    lines = similarity.markdown(measured[0]).splitlines()
    assert lines[2].startswith("| 1 | - (0) | ") and "(0.188)" in lines[2]
    assert lines[3].startswith("| 2 | ")
    assert {line.count("|") for line in lines[:4]} == {lines[0].count("|")}


def test_too_few_samples_or_steps_are_refused(model):
    with pytest.raises(ValueError, match="num=1 must be at least 2"):
        similarity.similarities(model, 1)
    with pytest.raises(ValueError, match="1 step: there are no adjacent steps"):
        similarity.similarities(model.with_settings(num_steps=1), 4)


GROUP = np.array([[[2, 1, 2, 2], [2, 0, 1, 1]]])
VALUES = np.array([[[0.5, 0.25, 1.0, 0.0], [0.5, 0.75, 0.0, 0.5]]])


def test_means_are_by_image_step_and_group():
    found = similarity.image_means(VALUES, GROUP)
    np.testing.assert_array_equal(found["already visible"], [[np.nan, 0.75]])
    np.testing.assert_array_equal(found["newly revealed"], [[0.25, 0.25]])
    np.testing.assert_array_equal(found["masked"], [[0.5, 0.5]])
    gap = np.where(VALUES == 0.75, np.nan, VALUES)
    assert np.isnan(similarity.image_means(gap, GROUP)["already visible"]).all()


def test_the_share_of_the_newly_revealed_in_all_change():
    # Changes are 0.5 0.75 0 1 and 0.5 0.25 1 0.5; the newly revealed have 0.75, and 1.5.
    found = similarity.change_share(VALUES, GROUP)
    np.testing.assert_allclose(found, [[0.75 / 2.25, 1.5 / 2.25]])
    nothing_new = np.where(GROUP == 1, 2, GROUP)
    assert np.isnan(similarity.change_share(VALUES, nothing_new)).all()
