"""The small convolutional networks, on cases that are worked out by hand."""

import jax.numpy as jnp
import numpy as np

from enat_jax.models import classifier


def test_pixels_become_minus_one_to_one():
    found = classifier.to_float(jnp.array([0, 51, 255], jnp.uint8))
    np.testing.assert_allclose(found, [-1, -0.6, 1], atol=1e-6)


def test_one_convolution_of_ones_sums_neighbours_and_means_over_places():
    """A 4x4 image of ones: at stride 2 windows of 9, 6, 6 and 4 pixels lie within it."""
    params = {"conv_0": {"kernel": jnp.ones((3, 3, 1, 2)), "bias": jnp.array([-5.0, 0.0])}}
    model = classifier.ConvFeatures((2,))
    found = model.apply({"params": params}, jnp.ones((1, 4, 4, 1)))
    np.testing.assert_allclose(found, [[(4 + 1 + 1 + 0) / 4, (9 + 6 + 6 + 4) / 4]])


def test_classes_are_a_linear_function_of_the_features():
    model = classifier.Classifier(num_classes=2, image_channels=1, widths=(1,))
    params = {
        "features": {"conv_0": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}},
        "head": {"kernel": jnp.array([[2.0, -1.0]]), "bias": jnp.array([0.5, 0.0])},
    }
    features, logits = model.apply({"params": params}, jnp.ones((1, 2, 2, 1)))
    np.testing.assert_allclose(features, [[4.0]])
    np.testing.assert_allclose(logits, [[8.5, -4.0]])
