"""TODO."""

import dataclasses

import numpy as np

from enat_jax.evaluation import similarity
from enat_jax.inference import masked_scores
from enat_jax.models import nat


def quadrant_losses(
    model, codes, labels, *, seed=0, batch_size=similarity.BATCH_SIZE, progress=None
):
    """Loss of masked tokens of a NAT, whole and without each quadrant of its attention.

    Args:
        model: ``Generator`` of a NAT that was trained with all of its attention.
        codes: int [n, l] in raster order, best of images it was not trained on; labels: int [n].
        seed: of the random places that are visible, the same for all quadrants.
        batch_size: images at a time; progress: called with the number of passes over a batch done.

    Returns:
        dict by quadrant ("none" and ``nat.QUADRANTS``) of dicts "loss" (nats) and "increase" over
        "none", each mean and standard error over images by ``masked_scores.VISIBLE_SHARES``.

    Raises:
        ValueError: the model is no NAT, or one that lacks a quadrant already, or there are fewer
            than two images.
    """
    network = model.model
    if not isinstance(network, nat.NAT) or network.disabled_attention != "none":
        raise ValueError("quadrants of the attention are those of a NAT that has all four of them")
    if len(codes) < 2:
        raise ValueError(f"{len(codes)} images: a standard error needs two")
    done, losses = 0, {}
    for disabled in ("none", *nat.QUADRANTS):
        cut = dataclasses.replace(model, model=network.clone(disabled_attention=disabled))
        batches = []
        for start in range(0, len(codes), batch_size):
            # One batch size, one compilation: the last batch reaches back.
            first = max(0, min(start, len(codes) - batch_size))
            part = slice(first, first + batch_size)
            scores = [
                cut.masked_scores(
                    codes[part], labels[part], round(network.num_tokens * share), seed + first
                )[0]
                for share in masked_scores.VISIBLE_SHARES
            ]
            of_images = np.stack([np.asarray(x, np.float64).mean(axis=1) for x in scores], axis=1)
            batches.append(of_images[start - first :])
            done += 1
            if progress is not None:
                progress(done)
        losses[disabled] = np.concatenate(batches)
    return {
        name: {
            "loss": similarity.mean_and_error(loss),
            "increase": similarity.mean_and_error(loss - losses["none"]),
        }
        for name, loss in losses.items()
    }


def quadrants_markdown(result):
    """The table of a result of ``_run_quadrants``."""
    head = [f"{share:.4g} visible" for share in masked_scores.VISIBLE_SHARES]
    lines = [f"| without | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for name, found in result["quadrants"].items():
        key = "loss" if name == "none" else "increase"
        sign = "" if name == "none" else "+"
        cells = [similarity.cell(found[key], i, sign) for i in range(len(head))]
        lines.append(f"| {'nothing' if name == 'none' else name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Loss (nats) of masked tokens of {result['num_images']} images, and its increase without "
        "one quadrant of the attention, cut after training; mean ± standard error over images.",
    ]
    return "\n".join(lines) + "\n"
