"""From statistics to numbers: what each is called, its interval, and what could not be measured."""

import types

import numpy as np
import pytest

from enat_jax.evaluation import measures
from enat_jax.evaluation import statistics as image_statistics
from enat_jax.metrics import inception_score, moments

INCEPTION = types.SimpleNamespace(
    is_inception=True, description={"label": "FID"}, origin={"published": True}
)
OTHER = types.SimpleNamespace(is_inception=False, description={"label": "Distance by colours"})
RNG = np.random.default_rng(0)
OWN, REAL = (RNG.normal(mean, 1, (60, 4)).astype(np.float32) for mean in (0.5, 0.0))


def statistics(pool, spatial=None, kept=True):
    sums = {"pool": moments.Moments.empty(4).add(pool)}
    if spatial is not None:
        sums["spatial"] = moments.Moments.empty(spatial.shape[1]).add(spatial)
    about = dict.fromkeys(image_statistics.DESCRIPTION)
    return image_statistics.Statistics(sums, pool if kept else None, about)


def distance(first, second):
    """By the definition, for symmetric square roots of small matrices."""
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x.T)) for x in np.float64([first, second]))
    root = np.sqrt(np.linalg.eigvals(c1 @ c2).real).sum()
    return np.sum((m1 - m2) ** 2) + np.trace(c1) + np.trace(c2) - 2 * root


def test_features_of_inception_give_all_that_is_published():
    probabilities = np.full((60, 3), 0.05) + 0.85 * np.eye(3)[np.arange(60) % 3]
    found, missing = measures.evaluate_set(
        statistics(OWN, OWN[:, :2]),
        statistics(REAL, REAL[:, :2]),
        {"pool": OWN, "probabilities": probabilities},
        INCEPTION,
        replicates=20,
    )
    assert list(found) == [
        "fid", "sfid", "inception_score", "precision", "recall", "density", "coverage"
    ]  # fmt: skip
    assert [found[name]["title"] for name in ("fid", "sfid")] == ["FID", "sFID"]
    assert found["fid"]["value"] == pytest.approx(distance(OWN, REAL), rel=1e-9)
    assert found["sfid"]["value"] == pytest.approx(distance(OWN[:, :2], REAL[:, :2]), rel=1e-9)
    score, spread = inception_score.scores(probabilities, num_splits=10, seed=0)
    assert found["inception_score"]["value"] == score > 1
    assert f"standard deviation {spread:.3g}" in found["inception_score"]["about"]
    assert found["inception_score"]["better"] == found["recall"]["better"] == "higher"
    assert found["fid"]["better"] == "lower" and missing == []


def test_intervals_are_around_the_values_and_within_what_is_possible():
    found, _ = measures.evaluate_set(statistics(OWN), statistics(REAL), {}, OTHER, replicates=20)
    entry = found["frechet_distance"]
    assert entry["title"] == "Distance by colours"
    spread = 1.96 * entry["standard_error"]
    assert (entry["low"], entry["high"]) == (entry["value"] - spread, entry["value"] + spread)
    assert 0.05 * entry["value"] < spread < entry["value"]
    for name in ("precision", "recall", "coverage"):
        assert 0 <= found[name]["low"] <= found[name]["value"] <= found[name]["high"] <= 1
    # 60 images are 15 times the 4 features: no replicates are needed.
    assert entry["replicates"] == 0
    few = measures.evaluate_set(statistics(OWN[:15]), statistics(REAL), {}, OTHER, replicates=20)
    assert few[0]["frechet_distance"]["replicates"] == 20


def test_without_replicates_there_are_no_intervals_and_that_is_said():
    found, missing = measures.evaluate_set(
        statistics(OWN), statistics(REAL), {}, OTHER, replicates=0
    )
    assert all(entry["low"] is None for entry in found.values())
    assert missing == ["Intervals were not asked for: small differences may be chance."]


def test_what_a_reference_does_not_hold_is_said():
    reference = statistics(REAL, kept=False)
    found, missing = measures.evaluate_set(
        statistics(OWN, OWN), reference, {"pool": OWN}, INCEPTION, replicates=20
    )
    assert list(found) == ["fid"]
    assert "sFID is not measured: the reference has no spatial features." in missing
    assert any("holds no features of single images" in sentence for sentence in missing)
    _, missing = measures.evaluate_set(statistics(OWN[:5]), statistics(REAL), {}, OTHER)
    assert any("more than 5 images on both sides" in sentence for sentence in missing)


def test_reconstructions_have_names_of_their_own_and_a_psnr():
    rows = {"squared_error": np.full((60, 1), 0.01, np.float32)}
    found, _ = measures.evaluate_set(
        statistics(OWN), statistics(REAL), rows, INCEPTION, reconstructed=True
    )
    assert list(found)[:2] == ["rfid", "psnr"] and found["rfid"]["title"] == "rFID"
    assert found["psnr"]["value"] == pytest.approx(20.0, abs=1e-5)
    assert found["psnr"]["standard_error"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("own", "reference", "words"),
    [
        (6, 6, None),
        (5, 6, "more than 5 images on both sides, and there are those of 5 against 6"),
        (60, 4, "those of 60 against 4"),
        (60, None, "the reference holds no features of single images"),
    ],
)
def test_how_many_images_precision_and_its_like_need(own, reference, words):
    found = measures.why_no_overlap(own, reference)
    assert found is None if words is None else words in found
    if own and reference:
        metrics, missing = measures.evaluate_set(
            statistics(OWN[:own]), statistics(REAL[:reference]), {}, OTHER, replicates=0
        )
        assert ("precision" in metrics) == (words is None)
        assert any(found in sentence for sentence in missing) if words else len(missing) == 1
