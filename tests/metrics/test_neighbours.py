import numpy as np
import pytest

from enat_jax.metrics import neighbours

LINE = np.array([[0.0], [1], [3], [10]])


def test_neighbours_by_hand():
    squares, indices = neighbours.nearest(np.array([[2.5]]), LINE, 3)
    assert indices.tolist() == [[2, 1, 0]]
    np.testing.assert_allclose(squares, [[0.25, 2.25, 6.25]])
    np.testing.assert_allclose(neighbours.squared_distances(LINE[:1], LINE), [[0, 1, 9, 100]])


def test_a_vector_is_not_its_own_neighbour():
    squares, indices = neighbours.nearest(LINE[[3, 0]], LINE, 2, own=[3, 0])
    assert indices.tolist() == [[2, 1], [1, 2]]
    np.testing.assert_allclose(squares, [[49, 81], [1, 9]])


@pytest.mark.parametrize("copies", [2, 5, 300])
def test_copies_are_neighbours_however_many_there_are(copies):
    rows = np.repeat([[0.0, 1.0], [7.0, 1.0]], copies, axis=0)
    squares, indices = neighbours.nearest(rows, rows, 1, own=np.arange(len(rows)))
    np.testing.assert_array_equal(squares, 0)
    assert (indices[:, 0] != np.arange(len(rows))).all()
