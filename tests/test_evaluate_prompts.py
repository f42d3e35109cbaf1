"""Cards of models of texts and of pictures with texts: prompts, CLIP scores, FID of captions."""

import functools
import json

import fake_coco
import jax
import numpy as np
import PIL.Image
import pytest
import tiny
from test_evaluate import FEATURES, run

from enat_jax.data import drawn, text_tokens
from enat_jax.evaluation import (
    cards,
    caveats,
    clip_scores,
    features,
    image_texts,
    statistics,
    text_prompts,
)
from enat_jax.inference import clip_towers, generator

QUICK = [*FEATURES, "--replicates", 0]
DRAWN = ["--batch-size", 8, "--steps", 1]
NUMBERS = range(12)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    pytest.importorskip("tokenizers")
    pytest.importorskip("ftfy")
    one = {"devices": tuple(jax.devices()[:1])}  # for which they are compiled faster
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "open_features", functools.cache(features.open_features))
        for kind in (generator.Generator, clip_towers.Clip):
            load = functools.cache(kind.load)
            patch.setattr(kind, "load", lambda *a, load=load, **kw: load(*a, **kw | one))
        yield


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip")
    tiny.make_both_towers().save(directory, ["safetensors"])
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of words; it draws grey pictures of 8x8 pixels."""
    directory = tmp_path_factory.mktemp("model")
    tiny.make_word_generator().save(directory, ["safetensors"])
    return directory


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Grey pictures called as those of val2014, and their captions in words that models know."""
    root = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    (root / "val2014").mkdir()
    lines = []
    for number in NUMBERS:
        name = fake_coco.file_name(number, 2014, "val")
        PIL.Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(
            root / "val2014" / name, "PNG"
        )
        a, b = tiny.WORDS[number % 7], tiny.WORDS[number // 2 % 7]
        lines += [{"file_name": name, "text": text} for text in (f"{a} {b}", f"{b} two {a}")]
    (root / "captions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return root


def of_model(model, coco, clip, out, *more):
    run(
        *("--model", model, "--prompts", coco / "captions.jsonl", "--clip", clip),
        *("--reference", coco / "val2014", *QUICK, *DRAWN, "--out", out, *more),
    )


@pytest.fixture(scope="module")
def card(model, coco, clip, tmp_path_factory):
    out = tmp_path_factory.mktemp("card") / "out"
    of_model(model, coco, clip, out, "--num", 9)
    return out


def cosine_scores(images, texts):
    """The CLIP scores of images and texts, by the towers themselves."""
    both = tiny.make_both_towers()
    ids = text_tokens.window(both.text.kind, texts, both.text.model.context).ids
    vectors = [both.vision.vectors(images), both.text.vectors(ids)]
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in vectors)
    return np.maximum(100 * (a * b).sum(axis=1), 0)


def test_a_card_of_captions(card, model, coco):
    found = cards.read(card)
    lines = [json.loads(x) for x in (card / "prompts.jsonl").read_text().splitlines()]
    names = [line["file_name"] for line in lines]
    assert len(set(names)) == 9
    captions = [json.loads(x) for x in (coco / "captions.jsonl").read_text().splitlines()]
    assert all(line in captions for line in lines)
    about = found["images"]["prompts"]
    assert (about["num"], about["pictures"]) == (9, 12) and len(about["sha256"]) == 64
    texts = [line["text"] for line in lines]
    drawing = tiny.make_word_generator().with_settings(num_steps=1)
    images = drawing.sample(prompts=texts, seed=0, batch_size=8)
    metrics = found["metrics"]
    expected = cosine_scores(images, texts).mean()
    assert metrics["clip_score"]["value"] == pytest.approx(expected, rel=1e-5)
    real = np.stack([np.asarray(PIL.Image.open(coco / "val2014" / x))[..., None] for x in names])
    expected = cosine_scores(real, texts).mean()
    assert metrics["clip_score_real"]["value"] == pytest.approx(expected, rel=1e-5)
    different = list(dict.fromkeys(texts))
    others = [different[(different.index(text) + 1) % len(different)] for text in texts]
    expected = cosine_scores(images, others).mean()
    assert metrics["clip_score_rolled"]["value"] == pytest.approx(expected, rel=1e-5)
    assert 0 <= metrics["r_precision"]["value"] <= 1
    assert f"nearer than {len(different) - 1} others" in metrics["r_precision"]["about"]
    assert metrics["clip_score"]["standard_error"] is None
    assert found["clip"]["scale"] == 100 and found["clip"]["prefix"] == ""
    assert found["clip"]["weights"] == {
        "text": tiny.make_both_towers().text.fingerprint,
        "vision": tiny.make_both_towers().vision.fingerprint,
    }
    text = (card / "card.md").read_text()
    assert "## CLIP" in text and "mean of max(100 cos, 0), no prefix" in text


def test_what_must_be_known_of_it(card):
    said = " ".join(cards.read(card)["caveats"])
    assert "not with published ones of 30,000" in said
    assert "If guidance or temperatures were chosen by these prompts" in said
    assert "same encoder" not in said and "classes" not in said


def test_it_is_shown_and_compared_and_no_other_is_made_there(card, model, coco, clip, capsys):
    of_model(model, coco, clip, card, "--num", 9)
    assert "CLIP score" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds an evaluation with other settings"):
        run(
            *("--model", model, "--prompts", coco / "captions.jsonl", *QUICK, *DRAWN),
            *("--reference", coco / "val2014", "--num", 9, "--out", card),
        )
    found = cards.read(card)
    other = json.loads(json.dumps(found))
    other["metrics"]["clip_score"]["weights"] = {"text": "x", "vision": "y"}
    said = cards.compare(found, other)
    row = next(line for line in said.splitlines() if line.startswith("| CLIP score |"))
    assert "cannot be compared: by other weights" in row


def test_hosts_share_it(card, model, coco, clip, tmp_path):
    for host in (1, 0):
        of_model(model, coco, clip, tmp_path, "--num", 9, "--num-hosts", 2, "--host-index", host)
    assert cards.read(tmp_path)["metrics"] == cards.read(card)["metrics"]


def test_a_list_of_prompts_begins_again(model, coco, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dog\n")
    common = ["--model", model, "--prompts", tmp_path / "prompts.txt", *QUICK, *DRAWN]
    run(*common, "--reference", coco / "val2014", "--num", 3, "--out", tmp_path / "out")
    found = cards.read(tmp_path / "out")
    assert "clip" not in found and "clip_score" not in found["metrics"]
    lines = (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(x) for x in lines] == [
        {"text": "a cat"}, {"text": "two dog"}, {"text": "a cat"}
    ]  # fmt: skip
    said = " ".join(found["caveats"])
    assert "The 3 images are of 2 different texts." in said
    assert "no captions of the reference's pictures" in said


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A folder as ``sample --prompts`` writes it: two images of each of three prompts."""
    folder = tmp_path_factory.mktemp("samples")
    prompts = ["a cat", "a red dog", "two cats"]
    pixels = np.random.default_rng(3).integers(0, 256, (6, 8, 8), np.uint8)
    for i, image in enumerate(pixels):
        PIL.Image.fromarray(image).save(folder / drawn.file_name(i, prompts[i // 2]))
    settings = {"software": "enat_jax 0", "prompts": prompts, "num": 2}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder, pixels[..., None], [text for text in prompts for _ in range(2)]


def of_images(folder, out, clip, *more):
    grey = ["--size", 8, "--set", "channels=1"]
    run(
        "--images",
        folder,
        "--reference",
        folder,
        *QUICK,
        *grey,
        "--clip",
        clip,
        "--out",
        out,
        *more,
    )
    return cards.read(out)


def test_samples_know_their_prompts(samples, clip, tmp_path):
    folder, pixels, texts = samples
    found = of_images(folder, tmp_path / "out", clip)["metrics"]
    expected = cosine_scores(pixels, texts).mean()
    assert found["clip_score"]["value"] == pytest.approx(expected, rel=1e-5)
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    again = of_images(folder, tmp_path / "again", clip, "--prompts", tmp_path / "prompts.txt")
    assert again["metrics"]["clip_score"] == found["clip_score"]


def test_pictures_with_captions_by_their_names(coco, clip, tmp_path):
    found = of_images(
        coco / "val2014", tmp_path / "out", clip, "--prompts", coco / "captions.jsonl"
    )
    metrics = found["metrics"]
    assert metrics["clip_score"]["value"] == metrics["clip_score_real"]["value"]
    assert found["images"]["prompts"]["num"] == 12


def fails(words, *arguments):
    with pytest.raises((ValueError, OSError), match=words) as error:
        run(*arguments)
    assert "\n" not in str(error.value)


def test_mistakes_are_said_before_anything_is_drawn(
    model, samples, coco, clip, tmp_path, monkeypatch
):
    out = ["--reference", coco / "val2014", *QUICK, "--out", tmp_path / "out"]
    captions = coco / "captions.jsonl"
    fails("this model draws texts: name these by --prompts", "--model", model, *out)
    fails("name these by --prompts", "--model", model, "--clip", clip, *out)
    of_model = ["--model", model, *out, "--prompts"]
    fails("captions of 12 pictures alone", *of_model, captions, "--num", 13)
    fails("a distance needs at least 2 images", *of_model, captions, "--num", 1)
    fails("does not exist", *of_model, tmp_path / "none")
    (tmp_path / "prompts.txt").write_text("a zebra\na cat\n")
    fails("zebra", *of_model, tmp_path / "prompts.txt")
    classes = tmp_path / "classes"
    tiny.make_generator().save(classes, ["safetensors"])
    fails("reads no texts", "--model", classes, *out, "--prompts", captions)
    tiny.make_clip().save(tmp_path / "text", ["safetensors"])
    fails(
        "no vision tower, so that it gives no scores",
        *of_model,
        captions,
        "--clip",
        tmp_path / "text",
    )
    grey = ["--size", 8, "--set", "channels=1"]
    of_folder = ["--images", samples[0], *out, *grey]
    fails("has no effect on images without --clip", *of_folder, "--prompts", captions)
    fails("6 of 6 images have no caption", *of_folder, "--clip", clip, "--prompts", captions)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    fails(
        "has 1 prompts and there are 6 images",
        *of_folder,
        "--clip",
        clip,
        "--prompts",
        tmp_path / "prompts.txt",
    )
    of_coco = ["--images", coco / "val2014", *out, *grey, "--clip", clip]
    fails("which .*val2014 does not say: name them by --prompts", *of_coco)
    fails(
        "--prompts has no effect with --tokenizer",
        "--tokenizer",
        model / "tokenizer",
        "--source",
        coco / "val2014",
        *out[2:],
        "--prompts",
        captions,
    )
    assert not (tmp_path / "out").exists()


def test_the_choice_of_pictures_does_not_depend_on_their_number(coco):
    source = str(coco / "captions.jsonl")
    whole, few = text_prompts.read(source), text_prompts.read(source, 5)
    assert len(whole) == 12 and whole.texts[:5] == few.texts
    assert whole.pictures[:5] == few.pictures and whole.pictures != tuple(sorted(whole.pictures))


def test_captions_of_coco_and_of_tokenize_captions(tmp_path):
    path = fake_coco.write_captions(tmp_path / "captions_val2014.json", range(5), part="val")
    found = text_prompts.read(str(path))
    assert len(found) == 5
    for name, text in zip(found.pictures, found.texts, strict=True):
        number = int(name[-16:-4])
        assert text in [" ".join(fake_coco.caption(number, i).split()) for i in range(3)]


@pytest.mark.parametrize(
    ("names", "provenance", "words"),
    [
        (("COCO_train2014_000000000009.jpg",), {}, "captions of pictures of COCO's train2014"),
        (("a/000000000009.jpg",), {}, "called like those of COCO 2017"),
        (("COCO_val2014_000000000009.jpg",), {"tokens": "coco/train2017"}, "holds most of val2014"),
        (("COCO_val2014_000000000009.jpg",), {"tokens": "coco/train2014"}, None),
    ],
)
def test_which_coco_it_is(names, provenance, words):
    prompts = text_prompts.Prompts("p", ("a cat",), names, 1)
    said = caveats.of_prompts(prompts, provenance)
    assert len(said) == 1 + (words is not None)
    assert words is None or words in said[-1]


def test_the_encoder_of_the_condition_is_known():
    clip = tiny.make_clip()
    both = clip_towers.Clip(clip, tiny.make_both_towers().vision)
    prompts = text_prompts.Prompts("p", ("a cat",))
    scorer = clip_scores.Scorer("x", both.text, both.vision, prompts)
    assert image_texts._is_condition(scorer, tiny.make_clip_generator())
    assert not image_texts._is_condition(scorer, tiny.make_word_generator())
    other = clip_scores.Scorer("x", tiny.make_both_towers().text, both.vision, prompts)
    assert not image_texts._is_condition(other, tiny.make_clip_generator())


def test_the_crop_of_u_vit(coco, tmp_path):
    file = tmp_path / "reference.npz"
    make = ["--make-reference", file, "--size", 8, *FEATURES, "--crop", "square-lanczos"]
    run(*make, "--reference", coco / "val2014")
    crop = statistics.Statistics.load(file).description["crop"]
    assert crop == "centre square, then Lanczos (U-ViT)"
    fails(
        "--crop square-lanczos has no effect on digits",
        *make[:2],
        *make[4:],
        "--reference",
        "digits",
    )


def test_captions_of_scenes_are_said_to_be_elsewhere():
    with pytest.raises(ValueError, match="name these, TOKENS/captions"):
        text_prompts.read("scenes")
