"""Pictures of scenes that a model draws, each row with its text: held-out ones, and swapped words.

``PICTURES`` names the files. No picture is chosen by what it shows.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from enat_jax.data import records, scenes
from enat_jax.inference import generator
from enat_jax.inference.reveal_pictures import GAP, LINE, wrapped, write_line
from enat_jax.runtime import png

COLUMNS = 8  # samples of a text
ROWS = 10  # held-out combinations, evenly chosen
PAIRS = 4  # of two texts with the digits swapped
SIDE = 64  # least pixels of an image's side, in whole multiples of its own
MARGIN = 136  # pixels for texts at the left
PICTURES = {
    "unseen.png": "held-out combinations, evenly chosen",
    "swapped.png": "a text of a held-out combination and below it the same with the digits "
    "swapped, from the same noise",
    "negative.png": "a text, and below it the same led away from another text, from the same noise",
}


def write(model: generator.Generator, directory: pathlib.Path, seed: int) -> dict[str, str]:
    """Writes pictures of a model that reads the words of scenes.

    Args:
        model: draws the images; without guidance it draws none of a negative prompt.
        directory: of the files.
        seed: of the noise.

    Returns:
        What was written: of ``PICTURES``.
    """
    held_out = scenes.combinations("unseen")
    chosen = [held_out[i] for i in records.evenly(len(held_out), ROWS)]
    texts = [scene.captions[i % 2] for i, scene in enumerate(chosen)]
    swapped = [held_out[i] for i in records.evenly(len(held_out), PAIRS)]
    pairs = [[x.captions[0] for x in (scene, scene.reversal)] for scene in swapped]
    one, other = (_draw(model, part, seed) for part in zip(*pairs, strict=True))
    in_turn = np.stack([one, other], axis=1).reshape(-1, *one.shape[1:])
    found = {
        "unseen.png": labelled(_draw(model, texts, seed), texts),
        "swapped.png": labelled(in_turn, sum(pairs, [])),
    }
    if model.settings.guidance_weights().any():
        found["negative.png"] = _negative(model, seed)
    for name, picture in found.items():
        png.write_png(directory / name, picture)
    return {name: PICTURES[name] for name in found}


def labelled(
    images: UInt8[np.ndarray, "rows columns h w c"], names: Sequence[str]
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns rows of images in one picture, each with its name at the left."""
    factor = -(-SIDE // min(images.shape[2:4]))
    large = images.repeat(factor, axis=2).repeat(factor, axis=3)
    large = np.broadcast_to(large, (*large.shape[:-1], 3))
    grid = png.grid(large.reshape(-1, *large.shape[2:]), images.shape[1], GAP)
    margin = np.full((len(grid), MARGIN, 3), 255, np.uint8)
    picture = PIL.Image.fromarray(np.concatenate([margin, grid], axis=1))
    for row, name in enumerate(names):
        lines = wrapped(name, MARGIN - 2 * GAP)
        middle = GAP + row * (large.shape[2] + GAP) + large.shape[2] // 2
        for i, line in enumerate(lines):
            write_line(picture, GAP, middle - LINE * len(lines) // 2 + i * LINE, line)
    return np.asarray(picture)


def _negative(model: generator.Generator, seed: int) -> UInt8[np.ndarray, "height width 3"]:
    drawn = [_draw(model, ["a three"], seed, negative) for negative in (None, ["a seven"])]
    return labelled(np.concatenate(drawn), ["a three", "a three, away from a seven"])


def _draw(
    model: generator.Generator,
    prompts: Sequence[str],
    seed: int,
    negative_prompts: Sequence[str] | None = None,
) -> UInt8[np.ndarray, "rows columns h w c"]:
    """Returns images of texts, the noise of each of its own; one compiled batch serves all."""
    given, negative = (
        None if texts is None else [text for text in texts for _ in range(COLUMNS)]
        for texts in (prompts, negative_prompts)
    )
    images = model.sample(
        prompts=given,
        negative_prompts=negative,
        seed=seed,
        batch_size=generator.BATCH_SIZE,
    )
    return images.reshape(len(prompts), COLUMNS, *images.shape[1:])
