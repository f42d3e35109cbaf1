"""Speed is measured in exact work, and every number can be recomputed from the others."""

import dataclasses
import functools
import json
import statistics

import expected_work
import jax
import ml_collections
import numpy as np
import pytest
import tiny
import tiny_config

from enat_jax.inference import text_encoder
from enat_jax.models import nat
from enat_jax.profiling import setup, timing
from enat_jax.schedules import costs

SMALL = (32, 48, 32)
TWO_STEPS = dataclasses.replace(tiny.SETTINGS, num_steps=2)
ONE_STEP = dataclasses.replace(tiny.SETTINGS, num_steps=1)


def test_rates_are_of_exact_work():
    found = tiny_config.measurement()
    assert found.images_per_second == (2.0, 1.0, 4.0)  # median, least, largest
    assert found.exact_rate == 50.0 and found.matmul_rate == 200.0
    assert found.fraction == 0.25
    assert found.padding == 0.5
    assert dataclasses.replace(found, padded=1e9).fraction == 0.25


def test_expectations_weigh_steps_by_their_probability():
    slow = tiny_config.measurement(seconds=(4.0,), exact=100.0)
    fast = tiny_config.measurement(seconds=(1.0,), exact=50.0)
    found = timing.TrainingMeasurement(7, 0.2, (fast, slow), (0.6, 0.2))
    assert found.share == pytest.approx(0.8)
    assert found.images_per_second == pytest.approx(4 / (0.75 * 1 + 0.25 * 4))
    assert found.fraction == pytest.approx((0.75 * 50 + 0.25 * 100) / 1.75 / 200)


def test_the_sampler_is_timed_for_every_number_of_segments():
    found = timing.time_sampler(
        tiny.TRANSFORMER, TWO_STEPS, 2, [1, 2, 9], repeats=2, matmul_shape=SMALL
    )
    assert [x.label["segments"] for x in found] == [1, 2]  # 9 is 2, the number of steps
    one, exact = found
    dims = costs.dims_of(tiny.TRANSFORMER)
    assert one.exact == exact.exact == costs.exact_sampling_cost(dims, 2, batch_size=2)
    assert one.padding > 0 and exact.padding == 0
    for x in found:
        assert x.images == 2 and len(x.seconds) == 2 and len(x.matmul_rates) == 3
        assert min(x.seconds) > 0 and x.compile_seconds > 0 and x.peak_bytes > 2**20
        assert x.fraction == pytest.approx(
            x.exact / statistics.median(x.seconds) / statistics.median(x.matmul_rates)
        )
        json.dumps(x.json())


def test_the_image_decoder_can_be_part_of_it():
    (found,) = timing.time_sampler(
        tiny.TRANSFORMER, ONE_STEP, 2, [1], codec=tiny.CODEC, repeats=1, matmul_shape=SMALL
    )
    dims = costs.dims_of(tiny.TRANSFORMER)
    decoder = 2 * costs.image_decoder_cost(tiny.CODEC, 4, 4)
    assert found.exact == costs.exact_sampling_cost(dims, 1, batch_size=2) + decoder
    with pytest.raises(ValueError, match="codebook_size=9 is not the transformer's, 8"):
        timing.time_sampler(
            tiny.TRANSFORMER, ONE_STEP, 1, [1], codec=tiny.CODEC.clone(codebook_size=9)
        )


def test_the_baseline_can_be_timed_too():
    model = nat.NAT(
        num_tokens=16, codebook_size=8, num_classes=3, width=16, num_heads=2, num_layers=1
    )
    settings = dataclasses.replace(TWO_STEPS, guidance_scale=0.0)
    (found,) = timing.time_sampler(model, settings, 1, [2], repeats=1, matmul_shape=SMALL)
    assert found.padding == 0
    assert found.exact == costs.exact_sampling_cost(costs.dims_of(model), 2, guided=False)


