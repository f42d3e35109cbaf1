"""How well images show their texts, as a CLIP sees it: vectors during a pass, numbers after it."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from enat_jax.data import images, text_tokens
from enat_jax.evaluation import accumulate, image_sets, measures, passes, text_prompts
from enat_jax.inference import clip_model, clip_towers
from enat_jax.metrics import text_agreement

ROWS = "clip"  # name of the vectors of images among the rows of a pass
CONVENTION = "mean of max(100 cos, 0), no prefix"

Real = tuple[Int[np.ndarray, " k"], Float32[np.ndarray, "k d"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """Scores images by their texts.

    Attributes:
        path: of the CLIP.
        clip: its text tower.
        vision: its vision tower.
        prompts: a text for each image.
    """

    path: str
    clip: clip_model.ClipText
    vision: clip_towers.ClipVision
    prompts: text_prompts.Prompts

    @property
    def weights(self) -> dict[str, str]:
        """The fingerprints of both towers."""
        return {"text": self.clip.fingerprint, "vision": self.vision.fingerprint}

    @property
    def description(self) -> dict[str, Any]:
        """The section ``clip`` of a card."""
        return {
            "path": self.path,
            "weights": self.weights,
            "provenance": self.clip.provenance,
            "scale": text_agreement.SCALE,
            "prefix": "",
            "convention": CONVENTION,
            "image_size": self.vision.model.image_size,
            "resize": "bicubic with antialiasing, shorter side, centre crop",
            "r_precision_of": text_agreement.others_of(len(self.prompts.different[0])) + 1,
            "numerics": self.vision.model.dtype,
        }

    @property
    def no_pictures(self) -> Real:
        """What ``real`` returns of none."""
        return np.zeros(0, np.int64), np.zeros((0, self.vision.model.projection), np.float32)

    def joined(self, subject: image_sets.ImageSet) -> image_sets.ImageSet:
        """Returns the same images, each with its vector."""

        def load(start: int, stop: int) -> accumulate.Batch:
            batch = subject.load(start, stop)
            rows = {**batch.rows, ROWS: self.vision.vectors(batch.images)}
            return batch._replace(rows=rows)

        identity = subject.spec.identity | {"clip": self.vision.fingerprint}
        spec = dataclasses.replace(subject.spec, identity=identity)
        return dataclasses.replace(subject, load=load, spec=spec)

    def real(self, source: images.Source, out: pathlib.Path, hosts: passes.Hosts) -> Real | None:
        """Computes the vectors of the pictures that the texts are captions of.

        Args:
            source: in which they are sought by their names.
            out: directory for the work, shared by the hosts.
            hosts: that share the work.

        Returns:
            Which of the different texts each has, and its vector; None if other hosts have not
            finished.
        """
        texts = self.prompts.by_picture([source.key(i) for i in range(len(source))])
        there = [(i, found[0]) for i, found in enumerate(texts) if found]
        numbers = {text: i for i, text in enumerate(self.prompts.different[0])}
        own = np.array([numbers[text] for _, text in there], np.int64)
        if not there:
            return self.no_pictures
        indices = np.array([i for i, _ in there])

        def load(start: int, stop: int) -> accumulate.Batch:
            found = source.gather(indices[start:stop])["images"]
            return accumulate.Batch(found, np.zeros(len(found), np.int32))

        identity = {"clip": self.vision.fingerprint, "prompts": self.prompts.sha256}
        spec = accumulate.PassSpec(len(there), 1, len(there), identity)
        pictures = image_sets.ImageSet(load, True, spec, source.image_shape, {})
        network = lambda pixels: {"pool": self.vision.vectors(pixels)}  # noqa: E731
        found = passes.run_and_collect(pictures, network, out, hosts, "real pictures")
        return None if found is None else (own, np.asarray(found.rows["pool"]))

    @functools.cached_property
    def window(self) -> text_tokens.Window:
        """Tokens of the different texts."""
        texts = self.prompts.different[0]
        return text_tokens.window(self.clip.kind, texts, self.clip.model.context)

    def measure(
        self,
        vectors: Float32[np.ndarray, "n d"],
        real: Real,
        intervals: bool,
    ) -> tuple[dict[str, measures.Metric], list[str]]:
        """Returns entries of a card's ``metrics``, and sentences on what must be known of them.

        Args:
            vectors: of the images.
            real: see ``real``; of no pictures if none are given.
            intervals: whether standard errors are computed.
        """
        texts = self.clip.vectors(self.window.ids)
        too_long = sum(map(bool, self.window.dropped))
        own = self.prompts.different[1]
        found = {"clip_score": self._score("CLIP score", vectors, texts, own, "higher")}
        said = []
        if len(real[0]):
            title = "CLIP score of real pictures"
            about = f"{len(real[0]):,} pictures with the same captions: what can be reached"
            found["clip_score_real"] = self._score(
                title, real[1], texts, real[0], "reference", about
            )
        elif self.prompts.pictures:
            said.append(
                "CLIP scores of real pictures are not measured: the reference has none of the "
                "pictures that the prompts are captions of."
            )
        if len(texts) > 1:
            about = "each image with the text of another one: what says nothing of the text"
            rolled = (own + 1) % len(texts)
            found["clip_score_rolled"] = self._score(
                "CLIP score of other texts", vectors, texts, rolled, "reference", about
            )
            found["r_precision"] = self._precision("R-precision", vectors, texts, own, "higher")
            if len(real[0]):
                found["r_precision_real"] = self._precision(
                    "R-precision of real pictures", real[1], texts, real[0], "reference"
                )
        else:
            said.append("All images have one text: there is no R-precision.")
        if too_long:
            said.append(
                f"CLIP reads the first {self.clip.model.context} tokens of a text: of {too_long:,} "
                f"of {len(texts):,} texts the end does not count in its scores."
            )
        if not intervals:
            for entry in found.values():
                entry |= dict.fromkeys(("standard_error", "low", "high"))
        return found, said

    def _score(
        self,
        title: str,
        vectors: Float32[np.ndarray, "n d"],
        texts: Float32[np.ndarray, "m d"],
        own: Int[np.ndarray, " n"],
        better: str,
        about: str = CONVENTION,
    ) -> measures.Metric:
        values = text_agreement.scores(vectors, texts, own)
        error = text_agreement.error_of_mean(values, own)
        return self._entry(title, float(values.mean()), error, better, about)

    def _precision(
        self,
        title: str,
        vectors: Float32[np.ndarray, "n d"],
        texts: Float32[np.ndarray, "m d"],
        own: Int[np.ndarray, " n"],
        better: str,
    ) -> measures.Metric:
        values = text_agreement.retrieved(vectors, texts, own).astype(np.float64)
        others = text_agreement.others_of(len(texts))
        about = f"the own text is nearer than {others} others; by chance {1 / (others + 1):.2g}"
        error = text_agreement.error_of_mean(values, own)
        entry = self._entry(title, float(values.mean()), error, better, about)
        entry["low"], entry["high"] = max(entry["low"], 0.0), min(entry["high"], 1.0)
        return entry

    def _entry(
        self, title: str, value: float, error: float, better: str, about: str
    ) -> measures.Metric:
        about = f"{about}; {_named(self.clip)}"
        made = measures.entry(title, value, error, 0, better, about)
        return made | {"weights": self.weights}


def open_scorer(path: str | os.PathLike, prompts: text_prompts.Prompts) -> Scorer:
    """Opens a CLIP, to score images by their texts.

    Args:
        path: of the directory that ``import_torch --clip`` wrote.
        prompts: a text for each image.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is damaged, or has no vision tower or no vectors of texts; or a text cannot
            be read.
        ImportError: the packages that read texts are not installed.
    """
    found = clip_towers.Clip.load(path)
    if found.vision is None:
        raise ValueError(
            f"{path} has no vision tower, so that it gives no scores: import a whole CLIP "
            f"({clip_model.MADE_BY})"
        )
    if found.text.model.projection != found.vision.model.projection:
        raise ValueError(
            f"{path} has no vectors of texts to compare those of images with: import it with "
            "--hidden-layer -1"
        )
    scorer = Scorer(str(path), found.text, found.vision, prompts)
    _ = scorer.window  # what is wrong with a text is said before anything is drawn
    return scorer


def _named(clip: clip_model.ClipText) -> str:
    file = clip.provenance.get("file")
    return f"CLIP {clip.fingerprint[:12]}" + (f" ({file})" if file else "")
