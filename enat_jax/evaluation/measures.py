"""Two sets of images as numbers: Fréchet distances, Inception score, precision and recall, PSNR.

Every number comes with its standard error over the images, as far as what it needs was kept.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from enat_jax.evaluation import features, perceptual_distance, statistics
from enat_jax.metrics import bootstrap, fid, inception_score, manifold

REPLICATES = 100  # of the bootstrap
REPLICATES_OF_MANY = 30  # with more than FEW features, where each takes a second or more
FEW = 512
ENOUGH_IMAGES = 5  # times as many as features: then a closed form serves instead of replicates
SEED = 0  # of the bootstrap, and of the splits of the Inception score
SPLITS = 10  # of the Inception score, by convention
NEIGHBOURS = {"precision": 3, "density": 5}  # Kynkäänniemi et al. and ADM; Naeem et al.

Metric = dict[str, Any]  # a number of a card, as ``entry`` makes it


def evaluate_set(
    own: statistics.Statistics,
    reference: statistics.Statistics,
    rows: Mapping[str, np.ndarray],
    network: features.Features,
    *,
    reconstructed: bool = False,
    replicates: int = REPLICATES,
) -> tuple[dict[str, Metric], list[str]]:
    """Measures all that can be measured.

    Args:
        own: statistics of the images that are judged.
        reference: statistics of those they are compared with.
        rows: what was kept of single images, see ``accumulate.Collected``.
        network: the features of both.
        reconstructed: whether the images are reconstructions of other images.
        replicates: of the bootstrap, where it is used; 0: no standard errors.

    Returns:
        A card's ``metrics``, the one to judge by first, and sentences on what is not in it.
    """
    metrics, missing = _distances(own, reference, network, reconstructed, replicates)
    if "probabilities" in rows and not reconstructed and len(rows["probabilities"]) >= 2 * SPLITS:
        metrics["inception_score"] = _inception_score(rows["probabilities"], replicates)
    if "squared_error" in rows:
        metrics["psnr"] = _psnr(rows["squared_error"][:, 0].astype(np.float64))
    for kind, title in perceptual_distance.TITLES.items():
        if kind in rows:
            metrics[kind] = _lpips(title, rows[kind][:, 0].astype(np.float64))
    kept = [None if side.pool is None else len(side.pool) for side in (own, reference)]
    reason = why_no_overlap(*kept)
    if own.pool is None or reference.pool is None or reason:
        missing.append(f"Precision, recall, density and coverage are not measured: {reason}.")
    else:
        metrics |= _manifold(own.pool, reference.pool, replicates)
    if not replicates:
        missing.append("Intervals were not asked for: small differences may be chance.")
    return metrics, missing


def why_no_overlap(own: int | None, reference: int | None) -> str | None:
    """Says why precision, recall, density and coverage cannot be measured, None if they can.

    Args:
        own: images that are judged and whose features are kept; None: none are kept.
        reference: the same of those they are compared with.
    """
    least = max(NEIGHBOURS.values())
    if own is None or reference is None:
        return (
            "the reference holds no features of single images; statistics that evaluate "
            "--make-reference writes do"
        )
    if min(own, reference) <= least:
        return (
            f"they need the features of more than {least} images on both sides, and there are "
            f"those of {own:,} against {reference:,}"
        )
    return None


def about_intervals(replicates: int) -> dict[str, Any]:
    """Returns a card's section ``intervals``."""
    about = "No intervals were asked for."
    if replicates:
        about = (
            "95% intervals are the value plus and minus 1.96 standard errors, from bootstrap "
            "replicates over the images or, where as good, from its first order. They tell how "
            "much another draw of as many images would change; not other trainings, other "
            "references, or the bias of few images. Those of precision and density take the "
            "reference as given; those of recall and coverage are lower bounds."
        )
    return {"about": about, "replicates": replicates, "seed": SEED}


