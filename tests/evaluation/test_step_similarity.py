"""How much features change between sampling steps."""

import functools

import jax
import numpy as np
import pytest
import tiny
from references import apply

from enat_jax.evaluation import step_similarity
from enat_jax.inference import sampling
from enat_jax.models import enat, nat

SIZES = dict(num_tokens=4, codebook_size=5, num_classes=2, width=8, num_heads=2)
ENAT = enat.ENAT(**SIZES, encoder_layers=1, decoder_layers=1)
DISENTANGLED = ENAT.clone(reuse=False)
NAT = nat.NAT(**SIZES, num_layers=1)
# Three steps of four tokens leave 3, 2 and 0 masked: one, one and two are revealed.
STEP = np.array([[2, 0, 2, 1], [1, 2, 0, 2]])
TOKENS = np.array([[4, 3, 2, 1], [0, 1, 2, 3]])
LABELS = np.array([1, 0])


def random_params(model):
    return tiny.random_params(model.init, np.zeros((1, 4), int), np.zeros(1, int), seed=1)


@pytest.fixture(scope="module")
def of_enat():
    return step_similarity.similarities_of_passes(
        ENAT, random_params(ENAT), TOKENS, STEP, LABELS, num_steps=3
    )


@pytest.fixture(scope="module")
def of_nat():
    return step_similarity.similarities_of_passes(
        NAT, random_params(NAT), TOKENS, STEP, LABELS, num_steps=3
    )


def expected_features(model, tokens, visible, cache=None):
    """Of one image, [l, d] in raster order, without any padding; of a given cache or recomputed."""
    run = functools.partial(apply, model, random_params(model))
    modulation = run(LABELS[:1], method="condition")
    masked = np.setdiff1d(np.arange(4), visible)
    if cache is None:
        cache = run(tokens[None, visible], visible[None], modulation, method="encode")
    decoded = run(masked[None], modulation, cache, method="features")[0]
    found = np.zeros((4, model.width))
    if isinstance(model, nat.NAT):
        found[np.concatenate([visible, masked])] = decoded
    else:
        found[visible], found[masked] = cache[0], decoded
    return found


def cosine(x, y):
    return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


def test_groups_follow_the_steps_that_revealed_the_tokens(of_enat):
    """Pass 1 sees the token of step 0, pass 2 that of step 1 as well."""
    assert of_enat.group.tolist() == [
        [[2, 1, 2, 2], [2, 0, 2, 1]],
        [[2, 2, 1, 2], [1, 2, 0, 2]],
    ]


@pytest.mark.parametrize("model", ["of_enat", "of_nat"])
def test_adjacent_passes_are_compared_at_the_same_place(model, request):
    found, model = request.getfixturevalue(model), {"of_enat": ENAT, "of_nat": NAT}[model]
    passes = [
        expected_features(model, TOKENS[0], np.array(visible, int)) for visible in ([], [1], [1, 3])
    ]
    expected = [cosine(passes[0], passes[1]), cosine(passes[1], passes[2])]
    np.testing.assert_allclose(found.adjacent[0], expected, atol=1e-5)
    # Elsewhere: the next of the group. A group of one token has no other.
    np.testing.assert_allclose(
        found.elsewhere[0, 1, [0, 2]],
        [cosine(passes[1][2], passes[2][0]), cosine(passes[1][0], passes[2][2])],
        atol=1e-5,
    )
    assert np.isnan(found.elsewhere[0, 1, [1, 3]]).all()


def test_reuse_is_compared_with_what_the_sampler_keeps(of_enat):
    """Pass 2 of the first image: place 1 went through f, place 3 was encoded with it as context."""
    run = functools.partial(apply, ENAT, random_params(ENAT))
    modulation, ids = run(LABELS[:1], method="condition"), TOKENS[:1]
    cache = run(ids[:, [1]], np.array([[1]]), modulation, method="encode")
    cache = run(ids[:, [3]], np.array([[3]]), modulation, cache, method="encode")
    visible = np.array([1, 3])
    reused = expected_features(ENAT, TOKENS[0], visible, cache)
    fresh = expected_features(ENAT, TOKENS[0], visible)
    np.testing.assert_allclose(of_enat.reused[0, 1], cosine(reused, fresh), atol=1e-5)
    # Pass 1 has nothing to reuse yet.
    np.testing.assert_allclose(of_enat.reused[:, 0], 1, atol=1e-5)
    np.testing.assert_array_equal(of_enat.same_code[0, 0], [1, np.nan, 1, 1])
    np.testing.assert_allclose(of_enat.overlap[0, 0], [1, np.nan, 1, 1], atol=1e-5)


def test_predictions_with_and_without_reuse_overlap(of_enat):
    """Masked places 0 and 2 of the first image in pass 2."""
    run = functools.partial(apply, ENAT, random_params(ENAT))
    modulation, ids = run(LABELS[:1], method="condition"), TOKENS[:1]
    first = run(ids[:, [1]], np.array([[1]]), modulation, method="encode")
    caches = [
        run(ids[:, [3]], np.array([[3]]), modulation, first, method="encode"),
        run(ids[:, [1, 3]], np.array([[1, 3]]), modulation, method="encode"),
    ]
    logits = [run(np.array([[0, 2]]), modulation, cache, method="decode")[0] for cache in caches]
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits)
    np.testing.assert_allclose(of_enat.overlap[0, 1, [0, 2]], np.minimum(p, q).sum(-1), atol=1e-5)
    same = p.argmax(-1) == q.argmax(-1)
    np.testing.assert_array_equal(of_enat.same_code[0, 1], [same[0], np.nan, same[1], np.nan])


def test_a_model_without_reuse_has_nothing_to_say_of_it(of_nat):
    assert of_nat.reused is None and of_nat.overlap is None and of_nat.same_code is None
    params = random_params(DISENTANGLED)
    found = step_similarity.similarities_of_passes(
        DISENTANGLED, params, TOKENS, STEP, LABELS, num_steps=3
    )
    assert found.reused is None and np.isfinite(found.adjacent).all()


def test_drawn_images_are_the_samplers():
    """The very tokens of the sampler, revealed as its schedule says."""
    settings = sampling.Settings(
        num_steps=3, num_segments=1, guidance_scale=0, token_temperature=0, mask_temperature=0
    )
    params, index = random_params(ENAT), np.array([5, 6])
    tokens, step = step_similarity.draw(ENAT, params, settings, LABELS, index, seed=2)
    plain = sampling.make(ENAT, settings)(params, LABELS, index, jax.random.key(2))
    np.testing.assert_array_equal(tokens, plain)
    assert np.sort(step, axis=1).tolist() == [[0, 1, 2, 2]] * 2


def test_other_numbers_of_steps_are_refused():
    params = random_params(ENAT)
    with pytest.raises(ValueError, match="num_steps=1: a similarity of adjacent steps needs two"):
        step_similarity.similarities_of_passes(ENAT, params, TOKENS, STEP, LABELS, num_steps=1)
    with pytest.raises(ValueError, match="not revealed in 4 steps"):
        step_similarity.similarities_of_passes(ENAT, params, TOKENS, STEP, LABELS, num_steps=4)
