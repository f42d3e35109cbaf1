"""The quality of a few samples during training, by the code that ``evaluate`` uses.

The section ``evaluation`` of a config switches it on, or the command line:

    --config.evaluation.reference=digits --config.evaluation.features=random:0
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from enat_jax.data import images
from enat_jax.evaluation import accumulate, features, measures, passes, statistics
from enat_jax.inference import tokenization, tokenizer


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section ``evaluation`` of a config.

    Attributes:
        reference: statistics (.npz), or pictures, ``data.images.open_source``, as the tokenizer was
            trained on. Of many pictures every process makes the statistics at the first
            evaluation; ``python -m enat_jax.evaluate --make-reference`` makes them once for all.
            None: no evaluation.
        features: as for ``features.open_features``; inception: path of Inception's weights.
        num: samples; few give a distance that is too high, so compare equal numbers.
        split: of pictures.
        keep: pictures whose features are kept for precision and recall.
    """

    reference: str | None = None
    features: str | None = None
    num: int = 500
    inception: str | None = None
    split: str = "train"
    keep: int = 10_000

    def __post_init__(self):
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
        network: the features; num: samples.
        found: statistics of the reference; None: they are still to be made of ``source``.
        source: pictures; keep: how many features of them are kept.
    """

    network: features.Features
    num: int
    found: statistics.Statistics | None
    source: images.Source | None
    keep: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of the numbers that ``measure`` gives."""
        distance = "fid" if self.network.is_inception else "frechet_distance"
        single = self.found is None or self.found.pool is not None
        names = (distance, "precision", "recall") if single else (distance,)
        return tuple(f"samples/{name}" for name in names)

    def measure(self, load: accumulate.Load, num_classes: int) -> Iterator[tuple[str, float]]:
        """Numbers by name; ``load`` draws samples."""
        spec = accumulate.PassSpec(self.num, num_classes, self.num, {})
        found = passes.in_memory(load, self.network, spec)
        own = found.statistics(self._description)
        metrics, _ = measures.evaluate_set(
            own, self.reference, found.rows, self.network, replicates=0
        )
        for name in self.names:
            yield name, metrics[name.removeprefix("samples/")]["value"]

    @functools.cached_property
    def reference(self) -> statistics.Statistics:
        """Its statistics, made at the first use."""
        if self.found is not None:
            return self.found

        def load(start: int, stop: int) -> accumulate.Batch:
            batch = self.source.gather(np.arange(start, stop))
            return accumulate.Batch(batch["images"], batch["labels"])

        spec = accumulate.PassSpec(len(self.source), len(self.source.class_names), self.keep, {})
        found = passes.in_memory(load, self.network, spec, read_ahead=True)
        return found.statistics(self._description)

    @property
    def _description(self):
        unknown = dict.fromkeys(statistics.DESCRIPTION)
        return unknown | {"features": self.network.description}


def make(section, codec: tokenizer.Tokenizer) -> SampleQuality | None:
    """Of a config's section, a ConfigDict, for images of the tokenizer; None without a reference.

    Raises:
        OSError: a file cannot be read.
        ValueError: settings, reference, features and images do not fit together.
    """
    settings = Settings(**section.to_dict())
    if settings.reference is None:
        return None
    network = features.open_features(settings.features, weights=settings.inception)
    shape = (*codec.image_size, codec.model.image_channels)
    sizes = {k: v.shape[1] for k, v in network(np.zeros((1, *shape), np.uint8)).items()}
    found = source = None
    if settings.reference.endswith(".npz"):
        found = statistics.Statistics.load(settings.reference)
        found.check_features(network.description, f"evaluation.reference={settings.reference}")
        found.check_dimensions(sizes, f"evaluation.reference={settings.reference}")
    else:
        framing = tokenization.source_settings(codec, settings.reference)
        source = images.open_source(settings.reference, settings.split, **framing)
        if source.image_shape != shape:
            raise ValueError(
                f"evaluation.reference={settings.reference} has images of {source.image_shape}, "
                f"the tokenizer makes {shape}"
            )
    return SampleQuality(network, settings.num, found, source, settings.keep)
