"""Features for evaluation: of every kind, on any number of devices, and never an FID by mistake."""

import json

import inception_golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from jax import export

from enat_jax.evaluation import features, perceptual_weights
from enat_jax.models import classifier, inception, lite0, perceptual
from enat_jax.runtime import sharding

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (11, 9, 8, 3)).astype(np.uint8)
GREY = RNG.integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)
MODEL = classifier.Classifier(num_classes=3, image_channels=1, widths=(4, 6))


def mesh_of(number):
    return sharding.make_mesh(sharding.Sharding(), jax.devices()[:number])


def saved(directory, seed=0):
    params = tiny.random_params(MODEL.init, jnp.zeros((1, 8, 8, 1)), seed=seed)
    features.save_trained(directory, MODEL, params, (8, 8), "shapes", {"step": 7})
    return params


def exported(path, function, shape, **settings):
    """Writes a function of uint8 images; letters in `shape` are symbolic dimensions."""
    spec = jax.ShapeDtypeStruct(export.symbolic_shape(shape), np.uint8)
    path.write_bytes(export.export(jax.jit(function), **settings)(spec).serialize())
    return path


def means(images):
    return images.astype(jnp.float32).mean((1, 2))


@pytest.fixture(scope="module")
def random():
    return features.open_features("random:3", batch_size=2)


@pytest.fixture(scope="module")
def found(random):
    return random(IMAGES, mesh_of(1))["pool"]


# --- of one network, whatever runs it ------------------------------------------------------------


def test_features_do_not_depend_on_devices_or_batches(random, found):
    assert found.shape == (11, 128) and found.dtype == np.float32
    np.testing.assert_array_equal(random(IMAGES)["pool"], found)  # on eight devices: one batch
    np.testing.assert_array_equal(random(IMAGES[4:5], mesh_of(1))["pool"], found[4:5])
    assert random(IMAGES[:0], mesh_of(1))["pool"].shape == (0, 128)
    larger = features.open_features("random:3", batch_size=8)
    np.testing.assert_allclose(larger(IMAGES, mesh_of(1))["pool"], found, rtol=1e-5, atol=1e-6)


