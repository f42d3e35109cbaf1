"""Evaluation of samples during training: the program's numbers, by the EMA model."""

import dataclasses
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
from small_runs import small_config

from enat_jax.evaluation import accumulate, features
from enat_jax.metrics import fid
from enat_jax.runtime import sharding
from enat_jax.training import config as train_config
from enat_jax.training import enat_evaluation, enat_task

MESH = sharding.make_mesh(sharding.Sharding(), jax.devices()[:1])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """30 pictures of 8x8 grey pixels, and the folder that they are in."""
    folder = tmp_path_factory.mktemp("pictures")
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8)
    for i, image in enumerate(images):
        PIL.Image.fromarray(image).save(folder / f"{i:02d}.png")
    return images[..., None], folder


def config(data, folder, **changes):
    made = small_config(data, **{"data.held_out_tokens": ""})
    section = {"reference": str(folder), "features": "random:0", "num": 12}
    made.evaluation = section | changes
    return made


@pytest.fixture(scope="module")
def task(data, pictures):
    return enat_task.make(config(data, pictures[1]))


def test_samples_of_the_ema_model_are_measured_against_the_reference(task, pictures):
    state = jax.jit(task.init)(jax.random.key(1))
    # Parameters that are trained have no say.
    state = state.replace(params=jax.tree.map(np.zeros_like, state.params))
    found = dict(task.evaluate(state, MESH))
    names = ("samples/frechet_distance", "samples/precision", "samples/recall")
    assert tuple(found) == names == task.evaluated
    network = features.open_features("random:0")
    labels = np.arange(12, dtype=np.int32)
    images = enat_evaluation.draw(task, state, MESH, labels % 3, labels)
    pools = [network(x)["pool"].astype(np.float64) for x in (images, pictures[0])]
    gaussians = [y for x in pools for y in (x.mean(0), np.cov(x.T))]
    assert found[names[0]] == pytest.approx(fid.frechet_distance(*gaussians), rel=1e-8)
    assert dict(task.evaluate(state, MESH)) == found


def test_few_samples_are_drawn_to_see_that_it_works(task, monkeypatch):
    monkeypatch.setattr(accumulate, "CHUNK", 8)
    drawn = []

    def load(start, stop):
        drawn.append((start, stop))
        return accumulate.Batch(
            np.zeros((stop - start, 8, 8, 1), np.uint8), np.zeros(stop - start, int)
        )

    found = dict(task.quality.measure(load, 3, few=True))
    assert tuple(found) == task.quality.names and drawn == [(0, 8)]


@pytest.mark.parametrize("kept", [4, 5, 6])
def test_few_pictures_are_measured_without_precision(data, pictures, kept):
    few = enat_task.make(config(data, pictures[1], keep=10))
    few = dataclasses.replace(few.quality, keep=kept)
    assert (few.why_no_overlap is None) == (kept > 5)

    def load(start, stop):
        return accumulate.Batch(pictures[0][start:stop], np.zeros(stop - start, int))

    assert tuple(dict(few.measure(load, 3))) == few.names
    assert ("samples/precision" in few.names) == (kept > 5)


def test_a_reference_of_few_pictures_is_told_of(data, pictures, tmp_path, capsys):
    for name in ("00.png", "01.png", "02.png"):
        shutil.copy(pictures[1] / name, tmp_path)
    few = config(data, tmp_path)
    assert enat_task.make(few).evaluated == ("samples/frechet_distance",)
    said = "precision and recall are not measured: they need the features of more"
    assert said in capsys.readouterr().out
    few.train.update({"best_metric": "samples/precision"})
    with pytest.raises(ValueError, match="best_metric='samples/precision' is not evaluated here"):
        train_config.build(few)


def test_it_may_choose_the_best_checkpoint_and_may_be_switched_on_and_off(data, pictures):
    with_it = config(data, pictures[1])
    with_it.train.update({"best_metric": "samples/frechet_distance", "eval_every": 2})
    loop, _, _, task = train_config.build(with_it)
    assert loop.best_metric in task.evaluated
    without = small_config(data)
    assert enat_task.make(without).quality is None
    assert "evaluation" not in train_config.identity(with_it, task)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num": 5}, "evaluation.num=5 must be a whole number from 10"),
        ({"reference": "no/such.npz"}, "there is no no/such.npz"),
        ({"reference": "no/such"}, "does not exist"),
        ({"features": "inception"}, "--inception FILE"),
        ({"reference": "digits"}, r"has images of \(32, 32, 1\), the tokenizer makes \(8, 8, 1\)"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(data, pictures, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        enat_task.make(config(data, pictures[1], **change))
