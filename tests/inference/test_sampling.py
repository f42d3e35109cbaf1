"""The sampler: the reference's tokens for every schedule, whatever the segments."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import Golden, perturbed

from enat_jax.inference import sampler_schedule, sampling
from enat_jax.models import enat, nat
from enat_jax.models.blocks import Prompt
from enat_jax.schedules import costs

GREEDY = dict(token_temperature=0.0, mask_temperature=0.0)
SMALL = enat.ENAT(
    num_tokens=16, codebook_size=20, num_classes=3, width=16, num_heads=2,
    encoder_layers=2, decoder_layers=1,
)  # fmt: skip


def generate(model, params, settings, labels, index=None, seed=0, prompts=()):
    index = np.arange(len(labels)) if index is None else index
    sample = sampling.make(model, settings)
    rows = np.asarray(labels, np.int32), np.asarray(index), jax.random.key(seed), *prompts
    return np.asarray(sample(params, *rows))


@pytest.mark.parametrize("num_segments", [1, 2, 3, None])
@pytest.mark.parametrize(
    "name, run",
    [
        ("enat_generate_greedy", "cfg0_steps4"),
        ("enat_generate_greedy", "cfg0_steps8"),
        ("enat_generate_greedy", "cfg3_steps8"),
        ("enat_generate_greedy", "cfg2_steps12"),
        ("enat_edges", "steps1"),
        ("enat_edges", "steps64"),
    ],
)
def test_greedy_tokens_equal_the_reference(name, run, num_segments):
    if run == "steps64" and num_segments is None:
        pytest.skip("16 bodies take long to compile: see the slow test")
    compare(name, run, num_segments)


@pytest.mark.slow
def test_greedy_tokens_equal_the_reference_with_a_body_per_step():
    compare("enat_edges", "steps64", 64)


def compare(name, run, num_segments):
    golden = Golden(name)
    settings = sampling.Settings(
        int(golden[f"{run}:steps"]), float(golden[f"{run}:cfg_scale"]), num_segments=num_segments,
        **GREEDY,
    )  # fmt: skip
    tokens = generate(golden.model, golden.params, settings, golden["labels"])
    np.testing.assert_array_equal(tokens, golden[f"{run}:tokens"])


@pytest.fixture(scope="module")
def params():
    return perturbed(SMALL)


NOISY = sampling.Settings(5, 2.0, token_temperature=2.0, mask_temperature=1.5)


@pytest.mark.slow
def test_segments_do_not_change_a_token_with_temperatures(params):
    labels = [0, 1, 2, 3]
    expected = generate(SMALL, params, NOISY, labels)
    assert len(np.unique(expected)) > 5
    for n in (1, 2, 3):
        settings = dataclasses.replace(NOISY, num_segments=n)
        np.testing.assert_array_equal(generate(SMALL, params, settings, labels), expected)


def test_an_image_depends_on_seed_index_and_label_alone(params):
    settings = dataclasses.replace(NOISY, num_segments=1)
    labels, index = np.array([0, 1, 2, 0, 1, 2, 0]), np.arange(7) + 10
    together = generate(SMALL, params, settings, labels, index)
    for row in (0, 3, 6):
        alone = generate(SMALL, params, settings, labels[[row]], index[[row]])
        np.testing.assert_array_equal(alone[0], together[row])
    backwards = generate(SMALL, params, settings, labels[::-1], index[::-1])
    np.testing.assert_array_equal(backwards[::-1], together)
    assert not np.array_equal(together[0], together[3])  # same label, other index
    other_seed = generate(SMALL, params, settings, labels, index, seed=1)
    assert not np.array_equal(other_seed, together)


@pytest.mark.parametrize(
    "model",
    [
        dataclasses.replace(SMALL, reuse=False),
        nat.NAT(num_tokens=16, codebook_size=20, num_classes=3, width=16, num_heads=2,
                num_layers=2),
    ],
    ids=["disentangled", "nat"],
)  # fmt: skip
def test_the_baselines_sample_too(model):
    params = perturbed(model)
    settings = dataclasses.replace(NOISY, num_segments=1)
    expected = generate(model, params, settings, [0, 1, 2])
    assert 0 <= expected.min() and expected.max() < 20
    settings = dataclasses.replace(NOISY, num_segments=3)
    np.testing.assert_array_equal(generate(model, params, settings, [0, 1, 2]), expected)


TEXT = dataclasses.replace(SMALL, num_classes=0, text_width=6, text_tokens=6)
ENCODINGS = ["once", pytest.param("every_step", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def prompts():
    """Three texts of 4, 2 and 1 states, padding of large numbers behind; and an empty text."""
    states = jax.random.normal(jax.random.key(1), (3, 5, 6))
    lengths = np.array([4, 2, 1])
    states = jnp.where(np.arange(5)[None, :, None] < lengths[:, None, None], states, 50.0)
    return Prompt(states, lengths), Prompt(jnp.ones((1, 2, 6)), jnp.array([1]))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_image_depends_on_its_own_text(prompts, encoding):
    """Not on segments, the batch or padding of the text, its own or the empty text's."""
    model = dataclasses.replace(TEXT, text_encoding=encoding)
    params, (prompt, null) = perturbed(model), prompts
    labels = np.zeros(3, np.int32)
    settings = dataclasses.replace(NOISY, num_segments=1)
    expected = generate(model, params, settings, labels, prompts=prompts)
    assert len({row.tobytes() for row in expected}) == 3
    cut = dataclasses.replace(NOISY, num_segments=2)
    found = generate(model, params, cut, labels, prompts=prompts)
    np.testing.assert_array_equal(found, expected)
    for row in range(3):
        n = prompt.length[row]
        alone = Prompt(prompt.tokens[row : row + 1, :n]), Prompt(null.tokens[:, :1])
        one = generate(model, params, settings, [0], [row], prompts=alone)
        np.testing.assert_array_equal(one[0], expected[row])
    # The noise knows nothing of the text: with another one, the same seed and place.
    other = Prompt(prompt.tokens[::-1], prompt.length[::-1]), null
    assert (generate(model, params, settings, labels, prompts=other) != expected).any()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_negative_prompt_takes_the_place_of_the_empty_text(prompts, encoding):
    model = dataclasses.replace(TEXT, text_encoding=encoding)
    params, (prompt, _) = perturbed(model), prompts
    labels, settings = np.zeros(3, np.int32), dataclasses.replace(NOISY, num_segments=1)
    # Against itself a prompt is not guided at all.
    against_itself = generate(model, params, settings, labels, prompts=(prompt, prompt))
    unguided = dataclasses.replace(settings, guidance_scale=0.0)
    expected = generate(model, params, unguided, labels, prompts=prompts)
    np.testing.assert_array_equal(against_itself, expected)
    assert (generate(model, params, settings, labels, prompts=prompts) != expected).any()


