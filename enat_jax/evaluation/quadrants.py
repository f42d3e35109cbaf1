"""The analysis of attention quadrants (paper Figure 2): what a NAT loses without one of the four.

A quadrant is the attention from masked or visible tokens to masked or visible ones, see
``models.nat``. It is cut out of a model that was trained with all four.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from enat_jax.data import records
from enat_jax.evaluation import means
from enat_jax.inference import generator, masked_scores
from enat_jax.models import nat
from enat_jax.runtime.markdown import table as markdown_table

BATCH_SIZE = 50  # images per call of the network


def losses(
    model: generator.Generator,
    codes: Int[np.ndarray, "n l"],
    labels: Int[np.ndarray, " n"],
    *,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, means.Mean]]:
    """Measures the loss of masked tokens of a NAT, whole and without each quadrant.

    Args:
        model: a NAT that was trained with all of its attention.
        codes: in raster order, best of images that it was not trained on.
        labels: of the images.
        seed: of the random places that are visible, the same for all quadrants.
        batch_size: images at a time.
        progress: called with the number of passes over a batch done.

    Returns:
        By quadrant, "none" and ``nat.QUADRANTS``, the "loss" (nats) and its "increase" over "none",
        each the mean and standard error over images by ``masked_scores.VISIBLE_SHARES``.

    Raises:
        ValueError: if the model is no NAT, or one that lacks a quadrant already, or there are fewer
            than two images.
    """
    network = model.model
    if not isinstance(network, nat.NAT) or network.disabled_attention != "none":
        raise ValueError("quadrants of the attention are those of a NAT that has all four of them")
    found = {}
    for i, disabled in enumerate(("none", *nat.QUADRANTS)):
        cut = dataclasses.replace(model, model=network.clone(disabled_attention=disabled))

        def report(done: int, before: int = i * -(-len(codes) // batch_size)) -> None:
            progress(before + done)

        found[disabled] = losses_of_images(
            cut, codes, labels, seed=seed, batch_size=batch_size, progress=report
        )
    return {
        name: {
            "loss": means.mean_and_error(loss),
            "increase": means.mean_and_error(loss - found["none"]),
        }
        for name, loss in found.items()
    }


def losses_of_images(
    model: generator.Generator,
    codes: Int[np.ndarray, "n l"],
    labels: Int[np.ndarray, " n"],
    *,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int], None] = lambda done: None,
) -> Float[np.ndarray, "n shares"]:
    """Returns the mean loss (nats) of each image's masked tokens by share visible, float64.

    Args:
        model: of any kind; the shares are ``masked_scores.VISIBLE_SHARES``.
        codes, labels, seed, batch_size: as for ``losses``.
        progress: called with the number of batches done.

    Raises:
        ValueError: there are fewer than two images.
    """
    if len(codes) < 2:
        raise ValueError(f"{len(codes)} images: a standard error needs two")
    batches = []
    batched = records.equal_batches(len(codes), batch_size)
    for done, (part, known) in enumerate(batched, start=1):
        scores = [
            model.masked_scores(
                codes[part], labels[part], round(codes.shape[1] * share), seed + part.start
            )[0]
            for share in masked_scores.VISIBLE_SHARES
        ]
        of_images = np.stack([np.asarray(x, np.float64).mean(axis=1) for x in scores], axis=1)
        batches.append(of_images[known:])
        progress(done)
    return np.concatenate(batches)


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the table of a result: ``losses`` as "quadrants", and "num_images"."""
    shares = [f"{share:.4g} visible" for share in masked_scores.VISIBLE_SHARES]
    rows = []
    for name, found in result["quadrants"].items():
        key, sign = ("loss", "") if name == "none" else ("increase", "+")
        cells = [means.text(found[key], i, sign) for i in range(len(shares))]
        rows.append(["nothing" if name == "none" else name, *cells])
    return (
        f"{markdown_table(['without', *shares], rows)}\n\n"
        f"Loss (nats) of masked tokens of {result['num_images']} images, and its increase without "
        "one quadrant of the attention, cut after training; mean ± standard error over images.\n"
    )
