"""Editing: masks of pixels and of tokens, and what stays as it is."""

import numpy as np
import pytest
import tiny

from enat_jax.inference import editing, sampling


@pytest.fixture(scope="module")
def model():
    return tiny.make_generator()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (4, *tiny.IMAGE_SIZE, 1)).astype(np.uint8)


def masks_of_sizes(*sizes):
    """Squares in the upper left corner, of pixels; a token has 2x2."""
    masks = np.zeros((len(sizes), *tiny.IMAGE_SIZE), bool)
    for mask, size in zip(masks, sizes, strict=True):
        mask[:size, :size] = True
    return masks


def test_any_masked_pixel_masks_its_token_and_the_mask_grows_on_all_sides():
    masks = np.zeros((2, 8, 12), bool)
    masks[0, 3, 4] = True
    rows = lambda grow: editing.token_masks(masks, (4, 6), grow)[0].reshape(4, 6)  # noqa: E731
    expected = np.zeros((4, 6), bool)
    expected[1, 2] = True
    np.testing.assert_array_equal(rows(0), expected)
    expected[0:3, 1:4] = True
    np.testing.assert_array_equal(rows(1), expected)
    assert rows(10**9).all() and not editing.token_masks(masks, (4, 6), 10**9)[1].any()
    for wrong in (-1, 0.5, True):
        with pytest.raises(ValueError, match="grow="):
            editing.token_masks(masks, (4, 6), wrong)


def test_what_is_hidden_has_no_effect_on_what_is_encoded(images):
    masks = masks_of_sizes(0, 3, 5, 8)
    other = np.where(masks[..., None], 255 - images, images)
    found = editing.neutralised(images, masks)
    np.testing.assert_array_equal(editing.neutralised(other, masks), found)
    np.testing.assert_array_equal(found[~masks], images[~masks])
    assert (found[3] == editing.GREY).all()


def test_blending_keeps_what_is_outside_and_fades_over_the_seam(images):
    masks, filled = masks_of_sizes(0, 3, 5, 8), np.full_like(images, 200)
    hard = editing.blended(images, filled, masks, 0)
    np.testing.assert_array_equal(hard, np.where(masks[..., None], filled, images))
    soft = editing.blended(images, filled, masks, 2)
    np.testing.assert_array_equal(soft[:, 7, 7][:3], images[:, 7, 7][:3])
    expected = np.rint(200 * 2 / 3 + images[1, 0, 3, 0] / 3)
    assert soft[1, 0, 3, 0] == expected and (soft[1, :3, :3] == 200).all()


@pytest.mark.parametrize(
    ("sides", "shape", "kept"),
    [
        (dict(left=3), (8, 8), (slice(0, 8), slice(0, 5))),  # the right end falls off
        (dict(right=3), (8, 8), (slice(0, 8), slice(3, 8))),
        (dict(left=2, right=2, top=4), (8, 8), (slice(0, 4), slice(2, 6))),
        (dict(left=2, bottom=5), (3, 6), (slice(0, 3), slice(0, 6))),  # nothing falls off
    ],
)
def test_outpainting_moves_the_picture_and_masks_the_room(sides, shape, kept):
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)[: shape[0], : shape[1]]
    mask = image[..., 0] == 1
    found, found_mask = editing.outpainted(image, mask, (8, 8), **sides)
    new = np.ones((8, 8), bool)
    top, left = sides.get("top", 0), sides.get("left", 0)
    height, width = (x.stop - x.start for x in kept)
    new[top : top + height, left : left + width] = mask[kept]
    np.testing.assert_array_equal(found_mask, new)
    np.testing.assert_array_equal(found[top : top + height, left : left + width], image[kept])


@pytest.mark.parametrize(
    ("sides", "words"),
    [
        (dict(left=8), "leaves nothing"),
        (dict(left=-1), "numbers of at least 0"),
        (dict(), "is 9 pixels wide and must be exactly 8"),
        (dict(left=2, top=2), "is 5 pixels high and must be at least 6"),
    ],
)
def test_outpainting_that_is_not_possible_is_refused(sides, words):
    image = np.zeros((5, 9, 1), np.uint8)
    with pytest.raises(ValueError, match=words):
        editing.outpainted(image, np.zeros((5, 9), bool), (8, 8), **sides)


def test_tokens_that_are_kept_stay_and_the_rest_depends_on_the_image_alone(model):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, tiny.CODES, (6, 16))
    numbers = np.array([0, 3, 12, 16, 5, 16])
    masked = rng.permuted(np.tile(np.arange(16), (6, 1)), axis=1) < numbers[:, None]
    labels = [0, 1, 2, 0, 1, 3]
    fill = lambda rows: model.fill_tokens(  # noqa: E731
        tokens[rows], masked[rows], np.array(labels)[rows], 7, 3, 6
    )
    found = fill(np.arange(6))
    np.testing.assert_array_equal(found[~masked], tokens[~masked])
    assert (found != tokens).any() and found.max() < tiny.CODES
    # Nothing kept: plain sampling, by its own compiled program.
    plain = model.sample_tokens(labels, 7, 3, 6)
    np.testing.assert_array_equal(found[[3, 5]], plain[[3, 5]])
    # Another image's number is another: that of its place counts from first_index.
    np.testing.assert_array_equal(fill(np.arange(4)), found[:4])


