"""The expected work of a training step in shape buckets, added up split by split."""

import numpy as np

from enat_jax.schedules import reveal, shape_buckets


def of(num_tokens, splits, buckets, cost):
    """``(padded, exact)`` work: in the windows of the buckets, and without any padding.

    ``cost`` as in ``shape_buckets.choose``; the buckets must hold all splits.
    """
    mass = splits.visible_probabilities(num_tokens)
    padded = exact = 0.0
    for reuse, share in ((False, 1 - splits.reuse_probability), (True, splits.reuse_probability)):
        work = {b: float(cost(*b.windows)) for b in buckets if b.reuse == reuse}
        for visible in np.flatnonzero(mass) if share else ():
            cached = splits.cached_probabilities(visible) if reuse else np.ones(1)
            counts = np.arange(len(cached))
            exact_work = cost(counts, visible - counts, visible, num_tokens - visible)
            padded_work = [
                work[shape_buckets.find(buckets, reveal.Split(reuse, int(c), int(visible)))]
                for c in counts
            ]
            exact += share * mass[visible] * float((cached * exact_work).sum())
            padded += share * mass[visible] * float((cached * padded_work).sum())
    return padded, exact
