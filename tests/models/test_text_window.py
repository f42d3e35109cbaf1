"""A text as a window of its own: what must hold exactly, since no reference has a text."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import Golden, apply, order_of, perturbed, rows

from enat_jax.models import enat
from enat_jax.models.blocks import Prompt

LABELS = jnp.zeros((3,), jnp.int32)
IDS = jnp.arange(48).reshape(3, 16) % 20
ORDER = jnp.stack([jnp.roll(jnp.arange(16), 3 * i) for i in range(3)])
LENGTHS = jnp.array([5, 2, 1])
ENCODINGS = ("once", "every_step")


def small(**changes):
    settings = dict(
        num_tokens=16, codebook_size=20, num_classes=0, width=16, num_heads=2,
        encoder_layers=2, decoder_layers=1, text_width=6, text_tokens=7,
    )  # fmt: skip
    return enat.ENAT(**settings | changes)


@functools.cache
def parameters(model):
    return perturbed(model)


def states(b=3, p=5):
    return jax.random.normal(jax.random.key(1), (b, p, 6))


def steps(model, text, length=None, labels=None, rows=slice(None), params=None, keep=False):
    """Features and logits of two steps, the first of four tokens and the second of three."""
    run = functools.partial(apply, model, parameters(model) if params is None else params)
    ids, order = IDS[rows], ORDER[rows]
    modulation = run(LABELS[: len(ids)] if labels is None else labels, method="condition")
    window, cache = None, None
    if text is not None:
        window = run(Prompt(text, length), modulation, method="read")
        window = run(window, modulation, method="keep") if keep else window
    outputs = []
    for start, stop in ((0, 4), (4, 7)):
        new = ids[:, start:stop], order[:, start:stop]
        cache = run(*new, modulation, cache, text=window, method="encode")
        seen = None
        if window is not None:
            cache, seen = cache
        logits = run(order[:, stop:], modulation, cache, text=seen, method="decode")
        outputs.append((cache, logits))
    return outputs


def close(one, other, tolerance=1e-5):
    chex.assert_trees_all_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("encoding", enat.TEXT_ENCODINGS)
def test_the_text_decides_and_its_padding_does_not(encoding):
    model = small(text_encoding=encoding)
    text = states()
    padded = jnp.pad(text, ((0, 0), (0, 2), (0, 0)), constant_values=50.0)
    given = steps(model, padded, LENGTHS)
    for i, n in enumerate(LENGTHS.tolist()):
        part = slice(i, i + 1)
        alone = steps(model, text[part, :n], rows=part)
        close(jax.tree.map(lambda x, part=part: x[part], given), alone)
    other = steps(model, padded.at[0, 0].add(1.0), LENGTHS)
    for (_, logits), (_, changed) in zip(given, other, strict=True):
        assert jnp.abs(logits - changed)[0].max() > 1e-3
        close(logits[1:], changed[1:])


@pytest.mark.parametrize("encoding", enat.TEXT_ENCODINGS)
@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_keys_and_values_that_are_kept_are_those_that_are_computed_anew(encoding, shared):
    model = small(text_encoding=encoding, shared_key_value=shared, num_classes=3)
    given = dict(length=LENGTHS, labels=jnp.array([0, 2, 1]))
    close(steps(model, states(), **given), steps(model, states(), **given, keep=True), 2e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_empty_text_is_no_text(encoding):
    model = small(text_encoding=encoding)
    close(steps(model, states(p=0)), steps(model, None))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_images_stay_with_their_texts(encoding):
    model = small(text_encoding=encoding)
    order = np.array([2, 0, 1])
    straight = steps(model, states(), LENGTHS)
    permuted = steps(model, states()[order], LENGTHS[order], rows=order)
    close(jax.tree.map(lambda x: x[order], straight), permuted)


def test_padding_is_attended_to_where_that_is_asked_for():
    text = states()
    model = small(attend_padding=True)
    close(steps(model, text, LENGTHS), steps(model, text))
    given, masked = steps(model, text, LENGTHS), steps(small(), text, LENGTHS)
    assert jnp.abs(given[1][1] - masked[1][1])[2].max() > 1e-3


def test_a_text_is_read_alone_and_once():
    """It depends on neither the image nor the batch, and no step changes it."""
    model = small()
    run = functools.partial(apply, model, parameters(model))
    modulation = run(LABELS, method="condition")
    together = run(Prompt(states(), LENGTHS), modulation, method="read")
    alone = run(Prompt(states()[1:2], LENGTHS[1:2]), modulation[:, 1:2], method="read")
    close(together.features[1, :2], alone.features[0, :2])
    _, after = run(IDS[:, :4], ORDER[:, :4], modulation, text=together, method="encode")
    chex.assert_trees_all_equal(after, together)


def test_at_every_step_the_text_is_read_with_the_new_tokens_and_never_projected():
    model = small(text_encoding="every_step")
    run = functools.partial(apply, model, parameters(model))
    modulation = run(LABELS, method="condition")
    window = run(Prompt(states()), modulation, method="read")
    read = []
    for n in (0, 4):
        _, seen = run(IDS[:, :n], ORDER[:, :n], modulation, text=window, method="encode")
        read.append(seen.features)
    assert jnp.abs(read[0] - window.features).max() > 1e-3  # also where no token is new
    assert jnp.abs(read[1] - read[0]).max() > 1e-3
    params = parameters(model)
    moved = params | {"project": jax.tree.map(lambda x: x + 1.0, params["project"])}
    run = functools.partial(apply, model, moved)
    _, seen = run(IDS[:, :4], ORDER[:, :4], modulation, text=window, method="encode")
    chex.assert_trees_all_equal(seen.features, read[1])


def test_both_encodings_have_the_same_parameters():
    once, every = (parameters(small(text_encoding=kind)) for kind in ENCODINGS)
    chex.assert_trees_all_equal(once, every)


def test_text_and_class_may_condition_together_or_alone():
    model = small(num_classes=3)
    labels, none = jnp.array([0, 1, 2]), jnp.full((3,), 3)
    found = [
        steps(model, text, labels=label)[1][1]
        for text in (states(), None)
        for label in (labels, none)
    ]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert jnp.abs(one - other).max() > 1e-3


def test_words_have_a_table_and_places():
    words = jnp.array([[1, 2, 0], [2, 1, 0], [1, 1, 0]])
    settings = dict(text_width=None, text_vocabulary=3, text_encoding="never")
    model = small(**settings, text_positions=True)
    found = steps(model, words, LENGTHS)[1][1]
    assert jnp.isfinite(found).all()
    rows = np.array([0, 0, 0])  # one image under two orders of the same words
    run = lambda model: steps(model, words, jnp.full((3,), 2), rows=rows)[1][1]  # noqa: E731
    assert jnp.abs(run(model)[0] - run(model)[1]).max() > 1e-3
    bag = run(small(**settings))
    close(bag[0], bag[1])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gradients_reach_the_text(encoding):
    model = small(text_encoding=encoding)

    def total(params, text):
        return sum(jnp.square(logits).mean() for _, logits in steps(model, text, params=params))

    params = parameters(model)
    grads, of_text = jax.jit(jax.grad(total, argnums=(0, 1)))(params, states())
    chex.assert_tree_all_finite(grads)
    assert jnp.abs(of_text).min(axis=(1, 2)).all()
    assert jnp.abs(grads["embed_text"]["dense"]["kernel"]).max() > 0
    assert jnp.abs(grads["modulation"]["constants"]).max(axis=(1, 2)).all()


def test_constants_start_as_a_plain_block():
    model = small()
    ids = jnp.zeros((1, 16), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids, LABELS[:1])["params"]
    assert not params["modulation"]["constants"].any()
    vectors = apply(model, params, LABELS, method="condition")
    chex.assert_shape(vectors, (3, 3, 8, 16))
    assert (vectors[:, :, [3 + 1, 7]] == 1).all()
    assert not vectors[:, :, [0, 1, 2, 3, 5, 6]].any()
    model = small(gate_bias=-0.7)
    params = jax.jit(model.init)(jax.random.key(0), ids, LABELS[:1])["params"]
    vectors = apply(model, params, LABELS, method="condition")
    np.testing.assert_allclose(vectors[:, :, [4, 7]], 0.3, rtol=1e-6)
    assert not vectors[:, :, [0, 1, 2, 3, 5, 6]].any()


def test_one_class_s_modulation_as_constants_gives_the_reference_s_logits():
    """The identity that ties a model of text to the goldens of the class-conditional one."""
    golden = Golden("enat_forward")
    order, _, num_visible = order_of(golden["masked_ids_prev"], golden["masked_ids"])
    ids, label = rows(golden["tokens"], order)[:1], golden["labels"][:1]
    fields = {name: getattr(golden.model, name) for name in golden.model.__dataclass_fields__}
    fields = {k: v for k, v in fields.items() if k not in ("parent", "name")}
    model = enat.ENAT(**fields | dict(num_classes=0, text_width=6, text_tokens=4))
    vectors = np.array(golden.apply(label, method="condition")[:, 0])
    vectors[:, [4, 7]] -= 1  # the gates of constants are offsets from 1
    params = dict(golden.params) | {
        "modulation": {"constants": vectors},
        "embed_text": {
            "dense": {"kernel": np.ones((6, model.width)), "bias": np.ones(model.width)}
        },
    }
    run = functools.partial(apply, model, params)
    modulation = run(label, method="condition")
    text = run(Prompt(jnp.zeros((1, 0, 6))), modulation, method="read")
    new = ids[:, :num_visible], order[:1, :num_visible]
    cache, text = run(*new, modulation, text=text, method="encode")
    logits = run(order[:1, num_visible:], modulation, cache, text=text, method="decode")
    expected = rows(golden["logits_without_reuse"][:1], order[:1, num_visible:])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


def test_one_layer_may_give_keys_and_values_of_context_and_tokens():
    model = small(shared_key_value=True)
    block = parameters(model)["encoder"]
    assert {name for name in block if name.startswith("key_value")} == {"key_value"}
    separate, shared = (jax.tree.map(jnp.asarray, parameters(small())) for _ in range(2))
    for stack in ("encoder", "decoder"):
        layer = shared[stack]["key_value_self"]
        separate[stack]["key_value_context"] = layer
        rest = {k: v for k, v in shared[stack].items() if not k.startswith("key_value")}
        shared[stack] = rest | {"key_value": layer}
    text = states()
    close(steps(model, text, params=shared), steps(small(), text, params=separate))


def test_the_projection_may_be_one_layer():
    model = small(reuse_projection="linear")
    project = parameters(model)["project"]
    assert list(project) == ["dense"] and project["dense"]["kernel"].shape == (16, 16)
    params = parameters(model) | {
        "project": {"dense": {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}}
    }
    (first, _), (second, _) = steps(model, states(), params=params)
    close(second[:, :4], first)


def test_features_may_be_reused_as_they_are():
    model = small(reuse_projection="none")
    assert "project" not in parameters(model)
    (first, _), (second, _) = steps(model, states())
    np.testing.assert_array_equal(second[:, :4], first)


SIZES = dict(
    num_tokens=256, codebook_size=1024, num_classes=0, width=768, num_heads=8, encoder_layers=15,
    decoder_layers=1, text_width=768, text_tokens=77, shared_key_value=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, millions",
    [
        (dict(reuse_projection="linear"), 116.2),
        (dict(reuse=False), 115.6),
        (dict(), 120.3),
        (dict(shared_key_value=False, reuse_projection="linear"), 135.1),
    ],
)
def test_sizes_of_the_paper_s_model_of_text(changes, millions):
    """The paper prints 116M (Table 5), which needs one layer of keys and values and a small f."""
    model = enat.ENAT(**SIZES | changes)
    inputs = jnp.zeros((1, 256), jnp.int32), jnp.zeros((1,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    found = sum(x.size for x in jax.tree.leaves(params))
    assert found / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(text_encoding="twice"), "text_encoding='twice' is unknown"),
        (dict(reuse_projection="two"), "reuse_projection='two' is unknown"),
        (dict(text_vocabulary=3), "not both"),
        (dict(text_tokens=0), "needs text_tokens"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        parameters(small(**changes))


@pytest.mark.parametrize(
    "changes, text, length, message",
    [
        (dict(text_width=None), states(), None, "takes no text"),
        ({}, states(p=8), None, "8 tokens is longer than text_tokens=7"),
        ({}, states()[..., :5], None, "the prompt's tokens must have the shape"),
        ({}, states(), jnp.array([1, 2]), "its length must have the shape"),
    ],
)
def test_texts_that_do_not_fit_are_refused(changes, text, length, message):
    model = small(**changes)
    modulation = jnp.zeros((3, 3, 8, 16))
    with pytest.raises(ValueError, match=message):
        apply(model, parameters(model), Prompt(text, length), modulation, method="read")
