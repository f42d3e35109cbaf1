"""The section ``data`` of a config that trains on images."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from enat_jax.data import images, run_pictures


@dataclasses.dataclass(frozen=True)
class Data:
    """The section ``data`` of a config that trains on images; see ``images.open_source``.

    Attributes:
        source: "digits", "scenes", a folder, an archive or a TFDS data set.
        settings: of the source, such as the ``size`` of its images.
        train_split: split of the source to train on.
        held_out_split: split of the source to evaluate on.
        unreadable: what to do about pictures that cannot be read: "refuse", or "skip", which leaves
            them out and lists them in ``data/unreadable.txt`` of the run.
        scan: whether the run decodes all pictures once, before its first step, to find these.
        workers: processes that read and decode images; 0: threads of this one, which do as well
            while the devices are busy elsewhere.
    """

    source: str
    settings: Mapping[str, Any]
    train_split: str = "train"
    held_out_split: str = "test"
    workers: int = 0
    unreadable: str = "refuse"
    scan: bool = True

    def __post_init__(self) -> None:
        if self.unreadable not in run_pictures.POLICIES:
            raise ValueError(
                f"data.unreadable={self.unreadable!r} is unknown: choose one of "
                f"{run_pictures.POLICIES}"
            )
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
