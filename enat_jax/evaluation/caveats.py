"""The sentences of a card without which its numbers would mislead.

Each stands for itself and ends in a full stop.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from enat_jax.data import coco
from enat_jax.evaluation import features, text_prompts

ENOUGH = 50_000  # images, by the convention of published FIDs


def of_features(network: features.Features, shape: tuple[int, int, int]) -> list[str]:
    """Returns what must be said of the features, for images of a shape height, width, channels."""
    found = []
    if not network.is_inception:
        found.append(
            "The distance is no FID: its features are not Inception's. It compares with others of "
            "the same features alone."
        )
        return found
    if not network.origin["published"]:
        found.append(
            "The weights are not the published ones of FID's Inception: this compares with nothing "
            "but results of the same weights."
        )
    if shape[2] == 1:
        found.append(
            "The images are grey and were repeated to three channels: Inception was trained on "
            "colour photographs and says little of others."
        )
    return found


def of_channels(own: tuple[int, int, int], reference: tuple[int, int, int] | None) -> list[str]:
    """Returns what must be said of shapes height, width, channels; None: not known."""
    if reference is None or own[2] == reference[2]:
        return []
    return [
        f"The images have {own[2]} channel{'s' * (own[2] > 1)}, those of the reference "
        f"{reference[2]}: grey was repeated to three channels, and colour counts as a difference."
    ]


def of_split(split: str | None) -> list[str]:
    """Returns what must be said of the split whose pictures a tokenizer reconstructed."""
    if split is None or not split.startswith(("train", "all")):
        return []
    return [
        f"The pictures are of the split {split!r}, which the tokenizer may have been trained on: "
        "it reconstructs others less well."
    ]


def of_prompts(prompts: text_prompts.Prompts, provenance: Mapping[str, Any]) -> list[str]:
    """Returns what must be said of the texts that a model drew images of.

    Args:
        prompts: of the images.
        provenance: of the model.
    """
    found = [
        "If guidance or temperatures were chosen by these prompts, the numbers are better than "
        "they should be: choose them by other ones."
    ]
    number, different = len(prompts), len(prompts.different[0])
    if different < number:
        found.append(f"The {number:,} images are of {different:,} different texts.")
    if not prompts.pictures:
        found.append(
            "The prompts are no captions of the reference's pictures: the distance is also one of "
            "what they are about."
        )
        return found
    names = [name.rpartition("/")[2] for name in prompts.pictures]
    if any("train2014" in name for name in names):
        found.append(
            "The prompts are captions of pictures of COCO's train2014: published numbers are of "
            "val2014, and a model knows the captions that it was trained on."
        )
    elif any(coco.image_id(name) is not None and not name.startswith("COCO_") for name in names):
        found.append(
            "The pictures are called like those of COCO 2017: published numbers are of val2014."
        )
    if any("val2014" in name for name in names) and "2017" in json.dumps(provenance):
        found.append(
            "The model's provenance names a data set of 2017, and COCO's train2017 holds most of "
            "val2014: what was trained on is evaluated on."
        )
    return found


def of_same_encoder() -> str:
    """Returns what must be said where one CLIP conditions a model and scores its images."""
    return (
        "The CLIP score is by the same encoder as the condition, whose judgement the model may "
        "have learned: another CLIP says more."
    )


def of_reference(own: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """Returns what makes numbers incomparable with others, or worth less than they look.

    What both descriptions say alike needs no sentence; what one of them does not say does.

    Args:
        own: description of the images that are measured, with the names
            ``statistics.DESCRIPTION``; ``source`` and ``crop`` are those of the images that the
            model was trained on.
        reference: description of those they are compared with.
    """
    sentences: list[str] = []
    silent: list[str] = []  # names of what the reference does not say
    for key, (mine, other) in _features_of(own, reference).items():
        if mine is None or other is None:
            silent.append(f"the {key} of its features")  # only foreign files are silent
        else:
            sentences.append(
                f"Features differ in {key} ({short(mine)}; reference: {short(other)}): "
                "the distance is not of images alone."
            )
    for name, consequence in (
        ("resolution", "the distance is also one of sharpness"),
        ("crop", "pictures were cut in another way than those the model learned from"),
    ):
        mine, other = own[name], reference[name]
        if other is None:
            silent.append(f"its {name}")
        elif mine is None:
            sentences.append(f"The {name} of the model's own images is not known.")
        elif mine != other:
            sentences.append(
                f"The {name} differs ({short(mine)}; reference: {short(other)}): {consequence}."
            )
    sentences += _of_sources(own["source"], reference["source"], silent)
    sentences += _of_numbers(own, reference, silent)
    if silent:
        sentences.append(
            f"The reference does not say {_listed(silent)}: whether they fit is not known."
        )
    return sentences


def _features_of(
    own: Mapping[str, Any], reference: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Returns what differs in the descriptions of the features, by name."""
    mine, other = own["features"] or {}, reference["features"] or {}
    # Features of other kinds have nothing in common, and what foreign files know are these three.
    names = (
        ("kind", "resize", "fingerprint") if mine.get("kind") == other.get("kind") else ("kind",)
    )
    pairs = {name: (mine.get(name), other.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _of_sources(
    mine: Mapping[str, Any] | None, other: Mapping[str, Any] | None, silent: list[str]
) -> Iterator[str]:
    """Yields sentences on the identities of the images, and adds to ``silent``."""
    if other is None:
        silent.append("which images it is of")
    elif mine is None:
        yield "Which images the model was trained on is not known: perhaps not the reference's."
    elif mine != other:
        names = [*mine, *(name for name in other if name not in mine)]
        differ = [name for name in names if mine.get(name) != other.get(name)]
        yield (
            "The reference is not of the images that the model was trained on: they differ in "
            f"{_listed(differ)}."
        )


def _of_numbers(
    own: Mapping[str, Any], reference: Mapping[str, Any], silent: list[str]
) -> Iterator[str]:
    """Yields sentences on the numbers of the images, and adds to ``silent``."""
    count, others = own["num_images"], reference["num_images"]
    of_texts = "prompts" in own  # which are of no class
    enough = text_prompts.NUM if of_texts else ENOUGH
    if count is None:
        yield "The number of images measured is not known."
    elif count < enough:
        yield (
            f"Only {count:,} images were measured: distances grow as images become fewer, so this "
            f"compares with results of {count:,} images only, not with published ones of "
            f"{enough:,}."
        )
    if others is None:
        silent.append("its number of images")
    elif others < enough:
        yield f"The reference has only {others:,} images, which adds to the distance, too."
    if of_texts:
        return
    mine, theirs = own["class_counts"], reference["class_counts"]
    if mine is None:
        yield "How many images of each class were measured is not known."
    elif max(mine) - min(mine) > 1:
        yield f"Classes are not balanced: {min(mine):,} to {max(mine):,} images of each class."
    elif max(mine) > min(mine):
        yield f"The number of images is no multiple of the {len(mine):,} classes."
    if theirs is None:
        silent.append("how many images of each class it has")
    elif mine is not None and len(mine) != len(theirs):
        yield f"The reference has {len(theirs):,} classes, the measured images {len(mine):,}."
    elif mine is not None and max(theirs) > 2 * min(theirs):
        yield (
            f"The reference's classes are of very different sizes, {min(theirs):,} to "
            f"{max(theirs):,} images."
        )


def _listed(names: list[str]) -> str:
    """Returns names as a sentence has them: "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def short(value: Any) -> str:
    """Returns a JSON value as text of at most 40 characters; of a longer one the beginning."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
