"""Opens the pictures that the command line of ``evaluate`` names."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

from enat_jax.data import image_data, images, scan
from enat_jax.evaluation import features, image_sets, npz_images
from enat_jax.inference import tokenization, tokenizer

Shape = tuple[int, int, int]  # height, width, channels


@dataclasses.dataclass(frozen=True)
class Opener:
    """How pictures are opened.

    Attributes:
        network: the features that are computed of them.
        split: of a source; None: "train", and for a tokenizer one that is held out.
        size: pixels of a side of a source's pictures; None: see ``source``.
        settings: other ones of sources; a source takes those that it has.
        keep: most pictures of a reference whose features are kept.
        skip: whether pictures that cannot be read are left out.
        opened: sources with all their pictures, and their paths.
        left_out: sentences on pictures that were left out.
    """

    network: features.Features
    split: str | None
    size: int | None
    settings: Mapping[str, Any]
    keep: int
    skip: bool = False
    opened: list[tuple[str, images.Source]] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)

    def reference(
        self, path: str, codec: tokenizer.Tokenizer | None = None, shape: Shape | None = None
    ) -> image_sets.ImageSet:
        """Opens pictures to compare others with; see ``source`` for ``codec`` and ``shape``."""
        if image_sets.is_npz(path):
            return image_sets.of_npz(npz_images.NpzImages(path), self.keep, self.network)
        source = self.source(path, self.split or "train", codec, shape)
        return image_sets.of_source(source, self.keep, self.network)

    def to_measure(self, path: str) -> image_sets.ImageSet:
        """Opens pictures to measure, of which all features are kept."""
        if image_sets.is_npz(path):
            found = npz_images.NpzImages(path)
            return image_sets.of_npz(found, len(found), self.network)
        source = self.source(path, self.split or "train")
        return image_sets.of_source(source, len(source), self.network)

    def held_out(self, path: str, codec: tokenizer.Tokenizer) -> images.Source:
        """Opens pictures that the tokenizer was not trained on, or others if there are none."""
        if self.split is not None:
            return self.source(path, self.split, codec)
        splits = ["test", "validation"] if images.kind(path) == "tfds" else ["test"]
        if trained_with := codec.provenance.get("config", {}).get("data"):
            data = image_data.Data.of(trained_with)
            if images.kind(data.source) == images.kind(path):
                splits.insert(0, data.held_out_split)
        for split in splits:
            try:
                return self.source(path, split, codec)
            except ValueError:  # nothing is held out, or opening another split says what is wrong
                continue
        return self.source(path, "train", codec)

    def source(
        self,
        path: str,
        split: str,
        codec: tokenizer.Tokenizer | None = None,
        shape: Shape | None = None,
    ) -> images.Source:
        """Opens a source.

        Args:
            path: of the source.
            split: of the source.
            codec: pictures are framed as it takes them.
            shape: without a tokenizer, of the images that they are compared with: they become as
                large, and get the channels that the features take.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it cannot be opened so, or has too few pictures.
        """
        known = images.SETTINGS[images.kind(path)]
        settings: dict[str, Any] = {"channels": self.network.image_shape[2]}
        if shape is not None and shape[0] == shape[1]:
            settings["size"] = shape[0]
        if codec is not None:
            settings = tokenization.source_settings(codec, path)
        if self.size is not None:
            settings["size"] = self.size
        settings |= self.settings
        given = {k: v for k, v in settings.items() if k in known and v is not None}
        source = images.open_source(path, split, **given)
        if unused := images.describe_unused(source.ignored):
            print(f"{path}, split {split!r}: {unused}")
        for folder, number in source.missing.items():
            where = os.path.join(path, folder).rstrip(os.sep)
            raise ValueError(
                f"{where} lacks {number:,} of the images that its settings.json names: start the "
                "same `sample` again, which completes them, or copy the images that are to count "
                "into another folder"
            )
        if len(source) < 2:
            raise ValueError(
                f"there is {len(source)} picture in the split {split!r} of {path}: statistics "
                "need at least 2, and many more for numbers that mean anything"
            )
        if self.skip:
            return scan.readable(source, lambda text: self._say(f"{path}: {text}"))
        self.opened.append((path, source))
        return source

    def refuse_unreadable(self) -> None:
        """Reads all pictures once; raises ValueError if one cannot be read."""
        for path, source in self.opened:
            said: list[str] = []
            scan.readable(source, said.append)
            for text in said:
                raise ValueError(
                    f"{path}: {text.removeprefix('left out: ')}: remove them or replace them by "
                    "good copies, or leave them out by --on-error skip"
                )

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr)
        self.left_out.append(f"{text}.")
