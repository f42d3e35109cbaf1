"""Training the transformer: loss and gradients against the reference, and the update."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from references import Golden, order_of, perturbed, rows

from enat_jax.inference import masked_scores
from enat_jax.models import conversion, enat
from enat_jax.models.blocks import Prompt
from enat_jax.schedules import reveal, shape_buckets
from enat_jax.training import masked_tokens


@pytest.fixture(scope="module")
def golden():
    return Golden("enat_train")


def loss_and_gradients(model, params, batch, counts, windows, exact, smoothing=0.1):
    def loss(params, counts):
        return masked_tokens.step_loss(
            model, params, params, batch, counts, windows, smoothing=smoothing, exact=exact
        )[0]

    return jax.jit(jax.value_and_grad(loss))(params, counts)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("case", ["without_reuse", "with_reuse"])
def test_loss_and_every_gradient_equal_the_reference(golden, case, padding):
    order, num_prev, num_vis = order_of(golden["masked_ids_prev"], golden["masked_ids"])
    l, exact = order.shape[1], not padding  # noqa: E741
    num_prev = num_prev if case == "with_reuse" else 0
    cached = num_prev + padding if num_prev else 0
    windows = reveal.Windows(
        cached, num_vis - num_prev + padding, num_vis + padding, l - num_vis + padding
    )
    batch = {
        "ids": rows(golden["tokens"], order),
        "positions": order.astype(np.int32),
        "labels": golden["labels"],
    }
    counts = (jnp.int32(num_prev), jnp.int32(num_vis))
    loss, gradients = loss_and_gradients(golden.model, golden.params, batch, counts, windows, exact)
    np.testing.assert_allclose(loss, golden[f"loss_{case}"], rtol=1e-6)
    expected = conversion.enat_params(golden.tensors(f"grad_{case}:"), golden.model)
    gradients = traverse_util.flatten_dict(gradients, sep="/")
    expected = traverse_util.flatten_dict(expected, sep="/")
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(
            gradient, expected[name], rtol=0, atol=1e-5 * scale + 1e-12, err_msg=name
        )


MODEL = enat.ENAT(
    num_tokens=16, codebook_size=20, num_classes=3, width=16, num_heads=2,
    encoder_layers=2, decoder_layers=1, dropout=0.0,
)  # fmt: skip


def random_batch(b=4, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "ids": rng.integers(0, 20, (b, 16)).astype(np.int32),
        "positions": np.stack([rng.permutation(16) for _ in range(b)]).astype(np.int32),
        "labels": rng.integers(0, 4, b).astype(np.int32),
    }


def test_padded_steps_equal_exact_ones_in_every_bucket():
    """Loss and gradients through the buckets' windows, for all kinds of splits of a small grid."""
    params, batch = perturbed(MODEL), random_batch()
    d = reveal.SplitDistribution(min_visible=0)
    cost = lambda p, n, v, m: p + n + v + m  # noqa: E731
    buckets = shape_buckets.choose(16, d, 3, cost, multiple=3)
    for split in [
        reveal.Split(False, 0, 0),
        reveal.Split(False, 0, 3),
        reveal.Split(True, 0, 3),
        reveal.Split(True, 2, 5),
        reveal.Split(True, 5, 5),
        reveal.Split(True, 9, 15),
    ]:
        p, v = split.num_cached, split.num_visible
        counts = (jnp.int32(p), jnp.int32(v))
        exact = reveal.Windows(p, v - p, v, 16 - v)
        expected = loss_and_gradients(MODEL, params, batch, counts, exact, exact=True)
        windows = shape_buckets.find(buckets, split).windows
        padded = loss_and_gradients(MODEL, params, batch, counts, windows, exact=False)
        chex.assert_trees_all_close(padded, expected, rtol=1e-5, atol=2e-6)


def gradients_of_both(model, batch):
    """A function of parameters and their average: the loss of a step that reuses four tokens of
    seven, and its gradients in both.
    """
    windows, counts = reveal.Windows(4, 3, 7, 9), (jnp.int32(4), jnp.int32(7))

    @jax.jit
    def gradients(params, ema):
        loss = lambda p, e: masked_tokens.step_loss(  # noqa: E731
            model, p, e, batch, counts, windows, smoothing=0.1, exact=True
        )[0]
        return loss(params, ema), *jax.grad(loss, argnums=(0, 1))(params, ema)

    return gradients


def test_the_cache_comes_from_the_ema_model_and_has_no_gradient():
    params, ema = perturbed(MODEL), perturbed(MODEL, seed=5)
    gradients = gradients_of_both(MODEL, random_batch())
    loss, _, of_ema = gradients(params, ema)
    assert not any(x.any() for x in jax.tree.leaves(of_ema))
    assert loss != gradients(params, params)[0]


