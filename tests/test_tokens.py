"""Token sets: whole or not there, and made once."""

import json

import jax
import numpy as np
import pytest

from enat_jax import cli, tokenize_images, tokenizer
from enat_jax.data import images, tokens
from enat_jax.models import vqgan


def token_set(n=6, codebook_size=300):
    rng = np.random.default_rng(0)
    return tokens.TokenSet(
        tokens=rng.integers(0, codebook_size, (n, 4)),
        labels=np.arange(n, dtype=np.int32) % 2,
        grid=(2, 2),
        codebook_size=codebook_size,
        class_names=("a", "b"),
        tokenizer="1234",
        preprocessing={"source": "noise"},
    )


def test_saved_is_opened_again(tmp_path):
    made = token_set()
    made.save(tmp_path / "set")
    found = tokens.TokenSet.open(tmp_path / "set")
    assert len(found) == 6
    np.testing.assert_array_equal(found.tokens, made.tokens)
    np.testing.assert_array_equal(found.labels, made.labels)
    for field in ("grid", "codebook_size", "class_names", "tokenizer", "preprocessing"):
        assert getattr(found, field) == getattr(made, field)
    batch = found.gather(np.array([4, 0]))
    assert batch["tokens"].dtype == batch["labels"].dtype == np.int32
    np.testing.assert_array_equal(batch["tokens"], made.tokens[[4, 0]])


@pytest.mark.parametrize(("codebook_size", "dtype"), [(256, "uint8"), (257, "uint16")])
def test_tokens_take_the_smallest_type(tmp_path, codebook_size, dtype):
    token_set(codebook_size=codebook_size).save(tmp_path / "set")
    assert tokens.TokenSet.open(tmp_path / "set").tokens.dtype == dtype


def test_a_set_is_whole_or_not_there(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        token_set().save(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="no token set"):
        tokens.TokenSet.open(tmp_path / "set")
    monkeypatch.undo()
    token_set().save(tmp_path / "set")  # what was left behind is not in the way
    with pytest.raises(FileExistsError):
        token_set().save(tmp_path / "set")


def test_what_is_no_token_set_is_refused(tmp_path):
    (tmp_path / "metadata.json").write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match="not a token set of ours"):
        tokens.TokenSet.open(tmp_path)
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        tokens.TokenSet.open(tmp_path)


def test_a_damaged_set_is_refused(tmp_path):
    token_set().save(tmp_path / "set")
    file = tmp_path / "set" / "tokens.npy"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged"):
        tokens.TokenSet.open(tmp_path / "set")


def test_a_fingerprint_tells_any_change():
    params = {"a": np.arange(4.0), "b": {"c": np.ones((2, 2), np.float32)}}
    same = {"b": {"c": np.ones((2, 2), np.float32)}, "a": np.arange(4.0)}
    assert tokens.fingerprint(params) == tokens.fingerprint(same)
    others = [
        {**params, "a": np.array([0.0, 1.0, 2.0, 3.5])},
        {**params, "a": np.arange(4.0).reshape(2, 2)},
        {**params, "a": np.arange(4.0, dtype=np.float32)},
        {"d": params["a"], "b": params["b"]},
    ]
    assert len({tokens.fingerprint(p) for p in [params, *others]}) == 5


@pytest.fixture(scope="module")
def model():
    module = vqgan.VQGAN(
        channels=4,
        channel_multipliers=(1, 1, 1),
        num_res_blocks=1,
        embed_dim=4,
        codebook_size=16,
        num_groups=2,
        image_channels=1,
    )
    params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))["params"]
    # Codes of the size of the encoder's outputs, or all images would get the same few.
    params["codebook"] = jax.random.normal(jax.random.key(1), (16, 4))
    data = {"source": "digits", "size": 8, "rotation": 20.0}
    return tokenizer.Tokenizer(module, params, (8, 8), {"config": {"data": data}})


def test_copies_are_augmented_but_the_first(model):
    source = images.Digits("test", size=8, rotation=20.0)
    made = tokenize_images.tokenize(model, source, 2, {})
    n = len(source)
    assert made.tokens.shape == (2 * n, 4) and made.grid == (2, 2)
    np.testing.assert_array_equal(made.labels, np.tile(source.labels, 2))
    plain = model.encode(source.gather(np.arange(n))["images"])
    np.testing.assert_array_equal(made.tokens[:n], plain)
    assert (made.tokens[n:] != plain).any()
    again = tokenize_images.tokenize(model, source, 2, {})
    np.testing.assert_array_equal(made.tokens, again.tokens)


def test_the_program_makes_a_set_once(model, tmp_path, capsys):
    model.save(tmp_path / "model")
    out = tmp_path / "tokens"
    arguments = ["--model", str(tmp_path / "model"), "--split", "test", "--out", str(out)]
    tokenize_images.main(arguments)
    found = tokens.TokenSet.open(out)
    assert found.tokenizer == model.fingerprint
    assert found.preprocessing["rotation"] == 20.0  # as the tokenizer was trained
    assert found.preprocessing["size"] == 8
    before = (out / "metadata.json").stat().st_mtime_ns
    tokenize_images.main(arguments)
    assert "already" in capsys.readouterr().out
    assert (out / "metadata.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="other settings"):
        tokenize_images.main([*arguments, "--set", "rotation=5"])


def test_the_program_ends_in_one_line(model, tmp_path, capsys):
    model.save(tmp_path / "model")
    (tmp_path / "full").mkdir()
    wrong = [
        (["--model", str(tmp_path / "nothing"), "--out", "x"], "nothing"),
        (["--model", str(tmp_path / "model"), "--out", str(tmp_path / "full")], "no token set"),
        (["--model", str(tmp_path / "model"), "--source", "cats", "--out", "x"], "cats"),
        (["--model", str(tmp_path / "model"), "--split", "all", "--out", "x"], "all"),
    ]
    for arguments, message in wrong:
        with pytest.raises(SystemExit) as exit_:
            cli.run(tokenize_images.main, arguments)
        error = capsys.readouterr().err
        assert exit_.value.code == 2
        assert message in error and error.count("\n") == 1
