import numpy as np
import pytest

from enat_jax.metrics import bootstrap, fid, inception_score, manifold

STANDARD = (np.zeros(6), np.eye(6))


def normal_features(rng, n=400):
    return rng.normal(0.2, 1.3, (n, 6))


def distance(features):
    return fid.frechet_distance(*fid.gaussian_statistics(features), *STANDARD)


def replicated(features, **settings):
    return bootstrap.of_frechet_distance(features, *STANDARD, **settings)


def linear(features):
    return bootstrap.of_frechet_distance_linear(features, *STANDARD)


@pytest.fixture(scope="module")
def true_deviation():
    """Of the distance of 400 images, over 400 sets of images."""
    rng = np.random.default_rng(0)
    return np.std([distance(normal_features(rng)) for _ in range(400)])


def test_a_mean_by_hand():
    assert bootstrap.of_mean(np.array([0, 0, 1, 1])) == 0.25
    assert bootstrap.of_mean(np.array([True, False])) == pytest.approx(0.5 / np.sqrt(2))
    assert bootstrap.interval(10.0, 2.0) == (pytest.approx(6.08), pytest.approx(13.92))


def test_replicates_of_the_frechet_distance_spread_as_other_images_do(true_deviation):
    rng = np.random.default_rng(1)
    found = [replicated(normal_features(rng), num_replicates=60) for _ in range(4)]
    assert np.mean(found) == pytest.approx(true_deviation, rel=0.2)


def test_to_first_order_it_is_the_same(true_deviation):
    rng = np.random.default_rng(2)
    found = [linear(normal_features(rng)) for _ in range(10)]
    assert np.mean(found) == pytest.approx(true_deviation, rel=0.15)


def test_the_interval_holds_the_mean_of_all_sets_as_often_as_it_says():
    rng = np.random.default_rng(3)
    sets = [normal_features(rng) for _ in range(200)]
    values = np.array([distance(features) for features in sets])
    limits = [bootstrap.interval(distance(x), linear(x)) for x in sets]
    held = np.mean([low <= values.mean() <= high for low, high in limits])
    assert 0.9 <= held <= 0.99


def test_one_dimension_has_a_closed_form():
    """Distance (m - 3)^2 + (s - 2)^2: the derivative in each image's share, of skewed values."""
    x = np.random.default_rng(4).gamma(1.0, size=500)
    m, s = x.mean(), x.std(ddof=1)
    influences = 2 * (m - 3) * (x - m) + (1 - 2 / s) * (x - m) ** 2
    found = bootstrap.of_frechet_distance_linear(x[:, None], np.full(1, 3.0), np.full((1, 1), 4.0))
    assert found == pytest.approx(influences.std() / np.sqrt(500), rel=1e-12)


def test_a_replicate_is_the_distance_of_the_images_drawn():
    features = normal_features(np.random.default_rng(5), 30)
    rng = np.random.RandomState(0)
    drawn = [distance(features[rng.randint(0, 30, 30)]) for _ in range(2)]
    expected = np.std(drawn, ddof=1)
    assert replicated(features, num_replicates=2) == pytest.approx(expected, rel=1e-9)


def test_the_same_seed_gives_the_same_error():
    features = normal_features(np.random.default_rng(6), 50)
    first = replicated(features, num_replicates=5, seed=1)
    assert first == replicated(features, num_replicates=5, seed=1)
    assert first != replicated(features, num_replicates=5, seed=2)


def test_inception_scores_spread_as_other_images_do():
    rng = np.random.default_rng(7)
    splits = inception_score.assign_splits(300, 3)

    def probabilities():
        return rng.dirichlet(np.full(5, 0.3), 300)

    true = np.std([inception_score.scores(probabilities(), 3)[0] for _ in range(200)])
    found = [bootstrap.of_inception_score(probabilities(), splits) for _ in range(5)]
    assert np.mean(found) == pytest.approx(true, rel=0.15)


def test_precision_and_density_spread_as_other_generated_images_do():
    rng = np.random.default_rng(8)
    real = rng.normal(size=(200, 3))
    results = [manifold.overlap(real, rng.normal(0.3, 0.9, (200, 3))) for _ in range(120)]
    for name in ("precision", "density"):
        true = np.std([getattr(result, name) for result in results])
        found = np.mean([bootstrap.of_overlap(result)[name] for result in results])
        assert found == pytest.approx(true, rel=0.25), name


def test_errors_of_indicators_by_hand():
    result = manifold.Overlap(
        inside_real=np.array([True, True, True, True]),
        inside_generated=np.array([True, False]),
        balls=np.array([0, 5, 10, 5]),
        covered=np.array([True, False]),
        density_neighbours=5,
    )
    assert bootstrap.of_overlap(result) == {
        "precision": 0,
        "recall": pytest.approx(0.5 / np.sqrt(2)),
        "density": pytest.approx(np.sqrt(0.5) / 2),
        "coverage": pytest.approx(0.5 / np.sqrt(2)),
    }


def test_too_little_is_refused():
    features = normal_features(np.random.default_rng(9), 10)
    with pytest.raises(ValueError, match="num_replicates=1"):
        replicated(features, num_replicates=1)
    with pytest.raises(ValueError, match="n from 1"):
        bootstrap.of_mean(np.zeros(0))
    with pytest.raises(ValueError, match="n >= 2"):
        replicated(features[:1])
