"""Means over images with their standard errors."""

import numpy as np

from enat_jax.evaluation import means


def test_means_have_errors_and_gaps():
    values = np.array([[np.nan, 1.0, 1.0], [np.nan, 3.0, np.nan]])
    assert means.mean_and_error(values) == {
        "mean": [None, 2.0, 1.0],
        "standard_error": [None, 1.0, None],
    }


def test_means_as_text():
    found = means.mean_and_error(np.array([[1.0, np.nan], [2.0, np.nan]]))
    assert means.text(found, 0, "+") == "+1.5000 ± 0.5000"
    assert means.text(found, 1) == "-"
    assert means.text(means.mean_and_error(np.array([0.25]))) == "0.2500"
