"""The axes of a mesh along which devices communicate."""

import numpy as np


def of(groups, mesh):
    """Returns the names of the mesh axes along which the devices of each group differ.

    Args:
        groups: of a ``Collective``.
        mesh: axis name -> size, such as ``dict(mesh.shape)``, in the order of the mesh.

    Returns:
        The names in the order of the mesh.
    """
    names, sizes = list(mesh), list(mesh.values())
    places = [np.stack(np.unravel_index(np.array(group, int), sizes)) for group in groups]
    differ = np.array([np.ptp(place, axis=1) > 0 for place in places]).any(axis=0)
    return tuple(name for name, varies in zip(names, differ, strict=True) if varies)