@pytest.mark.parametrize("reuse_probability", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mask", [{"mask_ratio": "beta"}, {"mask_ratio": "cosine"}])
def test_shares_of_the_shapes_add_up(mask, reuse_probability):
    values = ml_collections.ConfigDict(tiny_config.config())
    values.mask = mask | {"reuse_probability": reuse_probability}
    task = setup.make_task(values, 2, max_shapes=5)
    probability, exact = timing.shape_shares(task)
    assert probability.sum() == pytest.approx(1)
    cost = functools.partial(costs.training_cost, costs.dims_of(task.model))
    padded = np.array([float(cost(*bucket.windows)) for bucket in task.buckets])
    expected = expected_work.of(16, task.splits, task.buckets, cost)
    assert (probability @ padded, probability @ exact) == pytest.approx(expected)
    assert np.all(exact <= padded * (1 + 1e-12))


def test_the_training_step_is_timed():
    task = setup.make_task(ml_collections.ConfigDict(tiny_config.config()), 2)
    found = timing.time_training(task, max_timed=1, repeats=1, matmul_shape=SMALL)
    probability, exact = timing.shape_shares(task)
    assert found.shapes == 3 and found.padding > 0
    assert found.probabilities == (probability.max(),) and found.share == probability.max()
    (timed,) = found.timed
    assert timed.images == 2 and timed.exact == 2 * exact[probability.argmax()]
    assert found.images_per_second == pytest.approx(timed.images_per_second[0])
    assert found.fraction == pytest.approx(timed.fraction)


# --- models of texts ------------------------------------------------------------------------


def text_config(**model):
    values = tiny_config.config()
    values["model"] |= {"num_classes": 0, "text_tokens": 4} | model
    values["data"] = {"tokens": "a", "tokenizer": "b", "captions": "c"}
    return ml_collections.ConfigDict(values)


def test_texts_are_part_of_what_is_timed():
    model = setup.make_model(text_config(text_vocabulary=5))
    settings = dataclasses.replace(ONE_STEP, guidance_scale=0.0)
    (found,) = timing.time_sampler(model, settings, 2, [1], repeats=1, matmul_shape=SMALL)
    dims = costs.dims_of(model)
    assert found.exact == costs.exact_sampling_cost(dims, 1, guided=False, batch_size=2)
    assert found.exact > costs.exact_sampling_cost(
        dataclasses.replace(dims, text_tokens=0), 1, guided=False, batch_size=2
    )


@pytest.mark.slow
def test_a_step_with_an_encoder_is_timed():
    """The encoder's weights are random, and made for the measurement."""
    abstract = setup.make_task(text_config(text_vocabulary=5), 2)
    model = abstract.model.clone(text_vocabulary=None, text_width=6)
    clip = tiny.make_clip()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), clip.params)
    clip = dataclasses.replace(clip, params=shapes, saved_fingerprint="none")
    text = text_encoder.of_clip(dataclasses.replace(clip, saved_null=np.zeros((8, 6), "f2")), 4)
    task = dataclasses.replace(abstract, model=model, text=text)
    found = timing.time_training(task, max_timed=1, repeats=1, matmul_shape=SMALL)
    assert found.timed[0].images == 2 and found.timed[0].call_seconds > 0


def test_the_encoder_of_a_text_model_is_known_by_its_width():
    """Of shapes alone; 77 tokens at most."""
    for width, millions in ((512, 63.2), (768, 123.1), (1024, 353.0), (1280, 693.0)):
        text = setup.make_text(setup.make_model(text_config(text_width=width, dtype="bfloat16")))
        sizes = {x.dtype.name: 0 for x in jax.tree.leaves(text.frozen)}
        assert sizes.keys() == {"bfloat16"}
        count = sum(x.size for x in jax.tree.leaves(text.frozen)) / 1e6
        assert count == pytest.approx(millions, abs=0.5) and text.width == width
    with pytest.raises(ValueError, match="text_width=7 is that of no published CLIP: .512, 768"):
        setup.make_text(setup.make_model(text_config(text_width=7)))


def test_what_captions_would_say_must_be_set():
    message = "text_vocabulary or text_width, config.model.text_tokens must be set"
    with pytest.raises(ValueError, match=message):
        setup.make_model(text_config(text_tokens=0))
