"""Means over images with their standard errors, as JSON values and as text."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

Mean = Mapping[str, Any]  # "mean" and "standard_error", as ``mean_and_error`` returns them


def mean_and_error(values: Float[np.ndarray, "b ..."]) -> Mean:
    """Returns the mean over the images and its standard error.

    Args:
        values: of each image; nan where an image has none.

    Returns:
        "mean" and "standard_error", nested lists of the shape of one image's values; None where
        there is no number, and for the error where there are fewer than two images.
    """
    values = np.asarray(values, np.float64)
    there = ~np.isnan(values)
    count = there.sum(axis=0)
    mean = np.where(there, values, 0).sum(axis=0) / np.maximum(count, 1)
    squares = np.where(there, values - mean, 0) ** 2
    error = np.sqrt(squares.sum(axis=0) / np.maximum(count - 1, 1) / np.maximum(count, 1))
    return {"mean": _plain(mean, count > 0), "standard_error": _plain(error, count > 1)}


def _plain(values: np.ndarray, known: np.ndarray) -> Any:
    """Returns nested lists, or a number, with None for what is not known."""
    return np.where(known, values.astype(object), np.array(None)).tolist()


def text(values: Mean, index: int | None = None, sign: str = "") -> str:
    """Returns ``mean ± standard error``, a dash where there is no mean.

    Args:
        values: a mean and its error, or lists of them.
        index: which of the lists' entries.
        sign: "+" writes the sign of positive means, too.
    """
    mean, error = values["mean"], values["standard_error"]
    if index is not None:
        mean, error = mean[index], error[index]
    if mean is None:
        return "-"
    return f"{mean:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
