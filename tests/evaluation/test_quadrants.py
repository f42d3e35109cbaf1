"""Losses of a NAT without one quadrant of its attention."""

import dataclasses

import numpy as np
import pytest
import tiny

from enat_jax.evaluation import quadrants
from enat_jax.inference import generator, masked_scores
from enat_jax.models import nat


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator()


@pytest.fixture(scope="module")
def of_nat():
    """A model of all four quadrants, and three images of it."""
    network = nat.NAT(
        num_tokens=16, codebook_size=tiny.CODES, num_classes=3, width=8, num_heads=1, num_layers=1
    )
    params = tiny.random_params(network.init, np.zeros((1, 16), int), np.zeros(1, int), seed=0)
    model = generator.Generator(network, params, tiny.make_tokenizer(), tiny.CLASSES, tiny.SETTINGS)
    codes = np.random.default_rng(0).integers(0, tiny.CODES, (3, 16))
    return model, codes, np.array([0, 1, 2])


def test_losses_without_a_quadrant_are_compared_image_by_image(of_nat, monkeypatch):
    """In batches of two, of which the last reaches back."""
    model, codes, labels = of_nat
    monkeypatch.setattr(masked_scores, "VISIBLE_SHARES", (1 / 4,))
    done = []
    found = quadrants.losses(model, codes, labels, batch_size=2, progress=done.append)
    assert done == list(range(1, 11))

    def losses(disabled):
        cut = dataclasses.replace(model, model=model.model.clone(disabled_attention=disabled))
        scores = [
            cut.masked_scores(codes[i : i + 2], labels[i : i + 2], 4, seed=i)[0] for i in (0, 1)
        ]
        return np.concatenate([scores[0], scores[1][1:]]).mean(axis=1)

    whole, cut = losses("none"), losses("masked_from_visible")
    assert found["none"]["loss"]["mean"] == pytest.approx([whole.mean()], abs=1e-5)
    assert found["none"]["increase"]["mean"] == [0]
    increase = found["masked_from_visible"]["increase"]
    assert increase["mean"] == pytest.approx([(cut - whole).mean()], abs=1e-5)
    assert increase["standard_error"] == pytest.approx(
        [(cut - whole).std(ddof=1) / 3**0.5], abs=1e-5
    )
    table = quadrants.markdown({"num_images": 3, "quadrants": found}).splitlines()
    assert table[0] == "| without | 0.25 visible |" and table[2].startswith("| nothing | ")
    assert table[5].startswith(f"| masked_from_visible | {(cut - whole).mean():+.4f} ± ")


def test_quadrants_are_a_nats(model, of_nat):
    with pytest.raises(ValueError, match="those of a NAT that has all four"):
        quadrants.losses(model, np.zeros((2, 16), int), np.zeros(2, int))
    with pytest.raises(ValueError, match="1 images: a standard error needs two"):
        quadrants.losses(of_nat[0], np.zeros((1, 16), int), np.zeros(1, int))
