"""The texts of the images that ``evaluate`` measures, and the scores by them."""

import dataclasses
import os
import pathlib
from typing import Any

from enat_jax.evaluation import (
    accumulate,
    cards,
    caveats,
    clip_scores,
    image_sets,
    passes,
    text_prompts,
)
from enat_jax.inference import generator


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """The texts of a set of images.

    Attributes:
        prompts: a text for each image.
        scorer: scores them; None: no CLIP is given.
        said: sentences on the texts for the card.
    """

    prompts: text_prompts.Prompts
    scorer: clip_scores.Scorer | None
    said: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that decide what is measured of the texts."""
        weights = None if self.scorer is None else self.scorer.weights
        return {"prompts": self.prompts.sha256, "clip": weights}

    def joined(self, subject: image_sets.ImageSet) -> image_sets.ImageSet:
        """Returns the same images with all that scores need of each."""
        return subject if self.scorer is None else self.scorer.joined(subject)

    def real(
        self, reference: image_sets.Reference, out: pathlib.Path, hosts: passes.Hosts
    ) -> clip_scores.Real | tuple[()] | None:
        """Returns what scores need of the reference's pictures; None: other hosts are at work.

        Raises:
            ValueError: a caption could be of several of the pictures.
        """
        if self.scorer is None:
            return ()
        images = reference.content
        if not self.prompts.pictures or not isinstance(images, image_sets.ImageSet):
            return self.scorer.no_pictures
        if images.source is None:
            return self.scorer.no_pictures
        return self.scorer.real(images.source, out, hosts)

    def add_to(
        self,
        card: cards.Card,
        found: accumulate.Collected,
        real: clip_scores.Real | tuple[()],
    ) -> None:
        """Adds scores, sentences and settings to a card.

        Args:
            card: of the images.
            found: of the pass of the images.
            real: what ``real`` returned.
        """
        card["images"]["prompts"] = text_prompts.description(self.prompts)
        card["caveats"] += self.said
        if self.scorer is None or not real:
            return
        intervals = bool(card["intervals"]["replicates"])
        metrics, said = self.scorer.measure(found.rows[clip_scores.ROWS], real, intervals)
        card["metrics"] |= metrics
        card["caveats"] += said
        card[cards.CLIP] = self.scorer.description


def of_model(
    model: generator.Generator,
    path: str | None,
    clip: str | os.PathLike | None,
    num: int | None,
    **location: Any,
) -> Texts | None:
    """Returns the texts that a model is to draw; None: it is to draw classes.

    Args:
        model: draws them.
        path: of the prompts, see ``text_prompts``; None: there are none.
        clip: directory of the CLIP that scores the images; None: none does.
        num: of the images; None: as many as there are texts, at most ``text_prompts.NUM``.
        location: of captions in TFDS, see ``text_prompts.read``.

    Raises:
        ValueError: the texts cannot be read, by the model or at all, or are missing.
        OSError: a file cannot be read.
    """
    if path is None:
        if clip is not None:
            raise ValueError("--clip scores images by their texts: name these by --prompts")
        if not model.class_names:
            raise ValueError("this model draws texts: name these by --prompts")
        return None
    encoder = model.reading_texts()
    prompts = text_prompts.read(path, num, **location)
    if not prompts.pictures:
        prompts = prompts.repeated(num or min(len(prompts), text_prompts.NUM))
    said = caveats.of_prompts(prompts, model.provenance)
    different = prompts.different[0]
    if too_long := sum(map(bool, encoder.window(different).dropped)):
        said.append(
            f"The model reads the first {encoder.context} tokens of a text: of {too_long:,} of "
            f"{len(different):,} texts it does not read the end."
        )
    scorer = None if clip is None else clip_scores.open_scorer(clip, prompts)
    if scorer is not None and _is_condition(scorer, model):
        said.append(caveats.of_same_encoder())
    return Texts(prompts, scorer, tuple(said))


def of_images(
    subject: image_sets.ImageSet,
    images: str,
    path: str | None,
    clip: str | os.PathLike | None,
    **location: Any,
) -> Texts | None:
    """Returns the texts of pictures, None if they are not scored.

    Args:
        subject: the pictures.
        images: their path.
        path: of the prompts, see ``text_prompts``; None: the folder of the pictures says them.
        clip: directory of the CLIP that scores them; None: none does.
        location: of captions in TFDS, see ``text_prompts.read``.

    Raises:
        ValueError: the texts are missing, of other pictures, or cannot be read.
        OSError: a file cannot be read.
    """
    if clip is None:
        if path is not None:
            raise ValueError("--prompts has no effect on images without --clip: leave it out")
        return None
    if path is None and not text_prompts.is_drawn_of(images):
        raise ValueError(
            f"--clip scores images by their texts, which {images} does not say: name them by "
            "--prompts"
        )
    prompts = text_prompts.read(path or images, most=None, **location)
    prompts = prompts.of_images(subject.source, subject.spec.num_images)
    return Texts(prompts, clip_scores.open_scorer(clip, prompts))


def _is_condition(scorer: clip_scores.Scorer, model: generator.Generator) -> bool:
    """Says whether the CLIP that scores is the one whose states condition the model."""
    text = model.text
    if text is None or text.encoder is None:
        return False
    if text.encoder.get("weights") == scorer.clip.fingerprint:
        return True
    # Without its last layer its weights are others, and their source is the same.
    sources = [scorer.clip.provenance, {} if text.clip is None else text.clip.provenance]
    first, second = (source.get("sha256") for source in sources)
    return first is not None and first == second
