"""What a card says beside its numbers."""

import re
import types

import pytest
from image_description import DESCRIPTION

from enat_jax.evaluation import caveats

INCEPTION = types.SimpleNamespace(is_inception=True, origin={"published": True})
OTHER = types.SimpleNamespace(is_inception=False)


def compared(own=None, reference=None):
    return caveats.of_reference(DESCRIPTION | (own or {}), DESCRIPTION | (reference or {}))


def features_with(**changes):
    return {"features": DESCRIPTION["features"] | changes}


def test_nothing_to_say_of_the_same():
    assert compared() == []
    assert compared({"versions": {"numpy": "2.4"}}) == []


@pytest.mark.parametrize(
    ("own", "reference", "sentence"),
    [
        ({}, features_with(kind="random", label="x"), "Features differ in kind (inception; "),
        ({}, features_with(resize="pytorch-fid"), "resize (adm; reference: pytorch-fid)"),
        ({}, features_with(fingerprint="ef" * 32), "fingerprint (abababababababab...; "),
        ({}, {"resolution": [64, 64]}, "resolution differs ([256, 256]; reference: [64, 64])"),
        ({}, {"crop": "resize"}, "The crop differs (center; reference: resize)"),
        ({"crop": None}, {}, "The crop of the model's own images is not known."),
        ({}, {"source": {"source": "files", "split": "test"}}, "they differ in split and listing."),
        ({"source": None}, {}, "Which images the model was trained on is not known"),
        ({"num_images": 5000}, {}, "Only 5,000 images were measured"),
        ({"num_images": None}, {}, "The number of images measured is not known."),
        ({}, {"num_images": 359}, "The reference has only 359 images"),
        ({"class_counts": [10, 7, 9]}, {}, "Classes are not balanced: 7 to 10 images of each"),
        ({"class_counts": [25_001, 25_000]}, {}, "no multiple of the 2 classes."),
        ({"class_counts": None}, {}, "How many images of each class were measured is not known."),
        ({}, {"class_counts": [9] * 10}, "has 10 classes, the measured images 2."),
        ({}, {"class_counts": [9, 20]}, "of very different sizes, 9 to 20 images."),
        ({}, {"crop": None}, "The reference does not say its crop: whether"),
        ({}, features_with(fingerprint=None), "does not say the fingerprint of its features: "),
    ],
)
def test_each_difference_is_a_sentence(own, reference, sentence):
    found = compared(own, reference)
    assert any(sentence in line for line in found), found
    assert all(re.fullmatch(r"[A-Z][^\n]*\.", line) for line in found)


@pytest.mark.parametrize(
    ("network", "channels", "words"),
    [(INCEPTION, 3, []), (INCEPTION, 1, ["grey"]), (OTHER, 1, ["no FID"]), (OTHER, 3, ["no FID"])],
)
def test_what_must_be_said_of_the_features(network, channels, words):
    found = caveats.of_features(network, (8, 8, channels))
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))