def test_prompts_that_do_not_fit_the_images_are_refused(prompts):
    params, (prompt, _) = perturbed(TEXT), prompts
    settings = dataclasses.replace(NOISY, num_segments=1)
    with pytest.raises(ValueError, match="needs a null_prompt"):
        generate(TEXT, params, settings, [0, 0, 0], prompts=(prompt, None))
    with pytest.raises(ValueError, match=r"tokens of a prompt must have the shape \[b=2"):
        generate(TEXT, params, settings, [0, 0], prompts=prompts)
    with pytest.raises(ValueError, match=r"must have the shape \[b=1 or 4"):
        four = Prompt(jnp.zeros((4, 1, 6)))
        generate(TEXT, params, settings, [0] * 4, prompts=(four, Prompt(prompt.tokens[:2])))


def test_the_sampler_is_the_method_written_plainly(params):
    """Guidance, both temperatures and the order against loops over steps, images and tokens."""
    # The reference's schedule is in the goldens; this one guides the first step, too.
    settings = dataclasses.replace(NOISY, guidance_schedule="constant", num_segments=1)
    labels = [2, 0]
    expected = np.stack([plain(params, settings, y, i) for i, y in enumerate(labels)])
    np.testing.assert_array_equal(generate(SMALL, params, settings, labels), expected)


