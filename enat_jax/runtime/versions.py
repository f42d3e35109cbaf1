"""Versions of what decides pixels, tokens and numbers."""

import importlib.metadata
import platform

import enat_jax

LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "scipy", "pillow")


def library_versions() -> dict[str, str]:
    """Returns versions of Python, of this package and of ``LIBRARIES``, by name."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "enat_jax": enat_jax.__version__, **found}