def _distances(
    own: statistics.Statistics,
    reference: statistics.Statistics,
    network: features.Features,
    reconstructed: bool,
    replicates: int,
) -> tuple[dict[str, Metric], list[str]]:
    """Returns the Fréchet distances, and sentences on those that are not measured."""
    label = network.description["label"]
    name = "fid" if network.is_inception else "frechet_distance"
    prefix = "r" if network.is_inception else "Reconstruction: "
    if reconstructed:
        name, label = f"r{name}", prefix + label
    value = fid.frechet_distance(*own.gaussian("pool"), *reference.gaussian("pool"))
    error: float | None = None
    used = 0
    if replicates and own.pool is not None:
        error, used = _distance_error(own.pool, reference.gaussian("pool"), replicates)
    metrics = {name: entry(label, value, error, used, "lower", "")}
    missing: list[str] = []
    if network.is_inception and "spatial" in reference.moments and not reconstructed:
        value = fid.frechet_distance(*own.gaussian("spatial"), *reference.gaussian("spatial"))
        about = "spatial features, which are not kept: no interval"
        metrics["sfid"] = entry("sFID", value, None, 0, "lower", about)
    elif network.is_inception and not reconstructed:
        missing.append("sFID is not measured: the reference has no spatial features.")
    return metrics, missing


def _distance_error(
    pool: Float[np.ndarray, "n d"], reference: tuple[np.ndarray, np.ndarray], replicates: int
) -> tuple[float, int]:
    """Returns the standard error of a Fréchet distance, and how many replicates it took."""
    if len(pool) >= ENOUGH_IMAGES * pool.shape[1]:
        return bootstrap.of_frechet_distance_linear(pool, *reference), 0
    used = min(replicates, REPLICATES_OF_MANY) if pool.shape[1] > FEW else replicates
    error = bootstrap.of_frechet_distance(pool, *reference, num_replicates=used, seed=SEED)
    return error, used


def _inception_score(probabilities: Float[np.ndarray, "n c"], replicates: int) -> Metric:
    value, spread = inception_score.scores(probabilities, SPLITS, SEED)
    error = None
    if replicates:
        splits = inception_score.assign_splits(len(probabilities), SPLITS, SEED)
        error = bootstrap.of_inception_score(
            probabilities, splits, num_replicates=replicates, seed=SEED
        )
    about = f"mean of {SPLITS} splits in a random order, standard deviation {spread:.3g}"
    return entry("Inception score", value, error, replicates, "higher", about)


def _psnr(squared_error: Float[np.ndarray, " n"]) -> Metric:
    mean = max(float(squared_error.mean()), 1e-12)
    # To first order.
    error = 10 / math.log(10) * bootstrap.of_mean(squared_error) / mean
    about = "dB, of the mean squared error of all images"
    return entry("PSNR", -10 * math.log10(mean), error, 0, "higher", about)


def _lpips(title: str, distances: Float[np.ndarray, " n"]) -> Metric:
    about = "mean distance of originals and reconstructions; another network gives other values"
    return entry(title, distances.mean(), bootstrap.of_mean(distances), 0, "lower", about)


def _manifold(
    generated: Float[np.ndarray, "m d"], real: Float[np.ndarray, "n d"], replicates: int
) -> dict[str, Metric]:
    found = manifold.overlap(
        real,
        generated,
        precision_neighbours=NEIGHBOURS["precision"],
        density_neighbours=NEIGHBOURS["density"],
    )
    errors = bootstrap.of_overlap(found) if replicates else {}
    entries = {}
    for name in ("precision", "recall", "density", "coverage"):
        k = NEIGHBOURS["precision" if name in ("precision", "recall") else "density"]
        about = f"k = {k}; {len(generated):,} against {len(real):,} images"
        value = getattr(found, name)
        made = entry(name.capitalize(), value, errors.get(name), 0, "higher", about)
        if errors:  # no interval goes beyond what is possible
            most = math.inf if name == "density" else 1.0
            made["low"], made["high"] = max(made["low"], 0.0), min(made["high"], most)
        entries[name] = made
    return entries


def entry(
    title: str, value: float, error: float | None, replicates: int, better: str, about: str
) -> Metric:
    """Returns a number of a card with its interval.

    Args:
        title: for people.
        value: of the measure.
        error: its standard error; None: not known.
        replicates: of the bootstrap that the error took.
        better: "lower" or "higher"; "reference" of what is neither.
        about: what else is to be known.
    """
    low, high = (None, None) if error is None else bootstrap.interval(value, error)
    return {
        "title": title,
        "value": float(value),
        "standard_error": None if error is None else float(error),
        "low": low,
        "high": high,
        "replicates": replicates,
        "better": better,
        "about": about,
    }
