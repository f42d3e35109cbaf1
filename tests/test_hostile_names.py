"""Directories of any name: what is written there comes back, or is refused beforehand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from enat_jax import export, train
from enat_jax.checkpoints import checkpoint, model_files
from enat_jax.data import tokens
from enat_jax.evaluation.statistics import DESCRIPTION, Statistics
from enat_jax.inference import compiled_sampler, image_directory, model_directory
from enat_jax.inference.generator import Generator
from enat_jax.metrics.moments import Moments
from enat_jax.runtime import cli

WILD = "a[1] *?{b,c}#%41$x~'\"é\n[!d]"
LONG = "x" * 255
UNUSABLE = ["a\\b", "a\udcff", "[1]\\"]  # by Orbax
ODD = [WILD, LONG, *UNUSABLE]


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator()


@pytest.mark.parametrize("name", [WILD, LONG, "[1]"])
def test_a_run_finds_its_checkpoints(name, tmp_path):
    state = {"kernel": jnp.arange(6.0).reshape(2, 3)}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )
    (tmp_path / "a1").mkdir()  # what the name would find, were it a pattern
    for _ in range(2):
        with checkpoint.Checkpointer(tmp_path / name / "checkpoints", save_every=1) as saved:
            saved.save(1, state, {})
        with checkpoint.Checkpointer(tmp_path / name / "checkpoints", save_every=1) as saved:
            found, step = saved.restore(abstract, {})
        assert step == 1 and (found["kernel"] == state["kernel"]).all()


@pytest.mark.parametrize("name", [WILD, LONG])
@pytest.mark.parametrize("formats", [["orbax"], ["safetensors", "compiled", "reference"]])
def test_a_model_comes_back(name, formats, model, tmp_path, monkeypatch):
    program = jax.export.export(jax.jit(lambda x: x))(jax.ShapeDtypeStruct((), "float32"))
    monkeypatch.setattr(compiled_sampler, "make", lambda model: (bytes(program.serialize()), {}))
    out = tmp_path / name
    model_directory.write(model, out, formats)
    found = model_directory.load(out)
    assert isinstance(found, Generator)
    for one, other in ((found, model), (found.tokenizer, model.tokenizer)):
        assert model_files.fingerprint(one.params) == other.fingerprint
    assert (out / "sampler.jaxexport").is_file() == ("compiled" in formats)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_orbax_cannot_use_is_refused_before_anything_is_written(name, model, tmp_path, capsys):
    source, out = tmp_path / "model", tmp_path / name
    model.save(source)
    with pytest.raises(SystemExit) as end:
        cli.run(export.main, ["--model", str(source), "--out", str(out)])
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert "Orbax cannot use a directory" in line and "choose another name" in line
    with pytest.raises(ValueError, match="Orbax cannot use"):
        train.train(None, out)
    with pytest.raises(ValueError, match="Orbax cannot use"):
        checkpoint.Checkpointer(out, 1)
    assert not out.exists()
    # Without Orbax the name is one like any other, also of a directory that was moved there.
    model.save(out, ["safetensors"])
    assert Generator.load(out).fingerprint == model.fingerprint
    source.rename(tmp_path / f"moved {name}")
    assert Generator.load(tmp_path / f"moved {name}").fingerprint == model.fingerprint
    for file in (tmp_path / f"moved {name}").rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="Orbax cannot use"):
        Generator.load(tmp_path / f"moved {name}")


@pytest.mark.parametrize("name", ODD)
def test_tokens_samples_and_statistics_come_back(name, model, tmp_path, monkeypatch):
    made = tiny.token_set(
        np.arange(16 * 4).reshape(4, 16) % tiny.CODES,
        np.arange(4) % 3,
        codebook_size=tiny.CODES,
        class_names=tiny.CLASSES,
        tokenizer="1234",
    )
    tiny.write_tokens(tmp_path / name, made)
    found = tokens.TokenSet.open(tmp_path / name).in_memory()
    assert found.rows.tobytes() == made.rows.tobytes()
    rows = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    about = dict.fromkeys(DESCRIPTION)
    Statistics({"pool": Moments.empty(3).add(rows)}, rows, about).save(
        tmp_path / name / "statistics.npz"
    )
    again = Statistics.load(tmp_path / name / "statistics.npz")
    np.testing.assert_array_equal(again.pool, rows)
    drawn = np.random.default_rng(0).integers(0, 256, (2, *tiny.IMAGE_SIZE, 1), np.uint8)
    monkeypatch.setattr(image_directory, "draw_batch", lambda images, batch, size: drawn)
    for _ in range(2):
        first = image_directory.draw(model, [1], 2, tmp_path / name / "samples", batch_size=2)
        np.testing.assert_array_equal(first, drawn)
        monkeypatch.setattr(image_directory, "draw_batch", None)  # all are there
