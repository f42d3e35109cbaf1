"""Which pictures ``evaluate`` measures, and that what its messages advise can be done."""

import json
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
import tiny
from test_evaluate import FEATURES, compiled_once, model, pictures, refused, run

from enat_jax import evaluate
from enat_jax.data import drawn
from enat_jax.data.decoding import UnreadableImage
from enat_jax.evaluation import cards, caveats, features
from enat_jax.inference import tokenization, tokenizer

__all__ = ["compiled_once", "model", "pictures"]
QUICK = [*FEATURES, "--replicates", 0]
GREY = ["--size", 8, "--set", "channels=1"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """What ``sample`` writes: 8 grey pictures of 8x8 pixels, and what lies beside them."""
    folder = tmp_path_factory.mktemp("samples")
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 8), np.uint8)
    for i, image in enumerate(pixels):
        PIL.Image.fromarray(image).save(folder / drawn.file_name(i, tiny.CLASSES[i // 4]))
    for name in drawn.BESIDE:
        PIL.Image.fromarray(np.zeros((22, 42), np.uint8)).save(folder / name)
    settings = {"software": "enat_jax 0", "class_names": tiny.CLASSES[:2], "num": 4}
    (folder / "settings.json").write_text(json.dumps(settings))
    np.savez(folder / "samples.npz", arr_0=pixels[..., None], arr_1=np.arange(8) // 4)
    return folder


def measured(*arguments):
    run(*arguments, *QUICK)
    return cards.read(arguments[arguments.index("--out") + 1])


def distance(card):
    return card["metrics"]["frechet_distance"]["value"]


def test_of_what_sample_wrote_the_samples_are_measured(samples, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(samples, copy, ignore=shutil.ignore_patterns("*grid*", "reveal*", "*.json"))
    found = measured("--images", samples, *GREY, "--reference", copy, "--out", tmp_path / "a")
    assert found["images"]["num"] == found["reference"]["description"]["num_images"] == 8
    assert abs(distance(found)) < 1e-12


def test_images_of_an_npz_file_are_those_of_the_folder(samples, pictures, tmp_path):
    npz = samples / "samples.npz"
    of_npz = ["--images", npz, "--reference", pictures, *GREY[2:]]
    own = measured(*of_npz, "--out", tmp_path / "a")
    assert own["images"]["per_class"] == [4, 4] and own["images"]["num"] == 8
    of_folder = ["--images", samples, "--reference", pictures, *GREY]
    assert own["metrics"] == measured(*of_folder, "--out", tmp_path / "b")["metrics"]
    run("--make-reference", tmp_path / "s.npz", "--reference", npz, *FEATURES)
    back = ["--images", pictures, *GREY]
    found = measured(*back, "--reference", npz, "--out", tmp_path / "c")
    again = measured(*back, "--reference", tmp_path / "s.npz", "--out", tmp_path / "d")
    assert again["metrics"] == found["metrics"]
    assert distance(found) == pytest.approx(distance(own))


def test_grey_pictures_are_compared_with_grey_and_with_colour(samples, tmp_path):
    common = ["--images", samples, "--size", 8, "--reference", "digits", "--keep", 40]
    colour = measured(*common, "--out", tmp_path / "a")
    grey = measured(*common, "--set", "channels=1", "--out", tmp_path / "b")
    assert [x["images"]["size"][2] for x in (colour, grey)] == [3, 1]
    assert distance(grey) == pytest.approx(distance(colour), rel=1e-5)
    said = ["grey was repeated to three channels" in " ".join(x["caveats"]) for x in (colour, grey)]
    assert said == [True, False]


def test_of_a_tokenizer_held_out_pictures_are_measured(model, pictures, tmp_path):
    codec = tokenizer.Tokenizer.load(model / "tokenizer")

    def opened(path, split=None, **settings):
        network = features.open_features("random:0")
        opener = evaluate.pictures.Opener(network, split, None, settings, 10)
        source = opener.held_out(str(path), codec)
        return source.identity()["split"], len(source)

    held, rest = opened(pictures, held_out=0.3), opened(pictures, "train", held_out=0.3)
    assert (held[0], rest[0], held[1] + rest[1]) == ("test", "train", 64)
    assert opened(pictures) == ("train", 64)
    shutil.copytree(pictures, tmp_path / "train")
    shutil.copytree(pictures, tmp_path / "val")
    assert opened(tmp_path) == ("test", 64) and opened(tmp_path, "all") == ("all", 128)
    assert opened("digits", size=8) == ("test", 359)
    said = [bool(caveats.of_split(split)) for split in ("test", "validation", "train", "all", None)]
    assert said == [False, False, True, True, False]


def test_too_few_images_for_precision_are_said_at_the_start(samples, tmp_path, capsys):
    few = ["--reference", samples, "--keep", 5]
    found = measured("--images", samples, *GREY, *few, "--out", tmp_path / "a")
    line = capsys.readouterr().err.splitlines()
    assert any(x.startswith("without precision, recall, density and coverage: ") for x in line)
    assert "precision" not in found["metrics"]
    assert "those of 8 against 4" in " ".join(found["caveats"])


# --- what messages advise ------------------------------------------------------------------------


def of_statistics(paths):
    run("--make-reference", paths["tmp"] / "s.npz", "--reference", paths["npz"], *FEATURES)
    return paths["tmp"] / "s.npz"


def unfinished(paths):
    shutil.copytree(paths["samples"], paths["tmp"] / "cut")
    (paths["tmp"] / "cut" / "00003_cat.png").unlink()
    return paths["tmp"] / "cut"


def copied(paths):
    shutil.copytree(
        paths["tmp"] / "cut", paths["tmp"] / "new", ignore=shutil.ignore_patterns("*.json")
    )
    return paths["tmp"] / "new"


MODEL = {"--model": "model", "--reference": "pictures", "--num": 9}
TOKENIZER = {"--tokenizer": "tokenizer", "--source": "pictures"}
IMAGES = {"--images": "samples", "--reference": "pictures", "--size": 8}
NPZ = {"--images": "npz", "--reference": "npz"}
ADVISED = {  # a use, what is wrong with it, words of the message, and what they advise
    "size of a reference": (MODEL, {"--set": "size=16"}, "--set size=8 opens", {"--set": "size=8"}),
    "size of a source": (
        TOKENIZER, {"--set": "size=16"}, "--set size=8 changes that", {"--set": "size=8"}
    ),
    "channels": (
        TOKENIZER, {"--set": "channels=3"}, "--set channels=1 changes", {"--set": "channels=1"}
    ),
    "size beside an .npz file": (
        NPZ, {"--reference": "digits", "--size": 16}, "--set size=8", {"--set": "size=8"}
    ),
    "size of .npz files": (NPZ, {"--size": 8}, "--size has no effect on .npz", {"--size": None}),
    "split of .npz files": (NPZ, {"--split": "test"}, "leave it out", {"--split": None}),
    "no size": (IMAGES, {"--size": None}, "needs a setting size", {"--size": 8}),
    "no pictures held out": (
        IMAGES, {"--split": "test"}, "set held_out to the share", {"--set": "held_out=0.5"}
    ),
    "statistics for images": (
        NPZ, {"--images": of_statistics}, "statistics go to --reference",
        {"--images": "npz", "--reference": lambda paths: paths["tmp"] / "s.npz"},
    ),
    "few images": (MODEL, {"--num": 2}, "needs at least 3 images", {"--num": 3}),
    "samples that are not there": (
        IMAGES, {"--images": unfinished}, "copy the images that are to count", {"--images": copied}
    ),
    "no effect": (MODEL, {"--source": "pictures"}, "leave it out", {"--source": None}),
    "directory of something else": (
        IMAGES, {"--out": "samples"}, "name another --out", {"--out": lambda p: p["tmp"] / "other"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADVISED)
def test_what_a_message_advises_can_be_done(
    name, model, samples, pictures, tmp_path, capsys, monkeypatch
):
    use, mistake, words, remedy = ADVISED[name]
    paths = {"model": model, "tokenizer": model / "tokenizer", "samples": samples, "tmp": tmp_path}
    paths |= {"pictures": pictures, "npz": samples / "samples.npz"}

    def arguments(values):
        found = [
            (k, v(paths) if callable(v) else paths.get(v, v))
            for k, v in ({"--out": tmp_path / "out"} | values).items()
            if v is not None
        ]
        return [x for pair in found for x in pair] + FEATURES

    assert words in refused(arguments(use | mistake), tmp_path, capsys)
    # What follows has been reached, and that it works other tests show.
    monkeypatch.setattr(evaluate.passes, "statistics_of_reference", lambda *rest: None)
    monkeypatch.setattr(evaluate.passes, "run_and_collect", lambda *rest: None)
    run(*arguments(use | mistake | remedy))
    assert "this host's part is finished" in capsys.readouterr().out


def test_pictures_that_cannot_be_read_are_found_at_the_start(samples, tmp_path, capsys):
    folder, out = tmp_path / "cut", tmp_path / "out"
    shutil.copytree(samples, folder, ignore=shutil.ignore_patterns("*.json"))
    for name in ("00003_cat.png", "00006_dog.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    arguments = ["--images", folder, *GREY, "--reference", samples, "--out", out]
    line = refused([*arguments, *QUICK], tmp_path, capsys)
    assert "2 of 8 pictures cannot be read: 00003_cat.png: is truncated" in line
    assert "leave them out by --on-error skip" in line and not out.exists()
    line = refused([*arguments, *QUICK, "--on-error", "skip", "--no-scan"], tmp_path, capsys)
    assert "leave out --no-scan" in line
    with pytest.raises(UnreadableImage, match="00003_cat.png: is truncated"):
        run(*arguments, *QUICK, "--no-scan", "--out", tmp_path / "late")
    found = measured(*arguments, "--on-error", "skip")
    assert found["images"]["num"] == 6 and "2 of 8 pictures" in " ".join(found["caveats"])
    for name in ("00003_cat.png", "00006_dog.png"):
        (folder / name).unlink()
    assert measured(*arguments)["metrics"] == found["metrics"]


def test_digits_are_grey_and_no_setting_changes_that():
    found = tokenization.advice("digits", (8, 8, 1), (8, 8, 3))
    assert found == "name other pictures, digits has no setting channels"
    found = tokenization.advice("a.zip", (8, 8, 1), (16, 16, 3))
    assert found == "--set size=16 and --set channels=3 changes that"


def test_what_is_damaged_is_made_again_as_the_message_says(samples, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--images", samples, *GREY, "--reference", samples, "--out", out]
    before = measured(*arguments)["metrics"]
    state = out / "images" / "00000-of-00001" / "state.npz"
    for path, others, words, removed in (
        (out / "card.json", [], f"remove {out / 'card.json'}", out / "card.json"),
        (out / "reference.npz", [out / "card.json"], "and it is made again", out / "reference.npz"),
        (state, [out / "card.json"], f"remove the folder {state.parent}", state.parent),
    ):
        path.write_bytes(path.read_bytes()[:-30])
        for other in others:
            other.unlink()
        assert words in refused([*arguments, *QUICK], tmp_path, capsys)
        shutil.rmtree(removed) if removed.is_dir() else removed.unlink()
        assert measured(*arguments)["metrics"] == before
    make = ["--make-reference", tmp_path / "s.npz", "--reference", samples, *GREY, *FEATURES]
    (tmp_path / "s.npz").write_bytes(b"PK")
    assert f"remove {tmp_path / 's.npz'}, or name" in refused(make, tmp_path, capsys)
    (tmp_path / "s.npz").unlink()
    run(*make)


def test_an_evaluation_in_another_precision_is_another_one(samples, tmp_path):
    arguments = ["--images", samples, *GREY, "--reference", samples, "--out", tmp_path]
    with jax.default_matmul_precision("highest"):
        card = measured(*arguments)
        assert "numerics.JAX_DEFAULT_MATMUL_PRECISION | highest" in cards.markdown(card)
    with pytest.raises(ValueError, match="PRECISION is highest, now it would be not set"):
        run(*arguments, *QUICK)
