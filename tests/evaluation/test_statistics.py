import errno
import pathlib
import zipfile
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
from image_description import DESCRIPTION

from enat_jax.data import images
from enat_jax.evaluation import caveats, features
from enat_jax.evaluation import statistics as image_statistics
from enat_jax.evaluation.statistics import Statistics
from enat_jax.metrics import fid
from enat_jax.metrics.moments import Moments

CIFAR10 = pathlib.Path(__file__).parents[3] / "shared" / "data" / "cifar10_train.zip"


def statistics(seed=0, with_pool=True, **description):
    found = np.random.default_rng(seed).normal(size=(30, 5)).astype(np.float32)
    moments = {"pool": Moments.empty(5).add(found), "spatial": Moments.empty(3).add(found[:, :3])}
    return Statistics(moments, found[::3] if with_pool else None, DESCRIPTION | description)


@pytest.fixture(scope="module")
def adm_arrays():
    """As in ADM's files: many images in few dimensions, so that writing is quick."""
    rng = np.random.default_rng(1)
    return {
        "arr_0": rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8),
        "mu": rng.normal(size=2048),
        "sigma": np.diag(rng.uniform(size=2048)),
        "mu_s": rng.normal(size=2023),
        "sigma_s": np.diag(rng.uniform(size=2023)),
    }


def test_saved_and_loaded_is_the_same(tmp_path):
    saved = statistics(source={"listing": "é"})
    saved.save(tmp_path / "a.npz")
    loaded = Statistics.load(tmp_path / "a.npz")
    assert loaded.description == saved.description
    np.testing.assert_array_equal(loaded.pool, saved.pool)
    assert loaded.moments["spatial"].count == 30
    for name in ("pool", "spatial"):
        for one, two in zip(loaded.gaussian(name), saved.gaussian(name), strict=True):
            np.testing.assert_array_equal(one, two)
    loaded.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_features_need_not_be_kept(tmp_path):
    statistics(with_pool=False).save(tmp_path / "a.npz")
    assert Statistics.load(tmp_path / "a.npz").pool is None


@pytest.fixture(scope="module")
def adm(adm_arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("adm") / "VIRTUAL.npz"
    np.savez(path, **adm_arrays)
    return path, Statistics.load(path)


def test_adm_statistics_with_images(adm_arrays, adm, tmp_path):
    path, loaded = adm
    for name, mean, covariance in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        np.testing.assert_array_equal(loaded.gaussian(name)[0], adm_arrays[mean])
        np.testing.assert_array_equal(loaded.gaussian(name)[1], adm_arrays[covariance])
        assert loaded.moments[name].count is None
    assert loaded.description == {
        "features": {"kind": "inception", "resize": "adm", "fingerprint": None},
        "source": None,
        "resolution": [8, 8],
        "crop": None,
        "num_images": None,
        "class_counts": None,
        "versions": None,
        "sample_images": 5,
    }
    assert loaded.pool is None
    batches = list(image_statistics.sample_images(path, 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(batches), adm_arrays["arr_0"])
    with pytest.raises(ValueError, match="copy their file"):
        loaded.save(tmp_path / "copy.npz")


def test_mu_and_sigma_alone_do_not_tell_how_images_were_resized(tmp_path):
    sigma = np.float32([[2.0, 0.5], [0.5 + 6e-8, 1.0]])  # products of float32 round so
    np.savez(tmp_path / "stats.npz", mu=np.float32([1.0, 2.0]), sigma=sigma)
    loaded = Statistics.load(tmp_path / "stats.npz")
    mean, covariance = loaded.gaussian("pool")
    assert mean.tolist() == [1, 2]
    np.testing.assert_allclose(covariance, [[2, 0.5], [0.5, 1]], rtol=1e-7)
    np.testing.assert_array_equal(covariance, covariance.T)
    assert mean.dtype == covariance.dtype == np.float64
    assert loaded.description["features"] == {
        "kind": "inception",
        "resize": None,
        "fingerprint": None,
    }
    with pytest.raises(ValueError, match="no statistics of spatial"):
        loaded.gaussian("spatial")


def test_statistics_of_other_features_are_refused():
    own = statistics()
    own.check_dimensions({"pool": 5, "spatial": 3, "probabilities": 10}, "ref.npz")
    own.check_dimensions({"pool": 5}, "ref.npz")
    with pytest.raises(ValueError, match="ref.npz is of other features: pool has 5 .* have 2048"):
        own.check_dimensions({"pool": 2048}, "ref.npz")


def test_statistics_of_another_network_of_the_same_size_are_refused(adm):
    own, in_use = statistics(), DESCRIPTION["features"]
    own.check_features(in_use | {"resize": "pytorch-fid"}, "ref.npz")
    adm[1].check_features(in_use, "ref.npz")
    for change in ({"kind": "random"}, {"fingerprint": "ef" * 32}):
        with pytest.raises(ValueError, match=f"ref.npz is of other features: {list(change)[0]}"):
            own.check_features(in_use | change, "ref.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, r"holds images \(arr_0\) and no statistics"),
        ({"weights": np.zeros(3)}, "holds weights and no statistics"),
        ({}, "holds no arrays and no"),
        ({"mu": np.zeros(3)}, "holds mu and no statistics"),
        ({"mu": np.eye(3), "sigma": np.zeros(3)}, "mu and sigma are swapped"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"shapes \(3,\) and \(4, 4\)"),
        ({"mu": np.zeros(3, np.int64), "sigma": np.eye(3)}, "are int64 and float64"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "NaN or infinity"),
        ({"mu": np.zeros(2), "sigma": np.float64([[1, 2], [0, 1]])}, "not symmetric"),
        ({"mu": np.zeros(2), "sigma": np.diag([1.0, -1.0])}, "negative variances"),
        ({"mu": np.array([None, {}]), "sigma": np.eye(2)}, "pickled"),
        (
            {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)},
            "mu has 3 values and mu_s 2, not 2048 and 2023",
        ),
    ],
)
def test_what_is_no_statistics_is_one_clear_line(arrays, message, tmp_path):
    path = tmp_path / "stats.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        Statistics.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "--make-reference" in str(caught.value)