def plain(params, settings, label, index, given=(), once=False):
    """``given``: tokens by raster position, which are encoded first and never drawn; ``once``:
    a feature passes through the projection f once, whenever it is reused."""
    run = jax.jit(
        lambda *a, method, **k: SMALL.apply({"params": params}, *a, method=method, **k),
        static_argnames="method",
    )
    t, l = settings.num_steps, SMALL.num_tokens  # noqa: E741
    m = l - len(given)
    counts = [m] + [int(np.floor(m * np.cos(np.pi * s / (2 * t)))) for s in range(1, t)] + [0]
    key = jax.random.fold_in(jax.random.key(0), index)
    order, ids, previous = sorted(range(l), key=lambda p: p not in given), dict(given), 0
    projected = 0
    caches = [None, None]
    for s in range(t):
        visible = l - counts[s]
        logits = []
        for branch, y in enumerate((label, SMALL.num_classes)):
            modulation = run(jnp.array([y]), method="condition")
            new = np.array([order[previous:visible]], np.int32)
            new_ids = np.array([[ids[p] for p in new[0]]], np.int32).reshape(new.shape)
            before = {"num_projected": projected} if once else {}
            cache = caches[branch]
            caches[branch] = run(new_ids, new, modulation, cache, method="encode", **before)
            masked = np.array([order[visible:]], np.int32)
            logits.append(run(masked, modulation, caches[branch], method="decode")[0])
        weight = settings.guidance_scale
        log_probs = jax.nn.log_softmax(logits[0] + weight * (logits[0] - logits[1]), axis=-1)
        remaining = 1 - (s + 1) / t
        confidences = {}
        for row, p in enumerate(order[visible:]):
            noise = jax.random.fold_in(jax.random.fold_in(key, s), p)
            temperature = max(settings.token_temperature * remaining, 1e-3)
            gumbel = jax.random.gumbel(jax.random.fold_in(noise, 0), log_probs[row].shape)
            ids[p] = int(jnp.argmax(log_probs[row] / temperature + gumbel))
            gumbel = jax.random.gumbel(jax.random.fold_in(noise, 1))
            scale = settings.mask_temperature * remaining
            confidences[p] = float(log_probs[row, ids[p]] + scale * gumbel)
        order[visible:] = sorted(order[visible:], key=lambda p: -confidences[p])
        projected, previous = previous, visible
    return np.array([ids[p] for p in range(l)])


ONCE = dataclasses.replace(SMALL, project_once=True)


def test_features_pass_through_the_projection_once_if_so_set(params):
    settings = dataclasses.replace(NOISY, num_steps=4, guidance_schedule="constant", num_segments=1)
    found = generate(ONCE, params, settings, [0, 1, 2])
    assert np.array_equal(found[2], plain(params, settings, 2, 2, once=True))
    assert (found != generate(SMALL, params, settings, [0, 1, 2])).any()


@pytest.mark.slow
def test_features_of_given_tokens_pass_through_the_projection_once(params):
    """Images of one batch differ in how many are cached, and so in how many are projected."""
    settings = dataclasses.replace(NOISY, num_steps=3, guidance_schedule="constant", num_segments=2)
    tokens, masked = masks_of(6, 9, 10)
    found = generate_given(ONCE, params, settings, [2, 0, 1], tokens, masked)
    for row, label in enumerate([2, 0, 1]):
        given = {p: tokens[row, p] for p in np.flatnonzero(~masked[row])}
        expected = plain(params, settings, label, row, given, once=True)
        np.testing.assert_array_equal(found[row], expected)


