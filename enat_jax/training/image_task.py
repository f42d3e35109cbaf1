"""What the tasks that train on images share."""

from collections.abc import Callable, Iterator

import jax
import ml_collections
import numpy as np

from enat_jax.data import image_data, images, records
from enat_jax.runtime import sharding


def open_data(
    config: ml_collections.ConfigDict,
) -> tuple[image_data.Data, images.Source, images.Source]:
    """Opens the section ``data`` of a config: its settings, and what to train and evaluate on."""
    data = image_data.Data.of(config.data.to_dict())
    return data, data.open(data.train_split), data.open(data.held_out_split)


def held_out_batches(
    held_out: images.Source, max_images: int, batch_size: int
) -> Iterator[image_data.Batch]:
    """Yields images evenly over a source, which is sorted by class, in batches; the last is cut."""
    chosen = records.evenly(len(held_out), max_images)
    for start in range(0, len(chosen), batch_size):
        yield held_out.gather(chosen[start : start + batch_size])


def run(
    function: Callable[..., tuple[jax.Array, ...]],
    rows: tuple[np.ndarray, ...],
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> tuple[np.ndarray, ...]:
    """Calls a jitted function on at most a batch of rows, and returns what it finds for each.

    They are filled up to a whole batch, so that one compiled shape serves them all.
    """
    padded = (np.resize(x, (batch_size, *x.shape[1:])) for x in rows)
    found = sharding.to_host(function(*(sharding.place(x, mesh) for x in padded)))
    return tuple(x[: len(rows[0])] for x in found)
