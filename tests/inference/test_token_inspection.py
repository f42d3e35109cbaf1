"""What people see of a token set: counts that add up, originals beside what tokens decode to."""

import json

import numpy as np
import PIL.Image
import pytest
import tiny

from enat_jax.data import images, tokens
from enat_jax.inference import token_inspection, tokenization


@pytest.fixture(scope="module")
def model():
    return tiny.make_tokenizer()


@pytest.fixture
def directory(model, tmp_path):
    """Tokens of 21 noisy pictures in a folder of two classes, and a text file."""
    rng = np.random.default_rng(0)
    for i in range(21):
        path = tmp_path / "pictures" / ("bird" if i < 14 else "cat") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    (tmp_path / "pictures" / "notes.txt").write_text("not a picture")
    location = {"source": str(tmp_path / "pictures"), "split": "all", "size": 8, "channels": 1}
    source = images.open_source(**location)
    spec = tokens.TokenSetSpec(
        num_images=21,
        copies=1,
        flips=True,
        batch_size=4,
        grid=model.grid,
        codebook_size=tiny.CODES,
        class_names=source.class_names,
        tokenizer=model.fingerprint,
        preprocessing={"source": source.identity(), "ignored_files": source.ignored},
        location=location,
        shard_items=8,
    )
    tokenization.tokenize(model, source, spec, tmp_path / "tokens")
    assert tokens.finish(tmp_path / "tokens", spec)
    return tmp_path / "tokens"


def test_code_use_is_counted(directory):
    token_set = tokens.TokenSet.open(directory)
    codes = token_set.rows[np.arange(42)]["tokens"]
    use = token_inspection.code_use(token_set)
    assert (use.used, use.size) == (len(np.unique(codes)), tiny.CODES)
    share = np.bincount(codes.ravel()) / codes.size
    share = share[share > 0]
    assert use.perplexity == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_a_summary_says_what_is_in_it(directory):
    text = token_inspection.summary(directory)
    assert "42 records of 4x4 tokens (uint8) from 21 images, with mirror images" in text
    assert "2 classes, from 14 records (cat) to 28 (bird)" in text
    assert "files that are not used: .txt (1)" in text


def test_originals_stand_above_their_reconstructions(model, directory, tmp_path):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    text = token_inspection.inspect(directory, model, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    values = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert values["num_measured"] == 21 and f"PSNR {values['psnr']:.2f} dB" in text
    source = images.open_source(**tokens.read_metadata(directory)["location"])
    originals = source.gather(np.arange(21))["images"]
    decoded = model.decode(model.encode(originals))
    error = np.square(originals / 255 - decoded / 255).mean()
    assert values["squared_error"] == pytest.approx(error)
    assert values["psnr"] == pytest.approx(-10 * np.log10(error))
    picture = np.asarray(PIL.Image.open(tmp_path / "out" / "reconstructions.png"))
    assert picture.shape == (4 * 10 + 2, 8 * 10 + 2)  # two pairs of rows of eight
    first, below = picture[2:10, 2:10], picture[12:20, 2:10]
    (shown,) = [i for i in range(21) if np.array_equal(originals[i, :, :, 0], first)]
    np.testing.assert_array_equal(below, decoded[shown, :, :, 0])


def test_without_the_originals_it_says_so(model, directory, tmp_path):
    (tmp_path / "pictures").rename(tmp_path / "moved")
    text = token_inspection.inspect(directory, model, tmp_path / "out")
    assert "the original images cannot be shown" in text
    assert (tmp_path / "out" / "reconstructions.png").exists()


def test_changed_originals_are_not_compared(model, directory, tmp_path):
    (tmp_path / "pictures" / "cat" / "20.png").unlink()
    text = token_inspection.inspect(directory, model, tmp_path / "out")
    assert "has changed since" in text and "PSNR" not in text


def test_another_tokenizer_is_refused(directory, tmp_path):
    with pytest.raises(ValueError, match="made by another tokenizer"):
        token_inspection.inspect(directory, tiny.make_tokenizer(seed=1), tmp_path / "out")


def test_a_flipped_bit_is_found(model, directory, tmp_path):
    path = directory / "00001-of-00003.npy"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"00001-of-00003\.npy is damaged"):
        token_inspection.inspect(directory, model, tmp_path / "out")
