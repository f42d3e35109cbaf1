"""Training a feature network: it learns, is evaluated, and is saved for evaluation of others."""

import json

import jax
import ml_collections
import numpy as np
import pytest

from enat_jax import train
from enat_jax.data import images
from enat_jax.evaluation import features
from enat_jax.training import classifier_task
from enat_jax.training import config as train_config


def get_config(**changes):
    config = ml_collections.ConfigDict(
        {
            "task": "classifier",
            "seed": 0,
            "model": {"widths": (8, 16)},
            "data": {"source": "digits", "size": 8, "rotation": 5.0},
            "loss": {"label_smoothing": 0.1},
            "optimizer": {"learning_rate": 2e-2, "warmup_steps": 0, "b1": 0.9},
            "train": {
                "batch_size": 32, "num_steps": 60, "log_every": 30, "eval_every": 60,
                "save_every": 60, "matrix_rate": False,
            },
        }
    )  # fmt: skip
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run, and its last state."""
    workdir = tmp_path_factory.mktemp("run")
    state = train.train(get_config(), workdir, devices=jax.devices()[:1])
    return workdir, jax.device_get(state)


def test_it_learns_and_its_features_are_saved(trained):
    workdir, state = trained
    found = features.open_features(str(workdir / "model"), batch_size=8)
    assert found.description["label"].endswith("in features of a network trained on digits")
    assert found.origin["provenance"]["config"]["model"]["widths"] == [8, 16]
    held_out = images.open_source("digits", "test", size=8)
    rows = held_out.gather(np.arange(len(held_out)))
    pool = found(rows["images"])["pool"]
    assert pool.shape == (359, 16)
    head = state.params["head"]
    named = (pool @ head["kernel"] + head["bias"]).argmax(-1)
    assert (named == rows["labels"]).mean() > 0.5  # of ten classes


def test_evaluation_is_over_all_held_out_images(trained):
    """As the run logged it, and as NumPy finds it with the saved features."""
    workdir, state = trained
    logged = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        logged |= json.loads(line)
    rows = classifier_task.make(get_config()).held_out.gather(np.arange(359))
    pool = features.open_features(str(workdir / "model"), batch_size=8)(rows["images"])["pool"]
    logits = pool @ state.params["head"]["kernel"] + state.params["head"]["bias"]
    right = (logits.argmax(-1) == rows["labels"]).mean()
    assert logged["held_out/accuracy"] == pytest.approx(right, abs=1e-6)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = log_probs[np.arange(359), rows["labels"]]
    smoothed = -0.9 * picked - 0.1 * log_probs.mean(-1)
    assert logged["held_out/loss"] == pytest.approx(smoothed.mean(), rel=1e-4)


def test_a_task_has_what_best_metric_may_name():
    config = get_config(**{"train.best_metric": "held_out/accuracy"})
    *_, task = train_config.build(config)
    assert task.evaluated == ("held_out/accuracy", "held_out/loss")
    with pytest.raises(ValueError, match="held_out/psnr"):
        train_config.build(get_config(**{"train.best_metric": "held_out/psnr"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.label_smoothing": 1.0}, r"label_smoothing=1.0 must lie in \[0, 1\)"),
        ({"data.size": 4}, "size=4"),
        ({"data.source": ""}, "data.source is not set"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        classifier_task.make(get_config(**changes))