def test_swapped_pool_and_spatial_are_found(adm_arrays, tmp_path):
    names = {"mu": "mu_s", "sigma": "sigma_s", "mu_s": "mu", "sigma_s": "sigma"}
    np.savez(tmp_path / "a.npz", **{names[name]: adm_arrays[name] for name in names})
    with pytest.raises(ValueError, match="they are swapped"):
        Statistics.load(tmp_path / "a.npz")


def altered(path, **changes):
    with np.load(path) as archive:
        arrays = dict(archive) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"description": np.frombuffer(b"{", np.uint8)}, "no JSON"),
        ({"description": np.frombuffer(b"[1]", np.uint8)}, "no JSON"),
        ({"description": np.frombuffer(b'{"format": "x"}', np.uint8)}, "of format 'x'"),
        (
            {"description": np.frombuffer(b'{"format": "enat_jax statistics 1"}', np.uint8)},
            "without features, source",
        ),
        ({"pool/mean": None}, "without mean"),
        ({"pool/mean": None, "pool/count": None, "pool/scatter": None}, "without moments of pool"),
        ({"pool/scatter": np.zeros((4, 4))}, r"must be \[d\] and \[d, d\]"),
        ({"pool/scatter": -np.eye(5)}, "negative variances"),
        ({"kept": np.zeros((3, 4), np.float32)}, r"need \[k, 5\]"),
        ({"kept": np.full((3, 5), np.inf, np.float32)}, "not finite float32"),
        ({"kept": np.zeros((3, 5), np.int64)}, "not finite float32"),
    ],
)
def test_our_own_damaged_file_is_one_clear_line(changes, message, tmp_path):
    path = tmp_path / "ours.npz"
    statistics().save(path)
    altered(path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        Statistics.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_directories_single_arrays_and_absent_files(tmp_path):
    np.save(tmp_path / "mu.npy", np.zeros(3))
    with pytest.raises(ValueError, match="is a directory"):
        Statistics.load(tmp_path)
    with pytest.raises(ValueError, match="single array"):
        Statistics.load(tmp_path / "mu.npy")
    with pytest.raises(FileNotFoundError, match="there is no"):
        Statistics.load(tmp_path / "absent.npz")
    np.savez(tmp_path / "a.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="holds no images"):
        next(image_statistics.sample_images(tmp_path / "a.npz", 2))


def test_what_a_foreign_file_does_not_say_is_one_sentence(adm):
    _, reference = adm
    assert caveats.of_reference(DESCRIPTION | {"resolution": [8, 8]}, reference.description) == [
        "The reference does not say the fingerprint of its features, its crop, which images it is "
        "of, its number of images and how many images of each class it has: whether they fit is "
        "not known."
    ]


def test_a_description_must_say_everything():
    with pytest.raises(ValueError, match="without crop, versions"):
        Statistics(
            statistics().moments,
            None,
            {name: None for name in DESCRIPTION if name not in ("crop", "versions")},
        )


# --- real images


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.exists(), reason="needs CIFAR-10")
def test_ten_thousand_real_images_against_the_others():
    """Streamed moments against NumPy's covariance of all at once and SciPy's matrix root."""
    source = images.open_source(str(CIFAR10), "train", size=32)
    order = np.random.RandomState(0).permutation(len(source))
    network = features.open_features("random:0", batch_size=256)
    halves, streams = [], []
    for indices in (order[:10_000], order[10_000:]):
        parts = [
            network(source.gather(indices[start : start + 1000])["images"])["pool"]
            for start in range(0, len(indices), 1000)
        ]
        state = Moments.empty(parts[0].shape[1])
        for part in parts:
            state = state.add(part)
        streams.append((state.mean, state.covariance()))
        halves.append(np.concatenate(parts).astype(np.float64))
    assert [len(half) for half in halves] == [10_000, 40_000]
    found = fid.frechet_distance(*streams[0], *streams[1])
    means = [half.mean(axis=0) for half in halves]
    covariances = [np.cov(half, rowvar=False) for half in halves]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(
        covariances[0] + covariances[1] - 2 * root.real
    )
    print(f"distance {found:.10g}, NumPy and SciPy {expected:.10g}, {found / expected - 1:.2e}")
    assert found > 0
    assert found == pytest.approx(expected, rel=1e-8)


def test_what_the_system_says_is_no_damage(tmp_path, monkeypatch):
    statistics().save(tmp_path / "a.npz")
    fails = mock.Mock(side_effect=OSError(errno.EIO, "Input/output error"))
    monkeypatch.setattr(zipfile.ZipFile, "open", fails)
    with pytest.raises(OSError, match=r"Input/output error: .*a\.npz"):
        Statistics.load(tmp_path / "a.npz")
