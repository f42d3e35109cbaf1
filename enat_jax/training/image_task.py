"""What the tasks that train on images share."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

import jax
import ml_collections
import numpy as np
import optax
from jaxtyping import PyTree

from enat_jax.data import image_data, images, loader, records, run_pictures
from enat_jax.data.decoding import Batch
from enat_jax.runtime import sharding
from enat_jax.training import optim


@dataclasses.dataclass(frozen=True)
class ImageTask:
    """The half of a task that its images decide; see ``task.Task``.

    Attributes:
        model: the network; its type and that of ``loss`` are the task's.
        source: to train on, augmented.
        held_out: to evaluate on.
        optimizer: of optax.
        loss: settings.
        seed: of the images' order and augmentation.
        batch_size: images of a batch.
        workers, unreadable, scan: see ``image_data.Data``.
        pictures: what the run keeps of them, once they are ``chosen``.
    """

    model: Any
    source: images.Source
    held_out: images.Source
    optimizer: optax.GradientTransformation
    loss: Any
    seed: int
    batch_size: int
    workers: int = 0
    unreadable: str = "refuse"
    scan: bool = True
    pictures: run_pictures.RunPictures | None = None

    MEASURES: ClassVar[tuple[str, ...]]  # names of what evaluation finds

    @property
    def frozen(self) -> PyTree:
        """Weights of other networks, which no step changes; {} for a task without any."""
        return {}

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of a whole batch: images ``[b, h, w, c]``, labels ``[b]``."""
        return {
            "images": jax.ShapeDtypeStruct((self.batch_size, *self.source.image_shape), np.uint8),
            "labels": jax.ShapeDtypeStruct((self.batch_size,), np.int32),
        }

    def batches(self, start: int, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Yields part i of n, ``share``, of every augmented batch from number ``start`` on."""
        return loader.train_batches(
            self.source,
            self.batch_size,
            seed=self.seed,
            start_step=start,
            share=share,
            workers=self.workers,
        )

    def chosen(self, workdir: pathlib.Path, say: Callable[[str], None]) -> Self:
        """See ``task.OfPictures``, as for the next two."""
        ignored = dict(self.source.ignored)
        if self.held_out.key(0) != self.source.key(0):  # another split
            ignored[images.OTHER_SPLITS] = ignored.get(images.OTHER_SPLITS, 0) - len(self.held_out)
        if unused := images.describe_unused(ignored):
            say(unused)
        pictures = run_pictures.RunPictures(workdir / "data", self.unreadable, self.scan, say)
        source, held_out = pictures.choose(self.source, self.held_out)
        return dataclasses.replace(self, source=source, held_out=held_out, pictures=pictures)

    def recognise(self, identity: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.pictures.recognise(identity) if self.pictures else identity

    def reporting(self) -> contextlib.AbstractContextManager[None]:
        return self.pictures.reporting() if self.pictures else contextlib.nullcontext()

    def data_identity(self) -> dict[str, object]:
        """Returns what must not change when a run is resumed, as JSON values."""
        return self.source.identity()

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Names of the numbers that ``evaluate`` gives."""
        return tuple(f"held_out/{name}" for name in self.MEASURES)

    def held_out_batches(self, max_images: int, few: bool = False) -> Iterator[Batch]:
        """Yields held-out images in batches, the last of which is cut.

        They are spread evenly over the source, which is sorted by class. ``few``: the first batch,
        although all of them are read.
        """
        chosen = records.evenly(len(self.held_out), max_images)
        for start in range(0, len(chosen), self.batch_size):
            rows = self.held_out.gather(chosen[start : start + self.batch_size])
            if not (few and start):
                yield rows

    def run(
        self,
        function: Callable[..., tuple[jax.Array, ...]],
        rows: tuple[np.ndarray, ...],
        mesh: jax.sharding.Mesh,
    ) -> tuple[np.ndarray, ...]:
        """Calls a jitted function on at most a batch of rows, and returns what it finds for each.

        They are filled up to a whole batch, so that one compiled shape serves them all.
        """
        padded = (np.resize(x, (self.batch_size, *x.shape[1:])) for x in rows)
        found = sharding.to_host(function(*(sharding.place(x, mesh) for x in padded)))
        return tuple(x[: len(rows[0])] for x in found)


def settings(config: ml_collections.ConfigDict, batch_size: int | None) -> dict[str, Any]:
    """Returns the fields of an ``ImageTask`` but for ``model`` and ``loss``.

    ``batch_size`` is that of a micro-batch, None: ``train.batch_size``.
    """
    data = image_data.Data.of(config.data.to_dict())
    return {
        "source": data.open(data.train_split),
        "held_out": data.open(data.held_out_split),
        "optimizer": optim.Optimizer(**config.optimizer).make(config.train.num_steps),
        "seed": config.seed,
        "batch_size": batch_size or config.train.batch_size,
        "workers": data.workers,
        "unreadable": data.unreadable,
        "scan": data.scan,
    }
