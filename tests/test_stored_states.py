"""States of captions that are stored: made by the program, read by training."""

import json
import re

import fake_coco
import jax
import numpy as np
import pytest
import small_runs
import tiny

from enat_jax import tokenize_captions
from enat_jax.data import captioned, captions, text_states, text_tokens, tokens
from enat_jax.inference import text_encoder
from enat_jax.runtime import cli
from enat_jax.training import enat_task, texts

NUMBERS = range(12)
TEXTS = {n: ("a cat left of a dog", "a dog", f"the number {n}")[: 1 + n % 3] for n in NUMBERS}
MIRRORED = "a cat right of a dog"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tokens of pictures and of their mirror images, captions, and an encoder."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("ftfy")
    root = tmp_path_factory.mktemp("states")
    fake_coco.write_tokens(root / "tokens", [f"{n}.png" for n in NUMBERS], flips=True)
    lines = [{"file_name": f"{n}.png", "captions": TEXTS[n]} for n in NUMBERS]
    (root / "captions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    tiny.make_clip().save(root / "clip", ["safetensors"])
    return root


def arguments(root, out, *more):
    flags = ["--tokens", root / "tokens", "--captions", root / "captions.jsonl", "--out", out]
    return [str(x) for x in (*flags, *more)]


def make(root, out, *more):
    tokenize_captions.main(arguments(root, out, *more))
    return captions.Captions.open(out)


@pytest.fixture(scope="module")
def embedded(root):
    return make(root, root / "embedded", "--embed", root / "clip")


def read(texts):
    """What the encoder makes of texts."""
    kind = tiny.make_clip().kind
    window = text_tokens.window(kind, texts, 8)
    return tiny.make_clip().states(window.ids), window.lengths


def test_states_are_those_of_the_encoder(root, embedded, capsys):
    first = [embedded.first[n] for n in NUMBERS]
    batch = embedded.window(np.array(first), 8)
    states, lengths = read([TEXTS[n][0] for n in NUMBERS])
    assert batch["text"].dtype == np.float16 and batch["text"].shape == (12, 8, 6)
    np.testing.assert_array_equal(batch["lengths"], lengths)
    real = np.arange(8) < lengths[:, None]
    np.testing.assert_allclose(batch["text"][real], states[real], rtol=2e-3, atol=1e-3)
    assert not batch["text"][~real].any()
    np.testing.assert_array_equal(embedded.states.null, tiny.make_clip().null_states)
    # Equal texts are stored once: four kinds, one of which is mirrored, too.
    assert len(embedded.states.lengths) == 3 + len({n for n in NUMBERS if n % 3 == 2})
    tokenize_captions.main(arguments(root, root / "embedded", "--embed", root / "clip"))
    report = capsys.readouterr().out
    assert "already holds these captions" in report
    assert "states of 7 different texts, 6 numbers for each token: 0.0 MiB" in report


@pytest.mark.parametrize("how, text", [("swap", MIRRORED), ("keep", TEXTS[0][0])])
def test_mirrored_pictures_have_states_of_mirrored_words(root, embedded, how, text):
    made = embedded
    if how == "keep":
        made = make(root, root / how, "--embed", root / "clip", "--mirror-words", how)
    found = captioned.Captioned.of(tokens.TokenSet.open(root / "tokens"), made, 8)
    rows = found.gather(np.array([0, 1]))
    assert rows["tokens"][:, 1].tolist() == [0, 1]
    states, lengths = read([TEXTS[0][0], text])
    assert rows["lengths"].tolist() == lengths.tolist() == [8, 8]
    np.testing.assert_allclose(rows["text"], states, rtol=2e-3, atol=1e-3)


def test_padding_is_stored_on_request_and_windows_are_cut_as_those_of_tokens(root, tmp_path):
    more = ["--embed", root / "clip", "--padding", "--text-tokens", "5"]
    made = make(root, tmp_path / "out", *more)
    assert made.longest == 5 and made.states.padding
    batch = made.window(np.array([made.first[0], made.first[1] + 1]), 5)
    window = text_tokens.window(tiny.make_clip().kind, [TEXTS[0][0], "a dog"], 5)
    assert batch["lengths"].tolist() == window.lengths.tolist() == [5, 4]
    expected = tiny.make_clip().states(window.ids)
    np.testing.assert_array_equal(batch["text"], expected)


def content(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_killed_run_goes_on_byte_for_byte(root, tmp_path, monkeypatch):
    monkeypatch.setattr(text_states, "MIN_TEXTS", 2)  # so that there are four files
    make(root, tmp_path / "whole", "--embed", root / "clip")
    whole = content(tmp_path / "whole")
    assert sum(name.startswith("states-") for name in whole) == 4
    clip = type(tiny.make_clip())
    encode, calls = clip.states, []

    def states(self, ids):
        calls.append(len(ids))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return encode(self, ids)

    monkeypatch.setattr(clip, "states", states)
    for stop in range(1, 5):
        out = tmp_path / f"killed{stop}"
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            make(root, out, "--embed", root / "clip")
        (out / ".states-00003-of-00004.npy.0123456789abcdef.unfinished").write_bytes(b"half")
        with pytest.raises(FileNotFoundError, match="make captions with"):
            captions.Captions.open(out)
        with pytest.raises(ValueError, match="has begun other captions: their mirror_words is"):
            make(root, out, "--embed", root / "clip", "--mirror-words", "keep")
        calls[:] = [0] * 9
        make(root, out, "--embed", root / "clip")
        assert len(calls) == 9 + 5 - stop  # what was stored is not computed again
        assert content(out) == whole


# --- states of any encoder -------------------------------------------------------------------

PROMPTS = ["a dog", MIRRORED, "not a caption", "a cat  left of a dog", "a dog"] + [
    f"the number {n}" for n in NUMBERS
]


def npz(path, **changes):
    rng = np.random.default_rng(0)
    n = len(PROMPTS)
    arrays = {
        "embeddings": rng.normal(size=(n, 4, 3)).astype(np.float32),
        "lengths": 1 + np.arange(n) % 4,
        "prompts": np.array(PROMPTS),
        "null": rng.normal(size=(2, 3)).astype(np.float16),
    } | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


@pytest.mark.parametrize("part", [2, 256])
def test_states_of_any_encoder_are_found_by_their_texts(root, tmp_path, monkeypatch, part):
    monkeypatch.setattr(tokenize_captions.npz_states, "PART", part)
    monkeypatch.setattr(text_states, "MIN_TEXTS", 2)
    path = npz(tmp_path / "states.npz")
    made = make(root, tmp_path / "out", "--embeddings", path)
    assert made.kind == text_tokens.Stored() and made.longest == 4
    arrays = np.load(path)
    for n in (0, 2, 11):
        for which, text in enumerate(TEXTS[n]):
            place = PROMPTS.index(text.replace("cat ", "cat  "))
            length = arrays["lengths"][place]
            batch = made.window(made.first[[n]] + which, 6)
            assert batch["lengths"].tolist() == [length]
            expected = arrays["embeddings"][place, :length].astype(np.float16)
            np.testing.assert_array_equal(batch["text"][0, :length], expected)
            assert not batch["text"][0, length:].any()
    mirrored = made.window(made.first[[0]], 4, np.array([True]))
    expected = arrays["embeddings"][1, :2].astype(np.float16)
    np.testing.assert_array_equal(mirrored["text"][0, :2], expected)
    assert made.has_side.tolist() == [text == TEXTS[0][0] for n in NUMBERS for text in TEXTS[n]]
    encoder = text_encoder.of_states(made.states, 6)
    assert encoder.width == 3 and encoder.null_prompt.length.tolist() == [2]
    np.testing.assert_array_equal(encoder.null_prompt.tokens[0, :2], arrays["null"])
    assert encoder.null_prompt.tokens.shape == (1, 6, 3)
    with pytest.raises(ValueError, match="give the states of the prompts"):
        encoder.prompt(["a dog"])


def spoilt(**changes):
    return lambda tmp: ["--embeddings", npz(tmp / "states.npz", **changes)]


def many(value):
    states = np.zeros((len(PROMPTS), 4, 3), np.float32)
    states[3, 1, 1] = value
    return states


def written(name, data):
    def make_file(tmp_path):
        (tmp_path / name).write_bytes(data)
        return ["--embeddings", tmp_path / name]

    return make_file


MISTAKES = {
    "no file": (lambda tmp: ["--embeddings", tmp / "none.npz"], "there is no "),
    "no npz": (written("a.npz", b"hello"), "a.npz is no .npz file"),
    "no prompts": (spoilt(prompts=None), "has no prompts, but embeddings, lengths, null"),
    "no null": (spoilt(null=None), "has no states of the empty text, which guidance needs"),
    "another null": (spoilt(null=np.zeros((2, 4), np.float16)), "null is float16 [2, 4]"),
    "a null of NaN": (spoilt(null=np.full((2, 3), np.nan)), "null has a value that is not finite"),
    "a text is missing": (
        spoilt(prompts=np.array([x.replace("number", "no") for x in PROMPTS])),
        "no states of 4 texts, such as 'the number 2', 'the number 5', 'the number 8' and 1 more",
    ),
    "a mirrored text is missing": (
        spoilt(prompts=np.array(["x", "y", *PROMPTS[2:4], "a dog", *PROMPTS[5:]])),
        f"has no states of 1 texts, such as '{MIRRORED}': add them",
    ),
    "NaN": (spoilt(embeddings=many(np.nan)), "embeddings[3] has a value that is not finite"),
    "too large": (spoilt(embeddings=many(1e5)), "embeddings[3] has a value that is not finite"),
    "whole numbers": (spoilt(embeddings=many(1).astype(int)), "embeddings is int64 [17, 4, 3]"),
    "no rows": (spoilt(embeddings=np.zeros((0, 4, 3))), "embeddings is float64 [0, 4, 3]"),
    "flat": (spoilt(embeddings=np.zeros((17, 3))), "embeddings is float64 [17, 3]"),
    "a length of 0": (spoilt(lengths=np.arange(17) % 4), "lengths[0] is 0, and not within 1 to 4"),
    "too long": (spoilt(lengths=np.full(17, 5)), "lengths[0] is 5, and not within 1 to 4"),
    "fewer lengths": (spoilt(lengths=np.ones(3, int)), "lengths, int64 [3], are none of 17 texts"),
    "prompts of numbers": (spoilt(prompts=np.arange(17)), "prompts, int64 [17], are none of"),
    "pickled prompts": (spoilt(prompts=np.array(PROMPTS, object)), "pickled Python objects"),
    "padding": (lambda tmp: [*spoilt()(tmp), "--padding"], "--padding needs all 4 states of the"),
    "a longer window": (lambda tmp: [*spoilt()(tmp), "--text-tokens", 9], "9 is more than the 4"),
    "words": (lambda tmp: [*spoilt()(tmp), "--vocabulary", "scenes"], "words have no text encoder"),
    "padding alone": (lambda tmp: ["--padding"], "--padding is for --embed and --embeddings"),
    "no encoder": (lambda tmp: ["--embed", tmp], "encoder.json"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(root, tmp_path, capsys, name):
    make_flags, words = MISTAKES[name]
    with pytest.raises(SystemExit) as exit_:
        cli.run(
            tokenize_captions.main,
            arguments(root, tmp_path / "out", *make_flags(tmp_path)),
        )
    error = capsys.readouterr().err.splitlines()
    lines = [x for x in error if not x.startswith(("caption ", "text "))]
    assert exit_.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], lines
    assert not (tmp_path / "out" / "metadata.json").exists()


def test_damage_is_found_when_the_command_is_started_again(root, tmp_path):
    make(root, tmp_path / "out", "--embed", root / "clip")
    path = tmp_path / "out" / "states-00000-of-00001.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="states-00000-of-00001.npy is damaged: remove the"):
        make(root, tmp_path / "out", "--embed", root / "clip")
    path.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="are damaged .*it is cut off"):
        captions.Captions.open(tmp_path / "out")


# --- training --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """Data of a run, with the same captions as tokens and as states."""
    data = tmp_path_factory.mktemp("trained")
    small_runs.write_data(data)
    keys = tokens.image_keys(data / "tokens")
    said = ["a cat", "dogs left of it", "a"]
    lines = [{"file_name": key, "text": said[i % 3]} for i, key in enumerate(keys)]
    (data / "captions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    make(data, data / "ids")
    make(data, data / "states", "--embed", root / "clip")
    tiny.make_clip(1).save(data / "clip", ["safetensors"])
    make(data, data / "other", "--embed", data / "clip")
    make(data, data / "padded", "--embed", root / "clip", "--padding", "--text-tokens", 8)
    npz(
        data / "any.npz",
        embeddings=many(1)[:3],
        lengths=np.array([1, 4, 2]),
        prompts=np.array(said),
    )
    make(data, data / "any", "--embeddings", data / "any.npz")
    return data


def task_of(trained, name, **changes):
    paths = {"data.captions": trained / name, "data.held_out_captions": trained / name}
    paths = {name: str(path) for name, path in paths.items()}
    settings = {"loss.text_drop": 0.5, "model.num_classes": 0} | changes
    return enat_task.make(small_runs.small_config(trained, **paths | settings))


def first_step(task, state):
    """The batch, and gradients and loss of its step, in which features are not reused."""
    batch = next(task.batches(0))
    index = next(i for i in range(99) if not task.shapes(i)[1]["num_cached"])
    static, traced = task.shapes(index)
    step = jax.jit(task.gradients, static_argnames="static")
    key = jax.random.key(3)
    grads, metrics, _ = step(state, batch, traced, key, static=static, frozen=task.frozen)
    return batch, grads, metrics["loss"]


def both(root, trained, stored="states", **more):
    encoder = {"data.text_encoder": str(root / "clip")}
    return task_of(trained, stored, **more), task_of(trained, "ids", **more, **encoder)


def test_a_step_on_stored_states_is_that_on_the_encoder(root, trained):
    stored, online = both(root, trained, **{"model.encoder_layers": 1})
    assert stored.text.description() == online.text.description()
    assert stored.model == online.model and stored.frozen == {}
    state = jax.jit(stored.init)(jax.random.key(0))
    batch, grads, loss = first_step(stored, state)
    _, expected, expected_loss = first_step(online, state)
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {
        k: (x.shape, x.dtype) for k, x in stored.batch_spec().items()
    }
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-3)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-3 * largest)


@pytest.mark.parametrize("attended", [False, True])
def test_prompts_of_both_are_the_same(root, trained, attended):
    more = {"model.attend_padding": attended, "model.text_tokens": 8 if attended else 0}
    pair = both(root, trained, "padded" if attended else "states", **more)
    found, wanted = (task.held_out_prompt for task in pair)
    np.testing.assert_array_equal(found.length, wanted.length)
    real = np.arange(found.tokens.shape[1]) < np.where(attended, 8, found.length)[:, None]
    np.testing.assert_allclose(found.tokens[real], wanted.tokens[real], rtol=2e-3, atol=1e-3)
    prompts = []
    for task in pair:
        batch = next(task.batches(0))
        given = batch["text"], batch["lengths"], jax.random.key(1), 0.5
        prompts.append(texts.prompt(task.text, task.frozen, *given))
    found, wanted = (jax.tree.map(np.asarray, prompt) for prompt in prompts)
    np.testing.assert_array_equal(found.length, wanted.length)
    assert 0 < (found.length == 2).sum() < len(found.length)
    real = np.arange(found.tokens.shape[1]) < np.where(attended, 8, found.length)[:, None]
    np.testing.assert_allclose(found.tokens[real], wanted.tokens[real], rtol=2e-3, atol=1e-3)


def test_states_of_any_encoder_are_trained_on(trained, tmp_path):
    task = task_of(trained, "any")
    assert (task.model.text_width, task.model.text_tokens) == (3, 4)
    batch = next(task.batches(0))
    assert batch["text"].shape == task.batch_spec()["text"].shape == (8, 4, 3)
    prompt = texts.prompt(task.text, {}, batch["text"], batch["lengths"], jax.random.key(1), 0.5)
    dropped = np.asarray(prompt.tokens[:, 0] == task.text.null_prompt.tokens[0, 0]).all(axis=1)
    np.testing.assert_array_equal(prompt.length, np.where(dropped, 2, batch["lengths"]))
    np.testing.assert_array_equal(prompt.tokens[~dropped], batch["text"][~dropped])
    assert 0 < dropped.sum() < 8
    identity = json.loads(json.dumps(task.data_identity()))
    assert identity["captions"]["states"]["crc32"] and identity["text"]["encoder"]["width"] == 3
    task.text.save(tmp_path)
    loaded = text_encoder.load(tmp_path, identity["text"], None, jax.local_devices())
    assert loaded.description() == task.text.description()
    np.testing.assert_array_equal(loaded.null_prompt.tokens, task.text.null_prompt.tokens)


WRONG = {
    "an encoder beside states": ({"data.text_encoder": "x"}, "has no use: the states of the"),
    "a shorter window": (
        {"model.text_tokens": 4},
        "text_tokens=4, but a caption in .* has 6",
    ),
    "padding": ({"model.attend_padding": True}, "needs 6 states of every text, padding included"),
    "another width": ({"model.text_width": 7}, "model.text_width=7, but the texts of .* have 6"),
    "other texts": ({"data.held_out_captions": "any"}, "with different text tokens"),
    "other states": ({"data.held_out_captions": "other"}, "do not have stored states of one text"),
    "padding of one": ({"data.held_out_captions": "padded"}, "do not have stored states of one"),
    "no states": ({"data.held_out_captions": "ids"}, "do not have stored states of one text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_do_not_fit_are_refused(trained, name):
    changes, words = WRONG[name]
    if "data.held_out_captions" in changes:
        changes = {"data.held_out_captions": str(trained / changes["data.held_out_captions"])}
    with pytest.raises(ValueError, match=words) as error:
        task_of(trained, "states", **changes)
    assert re.fullmatch(r"[^\n]+", str(error.value))
