"""Texts in training: what belongs together, how they are dropped, and how much they help."""

import dataclasses
import functools
import types

import chex
import fake_coco
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from small_tasks import WORDS, make_task, text_encoders

from enat_jax.data import captions, records, text_tokens, token_data, tokens
from enat_jax.inference import sampling
from enat_jax.runtime import sharding
from enat_jax.training import enat_evaluation, enat_task, optim, texts, train_step

# --- what belongs together --------------------------------------------------------------------

KEYS = [f"{i}.png" for i in range(6)]
SETTINGS = {
    "text_width": None,
    "text_vocabulary": None,
    "text_tokens": 0,
    "dtype": "float32",
    "attend_padding": False,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two token sets of six pictures, each with captions of words and of CLIP; and an encoder."""
    root = tmp_path_factory.mktemp("texts")
    for name in ("train", "test"):
        fake_coco.write_tokens(root / name, [f"{name}/{key}" for key in KEYS])
        write_captions(root, name, "words", WORDS, [[1, 4], [2, 4, 4]])
        write_captions(root, name, "clip", text_tokens.Clip(), [[320, 2368], [320]])
    write_captions(root, "train", "others", text_tokens.Words(("red",)), [[1], [1, 1]])
    tiny.make_clip().save(root / "encoder", ["safetensors"])
    return root


def write_captions(root, name, out, kind, ids):
    """Two captions of each picture, whose texts nobody reads."""
    written = [[f"{i}", f"{i} again"] for i in range(len(KEYS))]
    plan = tokens.read_metadata(root / name)["digest"]
    made_of = captions.identity(written, kind, plan, "swap")
    captions.write(root / name / out, made_of, written, KEYS, ids * len(KEYS))


def join(root, settings, **data):
    """What ``texts.join`` makes of directories by their names in ``root``."""
    data = {k: str(root / v) for k, v in {"tokens": "train", "tokenizer": "none", **data}.items()}
    sets = [tokens.TokenSet.open(root / name) for name in ("train", "test")]
    held_out = sets[1] if "held_out_tokens" in data else None
    return texts.join(token_data.Data(**data), settings, sets[0], held_out)


def test_words_become_the_vocabulary_of_the_model(root):
    settings = dict(SETTINGS)
    both = {"held_out_tokens": "test", "held_out_captions": "test/words"}
    training, held_out, encoder = join(root, settings, captions="train/words", **both)
    assert settings == SETTINGS | {"text_vocabulary": 5, "text_tokens": 4}  # of the longest
    assert encoder.context == training.context == held_out.context == 4 and encoder.clip is None
    assert held_out.gather(np.array([1]))["text"].tolist() == [[0, 1, 4, 0]]


@pytest.mark.parametrize(("asked", "found"), [(0, 4), (3, 3), (8, 8)])
def test_states_of_clip_become_the_width_of_the_model(root, asked, found):
    settings = SETTINGS | {"text_tokens": asked, "dtype": "bfloat16"}
    data = {"captions": "train/clip", "text_encoder": "encoder"}
    training, _, encoder = join(root, settings, **data)
    assert settings == SETTINGS | {"text_width": 6, "text_tokens": found, "dtype": "bfloat16"}
    assert encoder.clip.model.dtype == "bfloat16" and encoder.context == found
    assert {x.dtype.name for x in jax.tree.leaves(encoder.frozen)} == {"bfloat16"}
    assert training.gather(np.array([0]))["lengths"] == min(4, found)
    # The encoder is known by its weights on disk, whatever they are rounded to.
    identity = encoder.description()["encoder"]
    assert identity == join(root, dict(SETTINGS), **data)[2].description()["encoder"]


def test_without_captions_nothing_changes(root):
    training, held_out, encoder = join(root, settings := dict(SETTINGS), held_out_tokens="test")
    assert type(training) is type(held_out) is tokens.TokenSet
    assert encoder is None and settings == SETTINGS


WRONG = {
    "a model of states without captions": (
        {"text_width": 768},
        {},
        "model.text_width=768 needs texts: give --config.data.captions=DIR",
    ),
    "a model of words without captions": (
        {"text_vocabulary": 5},
        {},
        "model.text_vocabulary=5 needs texts",
    ),
    "no captions of held-out tokens": (
        {},
        {"captions": "train/words", "held_out_tokens": "test"},
        "data.held_out_captions is not set: give --config.data.held_out_captions=DIR",
    ),
    "captions of other tokens": (
        {},
        {"captions": "test/words"},
        "test/words are not of the tokens in .*train: make them with .* --tokens .*train",
    ),
    "held-out captions of other tokens": (
        {},
        {"captions": "train/words", "held_out_tokens": "test", "held_out_captions": "train/words"},
        "train/words are not of the tokens in .*test: make them",
    ),
    "other words to evaluate on": (
        {},
        {"captions": "train/others", "held_out_tokens": "test", "held_out_captions": "test/words"},
        "test/words and .*train/others were made with different text tokens",
    ),
    "words with an encoder": (
        {},
        {"captions": "train/words", "text_encoder": "encoder"},
        "encoder has no use: the captions in .* are words, which the model learns by itself",
    ),
    "tokens of CLIP without an encoder": (
        {},
        {"captions": "train/clip"},
        "are tokens of CLIP: give --config.data.text_encoder=DIR .python -m enat_jax.import_torch",
    ),
    "another width": (
        {"text_width": 768},
        {"captions": "train/clip", "text_encoder": "encoder"},
        "model.text_width=768, but the texts of .*train/clip have 6: .*model.text_width=None",
    ),
    "another vocabulary": (
        {"text_vocabulary": 7},
        {"captions": "train/words"},
        "model.text_vocabulary=7, but the texts of .*train/words have 5: .*text_vocabulary=None",
    ),
    "words for a model of states": (
        {"text_width": 6},
        {"captions": "train/words"},
        "model.text_width=6, but the texts of .*train/words have none: .*text_width=None",
    ),
    "a text too short for its ends": (
        {"text_tokens": 1},
        {"captions": "train/clip", "text_encoder": "encoder"},
        "a text of 1 tokens is too short: at least 2",
    ),
    "a text longer than the encoder reads": (
        {"text_tokens": 9},
        {"captions": "train/clip", "text_encoder": "encoder"},
        "a text of 9 tokens is longer than the 8 that its encoder reads",
    ),
    "a dtype that no encoder has": (
        {"dtype": "float16"},
        {"captions": "train/clip", "text_encoder": "encoder"},
        "dtype='float16' of a model: choose float32 or bfloat16",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(root, name):
    settings, data, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as refused:
        join(root, SETTINGS | settings, **data)
    assert "\n" not in str(refused.value)


def test_a_model_without_texts_takes_no_captions(root):
    with pytest.raises(ValueError, match=r"needs a model that takes texts: model.kind must be 'en"):
        join(root, {"dtype": "float32"}, captions="train/words")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"held_out_captions": "x"}, "data.held_out_captions has no use without data.captions"),
        ({"text_encoder": "x"}, "data.text_encoder has no use without data.captions"),
        ({"captions": "x", "held_out_captions": "x"}, "no use without data.held_out_tokens"),
    ],
)
def test_settings_without_a_use_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        token_data.Data(tokens="a", tokenizer="b", **data)


# --- a step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["words", "clip"])
def test_a_text_is_dropped_as_a_whole(kind):
    encoder = text_encoders()[kind]
    task = make_task(text=kind)
    rows = task.tokens.gather(np.arange(40), seeds=np.arange(40))
    assert set(rows["lengths"].tolist()) == ({2, 3} if kind == "words" else {3, 4})
    make = functools.partial(texts.prompt, encoder, encoder.frozen, rows["text"], rows["lengths"])
    given = make(jax.random.key(0), 0.0)
    expected = encoder.of_tokens(rows["text"], rows["lengths"])
    null = encoder.null_prompt
    close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3)  # float16 there
    close(given.tokens, expected.tokens)
    np.testing.assert_array_equal(given.length, rows["lengths"])
    half = make(jax.random.key(0), 0.5)
    dropped = np.array(half.length) == null.length
    assert 8 < dropped.sum() < 32
    of_each = dropped.reshape(-1, *[1] * (given.tokens.ndim - 1))
    close(half.tokens, np.where(of_each, null.tokens, expected.tokens))
    other = np.array(make(jax.random.key(1), 0.5).length)
    assert (other != half.length).any()


def test_where_every_text_is_dropped_captions_make_no_difference():
    """So that the branches of guidance agree."""
    task = make_task(text="words")
    task = dataclasses.replace(task, loss=dataclasses.replace(task.loss, text_drop=1 - 1e-9))
    state = jax.jit(task.init)(jax.random.key(0))
    index = next(i for i in range(9) if task.shapes(i)[1]["num_cached"])
    static, traced = task.shapes(index)
    step = jax.jit(functools.partial(task.gradients, static=static, frozen=task.frozen))
    batch = next(task.batches(0))
    other = batch | {"text": np.roll(batch["text"], 1, 0), "lengths": np.roll(batch["lengths"], 1)}
    assert (other["text"] != batch["text"]).any()
    found, changed = (step(state, x, traced, jax.random.key(1))[:2] for x in (batch, other))
    chex.assert_trees_all_equal(found, changed)
    words = np.abs(found[0]["embed_text"]["word"]).max(1)
    assert words[0] > 0 and not words[1:].any()  # of what stands in front of every text alone


# --- how much the texts help ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A task and its state after it has learned which tokens belong to a colour."""
    rate = optim.Optimizer(learning_rate=1e-2, warmup_steps=0, schedule="cosine").make(320)
    task = dataclasses.replace(make_task(text="words", batch_size=16), optimizer=rate)
    mesh = sharding.make_mesh(sharding.Sharding(), jax.devices()[:1])
    steps = train_step.CompiledSteps(task, mesh, enat_task.RULES, seed=0)
    state, batches = steps.init(), task.batches(0)
    for step in range(320):
        state, _ = steps(state, [sharding.global_batch(next(batches), mesh)], step)
    return task, state, mesh


def gauges(task, state, mesh):
    names = enat_evaluation.names(has_text=True)
    found = dict(zip(names, enat_evaluation.held_out_scores(task, state, mesh), strict=True))
    return [found[f"held_out/text_use_{share}_visible"] for share in ("0", "0.0625", "0.25")]


@pytest.mark.slow
def test_the_gauge_says_whether_texts_are_read(trained):
    task, state, mesh = trained
    found = gauges(task, state, mesh)
    assert found[0] > 0.3 and found[1] > 0.3  # where hardly anything else says the colour
    # The same model, whose words all mean the same: its loss may be good, the gauge is 0.
    table = state.ema_params["embed_text"]
    deaf = table | {"word": jnp.zeros_like(table["word"])}
    state = state.replace(ema_params=state.ema_params | {"embed_text": deaf})
    assert gauges(task, state, mesh) == [0.0, 0.0, 0.0]


@pytest.mark.slow
def test_samples_have_the_texts_of_held_out_images(trained):
    """As the tokens of a colour say; they do not follow from the seed."""
    task, state, mesh = trained
    decoded = types.SimpleNamespace(
        decode=lambda x: x.reshape(-1, 4, 4, 1).astype(np.uint8), grid=(4, 4)
    )
    greedy = sampling.Settings(num_steps=3, token_temperature=0.0, num_segments=1)
    quality = types.SimpleNamespace(num=12)
    task = dataclasses.replace(task, tokenizer=decoded, sampler=greedy, quality=quality)
    expected = task.tokens.gather(records.evenly(50, 12))
    batches = [enat_evaluation.samples(task, state, mesh, 8, *x) for x in [(0, 8), (8, 12)]]
    assert [x.labels.tolist() for x in batches] == [[0] * 8, [0] * 4]  # there are no classes
    drawn = np.concatenate([x.images for x in batches]).reshape(12, 16)
    assert (drawn == expected["tokens"]).mean() > 0.9
    ((name, grid),) = enat_evaluation.pictures(task, state, mesh)
    rows = np.split(np.asarray(grid)[..., 0], 10)
    expected = task.tokens.gather(records.evenly(50, 10))["tokens"].reshape(10, 4, 4)
    assert name == "samples"
    assert np.mean([row == np.tile(x, 10) for row, x in zip(rows, expected, strict=True)]) > 0.9