def generate_given(model, params, settings, labels, tokens, masked, index=None, prompts=()):
    """Images of one range of numbers of masked tokens."""
    index = np.arange(len(labels)) if index is None else index
    static, inputs = sampler_schedule.make(settings, model, masked.sum(axis=1))
    rows = np.asarray(labels, np.int32), np.asarray(index), jax.random.key(0), *prompts
    given = sampling.Given(tokens, masked)
    return np.asarray(sampling.sample_tokens(model, static, inputs, params, *rows, given=given))


def masks_of(*numbers, seed=5):
    """Random masks of 16 tokens, and tokens to go with them."""
    rng = np.random.default_rng(seed)
    rank = rng.permuted(np.tile(np.arange(16), (len(numbers), 1)), axis=1)
    return rng.integers(0, 20, rank.shape), rank < np.reshape(numbers, (-1, 1))


def test_given_tokens_come_first_and_the_rest_is_the_method_written_plainly(params):
    """Images of one batch that keep different numbers; the unconditional branch sees them, too."""
    settings = dataclasses.replace(NOISY, num_steps=3, guidance_schedule="constant", num_segments=2)
    labels, (tokens, masked) = [2, 0, 1], masks_of(6, 9, 10)
    given = {p: tokens[1, p] for p in np.flatnonzero(~masked[1])}
    found = generate_given(SMALL, params, settings, labels, tokens, masked)
    np.testing.assert_array_equal(found[1], plain(params, settings, 0, 1, given))
    np.testing.assert_array_equal(found[~masked], tokens[~masked])
    turned = [np.array(x)[[1, 2, 1]] for x in (labels, tokens, masked)]  # a batch of others
    found_again = generate_given(SMALL, params, settings, *turned, index=[1, 2, 1])
    np.testing.assert_array_equal(found_again, found[[1, 2, 1]])


OTHERS = [
    dataclasses.replace(SMALL, reuse=False),
    nat.NAT(num_tokens=16, codebook_size=20, num_classes=3, width=16, num_heads=2, num_layers=2),
]


@pytest.mark.slow
@pytest.mark.parametrize("model", [SMALL, *OTHERS], ids=["enat", "disentangled", "nat"])
@pytest.mark.parametrize("numbers", [(1, 2, 5), (11, 15, 12)])
def test_segments_change_no_token_around_given_ones(model, numbers):
    params, (tokens, masked) = perturbed(model), masks_of(*numbers)
    rows = [0, 1, 3], tokens, masked
    expected = generate_given(model, params, dataclasses.replace(NOISY, num_segments=1), *rows)
    for n in (2, None):
        settings = dataclasses.replace(NOISY, num_segments=n)
        found = generate_given(model, params, settings, *rows)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("model", OTHERS, ids=["disentangled", "nat"])
def test_the_baselines_draw_around_given_tokens(model):
    params, (tokens, masked) = perturbed(model), masks_of(11, 15, 12)
    settings = dataclasses.replace(NOISY, num_steps=3, num_segments=1)
    found = generate_given(model, params, settings, [0, 1, 3], tokens, masked)
    np.testing.assert_array_equal(found[~masked], tokens[~masked])
    # What stands at masked places does not matter, what is kept does.
    other = np.where(masked, 0, tokens)
    again = generate_given(model, params, settings, [0, 1, 3], other, masked)
    np.testing.assert_array_equal(again, found)
    again = generate_given(model, params, settings, [0, 1, 3], 19 - tokens, masked)
    assert (again != found)[masked].any()


@pytest.mark.slow
def test_nothing_given_is_plain_sampling(params):
    """The compiled program of given tokens draws the same as the one without, of none given."""
    settings = dataclasses.replace(NOISY, num_segments=2)
    tokens, masked = masks_of(16, 16)
    found = generate_given(SMALL, params, settings, [0, 1], tokens, masked)
    np.testing.assert_array_equal(found, generate(SMALL, params, settings, [0, 1]))


