"""The images that a task is trained on, and the batches that they come in."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enat_jax.data import images as image_sources
from enat_jax.data import loader

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the images are; see ``data.images.open_source``.

    Attributes:
        source: "digits", a folder, an archive or a TFDS data set.
        settings: of the source, such as the ``size`` of its images.
        train_split, held_out_split: of the source.
        workers: processes that read and decode images; 0: threads of this one, which do as well
            while the devices are busy elsewhere.
    """

    source: str
    settings: Mapping[str, Any]
    train_split: str = "train"
    held_out_split: str = "test"
    workers: int = 0

    def __post_init__(self):
        if not self.source:
            raise ValueError(
                "data.source is not set: give --config.data.source=, the path of a folder, .zip or "
                ".tar of pictures, or tfds:NAME"
            )

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "Data":
        """Of the section of a config, in which the source's settings stand beside the others.

        A setting of None is one that was not given.
        """
        own = {f.name for f in dataclasses.fields(cls)} - {"settings"}
        settings = {k: v for k, v in section.items() if k not in own and v is not None}
        return cls(settings=settings, **{k: v for k, v in section.items() if k in own})

    def open(self, split: str) -> image_sources.Source:
        return image_sources.open_source(self.source, split, **self.settings)


def batch_spec(source: image_sources.Source, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a whole batch: images uint8 [b, h, w, c], labels int32 [b]."""
    return {
        "images": jax.ShapeDtypeStruct((batch_size, *source.image_shape), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }


def batches(
    source: image_sources.Source,
    batch_size: int,
    seed: int,
    start: int,
    share: tuple[int, int],
    workers: int,
) -> Iterator[Batch]:
    """Part i of n of every batch from number ``start`` on, augmented; see ``loader.train_batches``.

    ``share``: (i, n), see ``sharding.process_share``. ``workers``: see ``Data``.
    """
    return loader.train_batches(
        source.gather,
        len(source),
        batch_size,
        seed=seed,
        start_step=start,
        process_index=share[0],
        process_count=share[1],
        workers=workers,
    )
