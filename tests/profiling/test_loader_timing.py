"""Formats that are compared hold the same records."""

import numpy as np
import pytest

from enat_jax.profiling import loader_timing


def test_all_formats_give_the_same_records(tmp_path):
    made = loader_timing.make_tokens(tmp_path / "set", 250, 16)
    indices = np.array([249, 0, 100, 100])
    maps = [made.rows[np.arange(i, min(i + 100, 250))] for i in (0, 100, 200)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loader_timing, "PER_FILE", 100)
        found = loader_timing._from_maps(maps, indices)
    np.testing.assert_array_equal(found, made.rows[indices])
