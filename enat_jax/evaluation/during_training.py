"""The quality of a few samples during training, by the code that ``evaluate`` uses.

The section ``evaluation`` of a config switches it on, or the command line:

    --config.evaluation.reference=digits --config.evaluation.features=random:0
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from enat_jax.data import images
from enat_jax.evaluation import accumulate, features, image_sets, measures, passes, statistics
from enat_jax.inference import tokenization, tokenizer


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section ``evaluation`` of a config.

    Attributes:
        reference: statistics (.npz), or pictures, ``data.images.open_source``, as the tokenizer was
            trained on. Of many pictures every process makes the statistics before it trains;
            ``python -m enat_jax.evaluate --make-reference`` makes them once for all. None: no
            evaluation.
        features: as for ``features.open_features``.
        num: samples; few give a distance that is too high, so compare equal numbers.
        inception: path of Inception's weights.
        split: of pictures.
        keep: pictures whose features are kept for precision and recall.
    """

    reference: str | None = None
    features: str | None = None
    num: int = 500
    inception: str | None = None
    split: str = "train"
    keep: int = 10_000

    def __post_init__(self) -> None:
        if (self.reference is None) != (self.features is None):
            name = "reference" if self.reference is None else "features"
            raise ValueError(
                f"evaluation.{name} is not set: samples are compared with a reference by features, "
                f"so give --config.evaluation.{name}=, too"
            )
        for name in ("num", "keep"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 10:
                raise ValueError(f"evaluation.{name}={value!r} must be a whole number from 10")


@dataclasses.dataclass(frozen=True, eq=False)
class SampleQuality:
    """What samples are measured with; made by ``make``.

    Attributes:
        network: the features.
        num: samples.
        compared: statistics of the reference, or the pictures to make them of.
        keep: how many features of pictures are kept.
    """

    network: features.Features
    num: int
    compared: statistics.Statistics | images.Source
    keep: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the numbers that ``measure`` gives."""
        distance = "fid" if self.network.is_inception else "frechet_distance"
        names = (distance,) if self.why_no_overlap else (distance, "precision", "recall")
        return tuple(f"samples/{name}" for name in names)

    @property
    def why_no_overlap(self) -> str | None:
        """Why precision and recall cannot be measured; None if they can."""
        known = self.compared
        if isinstance(known, statistics.Statistics):
            kept = None if known.pool is None else len(known.pool)
            return measures.why_no_overlap(self.num, kept)
        spec = accumulate.PassSpec(len(known), 1, self.keep, {})
        return measures.why_no_overlap(self.num, spec.num_rows("pool", 0, len(known)))

    def measure(
        self, load: accumulate.Load, num_classes: int, few: bool = False
    ) -> Iterator[tuple[str, float]]:
        """Yields numbers by name; ``load`` draws samples, ``few``: one chunk of them."""
        num = min(self.num, accumulate.CHUNK) if few else self.num
        spec = accumulate.PassSpec(num, num_classes, num, {})
        found = passes.in_memory(load, self.network, spec)
        own = found.statistics(self._description)
        metrics, _ = measures.evaluate_set(
            own, self.reference, found.rows, self.network, replicates=0
        )
        for name in self.names:
            yield name, metrics[name.removeprefix("samples/")]["value"]

    @functools.cached_property
    def reference(self) -> statistics.Statistics:
        """Statistics of the reference, made at the first use."""
        if isinstance(self.compared, statistics.Statistics):
            return self.compared
        load = image_sets.loader(self.compared)
        num, classes = len(self.compared), len(self.compared.class_names)
        spec = accumulate.PassSpec(num, classes, self.keep, {})
        found = passes.in_memory(load, self.network, spec, read_ahead=True)
        return found.statistics(self._description)

    @property
    def _description(self) -> dict[str, Any]:
        unknown: dict[str, Any] = dict.fromkeys(statistics.DESCRIPTION)
        return unknown | {"features": self.network.description}


def make(
    section: ml_collections.ConfigDict, codec: tokenizer.Tokenizer, prefix: str = "evaluation."
) -> SampleQuality | None:
    """Returns what a config's section asks for, or None if it names no reference.

    Args:
        section: fields of ``Settings``.
        codec: makes the images that are measured.
        prefix: of the names of settings in messages.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if settings, reference, features and images do not fit together.
    """
    settings = Settings(**section.to_dict())
    if settings.reference is None or settings.features is None:
        return None
    network = features.open_features(settings.features, weights=settings.inception)
    shape = (*codec.image_size, codec.model.image_channels)
    sizes = {k: v.shape[1] for k, v in network(np.zeros((1, *shape), np.uint8)).items()}
    compared: statistics.Statistics | images.Source
    if settings.reference.endswith(".npz"):
        compared = statistics.Statistics.load(settings.reference)
        compared.check_features(network.description, f"{prefix}reference={settings.reference}")
        compared.check_dimensions(sizes, f"{prefix}reference={settings.reference}")
    else:
        framing = tokenization.source_settings(codec, settings.reference)
        compared = images.open_source(settings.reference, settings.split, **framing)
        # Where one side is grey, the features take it as RGB.
        if compared.image_shape[:2] != shape[:2]:
            raise ValueError(
                f"{prefix}reference={settings.reference} has images of {compared.image_shape}, "
                f"the tokenizer makes {shape}: "
                "make statistics with `python -m enat_jax.evaluate --make-reference`, whose --size "
                "and --set frame pictures otherwise"
            )
        if compared.image_shape != shape:
            network(np.zeros((1, *compared.image_shape), np.uint8))
    found = SampleQuality(network, settings.num, compared, settings.keep)
    if found.why_no_overlap and jax.process_index() == 0:
        reason = found.why_no_overlap
        print(f"[evaluation] precision and recall are not measured: {reason}", flush=True)
    return found
