"""The section ``data`` of a config that trains on images, and the batches of these images."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from enat_jax.data import images, loader
from enat_jax.data.decoding import Batch

__all__ = ["Batch", "Data", "batch_spec", "batches"]


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the images of a run are; see ``images.open_source``.

    Attributes:
        source: "digits", a folder, an archive or a TFDS data set.
        settings: of the source, such as the ``size`` of its images.
        train_split: split of the source to train on.
        held_out_split: split of the source to evaluate on.
        workers: processes that read and decode images; 0: threads of this one, which do as well
            while the devices are busy elsewhere.
    """

    source: str
    settings: Mapping[str, Any]
    train_split: str = "train"
    held_out_split: str = "test"
    workers: int = 0

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError(
                "data.source is not set: give --config.data.source=, the path of a folder, .zip or "
                ".tar of pictures, or tfds:NAME"
            )

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "Data":
        """Makes it from the section, in which the source's settings stand beside the others.

        A setting of None is one that was not given.
        """
        own = {f.name for f in dataclasses.fields(cls)} - {"settings"}
        settings = {k: v for k, v in section.items() if k not in own and v is not None}
        return cls(settings=settings, **{k: v for k, v in section.items() if k in own})

    def open(self, split: str) -> images.Source:
        """Opens a split of the source."""
        return images.open_source(self.source, split, **self.settings)


def batch_spec(source: images.Source, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of a batch: images uint8 ``[b, h, w, c]``, labels int32 ``[b]``."""
    return {
        "images": jax.ShapeDtypeStruct((batch_size, *source.image_shape), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }


def batches(
    source: images.Source,
    batch_size: int,
    seed: int,
    start: int,
    share: tuple[int, int],
    workers: int,
) -> Iterator[Batch]:
    """Yields augmented batches without end; see ``loader.train_batches``.

    Args:
        source: of the images.
        batch_size: images of a whole batch.
        seed: of their order and augmentation.
        start: number of the first batch.
        share: (i, n), part i of n of every batch; see ``sharding.process_share``.
        workers: see ``Data``.
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
