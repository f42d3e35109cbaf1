"""The multiply-add count: the paper's table, and the very products that JAX would compute."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.inference import sampler_schedule, sampling
from enat_jax.models import enat, nat, vqgan
from enat_jax.models.blocks import Prompt
from enat_jax.schedules import costs, reveal

NAT_S = costs.Dims(288, mixed_layers=8, reuse=False)
DISENTANGLED_8_8 = costs.Dims(288, 8, 8, reuse=False)
DISENTANGLED_12_4 = costs.Dims(318, 12, 4, reuse=False)
DISENTANGLED_15_1 = costs.Dims(366, 15, 1, reuse=False)
ENAT_S = costs.Dims(366, 15, 1)
ENAT_B = costs.Dims(768, 15, 1)
ENAT_L = costs.Dims(1024, 22, 2)

SMALL = dict(num_tokens=16, codebook_size=24, num_classes=5, width=12, num_heads=2)
SMALL_ENAT = enat.ENAT(**SMALL, encoder_layers=3, decoder_layers=2)
SMALL_DISENTANGLED = enat.ENAT(**SMALL, encoder_layers=2, decoder_layers=1, reuse=False)
SMALL_NAT = nat.NAT(**SMALL, num_layers=3)


def small_text(**changes):
    settings = dict(num_classes=0, text_width=7, text_tokens=4, encoder_layers=3, decoder_layers=2)
    return enat.ENAT(**SMALL | settings | changes)


def prompts(model, b):
    """As many texts as images and one for the unconditional branch, if the model takes any."""
    if not getattr(model, "takes_text", False):
        return ()
    return tuple(Prompt(jnp.zeros((n, 4, 7))) for n in (b, 1))


def multiply_adds(function, *args):
    """Multiply-adds of all matrix products and convolutions that ``function(*args)`` traces to."""
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += out * math.prod(shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = equation.params["dimension_numbers"].rhs_spec[0]
            total += out * math.prod(kernel) // kernel[outputs]
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * _of_jaxpr(inner)
    return total


def abstract(module, *args):
    return jax.eval_shape(module.init, jax.random.key(0), *args)["params"]


def small_params(model):
    return abstract(model, jnp.zeros((1, 16), int), jnp.zeros(1, int))


@pytest.mark.parametrize(
    ("dims", "recount"),
    [
        (NAT_S, 39.06),
        (DISENTANGLED_8_8, 40.17),
        (DISENTANGLED_12_4, 38.18),
        (DISENTANGLED_15_1, 39.85),
        (ENAT_S, 22.59),
    ],
)
def test_the_ablations_cost_what_the_paper_says(dims, recount):
    assert costs.paper_cost(dims, 8) / 1e9 == pytest.approx(recount, rel=1e-3)


@pytest.mark.parametrize(
    ("dims", "num_steps", "recount"),
    [(ENAT_B, 4, 0.148), (ENAT_B, 8, 0.187), (ENAT_L, 4, 0.242), (ENAT_L, 8, 0.348)],
)
def test_the_systems_cost_what_the_paper_says(dims, num_steps, recount):
    total = costs.paper_cost(dims, num_steps)
    total += costs.image_decoder_cost(vqgan.VQGAN(), 16, 16)
    assert total / 1e12 == pytest.approx(recount, rel=1e-2)


@pytest.mark.parametrize(
    ("encoding", "tokens", "num_steps", "billions"),
    [
        ("every_step", 77, 8, 230.0),
        ("every_step", 77, 4, 122.7),
        ("every_step", 16, 8, 120.5),
        ("once", 77, 8, 130.5),
        ("never", 77, 8, 113.9),
    ],
)
def test_only_a_text_read_at_every_step_costs_what_the_paper_says(
    encoding, tokens, num_steps, billions
):
    """0.3 T of Table 5, with the image decoder and 77 states of CLIP ViT-L/14."""
    text = dict(text_tokens=tokens, text_width=768, text_encoding=encoding, labels=False)
    dims = costs.Dims(768, 15, 1, **text)
    total = costs.paper_cost(dims, num_steps)
    assert total / 1e9 == pytest.approx(billions, abs=0.1)
    with_decoder = total + costs.image_decoder_cost(vqgan.VQGAN(), 16, 16)
    agrees = round(with_decoder / 1e12, 1) == 0.3
    assert agrees == (encoding == "every_step" and num_steps == 8 and tokens == 77)


def test_the_image_decoder_costs_what_the_paper_says():
    # 93.27: the paper's 93.6 has the shortcuts at the block's input, where channels are more.
    total = costs.image_decoder_cost(vqgan.VQGAN(), 16, 16)
    assert total / 1e9 == pytest.approx(93.6, rel=1e-2)


@pytest.mark.parametrize(
    ("model", "num_steps"),
    [
        (SMALL_ENAT, 1),
        (SMALL_ENAT, 5),
        (SMALL_ENAT, 17),  # more steps than tokens: some reveal nothing
        (SMALL_DISENTANGLED, 5),
        (SMALL_NAT, 5),
        (small_text(), 5),
        (small_text(text_encoding="every_step"), 5),
    ],
)
def test_the_exact_count_is_what_the_sampler_computes(model, num_steps):
    settings = sampling.Settings(num_steps=num_steps)
    sampler = sampling.make(model, settings)
    labels = jnp.zeros(3, int)
    rows = labels, labels, jax.random.key(0), *prompts(model, 3)
    counted = multiply_adds(sampler, small_params(model), *rows)
    dims = costs.dims_of(model)
    assert costs.exact_sampling_cost(dims, num_steps, batch_size=3) == counted


@pytest.mark.parametrize("model", [SMALL_ENAT, small_text(), small_text(text_encoding="never")])
def test_without_guidance_one_branch_is_counted(model):
    sampler = sampling.make(model, sampling.Settings(num_steps=6, guidance_scale=0.0))
    labels = jnp.zeros(2, int)
    rows = labels, labels, jax.random.key(0), *prompts(model, 2)
    counted = multiply_adds(sampler, small_params(model), *rows)
    dims = costs.dims_of(model)
    assert costs.exact_sampling_cost(dims, 6, guided=False, batch_size=2) == counted


@pytest.mark.parametrize(
    ("model", "num_segments"), [(SMALL_ENAT, 1), (SMALL_ENAT, 3), (SMALL_ENAT, 6), (SMALL_NAT, 2)]
)
def test_the_padded_count_is_what_the_sampler_computes(model, num_segments):
    settings = sampling.Settings(num_steps=6, num_segments=num_segments)
    plan, _ = sampler_schedule.make(settings, model)
    sampler = sampling.make(model, settings)
    labels = jnp.zeros(2, int)
    counted = multiply_adds(sampler, small_params(model), labels, labels, jax.random.key(0))
    dims = costs.dims_of(model)
    padded = costs.padded_sampling_cost(dims, plan.segments, plan.guided, batch_size=2)
    assert padded == counted
    exact = costs.exact_sampling_cost(dims, 6, batch_size=2)
    assert padded == exact if num_segments == 6 else padded > exact


def test_saving_steps_never_changes_the_model():
    # One of 8 unconditional decodings, the head on visible tokens and repeated modulations.
    assert 0.5 < costs.exact_sampling_cost(ENAT_B, 8) / costs.paper_cost(ENAT_B, 8) < 1
    # A large batch shares the modulation of "no class".
    one, many = (costs.exact_sampling_cost(ENAT_B, 8, batch_size=b) for b in (1, 100))
    assert 100 * one - many == 99 * costs.modulation_cost(ENAT_B)


def test_f_once_is_counted_once_for_each_token():
    """By hand: of the tokens cached in all steps those of the last; 10 and 3 times 40."""
    once = dataclasses.replace(ENAT_B, project_once=True)
    f = 2 * 4 * ENAT_B.width**2
    cached = reveal.sampling_steps(256, 8).num_cached
    plain = costs.exact_sampling_cost(ENAT_B, 8, guided=False)
    saved = plain - costs.exact_sampling_cost(once, 8, guided=False)
    assert saved == f * (cached.sum() - cached[-1]) > 0
    assert costs.exact_training_cost(once, 60, 100) == costs.exact_training_cost(ENAT_B, 60, 100)
    of = [int(costs.exact_training_cost(x, 60, 100, (0, 10, 40))) for x in (ENAT_B, once)]
    assert of[0] - of[1] == f * (10 + 3 * 40)


def test_the_image_decoder_count_is_what_the_vqgan_computes():
    tokenizer = vqgan.VQGAN(
        channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=1, embed_dim=6, num_groups=4
    )
    params = abstract(tokenizer, jnp.zeros((1, 8, 12, 3)))
    decode = lambda p, codes: tokenizer.apply({"params": p}, codes, method="decode")  # noqa: E731
    counted = multiply_adds(decode, params, jnp.zeros((1, 2, 3, 6)))
    assert costs.image_decoder_cost(tokenizer, 2, 3) == counted


@pytest.mark.parametrize(("cached", "visible"), [(0, 5), (2, 5), (5, 5)])
@pytest.mark.parametrize(
    "model",
    [
        SMALL_ENAT,
        small_text(),
        small_text(text_encoding="every_step", shared_key_value=True),
        small_text(text_encoding="never", reuse_projection="linear", num_classes=5),
        small_text(text_width=None, text_vocabulary=9, reuse_projection="none"),
    ],
    ids=["labels", "once", "every_step", "never", "words"],
)
def test_training_is_three_forward_passes_and_the_ema_encoder(model, cached, visible):
    text = jnp.zeros((1, 4, 7)) if model.text_width else jnp.zeros((1, 4), int)
    apply = lambda params, *args, **how: model.apply({"params": params}, *args, **how)  # noqa: E731
    zeros = lambda n: jnp.zeros((1, n), int)  # noqa: E731

    def student(params):
        modulation = apply(params, zeros(1)[0], method="condition")
        cache, ids = jnp.zeros((1, cached, 12)), zeros(visible - cached)
        if model.takes_text:
            read = apply(params, Prompt(text), modulation, method="read")
            cache, read = apply(params, ids, ids, modulation, cache, text=read, method="encode")
        else:
            read, cache = None, apply(params, ids, ids, modulation, cache, method="encode")
        return apply(params, zeros(16 - visible), modulation, cache, text=read, method="decode")

    def ema(params):
        # Of the modulation, encoding needs the three encoder layers: 3/5 of the vectors.
        modulation = jnp.zeros((5, 1, 8, 12))
        read = apply(params, Prompt(text), modulation, method="read") if model.takes_text else None
        return apply(params, zeros(cached), zeros(cached), modulation, text=read, method="encode")

    params, dims = small_params(model), costs.dims_of(model)
    expected = 3 * multiply_adds(student, params)
    if cached:
        expected += multiply_adds(ema, params) + costs.modulation_cost(dims) * 3 // 5
    assert costs.exact_training_cost(dims, cached, visible) == expected


def test_every_reveal_that_makes_the_cache_counts_what_it_encodes():
    plain = costs.exact_training_cost(ENAT_L, 60, 100)
    revealed = costs.exact_training_cost(ENAT_L, 60, 100, (0, 10, 40))
    parts = [costs.encode_cost(ENAT_L, a, b - a) for a, b in ((0, 10), (10, 40), (40, 60))]
    assert revealed - plain == sum(parts) - costs.encode_cost(ENAT_L, 0, 60)
    assert costs.exact_training_cost(ENAT_L, 60, 100, (0, 0, 0)) == plain
    windows = 64, 50, 110, 160
    padded = costs.training_cost(ENAT_L, *windows, reveals=4)
    assert padded - costs.training_cost(ENAT_L, *windows) == 3 * costs.encode_cost(ENAT_L, 64, 64)


def test_counts_of_arrays_are_arrays_of_counts():
    cached, visible = np.meshgrid(np.arange(3, dtype=np.int32), np.array([3, 9, 200]))
    counts = costs.exact_training_cost(ENAT_L, cached, visible)
    assert counts.shape == (3, 3) and counts.dtype == np.int64
    each = [
        int(costs.exact_training_cost(ENAT_L, int(c), int(v)))
        for c, v in zip(cached.flat, visible.flat, strict=True)
    ]
    assert counts.ravel().tolist() == each


def test_padding_only_adds_work():
    steps = reveal.sampling_steps(256, 8)
    exact = costs.step_cost(ENAT_B, *steps[:2], steps.num_visible, steps.num_masked)
    sizes = [x + 3 for x in (*steps[:2], steps.num_visible, steps.num_masked)]
    assert (costs.step_cost(ENAT_B, *sizes) > exact).all()


@pytest.mark.parametrize("size", [-1, 2.0, np.array([3, -4])])
def test_sizes_that_cannot_be_are_refused(size):
    with pytest.raises(ValueError, match="num_new=.*whole numbers of at least 0"):
        costs.encode_cost(ENAT_S, 0, size)