@pytest.mark.parametrize("once", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_cache_of_several_reveals_is_made_as_the_sampler_makes_it(once):
    """Of tokens 0, 1 to 3 and 4 in turn, each reveal projecting what was cached before."""
    model = dataclasses.replace(MODEL, project_once=once)
    params, ema, batch = perturbed(MODEL), perturbed(MODEL, seed=5), random_batch()

    def loss(counts, earlier, windows, exact=False):
        return masked_tokens.step_loss(
            *(model, params, ema, batch, counts, windows),
            smoothing=0.0,
            earlier=earlier,
            exact=exact,
        )[0]

    def plain():
        run = lambda weights, *a, **k: model.apply({"params": weights}, *a, **k)  # noqa: E731
        modulation = run(ema, batch["labels"], method="condition")
        cache, ends = None, (0, 1, 4, 5)
        for first, last in zip(ends, ends[1:], strict=False):
            window = batch["ids"][:, first:last], batch["positions"][:, first:last]
            before = {"num_projected": ends[max(0, ends.index(first) - 1)]} if once else {}
            cache = run(ema, *window, modulation, cache, method="encode", **before)
        modulation = run(params, batch["labels"], method="condition")
        window = batch["ids"][:, 5:8], batch["positions"][:, 5:8]
        cache = run(params, *window, modulation, cache, method="encode")
        logits = run(params, batch["positions"][:, 8:], modulation, cache, method="decode")
        log_probs = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_probs, batch["ids"][:, 8:, None], axis=2).mean()

    padded = jax.jit(functools.partial(loss, windows=reveal.Windows(7, 4, 9, 9)))
    counts = jnp.int32(5), jnp.int32(8)
    found = padded(counts, jnp.array([1, 4]))
    np.testing.assert_allclose(found, plain(), rtol=1e-5)
    exact = loss(counts, (1, 4), reveal.Windows(5, 3, 8, 8), exact=True)
    np.testing.assert_allclose(exact, found, rtol=1e-5)
    # Reveals of nothing before the first change nothing: all tokens are encoded together.
    together = padded(counts, jnp.array([0, 0]))
    np.testing.assert_allclose(together, padded(counts, ()), rtol=1e-5)
    assert abs(together - found) > 1e-4


TEXT = dataclasses.replace(MODEL, num_classes=0, text_width=6, text_tokens=5)
ENCODINGS = ["once", pytest.param("every_step", marks=pytest.mark.slow)]


def text_batch(*lengths):
    states = jax.random.normal(jax.random.key(1), (4, 5, 6))
    return random_batch() | {
        "labels": np.zeros(4, np.int32),
        "prompt": Prompt(states, np.array(lengths)),
    }


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("cached", "visible"), [(0, 0), (0, 5), (2, 5), (5, 5)])
def test_padded_steps_with_a_text_equal_exact_ones(encoding, cached, visible):
    """Also of the text: a window of exactly its length says what a longer one does."""
    model = dataclasses.replace(TEXT, text_encoding=encoding)
    params, batch = perturbed(model), text_batch(3, 3, 3, 3)
    counts = (jnp.int32(cached), jnp.int32(visible))
    exact = reveal.Windows(cached, visible - cached, visible, 16 - visible)
    short = batch | {"prompt": Prompt(batch["prompt"].tokens[:, :3])}
    expected = loss_and_gradients(model, params, short, counts, exact, exact=True)
    room = reveal.Windows(cached + 2 if cached else 0, visible - cached + 1, visible + 3, 16)
    padded = loss_and_gradients(model, params, batch, counts, room, exact=False)
    chex.assert_trees_all_close(padded, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_text_is_trained_by_the_loss_and_not_by_the_cache(encoding):
    model = dataclasses.replace(TEXT, text_encoding=encoding)
    params, ema = perturbed(model), perturbed(model, seed=5)
    gradients = gradients_of_both(model, text_batch(5, 2, 1, 3))
    loss, of_params, of_ema = gradients(params, ema)
    assert not any(x.any() for x in jax.tree.leaves(of_ema))
    assert jnp.abs(of_params["embed_text"]["dense"]["kernel"]).max() > 1e-5
    # The EMA reads the text, too: what it makes of it is in the cache.
    deaf = ema | {"embed_text": jax.tree.map(jnp.zeros_like, ema["embed_text"])}
    assert loss != gradients(params, deaf)[0]


def test_random_orders_are_permutations_and_uniform():
    order = np.asarray(masked_scores.random_order(jax.random.key(0), (3000, 5)))
    assert (np.sort(order, axis=1) == np.arange(5)).all()
    first = np.bincount(order[:, 0], minlength=5)
    assert np.abs(first - 600).max() < 4 * np.sqrt(600)


def test_masked_scores_see_what_they_are_given():
    params, batch = perturbed(MODEL), random_batch()
    score = functools.partial(masked_scores.scores, MODEL, params)
    loss, hits = score(batch["ids"], batch["labels"], batch["positions"], num_visible=5)
    chex.assert_shape([loss, hits], (4, 11))
    # What is masked must not matter for the prediction of another masked token.
    changed = batch["ids"].copy()
    last = batch["positions"][:, -1]
    changed[np.arange(4), last] = (changed[np.arange(4), last] + 1) % 20
    other, _ = score(changed, batch["labels"], batch["positions"], num_visible=5)
    np.testing.assert_allclose(loss[:, :-1], other[:, :-1], rtol=1e-5)
    assert not np.allclose(loss[:, -1], other[:, -1])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_masked_scores_see_the_text(encoding):
    model = dataclasses.replace(TEXT, text_encoding=encoding)
    params, batch = perturbed(model), text_batch(5, 2, 1, 3)
    rows = batch["ids"], batch["labels"], batch["positions"]
    score = functools.partial(masked_scores.scores, model, params, *rows, num_visible=5)
    prompt = batch["prompt"]
    loss, _ = score(prompt=prompt)
    rolled, _ = score(prompt=Prompt(*(jnp.roll(x, 1, axis=0) for x in prompt)))
    assert not np.allclose(loss, rolled)
    windows, counts = reveal.Windows(0, 5, 5, 11), (jnp.int32(0), jnp.int32(5))
    revealed = batch | {"ids": np.take_along_axis(batch["ids"], batch["positions"], axis=1)}
    expected, _ = masked_tokens.step_loss(
        model, params, params, revealed, counts, windows, smoothing=0.0, exact=True
    )
    np.testing.assert_allclose(loss.mean(), expected, rtol=1e-5)
