"""Squared Euclidean distances and nearest neighbours of feature vectors, by scikit-learn."""

import numpy as np
from jaxtyping import Float, Int


def squared_distances(
    features: Float[np.ndarray, "n d"], references: Float[np.ndarray, "r d"]
) -> Float[np.ndarray, "n r"]:
    """Returns the squared distance of every feature vector to every reference.

    They are computed from products, in the type of the vectors, and are never negative.
    """
    from sklearn.metrics import pairwise  # slow to import, and few programs need it

    return pairwise.euclidean_distances(features, references, squared=True)


def nearest(
    features: Float[np.ndarray, "n d"],
    references: Float[np.ndarray, "r d"],
    number: int,
    own: Int[np.ndarray, " n"] | None = None,
) -> tuple[Float[np.ndarray, "n number"], Int[np.ndarray, "n number"]]:
    """Returns the squared distances to the nearest references, ascending, and their indices.

    The search compares all pairs, a few hundred vectors at a time: memory does not grow with n * r.

    Args:
        features: the vectors, float64 and finite.
        references: the vectors among which neighbours are sought, float64 and finite.
        number: of neighbours, from 1 to r (to r - 1 with ``own``).
        own: the index of the reference that is the vector itself and does not count, where the
            vectors are taken from the references.
    """
    from sklearn import neighbors  # slow to import, and few programs need it

    found = number + (own is not None)
    search = neighbors.NearestNeighbors(
        n_neighbors=found, algorithm="brute", metric="sqeuclidean"
    ).fit(references)
    squares, indices = search.kneighbors(features)
    if own is None:
        return squares, indices
    itself = indices == np.asarray(own)[:, None]
    # Of a vector with many copies, the copies may fill all places: then the last one goes.
    itself[~itself.any(axis=1), -1] = True
    shape = (len(features), number)
    return squares[~itself].reshape(shape), indices[~itself].reshape(shape)