def test_given_tokens_and_texts(prompts):
    params, (tokens, masked) = perturbed(TEXT), masks_of(6, 8, 10)
    rows = np.zeros(3, np.int32), tokens, masked
    settings = dataclasses.replace(NOISY, num_steps=3, num_segments=1)
    found = generate_given(TEXT, params, settings, *rows, prompts=prompts)
    np.testing.assert_array_equal(found[~masked], tokens[~masked])
    prompt, null = prompts
    other = Prompt(prompt.tokens[::-1], prompt.length[::-1]), null
    assert (generate_given(TEXT, params, settings, *rows, prompts=other) != found).any()


def test_what_each_step_leaves_of_given_tokens(params):
    settings = dataclasses.replace(NOISY, num_segments=1)
    tokens, masked = masks_of(1, 5)
    static, inputs = sampler_schedule.make(settings, SMALL, np.array([1, 5]))
    rows = np.array([0, 3], np.int32), np.array([0, 1]), jax.random.key(0)
    given = sampling.Given(tokens, masked)
    trace = sampling.trace_tokens(SMALL, static, inputs, params, *rows, given=given)
    np.testing.assert_array_equal(np.asarray(trace.tokens)[:, ~masked], [tokens[~masked]] * 5)
    # 5 cos(pi s / 10) rounded down; one token is revealed in the first step.
    left = np.array([[0, 0, 0, 0, 0], [4, 4, 2, 1, 0]]).T
    np.testing.assert_array_equal(np.asarray(trace.visible).sum(-1), 16 - left)
    assert np.asarray(trace.visible)[:, ~masked].all()


def test_masks_of_all_sizes_share_four_schedules():
    schedules = {sampler_schedule.make(NOISY, SMALL, np.array([m]))[0] for m in range(1, 17)}
    assert len(schedules) == 4
    with pytest.raises(ValueError, match="must lie within 1 and 5"):
        sampler_schedule.make(NOISY, SMALL, np.array([1, 6]))
    for wrong in (0, 17):
        with pytest.raises(ValueError, match="must both be at least 1|must be at most"):
            sampler_schedule.make(NOISY, SMALL, np.array([wrong]))


def test_tokens_follow_the_predicted_distribution():
    """One step from nothing at a known temperature: frequencies are softmax(logits / tau)."""
    params = perturbed(SMALL, seed=3)
    n, tau = 3000, 1.5
    # The first of two steps has remaining = 1/2.
    settings = sampling.Settings(2, 0.0, token_temperature=2 * tau, mask_temperature=0.0)
    static, inputs = sampler_schedule.make(settings, SMALL)
    modulation = SMALL.apply({"params": params}, jnp.array([1]), method="condition")
    logits = SMALL.apply(
        {"params": params}, jnp.arange(16)[None], modulation, jnp.zeros((1, 0, 16)),
        method="decode",
    )  # fmt: skip
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), jnp.arange(n))
    step = jax.tree.map(lambda x: x[0], inputs)
    log_probs = jnp.broadcast_to(jax.nn.log_softmax(logits[:, :1]), (n, 1, 20))
    positions = jnp.zeros((n, 1), jnp.int32)
    tokens, _ = sampling._choose(static, step, log_probs, positions, keys)
    seen = np.bincount(np.asarray(tokens)[:, 0], minlength=20) / n
    expected = np.asarray(jax.nn.softmax(logits[0, 0] / tau))
    assert np.abs(seen - expected).max() < 4 * np.sqrt(expected.max() / n)
    assert np.abs(seen - np.asarray(jax.nn.softmax(logits[0, 0]))).max() > 0.02


def test_bfloat16_samples_with_float32_logits():
    model = dataclasses.replace(SMALL, dtype="bfloat16")
    settings = dataclasses.replace(NOISY, num_segments=1)
    tokens = generate(model, perturbed(model), settings, [0, 1])
    assert tokens.dtype == np.int32 and tokens.shape == (2, 16)


