"""What reused features cost, against the model run plainly, step after step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from enat_jax.evaluation import reuse_gap
from enat_jax.inference import masked_scores
from enat_jax.runtime import numerics

COUNTS = (3, 3, 4, 6)  # of 16 tokens


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator().with_settings(num_steps=4, counts=COUNTS)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return rng.integers(0, tiny.CODES, (5, tiny.NUM_TOKENS)), np.array([0, 1, 2, 0, 1])


@pytest.fixture(scope="module")
def found(model, images):
    """Of five images in batches of four: the last batch reaches back."""
    done = []
    result = reuse_gap.measure(model, *images, seed=3, batch_size=4, progress=done.append)
    assert done == [1, 2]
    return result


def plain(model, codes, labels, seed, kind):
    """Mean losses [steps, images] of the steps that reuse features."""
    apply = lambda *a, **k: model.model.apply({"params": model.params}, *a, **k)  # noqa: E731
    order = np.asarray(masked_scores.random_order(numerics.key(seed), codes.shape))
    ids = np.take_along_axis(codes, order, axis=1)
    modulation = apply(labels, method="condition")

    def encode(first, last, cache=None, **more):
        window = ids[:, first:last], order[:, first:last]
        return apply(*window, modulation, cache, method="encode", **more)

    ends, cache, losses = np.cumsum([0, *COUNTS[:-1]]), None, []
    for s, last in enumerate(ends):
        before, earlier = (int(ends[max(0, s - n)]) for n in (1, 2))
        if kind == reuse_gap.RECOMPUTED:
            cache = encode(0, last)
        elif kind == reuse_gap.TOGETHER:
            cache = encode(before, last, encode(0, before))
        else:
            once = {"num_projected": earlier} if kind == reuse_gap.ONCE else {}
            cache = encode(before, last, cache, **once)
        logits = apply(order[:, last:], modulation, cache, method="decode")
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, last:, None], axis=2)
        losses.append(-log_probs.mean(axis=(1, 2)))
    return np.array(losses)[2:]


@pytest.mark.parametrize("kind", reuse_gap.KINDS)
def test_losses_are_those_of_the_model_run_plainly(model, images, found, kind):
    codes, labels = images
    first = plain(model, codes[:4], labels[:4], 3, kind)
    second = plain(model, codes[1:], labels[1:], 3 + 1, kind)[:, 3:]
    expected = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(found[kind]["loss"]["mean"], expected.mean(axis=1), rtol=1e-5)
    error = expected.std(axis=1, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(found[kind]["loss"]["standard_error"], error, rtol=1e-4)
    assert found["steps"] == [2, 3] and found["visible"] == [6 / 16, 10 / 16]
    assert found[kind]["all"]["loss"]["mean"] == pytest.approx(expected.mean(), rel=1e-5)


def test_kinds_differ_where_f_and_the_order_of_encoding_matter(found):
    def increase(kind, step):
        return abs(found[kind]["increase"]["mean"][step])

    assert increase(reuse_gap.RECOMPUTED, 1) == 0
    assert increase(reuse_gap.TOGETHER, 0) > 1e-6
    # What was revealed in the second step is projected for the first time in the third.
    assert (
        found[reuse_gap.ONCE]["loss"]["mean"][0] == found[reuse_gap.EVERY_STEP]["loss"]["mean"][0]
    )
    assert (
        found[reuse_gap.ONCE]["loss"]["mean"][1] != found[reuse_gap.EVERY_STEP]["loss"]["mean"][1]
    )


def test_drawn_images_are_measured_with_what_a_sampler_can_have(model):
    class Share:
        """The share of images whose first pixel is dark, and nothing else."""

        names = ("dark",)
        identity = {}

        def __call__(self, model, seed, final=False):
            assert final
            drawn.append((model.model.reuse, model.model.project_once, seed))
            return {"dark": float(seed * (2 if model.model.reuse else 1))}

    drawn = []
    found = reuse_gap.distances(model, Share(), [1, 3])
    assert drawn == [
        (r, o, s) for r, o in ((False, False), (True, True), (True, False)) for s in (1, 3)
    ]
    assert found[reuse_gap.RECOMPUTED]["values"]["mean"] == [2.0]
    assert found[reuse_gap.ONCE]["increase"]["mean"] == [2.0]


def test_models_without_reuse_are_refused(model, images):
    other = dataclasses.replace(model, model=model.model.clone(reuse=False))
    with pytest.raises(ValueError, match="an ENAT of classes that reuses features"):
        reuse_gap.measure(other, *images)
    with pytest.raises(ValueError, match="2 steps reuse no features: take three"):
        reuse_gap.measure(model.with_settings(num_steps=2, counts=None), *images)
    with pytest.raises(ValueError, match="1 images: a standard error needs two"):
        reuse_gap.measure(model, images[0][:1], images[1][:1])
