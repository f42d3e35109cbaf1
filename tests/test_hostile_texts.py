"""Broken and hostile prompts, states and encoders: one clear line, and nothing is drawn.

Captions have a table of their own in ``test_tokenize_captions.py``, lines of files one in
``data/test_prompt_files.py``; here every kind goes through the program as a user starts it.
"""

import io
import json
import shutil
import sys
import zipfile

import jax
import numpy as np
import pytest
import tiny

from enat_jax import export, sample
from enat_jax.data import records, text_tokens
from enat_jax.inference import text_encoder
from enat_jax.runtime import cli

pytest.importorskip("tokenizers")
pytest.importorskip("ftfy")

FORMATS = ["safetensors"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Models of classes, of words, of states and of classes and words, and two text encoders."""
    root = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patch:
        device = jax.devices()[:1]
        patch.setattr(jax, "local_devices", lambda: device)
        tiny.make_generator().save(root / "classes", FORMATS)
        tiny.make_word_generator().save(root / "words", FORMATS)
        tiny.make_word_generator(3).save(root / "both", FORMATS)
        tiny.make_clip_generator().save(root / "states", FORMATS)
        for seed, name in enumerate(("encoder", "other")):
            tiny.make_clip(seed).save(root / name, FORMATS)
        yield root


def written(content, name="p.jsonl"):
    """Prompts in a file."""

    def make(root, tmp):
        (tmp / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["--prompts", tmp / name]

    return make


def prompts(*texts):
    return lambda root, tmp: ["--prompt", *texts]


def more(*arguments):
    return lambda root, tmp: list(arguments)


def states(**changes):
    """States of two prompts in a file, with these arrays instead; None: without."""

    def make(root, tmp):
        clip = tiny.make_clip()
        found = text_encoder.of_clip(clip, tiny.TEXT_TOKENS).prompt(["a cat", "a dog"])
        arrays = {"embeddings": found.tokens, "lengths": found.length, "null": clip.null_states}
        arrays |= {k: v(arrays[k]) if callable(v) else v for k, v in changes.items()}
        np.savez(tmp / "states.npz", **{k: v for k, v in arrays.items() if v is not None})
        return ["--embeddings", tmp / "states.npz"]

    return make


def spoilt(spoil):
    """A file of states whose bytes are changed."""

    def make(root, tmp):
        arguments = states()(root, tmp)
        spoil(tmp / "states.npz")
        return arguments

    return make


def bomb(path):
    """Says that it has a million million states."""
    header = io.BytesIO()
    about = {"descr": "<f2", "fortran_order": False, "shape": (10**6, 1000, 10**3)}
    np.lib.format.write_array_header_1_0(header, about)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("embeddings.npy", header.getvalue())
        archive.writestr("lengths.npy", header.getvalue())


def pickled(path):
    np.savez(path, embeddings=np.array([{}, {}], object), lengths=np.array([1, 1]))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"NUMPY") + 140] ^= 255
    path.write_bytes(data)


def null_of(values):
    return states(null=np.asarray(values, np.float32))


def encoder(name, spoil=lambda directory: None):
    """A text encoder beside the model, a copy that something happens to."""

    def make(root, tmp):
        if (root / name).exists():
            shutil.copytree(root / name, tmp / name)
            spoil(tmp / name)
        return ["--prompt", "a cat", "--text-encoder", tmp / name]

    return make


def of_model(spoil):
    """A model whose own files are spoilt."""

    def make(root, tmp):
        shutil.copytree(root / "states", tmp / "model")
        spoil(tmp / "model")
        return ["--model", tmp / "model", "--prompt", "a cat"]

    return make


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def zeros(path):
    np.save(path, np.zeros((8, 6), np.float16))


def lie(directory):
    edit(directory / "encoder.json", lambda x: x["text"]["model"].update(activation="gelu"))


def another_weights(root, tmp):
    arguments = encoder("encoder")(root, tmp)
    shutil.copy(root / "other" / "text.safetensors", tmp / "encoder" / "text.safetensors")
    return arguments


NEVER = "this model reads no texts: give labels and no prompts"
HOSTILE = {  # kind: the model, what makes the arguments, words of the message
    "no prompt": ("words", more(), "this model draws what it reads: give --prompt TEXT"),
    "labels of texts": (
        "words",
        more("--labels", "0"),
        "this model has no classes: give prompts and no --labels",
    ),
    "prompts of classes": ("classes", prompts("a cat"), NEVER),
    "states of classes": ("classes", states(), NEVER),
    "an encoder of classes": (
        "classes",
        lambda root, tmp: ["--text-encoder", root / "encoder"],
        "reads no texts, so a text encoder has no use",
    ),
    "an encoder of words": ("words", encoder("encoder"), "reads words and needs no text encoder"),
    "more labels than prompts": (
        "both",
        more("--labels", "0,1,2", "--prompt", "a cat", "a dog"),
        "3 labels and 2 prompts: give as many, or one of either for all",
    ),
    "an unknown word": (
        "words",
        prompts("a cat", "a giraffe"),
        "the word 'giraffe' of the text 'a giraffe' is not in the vocabulary: a two red blue cat",
    ),
    "a word of 10,000 letters": ("words", prompts("cat" * 3334), "the word 'catcat"),
    "an invisible character": ("words", prompts("cat\u202e"), r"the word 'cat\u202e' of the text"),
    "bytes that are no text": ("words", prompts("a \udcff"), "holds half of a surrogate pair"),
    "an unknown word in a negative prompt": (
        "words",
        more("--prompt", "a", "--negative-prompt", "ugly"),
        "the word 'ugly' of the text 'ugly' is not",
    ),
    "a negative prompt without guidance": (
        "words",
        more("--prompt", "a", "--negative-prompt", "a dog", "--guidance-scale", "0"),
        "a negative prompt is what guidance leads away from, and these settings have none",
    ),
    "a negative prompt in one step": (
        "words",
        more("--prompt", "a", "--negative-prompt", "a dog", "--steps", "1"),
        "(guidance_scale=1.0 in 1 steps)",
    ),
    "a negative prompt alone": (
        "both",
        more("--negative-prompt", "a"),
        'needs a prompt beside it, which may be --prompt ""',
    ),
    "prompts twice": (
        "words",
        more("--prompt", "a", "--prompts", "-"),
        "argument --prompts: not allowed with argument --prompt",
    ),
    "no file": ("words", more("--prompts", "gone.txt"), "No such file or directory: gone.txt"),
    "a folder": (
        "words",
        lambda root, tmp: ["--prompts", root],
        "Is a directory: ",
    ),
    "a file of nothing": ("words", written("\n", "p.txt"), "p.txt holds no prompt"),
    "stdin of nothing": ("words", more("--prompts", "-"), "stdin holds no prompt"),
    "UTF-16": ("words", written("a".encode("utf-16"), "p.txt"), "p.txt:1 is not UTF-8"),
    "zero bytes": ("words", written("a\n\0a", "p.txt"), "p.txt:2: this line holds a zero byte"),
    "a broken line": ("words", written('{"text": "a"}\n{"te'), "p.jsonl:2: this line is not JSON"),
    "a line of a list": ("words", written('["a"]'), "p.jsonl:1: this line is no object"),
    "a line without a text": (
        "words",
        written('{"a": "b"}'),
        "p.jsonl:1: there is none of ['text'",
    ),
    "a number": ("words", written('{"text": 3}'), "p.jsonl:1: the prompt '3' is no text"),
    "a line of brackets": ("words", written("[" * 10**5), "p.jsonl:1: this line is not JSON"),
    "half a surrogate in JSON": ("words", written('{"text": "\\ud800"}'), "half of a surrogate"),
    "zero bytes in JSON": ("words", written('{"text": "a\\u0000"}'), r"the word 'a\x00' of"),
    "another kind of file": ("words", written("a,b", "p.csv"), "p.csv is neither .txt"),
    "states of words": ("words", states(), "states.npz: this model reads words and no states"),
    "no states": ("states", states(embeddings=None), "has no embeddings, but ['lengths', 'null']"),
    "no lengths": ("states", states(lengths=None), "states.npz has no lengths, but ["),
    "states of nothing": (
        "states",
        states(embeddings=np.zeros((0, 5, 6)), lengths=np.zeros(0, int)),
        "states.npz holds no prompt: embeddings is [0, 5, 6]",
    ),
    "states that are not finite": (
        "states",
        states(embeddings=lambda x: np.where(np.arange(2)[:, None, None] == 1, np.nan, x)),
        "states.npz: prompt 1 has a value that is not finite in float16",
    ),
    "states too large for halves": (
        "states",
        states(embeddings=lambda x: x.astype(np.float32) * 1e6),
        "has a value that is not finite in float16",
    ),
    "states of another width": (
        "states",
        states(embeddings=np.zeros((2, 5, 7), np.float16)),
        "prompts are floats [n, p, 6], and not float16 (2, 5, 7): they are of another text enc",
    ),
    "states of whole numbers": (
        "states",
        states(embeddings=np.zeros((2, 5, 6), int)),
        "prompts are floats [n, p, 6], and not int64 (2, 5, 6)",
    ),
    "vectors of texts": ("states", states(embeddings=np.zeros((2, 6))), "and not float64 (2, 6)"),
    "texts that are too long": (
        "states",
        states(embeddings=np.zeros((2, 8, 6), np.float16), lengths=np.array([8, 2])),
        "a prompt of 8 tokens: this model reads 5 at most",
    ),
    "length zero": ("states", states(lengths=np.array([4, 0])), "prompt 1 has the length 0"),
    "a length too large": ("states", states(lengths=np.array([6, 4])), "prompt 0 has the length 6"),
    "lengths of other prompts": ("states", states(lengths=np.array([4] * 3)), "and not int64 (3,)"),
    "lengths that are floats": ("states", states(lengths=np.array([4.0, 4.0])), "and not float64"),
    "null of another encoder": (
        "states",
        lambda root, tmp: states(null=tiny.make_clip(1).null_states)(root, tmp),
        "from the states of the empty text that the model was trained with: take the same",
    ),
    "null that is not finite": ("states", null_of(np.full((2, 6), np.nan)), "null differs by nan%"),
    "null of another width": ("states", null_of(np.zeros((2, 7))), "null is float32 [2, 7]"),
    "names of other prompts": (
        "states",
        states(prompts=np.array(["a"])),
        "states.npz: prompts is <U1 [1]",
    ),
    "names that are numbers": ("states", states(prompts=np.arange(2)), "prompts is int64 [2]"),
    "pickled states": ("states", spoilt(pickled), "pickled Python objects, which are never read"),
    "states of a bomb": ("states", spoilt(bomb), "states.npz is damaged (embeddings has 0 bytes"),
    "states cut off": ("states", spoilt(cut), "states.npz is damaged ("),
    "a flipped bit of states": ("states", spoilt(flipped), "states.npz is damaged (Bad CRC-32"),
    "a text of states": (
        "states",
        spoilt(lambda path: path.write_bytes(b"a cat")),
        "states.npz is no .npz file",
    ),
    "a single array": (
        "states",
        spoilt(lambda path: path.write_bytes(records.npy_bytes(np.zeros(3)))),
        "states.npz is a single array (.npy)",
    ),
    "no encoder": (
        "states",
        prompts("a cat"),
        "not at hand: name its directory by --text-encoder (python -m enat_jax.import_torch",
    ),
    "a folder without an encoder": ("states", encoder("gone"), "encoder.json: make one with"),
    "another encoder": ("states", encoder("other"), "other is not the text encoder that the model"),
    "an encoder with weights of another": (
        "states",
        another_weights,
        "encoder are not those that were saved: damaged",
    ),
    "an encoder without weights": (
        "states",
        encoder("encoder", lambda path: (path / "text.safetensors").unlink()),
        "no parameters at ",
    ),
    "an encoder that lies about its activation": (
        "states",
        encoder("encoder", lie),
        "encoder is not the text encoder that the model was trained with, which is {",
    ),
    "an encoder with another empty text": (
        "states",
        encoder("encoder", lambda path: zeros(path / "null_text.npy")),
        "encoder/null_text.npy is not what was saved: damaged",
    ),
    "an encoder with a broken description": (
        "states",
        encoder("encoder", lambda path: edit(path / "encoder.json", dict.clear)),
        "encoder.json is of format None",
    ),
    "a model without its empty text": (
        "states",
        of_model(lambda path: (path / "null_text.npy").unlink()),
        "No such file or directory: ",
    ),
    "a model with another empty text": (
        "states",
        of_model(lambda path: zeros(path / "null_text.npy")),
        "model/null_text.npy is not what was saved: damaged",
    ),
    "a model with half an empty text": (
        "states",
        of_model(lambda path: cut(path / "null_text.npy")),
        "model/null_text.npy is damaged: ",
    ),
    "a model of longer texts than its weights": (
        "words",
        lambda root, tmp: edited_words(root, tmp, lambda x: x["text"].update(context=9)),
        "tokens of a text, words and width of states are (9, 8, None), of the transformer (5, 8,",
    ),
    "a model of fewer words than its weights": (
        "words",
        lambda root, tmp: edited_words(
            root, tmp, lambda x: x["text"]["tokens"]["vocabulary"].pop()
        ),
        "are (5, 7, None), of the transformer (5, 8, None)",
    ),
    "a model without a word about texts": (
        "words",
        lambda root, tmp: edited_words(root, tmp, lambda x: x.pop("text")),
        "a model of text needs to know how texts are read",
    ),
    "a model of unknown tokens": (
        "words",
        lambda root, tmp: edited_words(root, tmp, lambda x: x["text"].update(tokens={"a": 1})),
        "names no tokens of texts",
    ),
}


def edited_words(root, tmp, change):
    shutil.copytree(root / "words", tmp / "model")
    edit(tmp / "model" / "model.json", change)
    return ["--model", tmp / "model", "--prompt", "a cat"]


def refused(capsys, main, arguments, words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.run(main, [str(x) for x in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2, lines
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert words in lines[0] and len(lines[0]) < 1000, lines[0]


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_texts_are_one_line(root, tmp_path, capsys, monkeypatch, kind):
    model, make, words = HOSTILE[kind]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", root / model, "--num", "1", *make(root, tmp_path)]
    refused(capsys, sample.main, [*arguments, "--out", tmp_path / "out"], words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ("words", ["--with-text-encoder"], "this model reads words and has none"),
        ("classes", ["--with-text-encoder"], "this model reads no texts"),
        ("classes/tokenizer", ["--with-text-encoder"], "a tokenizer reads no texts"),
        ("states", ["--with-text-encoder"], "has none at hand: give --text-encoder"),
        ("states", ["--text-encoder", "{root}/other"], "is not the text encoder that the model"),
        ("states", ["--text-encoder", "{root}/states"], "encoder.json: make one with"),
        (
            "states",
            ["--text-encoder", "{root}/encoder", "--format", "compiled"],
            "is new and needs weights",
        ),
    ],
)
def test_what_export_refuses(root, tmp_path, capsys, model, arguments, words):
    given = [x.format(root=root) for x in arguments]
    out = tmp_path / "out"
    refused(capsys, export.main, ["--model", root / model, "--out", out, *given], words)
    assert not out.exists()


def test_long_and_strange_texts_are_read(root):
    """None of these is a mistake: CLIP reads any text, and what has no room is named."""
    encoder = text_encoder.of_clip(tiny.make_clip(), tiny.TEXT_TOKENS)
    texts = ["", "\0", "\u202e", "<|endoftext|>", "a\n\tb", "x" * 10_000, "word " * 2000]
    window = encoder.window(texts)
    assert window.ids.shape == (7, 5) and window.lengths[0] == 2
    assert [bool(x) for x in window.dropped] == [False, False, False, True, False, True, True]
    assert (window.ids[3] != text_tokens.Clip.end).sum() == 4  # a prompt cannot end itself
