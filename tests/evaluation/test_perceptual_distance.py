"""LPIPS of reconstructions: the distance of each pair, and the card of a tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import perceptual_golden
import PIL.Image
import pytest
import tiny

from enat_jax import evaluate
from enat_jax.evaluation import cards, perceptual_distance, perceptual_weights
from enat_jax.inference import tokenizer


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Compiled for one device, the networks are ready much sooner."""
    with pytest.MonkeyPatch.context() as patch:
        device = jax.devices()[:1]
        patch.setattr(jax, "local_devices", lambda: device)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A prepared file of LPIPS with AlexNet; the network is random, the heads are not."""
    path = tmp_path_factory.mktemp("weights") / "alex.safetensors"
    trunk, heads = perceptual_golden.random_lpips("alex")
    both = path.with_name("both.safetensors")
    perceptual_weights.weight_files.write_safetensors(both, trunk | heads)
    perceptual_weights.prepare("lpips_alex", str(both), path)
    return path


@pytest.fixture(scope="module")
def distance(weights):
    return perceptual_distance.open_distance(f"alex:{weights}", 3)


@pytest.fixture(scope="module")
def codec():
    model = tiny.CODEC.clone(image_channels=3)
    params = tiny.random_params(model.init, jnp.zeros((1, *tiny.IMAGE_SIZE, 3)), seed=0)
    return tokenizer.Tokenizer(model, params, tiny.IMAGE_SIZE, {"weights": "random"})


def test_distances_are_those_of_the_network(distance):
    golden = perceptual_golden.load("lpips_random")
    found = distance(golden["images"], golden["others"])
    np.testing.assert_allclose(found, golden["alex:distance"], rtol=1e-5)
    assert distance.description["kind"] == "lpips_alex" and found[2] == 0


def test_the_card_of_a_tokenizer_has_its_lpips(codec, distance, weights, tmp_path, capsys):
    codec.save(tmp_path / "tokenizer")
    pixels = np.random.default_rng(0).integers(0, 256, (6, *tiny.IMAGE_SIZE, 3), np.uint8)
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    for i, picture in enumerate(pixels):
        PIL.Image.fromarray(picture).save(tmp_path / "pictures" / "cat" / f"{i}.png")
    command = ["--tokenizer", tmp_path / "tokenizer", "--source", tmp_path / "pictures"]
    command += ["--features", "random:0", "--replicates", 0, "--lpips", f"alex:{weights}"]
    evaluate.main([str(x) for x in [*command, "--out", tmp_path / "out"]])
    card = cards.read(tmp_path / "out")
    decoded = codec.decode(codec.encode(pixels))
    entry = card["metrics"]["lpips_alex"]
    assert entry["value"] == pytest.approx(distance(pixels, decoded).mean(), rel=1e-5)
    assert entry["title"] == "LPIPS (AlexNet)" and entry["better"] == "lower"
    assert entry["low"] < entry["value"] < entry["high"]
    assert card["lpips"]["files"][0]["file"] == "alex.safetensors"
    assert card["lpips"]["fingerprint"] == distance.description["fingerprint"]
    text = (tmp_path / "out" / "card.md").read_text()
    assert "## LPIPS" in text and "LPIPS (AlexNet)" in text
    # A card without it is another one.
    with pytest.raises(ValueError, match="lpips"):
        evaluate.main([str(x) for x in [*command[:-2], "--out", tmp_path / "out"]])


@pytest.mark.parametrize(
    ("text", "channels", "message"),
    [
        ("squeeze:FILE", 3, "give vgg:FILE or alex:FILE"),
        ("FILE", 3, "names no network with its weights"),
        ("alex:", 3, "names no network with its weights"),
        ("vgg:none.ckpt", 3, "there is no file none.ckpt .*: give vgg16.ckpt"),
        ("alex:none.ckpt", 1, "pictures of 3 channels, and these have 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(text, channels, message):
    with pytest.raises((ValueError, OSError), match=message):
        perceptual_distance.open_distance(text, channels)


def test_distances_do_not_depend_on_the_other_pairs(distance):
    golden = perceptual_golden.load("lpips_real")
    images, others = golden["images"], golden["others"]
    both = distance(images, others)
    np.testing.assert_array_equal(distance(images[1:], others[1:]), both[1:])
    assert both.shape == (2,) and isinstance(both, np.ndarray) and not jax.config.jax_enable_x64
