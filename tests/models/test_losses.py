"""The losses of the transformer and of discriminators, on cases worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.models import losses


def test_smoothed_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    value = losses.smoothed_cross_entropy(logits, jnp.array([0]), 0.1)
    target = np.array([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3])
    np.testing.assert_allclose(value, -(target * np.log([0.5, 0.25, 0.25])).sum(), rtol=1e-6)


def test_the_masked_mean_ignores_padding_even_nan():
    values = jnp.array([[np.nan, 1.0, 2.0], [np.nan, 3.0, 6.0]])
    real = jnp.array([False, True, True])
    assert losses.masked_mean(values, real, 2) == 3.0
    gradient = jax.grad(lambda v: losses.masked_mean(v, real, 2))(values)
    np.testing.assert_array_equal(gradient, [[0, 0.25, 0.25], [0, 0.25, 0.25]])


def test_every_real_slot_weighs_the_same_where_images_have_different_numbers():
    """One slot of the first image and three of the second: not the mean of the images' means."""
    values = jnp.array([[np.nan, np.nan, 8.0], [1.0, 2.0, 5.0]])
    num_real = jnp.array([1, 3])
    real = jnp.arange(3) >= 3 - num_real[:, None]
    assert losses.masked_mean(values, real, num_real) == (8 + 1 + 2 + 5) / 4
    gradient = jax.grad(lambda v: losses.masked_mean(v, real, num_real))(values)
    np.testing.assert_array_equal(gradient, [[0, 0, 0.25], [0.25, 0.25, 0.25]])


def test_one_count_and_the_same_count_of_each_image_give_the_same_mean():
    values = jnp.arange(6.0).reshape(2, 3)
    expected = losses.masked_mean(values, None, 3)
    assert losses.masked_mean(values, None, jnp.array([3, 3])) == expected == 2.5


def test_wrong_shapes_are_refused():
    logits = jnp.zeros((2, 3, 5))
    with pytest.raises(ValueError, match=r"targets must have the shape .*=2, .*=3\], not \[2, 4\]"):
        losses.smoothed_cross_entropy(logits, jnp.zeros((2, 4), jnp.int32), 0.0)
    with pytest.raises(ValueError, match=r"values must have the shape \[b, m\], not \[3\]"):
        losses.masked_mean(jnp.zeros(3), None, 3)
    with pytest.raises(ValueError, match=r"real must have the shape \[b=1 or 2, m=3\], not \[3, 3"):
        losses.masked_mean(jnp.zeros((2, 3)), jnp.ones((3, 3), bool), 3)
    with pytest.raises(ValueError, match=r"num_real must have the shape \[b=2\], not \[3\]"):
        losses.masked_mean(jnp.zeros((2, 3)), None, jnp.ones(3, jnp.int32))


def test_a_discriminator_that_knows_nothing_has_the_loss_that_is_said():
    nothing = jnp.zeros((2, 3, 3))
    assert losses.discriminator_loss("hinge", nothing, nothing) == 1
    found = losses.discriminator_loss("non_saturating", nothing, nothing)
    np.testing.assert_allclose(found, 2 * np.log(2), rtol=1e-6)
    for loss in (losses.discriminator_loss, losses.generator_loss):
        with pytest.raises(ValueError, match="adversarial loss 'wgan' is unknown: one of hinge, n"):
            loss("wgan", *[nothing] * (loss.__code__.co_argcount - 1))


def test_lecam_takes_the_averages_from_before_the_step():
    """And its gradient reaches the logits, never the averages."""
    means = jnp.array([0.5, -0.25])
    arguments = (jnp.float32(1.0), jnp.float32(-2.0), means)
    value, gradients = jax.value_and_grad(losses.lecam, (0, 1, 2))(*arguments)
    assert value == 1.25**2 + 2.5**2
    np.testing.assert_array_equal(jnp.stack(gradients[:2]), [2.5, -5])
    np.testing.assert_array_equal(gradients[2], [0, 0])
    assert losses.lecam(jnp.float32(-1.0), jnp.float32(1.0), means) == 0
    expected = [0.999 * 0.5 + 0.001 * 1.0, 0.999 * -0.25 - 0.001 * 2.0]
    np.testing.assert_allclose(losses.updated_lecam(*arguments), expected, rtol=1e-6)


def test_the_gradient_penalty_by_hand():
    """Logits w . x of each row of a picture: the mean's gradient is w / rows in every row."""
    w = jnp.array([3.0, 4.0])

    def apply(images):
        return (images * w[None, None, :, None]).sum((2, 3))[..., None]

    images = jnp.ones((5, 2, 2, 1))
    # Two rows of |w / 2| ** 2 = 6.25 each, the same for each of the five pictures.
    assert losses.gradient_penalty(apply, images) == 12.5