def test_eight_devices_give_the_tokens_of_one(params):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    labels, index = np.arange(8, dtype=np.int32) % 4, np.arange(8)
    settings = dataclasses.replace(NOISY, num_segments=1)
    expected = generate(SMALL, params, settings, labels, index)
    sample = sampling.make(SMALL, settings)
    tokens = sample(
        params, *(jax.device_put(x, sharding) for x in (labels, index)), jax.random.key(0)
    )
    assert len(tokens.sharding.device_set) == 8
    np.testing.assert_array_equal(tokens, expected)


def test_changing_guidance_or_temperature_does_not_compile_again(params):
    settings = dataclasses.replace(NOISY, num_segments=2)
    generate(SMALL, params, settings, [0, 1])
    before = sampling.sample_tokens.jitted._cache_size()
    for change in (dict(guidance_scale=1.0), dict(token_temperature=3.0)):
        generate(SMALL, params, dataclasses.replace(settings, **change), [0, 1])
    assert sampling.sample_tokens.jitted._cache_size() == before


@pytest.mark.parametrize(
    "change",
    [
        {"num_steps": 0},
        {"num_steps": 2.5},
        {"num_steps": 10**9},
        {"num_segments": 0},
        {"guidance_scale": float("nan")},
        {"token_temperature": -1.0},
        {"mask_temperature": float("inf")},
        {"mask_temperature": 1e39},  # infinite in float32
        {"guidance_scale": 1e38},  # infinite once it is multiplied
        {"guidance_schedule": "quadratic"},
        {"guidance_interval": (0.5, 0.5)},
        {"guidance_interval": (0.0, float("nan"))},
        {"guidance_interval": (-0.1, 1.0)},
        {"guidance_interval": (0.0, 0.5, 1.0)},
        {"guidance_interval": 0.5},
    ],
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        sampling.Settings(**change)


def test_a_wrong_schedule_is_told_which_there_are():
    with pytest.raises(ValueError, match="'sine' is none of linear, constant, cosine, interval"):
        sampling.Settings(guidance_schedule="sine")


def test_an_interval_without_a_step_is_refused():
    narrow = dict(guidance_schedule="interval", guidance_interval=(0.3, 0.45))
    with pytest.raises(ValueError, match=r"\(0.3, 0.45\) has none of the 4 steps"):
        sampling.Settings(num_steps=4, **narrow)
    sampling.Settings(num_steps=8, **narrow)
    sampling.Settings(num_steps=4, guidance_scale=0.0, **narrow)


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        ("linear", [0, 0.5, 1, 1.5]),
        ("constant", [2, 2, 2, 2]),
        ("cosine", [0, 1 - 0.5**0.5, 1, 1 + 0.5**0.5]),
        ("interval", [0, 2, 2, 0]),
    ],
)
def test_guidance_schedules(schedule, weights):
    settings = sampling.Settings(
        4, 2.0, guidance_schedule=schedule, guidance_interval=[0.25, 0.75], num_segments=4
    )
    assert hash(settings) == hash(dataclasses.replace(settings, guidance_interval=(0.25, 0.75)))
    static, inputs = sampler_schedule.make(settings, SMALL)
    np.testing.assert_allclose(inputs.guidance, weights, rtol=1e-6)
    assert static.guided == tuple(weight > 0 for weight in weights)
    # Nothing is padded here, so this is counted exactly.
    dims, guided = costs.dims_of(SMALL), settings.guidance_weights() > 0
    assert costs.padded_sampling_cost(
        dims, static.segments, static.guided
    ) == costs.exact_sampling_cost(dims, 4, guided=guided)


