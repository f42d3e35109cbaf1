"""What a pass over images sums and keeps, and the file in which it can be continued.

Images are numbered from 0 and pass in chunks of one size, whose limits depend neither on devices
nor on hosts. Host i of n takes the i-th of n runs of chunks. ``passes`` runs them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Float, Int, Num, UInt8

from enat_jax.evaluation import statistics as image_statistics
from enat_jax.metrics import moments
from enat_jax.runtime import files, os_errors

CHUNK = 256  # images; a multiple of what feature networks take in a batch


class Batch(NamedTuple):
    """Some images in a row, and what belongs to them.

    Attributes:
        images: pixels.
        labels: classes, from 0 to the number of classes - 1.
        rows: more numbers of each image that are kept, by name.
    """

    images: UInt8[np.ndarray, "b h w c"]
    labels: Int[np.ndarray, " b"]
    rows: Mapping[str, Float[np.ndarray, "b d"]] = {}


Load = Callable[[int, int], Batch]  # makes or reads the images start to stop - 1


@dataclasses.dataclass(frozen=True)
class PassSpec:
    """What passes through the features.

    Attributes:
        num_images: at least 1.
        num_classes: of the labels.
        keep: most images whose pool features are kept: every n-th, so that they are spread evenly.
        identity: JSON values of all that decides images and features, to refuse going on with
            something else.
        chunk: images of a chunk.
    """

    num_images: int
    num_classes: int
    keep: int
    identity: dict[str, Any]
    chunk: int = CHUNK

    @property
    def stride(self) -> int:
        """The pool features of every image whose number is a multiple of it are kept."""
        return max(1, -(-self.num_images // self.keep))

    @property
    def kept(self) -> int:
        """The number of images whose pool features are kept."""
        return self.num_rows("pool", 0, self.num_images)

    def share(self, host_index: int, num_hosts: int) -> tuple[int, int]:
        """Returns the images of a host, the first and the one after the last."""
        chunks = -(-self.num_images // self.chunk)
        first, end = (chunks * i // num_hosts * self.chunk for i in (host_index, host_index + 1))
        return min(first, self.num_images), min(end, self.num_images)

    def chunks(self, first: int, end: int) -> list[tuple[int, int]]:
        """Returns the limits of the chunks of the images first to end - 1."""
        return [(i, min(i + self.chunk, end)) for i in range(first, end, self.chunk)]

    def num_rows(self, name: str, first: int, end: int) -> int:
        """Returns how many rows of a name are kept of the images first to end - 1."""
        if name != "pool":
            return end - first
        return -(-end // self.stride) - -(-first // self.stride)

    def kept_rows(
        self, found: Mapping[str, np.ndarray], batch: Batch, start: int, stop: int
    ) -> dict[str, Num[np.ndarray, "k d"]]:
        """Returns what is kept of the features and rows of the images start to stop - 1."""
        every = slice(-start % self.stride, stop - start, self.stride)
        rows = {"pool": found["pool"][every], **batch.rows}
        if "probabilities" in found:
            rows["probabilities"] = found["probabilities"]
        return rows


@dataclasses.dataclass(frozen=True)
class Totals:
    """What has passed. Never changes: ``add`` gives anew.

    Attributes:
        moments: of the features, by their names.
        class_counts: images of each class.
        seconds: "images", for making or reading them, and "features".
    """

    moments: dict[str, moments.Moments]
    class_counts: Int[np.ndarray, " c"]
    seconds: dict[str, float]

    @classmethod
    def empty(cls, num_classes: int) -> Self:
        """Returns the totals of no images."""
        return cls({}, np.zeros(num_classes, np.int64), {"images": 0.0, "features": 0.0})

    @property
    def num_images(self) -> int:
        """How many images have passed."""
        return int(self.class_counts.sum())

    def add(
        self, found: Mapping[str, Float[np.ndarray, "b d"]], labels: Int[np.ndarray, " b"]
    ) -> Self:
        """Returns the totals with one more chunk, its features "pool" and perhaps "spatial"."""
        sums = dict(self.moments)
        for name in ("pool", "spatial"):
            if name in found:
                before = sums.get(name) or moments.Moments.empty(found[name].shape[1])
                sums[name] = before.add(found[name])
        counts = self.class_counts + np.bincount(labels, minlength=len(self.class_counts))
        return dataclasses.replace(self, moments=sums, class_counts=counts)

    def spend(self, images: float, features: float) -> Self:
        """Returns the totals with more seconds."""
        seconds = {
            "images": self.seconds["images"] + images,
            "features": self.seconds["features"] + features,
        }
        return dataclasses.replace(self, seconds=seconds)

    def merge(self, other: Self) -> Self:
        """Returns the totals of two hosts together, whose seconds are added up."""
        if not self.moments or not other.moments:  # a host without images
            return self if self.moments else other
        return type(self)(
            {name: value.merge(other.moments[name]) for name, value in self.moments.items()},
            self.class_counts + other.class_counts,
            {name: value + other.seconds[name] for name, value in self.seconds.items()},
        )

    def save(self, path: pathlib.Path, spec: PassSpec, sizes: Mapping[str, int]) -> None:
        """Writes the totals, whole or not at all.

        Args:
            path: of the file.
            spec: what passes.
            sizes: bytes of the files of kept rows beside it, by name.
        """
        arrays = {"class_counts": self.class_counts}
        for name, value in self.moments.items():
            arrays |= {f"{name}/{key}": array for key, array in value.arrays().items()}
        about = {"plan": dataclasses.asdict(spec), "seconds": self.seconds, "files": dict(sizes)}
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        files.write_npz(path, arrays)

    @classmethod
    def load(cls, path: pathlib.Path, spec: PassSpec) -> Self | None:
        """Reads the totals that ``save`` wrote; None if there are none.

        Raises:
            ValueError: if the file is damaged, or of another ``spec``, or a file of rows beside it
                is not what it was.
        """
        if not path.exists():
            return None
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                about = json.loads(arrays["about"].tobytes())
                counts = arrays["class_counts"]
                found: dict[str, dict[str, np.ndarray]] = {}
                for key in arrays.files:
                    name, _, part = key.partition("/")
                    if part:
                        found.setdefault(name, {})[part] = arrays[key]
            sums = {name: moments.Moments.from_arrays(parts) for name, parts in found.items()}
            seconds, before, sizes = about["seconds"], about["plan"], dict(about["files"])
        except Exception as error:  # whatever a damaged archive makes of itself
            os_errors.pass_on(error, path)
            raise ValueError(
                f"{path} is damaged ({error}): remove the folder {path.parent} to begin it anew"
            ) from error
        if files.differences(before, files.as_json(dataclasses.asdict(spec))):
            raise ValueError(f"{path} is of another evaluation: name another --out")
        for name, size in sizes.items():
            rows = path.with_name(f"{name}.npy")
            # Made anew, it would hold zeros for the images that have passed.
            if not rows.is_file() or rows.stat().st_size != size:
                raise ValueError(
                    f"{rows} is missing or damaged: remove the folder {path.parent} to begin it "
                    "anew"
                )
        return cls(sums, counts, seconds)


@dataclasses.dataclass(frozen=True)
class Collected:
    """All that is known of the images of a pass.

    Attributes:
        totals: moments and counts.
        rows: what was kept, by name: "pool" (every ``stride``-th image), "probabilities" if the
            features have them, and the rows of batches.
    """

    totals: Totals
    rows: dict[str, Float[np.ndarray, "k d"]]

    def statistics(self, description: Mapping[str, Any]) -> image_statistics.Statistics:
        """Returns statistics as they are saved and compared, of images with this description."""
        return image_statistics.Statistics(
            moments=self.totals.moments, pool=self.rows["pool"], description=dict(description)
        )