def test_random_features_are_convolutions_with_weights_of_the_seed(random, found):
    """Of one image, again in NumPy."""
    rng = np.random.RandomState(3)
    x = IMAGES[0] / 127.5 - 1
    for before, width in [(3, 32), (32, 64), (64, 128)]:
        kernel = (2 * rng.random_sample((3, 3, before, width)) - 1) * np.sqrt(6 / (9 * before))
        bias = 0.2 * rng.random_sample(width) - 0.1
        # An odd length has zeros at both ends, an even one only behind.
        rows, columns, _ = x.shape
        x = np.pad(x, ((rows % 2, 1), (columns % 2, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (0, 1))[::2, ::2]
        x = np.maximum(np.einsum("rcixy,xyio->rco", windows, kernel) + bias, 0)
    assert x.shape == (2, 1, 128)
    np.testing.assert_allclose(found[0], x.mean((0, 1)), rtol=1e-4, atol=1e-5)
    assert (
        random.description["label"] == "Fréchet distance in features of a random network (seed 3)"
    )


def test_the_random_weights_never_change():
    fingerprint = features.random(0).description["fingerprint"]
    assert fingerprint == "27092577eca6b3602a3c7d81309635a8acb68a9e7d6a7f4192464c8d1ee90b22"
    assert features.random(1).description["fingerprint"] != fingerprint


def test_grey_images_are_taken_as_rgb(random):
    rgb = np.repeat(GREY, 3, axis=-1)
    one = mesh_of(1)
    np.testing.assert_array_equal(random(GREY, one)["pool"], random(rgb, one)["pool"])


@pytest.mark.parametrize(
    ("images", "shown"),
    [
        (IMAGES.astype(np.float32), r"float32 \(9, 8, 3\)"),
        (IMAGES[0], r"uint8 \(8, 3\)"),
        (IMAGES[..., :2], r"uint8 \(9, 8, 2\)"),
        (IMAGES[:, :0], r"uint8 \(0, 8, 3\)"),
    ],
)
def test_what_are_no_images_is_refused(random, images, shown):
    with pytest.raises(ValueError, match=f"images of {shown} do not suit random features"):
        random(images)


# --- Inception -----------------------------------------------------------------------------------


SHAPES = {"pool": 2048, "spatial": 2023, "probabilities": 1008}


def test_inception_gives_three_kinds_of_features():
    opened = features.of_inception({}, "adm", {})
    assert opened.names == tuple(SHAPES)
    image = jnp.zeros((1, 299, 299, 3))
    params = jax.eval_shape(inception.Inception().init, jax.random.key(0), image)["params"]
    found = jax.eval_shape(opened.apply, params, GREY)
    assert {n: (found[n].shape, found[n].dtype) for n in opened.names} == {
        name: ((5, size), np.float32) for name, size in SHAPES.items()
    }


@pytest.mark.slow
def test_inception_runs_on_several_devices():
    opened = features.of_inception(inception_golden.params(), "adm", {}, batch_size=1)
    found = opened(np.concatenate([IMAGES[:1]] * 3), mesh_of(2))  # the last batch is half empty
    assert {n: array.shape for n, array in found.items()} == {n: (3, s) for n, s in SHAPES.items()}
    np.testing.assert_allclose(found["probabilities"].sum(1), 1, rtol=1e-5)
    for array in found.values():
        np.testing.assert_array_equal(array[0], array[2])
        assert array.dtype == np.float32 and np.isfinite(array).all()


def test_only_inception_is_called_fid(tmp_path, random):
    saved(tmp_path / "trained")
    function = exported(tmp_path / "means.jaxexport", means, "b, 8, 8, 1")
    others = [random, *map(features.open_features, [str(tmp_path / "trained"), str(function)])]
    params = {"fc": {"kernel": np.zeros(2, np.float32)}}
    pytorchs, adms = (features.of_inception(params, r, {}) for r in ("pytorch-fid", "adm"))
    assert pytorchs.is_inception and pytorchs.description["label"] == "FID"
    assert pytorchs.description != adms.description  # so nobody compares one with the other
    for other in others:
        assert not other.is_inception and "FID" not in other.description["label"]
        assert other.names == ("pool",) and other.kind == other.description["kind"]
        assert json.loads(json.dumps(other.description)) == other.description
        assert other.description.keys() == pytorchs.description.keys()


# --- trained, and of others ----------------------------------------------------------------------


def test_a_trained_network_gives_the_layer_before_its_classes(tmp_path):
    params = saved(tmp_path)
    opened = features.open_features(str(tmp_path), batch_size=2)
    assert opened.description["label"] == (
        "Fréchet distance in features of a network trained on shapes"
    )
    assert opened.origin == {"provenance": {"step": 7}}
    expected, logits = MODEL.apply({"params": params}, classifier.to_float(jnp.asarray(GREY)))
    np.testing.assert_allclose(opened(GREY, mesh_of(1))["pool"], expected, rtol=1e-5, atol=1e-6)
    head = params["head"]
    np.testing.assert_allclose(logits, expected @ head["kernel"] + head["bias"], atol=1e-5)
    with pytest.raises(
        ValueError, match="take uint8 images of height x width x channels 8 x 8 x 1"
    ):
        opened(IMAGES)


def test_a_damaged_network_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .*features.json: train a feature network"):
        features.open_features(str(tmp_path))
    saved(tmp_path)
    path = tmp_path / "features.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {"image_size": [8]}))
    with pytest.raises(ValueError, match="features.json is damaged"):
        features.open_features(str(tmp_path))
    path.write_text(json.dumps(description | {"fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match="are not those that were saved"):
        features.open_features(str(tmp_path))


@pytest.mark.parametrize(("shape", "batch"), [("b, h, w, c", 2), ("3, 8, 8, 1", 3)])
def test_an_exported_function_runs_on_every_device(tmp_path, shape, batch):
    path = exported(tmp_path / "f.jaxexport", lambda x: means(x) * 2, shape)
    opened = features.open_features(str(path), batch_size=2)
    assert opened.batch_size == batch
    assert opened.origin == {"file": "f.jaxexport"}
    expected = 2 * GREY.astype(np.float64).mean((1, 2))
    np.testing.assert_allclose(opened(GREY)["pool"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (lambda x: x.mean(), r"gives \(float32\[\]\)"),
        (lambda x: x.mean((1, 2)).astype(jnp.bfloat16), r"gives \(bfloat16\[b,1\]\)"),
        (lambda x: {"a": means(x), "b": means(x)}, r"gives \(float32\[b,1\], float32\[b,1\]\)"),
        (lambda x: means(x)[:1], r"gives \(float32\[1,1\]\)"),
    ],
)
def test_a_function_of_another_signature_is_refused(tmp_path, function, shown):
    path = exported(tmp_path / "f.jaxexport", function, "b, 8, 8, 1")
    with pytest.raises(ValueError, match=rf"f.jaxexport holds a function of .* that {shown}"):
        features.open_features(str(path))


def test_a_function_for_other_devices_is_refused(tmp_path):
    path = exported(tmp_path / "f.jaxexport", means, "b, 8, 8, 1", platforms=["tpu"])
    with pytest.raises(ValueError, match="is exported for tpu, not for cpu: export it with"):
        features.open_features(str(path))


@pytest.mark.parametrize("content", [b"", b"not a function", bytes(range(256)) * 20])
def test_what_is_no_function_is_refused(tmp_path, content):
    path = tmp_path / "f.jaxexport"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="f.jaxexport is no function serialized by jax.export"):
        features.open_features(str(path))


# --- the user's mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "weights", "message"),
    [
        ("inception", None, "weights are missing: give --inception FILE, the path of pt_inception"),
        ("inception:adm", "absent.pth", "there is no file absent.pth"),
        ("inception:bicubic", None, "'inception:bicubic': one of pytorch-fid, adm may follow"),
        ("random:", None, "features 'random:': the seed must be"),
        ("random:-1", None, "the seed must be a whole number below"),
        ("random:4294967296", None, "the seed must be"),
        ("random:0", "a.pth", r"weights of Inception \(a.pth\) are given, but features are"),
        ("absent.jaxexport", None, "there is no file absent.jaxexport"),
        ("absent", None, "there are no features 'absent': features are 'inception', "),
    ],
)
def test_mistakes_are_told_in_one_line(text, weights, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        features.open_features(text, weights=weights)
    assert "\n" not in str(error.value)


def test_lite0_gives_means_of_its_third_stage(tmp_path):
    params = tiny.random_params(lite0.Lite0().init, jnp.zeros((1, 64, 64, 3)), seed=0)
    path = tmp_path / "lite0.safetensors"
    tensors = {k: np.asarray(x) for k, x in traverse_util.flatten_dict(params, sep="/").items()}
    perceptual_weights.weight_files.write_safetensors(path, tensors)
    network = features.open_features(f"lite0:{path}")
    assert network.description["label"].endswith("features of EfficientNet-Lite0, stage 3")
    found = network(IMAGES, mesh_of(1))["pool"]
    enlarged = lite0.scaled(perceptual.enlarged(IMAGES / 255, 64))
    assert enlarged.shape == (11, 72, 64, 3)
    stage = jax.jit(lambda params, x: lite0.Lite0().apply({"params": params}, x)["stage_3"])
    wanted = stage(params, enlarged)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert found.shape == (11, 40)
    with pytest.raises(FileNotFoundError, match="give efficientnet-lite0-57934424.pth"):
        features.open_features("lite0:none.pth")