def test_unguided_segments_change_no_token(params):
    """Their null rows are not decoded, and after the last guided step not encoded any more."""
    interval = dict(guidance_schedule="interval", guidance_interval=(0.3, 0.6))
    settings = dataclasses.replace(NOISY, num_steps=3, num_segments=1, **interval)
    expected = generate(SMALL, params, settings, [0, 1, 2])
    settings = dataclasses.replace(settings, num_segments=3)
    assert sampler_schedule.make(settings, SMALL)[0].guided == (False, True, False)
    np.testing.assert_array_equal(generate(SMALL, params, settings, [0, 1, 2]), expected)


def test_more_steps_than_tokens_and_what_each_leaves(params):
    settings = dataclasses.replace(NOISY, num_steps=20, num_segments=2)
    static, inputs = sampler_schedule.make(settings, SMALL)
    labels, index = np.array([0, 3], np.int32), np.array([0, 1])
    trace = sampling.trace_tokens(SMALL, static, inputs, params, labels, index, jax.random.key(0))
    tokens, visible = np.asarray(trace.tokens), np.asarray(trace.visible)
    np.testing.assert_array_equal(tokens[-1], generate(SMALL, params, settings, labels, index))
    # 16 cos(pi s / 40) rounded down; two steps in the beginning reveal nothing.
    masked = [15, 15, 15, 15, 14, 14, 13, 12, 12, 11, 10, 9, 8, 7, 6, 4, 3, 2, 1, 0]
    np.testing.assert_array_equal(
        visible.sum(-1), np.repeat(16 - np.array(masked), 2).reshape(20, 2)
    )
    for before, after in zip(range(19), range(1, 20), strict=True):
        assert (visible[after] >= visible[before]).all()
        seen = visible[before]
        np.testing.assert_array_equal(tokens[after][seen], tokens[before][seen])
    assert (tokens[0] != tokens[-1]).any()  # what is masked is only a guess


def number_of_segments(num_images, **changes):
    settings = dataclasses.replace(NOISY, **changes)
    return len(sampler_schedule.make(settings, SMALL, num_images=num_images)[0].segments)


def test_more_images_have_more_segments(monkeypatch):
    work = [
        costs.padded_sampling_cost(costs.dims_of(SMALL), plan.segments, plan.guided)
        for n in (1, 2)
        for plan, _ in [sampler_schedule.make(dataclasses.replace(NOISY, num_segments=n), SMALL)]
    ]
    monkeypatch.setattr(sampler_schedule, "BODY_COSTS", {jax.default_backend(): work[0] - work[1]})
    assert number_of_segments(1) == 1  # as one body costs what it saves
    assert number_of_segments(2) >= 2
    monkeypatch.setattr(sampler_schedule, "BODY_COSTS", {})
    assert number_of_segments(1000) == 1
    assert number_of_segments(10**15) == number_of_segments(None) == 5
    assert number_of_segments(1000, num_segments=3) == 3
    assert number_of_segments(10**15, num_steps=40) == 16


def test_many_steps_have_few_bodies_unless_asked_for():
    assert len(sampler_schedule.make(sampling.Settings(16), SMALL)[0].segments) == 16
    assert len(sampler_schedule.make(sampling.Settings(40), SMALL)[0].segments) == 16
    assert (
        len(sampler_schedule.make(sampling.Settings(40, num_segments=40), SMALL)[0].segments) == 40
    )
    before = time.process_time()
    sampler_schedule.make(sampling.Settings(1000), SMALL)
    assert time.process_time() - before < 10  # one by one, its 500,000 runs take a minute


@pytest.mark.parametrize(
    "labels, index, words",
    [
        ([[0, 1]], [0, 1], r"labels must have the shape \[b\], not \[1, 2\]"),
        ([0, 1], [0], r"image_index must have the shape \[b=2\], not \[1\]"),
    ],
)
def test_labels_and_numbers_of_other_shapes_are_refused(params, labels, index, words):
    with pytest.raises(ValueError, match=words):
        generate(SMALL, params, NOISY, labels, index)
