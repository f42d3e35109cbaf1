"""Scenes of digits that stand-ins for a model draw as they are told, from texts."""

import dataclasses
import functools
import types

import numpy as np

from enat_jax.data import scenes, text_tokens
from enat_jax.data.scenes import Scene, Scenes
from enat_jax.inference import sampling, text_encoder

SOURCE = Scenes(split="train", num=300, size=16, rotation=5.0)
SCENES = {
    caption: Scene(i, j, axis)
    for axis in scenes.AXES
    for i in range(10)
    for j in range(10)
    for caption in Scene(i, j, axis).captions
}


class Tokenizer:
    """A token is a pixel in 16 levels."""

    fingerprint = "levels of pixels"
    image_size = (16, 16)
    model = types.SimpleNamespace(image_channels=1)

    def encode(self, pictures):
        return (np.asarray(pictures) // 16).astype(np.int32).reshape(-1, 256)

    def decode(self, token_ids):
        return (np.asarray(token_ids) * 17).astype(np.uint8).reshape(-1, 16, 16, 1)


@functools.cache
def digits(split):
    """Pictures by class, as they are."""
    source = dataclasses.replace(SOURCE.digits, split=split)
    pictures = source.gather(np.arange(len(source)))["images"]
    return [pictures[source.labels == digit] for digit in range(10)]


def picture(scene, rng, split="test"):
    """A scene of digits of a split, at a place that the text leaves open."""
    canvas = np.zeros((16, 16, 1), np.uint8)
    for cell, digit in zip(scene.cells(int(rng.integers(2))), scene[:2], strict=True):
        y, x = 8 * (cell // 2), 8 * (cell % 2)
        canvas[y : y + 8, x : x + 8] = rng.choice(digits(split)[digit])
    return canvas


def of_seen(scene):
    """What a model draws that knows pairs of digits and no places: what it has seen."""
    return scene.reversal if scene in scenes.unseen() else scene


@dataclasses.dataclass(frozen=True)
class Model:
    """Draws ``change(scene)`` of each text, nothing of the empty one; ``reads`` part of a text."""

    change: object = lambda scene: scene
    reads: object = lambda scene: scene
    split: str = "test"
    settings: sampling.Settings = sampling.Settings()
    text: object = text_encoder.TextEncoder(text_tokens.Words(scenes.WORDS), 7)
    tokenizer: object = Tokenizer()
    fingerprint = "as it is told"

    def with_settings(self, **changes):
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **changes))

    def sample(self, *, prompts, seed, negative_prompts=None, first_index=0, batch_size=None):
        drawn = []
        for i, prompt in enumerate(prompts, first_index):
            scene = SCENES.get(prompt) and self.change(SCENES[prompt])
            rng = np.random.default_rng([seed, i])
            blank = np.zeros((16, 16, 1), np.uint8)
            drawn.append(picture(scene, rng, self.split) if scene else blank)
        return np.stack(drawn)

    def masked_scores(self, codes, labels, num_visible, seed, *, prompts):
        """The loss is 1 where the text reads otherwise than that of the held-out combination."""
        assert codes.shape == (len(prompts), 256) and labels is None
        held_out = scenes.combinations("unseen")
        own = [held_out[i % len(held_out)] for i in range(len(prompts))]
        read = [SCENES[prompt] for prompt in prompts]
        wrong = [self.reads(x) != self.reads(y) for x, y in zip(read, own, strict=True)]
        loss = np.broadcast_to(np.array(wrong, float)[:, None], (len(own), 256 - num_visible))
        return loss, loss < 0.5