def test_an_edit_of_pictures(model, images):
    masks, labels = masks_of_sizes(0, 2, 5, 8), [0, 1, 2, 3]
    edited = model.edit(images, masks, labels, grow=0, blend=0)
    assert edited.shape == images.shape and edited.dtype == np.uint8
    np.testing.assert_array_equal(edited[~masks], images[~masks])
    left = model.edit(images, masks, labels, grow=0, blend=None)
    np.testing.assert_array_equal(edited[masks], left[masks])
    codec = model.tokenizer
    # All kept, the tokenizer's reconstruction; nothing kept, what the model draws.
    np.testing.assert_array_equal(left[0], codec.decode(codec.encode(images))[0])
    np.testing.assert_array_equal(left[3], model.sample(labels)[3])
    # What was hidden has no effect.
    other = np.where(masks[..., None], 255 - images, images)
    np.testing.assert_array_equal(model.edit(other, masks, labels, grow=0, blend=0), edited)
    no_class = model.edit(images, masks, [3] * 4, grow=0, blend=0)
    np.testing.assert_array_equal(model.edit(images, masks, grow=0, blend=0), no_class)


def test_a_variation_keeps_a_random_share_of_the_tokens(model, images):
    masked = np.zeros((4, 16), bool)
    masked[3] = True
    found = editing.with_share_dropped(masked, 0.25, 5, np.array([0, 1, 1, 2]))
    np.testing.assert_array_equal(found.sum(axis=1), [12, 12, 12, 16])
    assert (found[0] != found[1]).any() and (found[1] == found[2]).all()
    varied = model.edit(images, labels=[0] * 4, keep=0.5)
    reconstruction = model.tokenizer.decode(model.tokenizer.encode(images))
    assert (varied != reconstruction).any()
    np.testing.assert_array_equal(model.edit(images, keep=1.0, blend=None), reconstruction)
    np.testing.assert_array_equal(
        model.edit(images, keep=0.0, labels=[0] * 4), model.sample([0] * 4)
    )


def test_forty_masks_compile_four_samplers_at_most(model):
    model = model.with_settings(num_steps=2)
    rng = np.random.default_rng(2)
    before = sampling.sample_tokens.jitted._cache_size()
    for _ in range(40):
        tokens = rng.integers(0, tiny.CODES, (5, 16))
        masked = rng.random((5, 16)) < rng.random((5, 1))
        found = model.fill_tokens(tokens, masked, batch_size=5)
        np.testing.assert_array_equal(found[~masked], tokens[~masked])
    assert sampling.sample_tokens.jitted._cache_size() - before <= 4


@pytest.mark.slow
def test_edits_with_prompts():
    model = tiny.make_word_generator()
    images = np.zeros((2, *tiny.IMAGE_SIZE, 1), np.uint8)
    masks = masks_of_sizes(6, 6)
    texts = dict(prompts=["a cat", "two dog"], negative_prompts=["a dog", "red"])
    first = model.edit(images, masks, **texts, grow=0, blend=None)
    other = model.edit(images, masks, **texts | dict(prompts=["a cat", "blue"]), grow=0, blend=None)
    np.testing.assert_array_equal(first[0], other[0])
    # Without a text it is the empty one.
    empty = model.edit(images, masks, prompts=["", ""], grow=0)
    np.testing.assert_array_equal(model.edit(images, masks, grow=0), empty)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(images=np.zeros((4, 8, 9, 1), np.uint8)), "do not suit this tokenizer"),
        (dict(images=np.zeros((4, 8, 8, 1))), "images of float64"),
        (dict(masks=np.zeros((4, 8, 9), bool)), r"masks of bool \(4, 8, 9\)"),
        (dict(masks=np.zeros((4, 8, 8), np.uint8)), "masks of uint8"),
        (dict(labels=[0, 1]), "2 labels or prompts of 4 images"),
        (dict(labels=[0, 1, 2, 4]), "label 4 is out of range"),
        (dict(prompts=["a"] * 4), "reads no texts"),
        (dict(grow=-1), "grow=-1"),
        (dict(blend=-1), "blend=-1"),
        (dict(blend=float("nan")), "blend=nan"),
        (dict(keep=1.5), "keep=1.5"),
        (dict(seed=-1), "seed"),
        (dict(batch_size=0), "batch_size=0"),
    ],
)
def test_impossible_edits_are_refused(model, images, change, words):
    given = dict(images=images, masks=masks_of_sizes(2, 2, 2, 2)) | change
    with pytest.raises(ValueError, match=words):
        model.edit(**given)
