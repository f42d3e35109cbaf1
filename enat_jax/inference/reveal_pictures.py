"""Pictures of how images come about step by step: a GIF, a strip, or arrays for a notebook.

    from enat_jax.inference import reveal_pictures
    found = reveal_pictures.draw(generator, labels=[3, 7], seed=0)
    reveal_pictures.write_gif("reveal.gif", found)
    reveal_pictures.write_strip("reveal.png", found)
    found = reveal_pictures.draw(generator, prompts=["a three left of a seven"])

Places whose tokens are still masked are greyed, with a hint of the current guess; those that a step
has revealed, which are all that the next step has to encode, have a coloured outline.
"""

import dataclasses
import io
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from jaxtyping import Bool, Int, Shaped, UInt8

from enat_jax.inference import image_directory
from enat_jax.inference.conditions import Prompts
from enat_jax.inference.generator import Generator
from enat_jax.models.blocks import Prompt
from enat_jax.runtime import files, png

MAX_IMAGES = 16  # that ``spread`` chooses
MAX_FRAMES = 32  # that ``draw`` keeps beside the first, evenly over the steps
MAX_COLUMNS = 8  # of a strip beside the first
MAX_ROWS = 8  # images of a strip
SIDE = 128  # least pixels of an image's shorter side, in whole multiples of its own
GREY, HINT = 128, 0.15  # what is masked, and how much of the guess shows through
OUTLINE = (255, 128, 0)
PACK = np.array([1 << 16, 1 << 8, 1], np.uint32)  # a colour as one number
GAP, MARGIN, LINE = 4, 96, 20  # pixels: between images, for names at the left, of a line of text
MAX_LINES = 4  # of a prompt
MAX_LETTERS = 200  # of a prompt, of which more would have no room


@dataclasses.dataclass(frozen=True, eq=False)
class Reveal:
    """Frames of the making of n images.

    Attributes:
        steps: how many steps each of the frames comes after; the first is 0, the last t.
        guesses: what all tokens decode to after the steps of each frame but the first, those
            included that the sampler has only guessed.
        visible: the tokens that have been revealed.
        names: class names of the images, or their prompts.
        of_texts: whether the names are prompts, which take several lines and stand in the
            animation, too.
    """

    steps: Int[np.ndarray, " frames"]
    guesses: UInt8[np.ndarray, "frames-1 n h w c"]
    visible: Bool[np.ndarray, "frames n rows columns"]
    names: list[str]
    of_texts: bool = False

    def frames(self) -> UInt8[np.ndarray, "frames n h w c"]:
        """Returns the guesses with what is masked greyed, after a frame that is all grey."""
        grey = np.full_like(self.guesses[:1], GREY)
        hinted = np.rint(GREY + HINT * (self.guesses.astype(np.float32) - GREY)).astype(np.uint8)
        seen = self.pixels(self.visible[1:])[..., None]
        return np.concatenate([grey, np.where(seen, self.guesses, hinted)])

    def pixels(self, places: Bool[np.ndarray, "*n rows columns"]) -> Bool[np.ndarray, "*n h w"]:
        """Returns for each pixel the value of its token."""
        height, width = self.guesses.shape[2:4]
        rows, columns = places.shape[-2:]
        return places.repeat(height // rows, axis=-2).repeat(width // columns, axis=-1)


def spread(num_labels: int, num: int, most: int = MAX_IMAGES) -> Int[np.ndarray, " n"]:
    """Chooses which images to show: the first of each label, then the second, and so on.

    Args:
        num_labels: how many labels there are.
        num: images per label.
        most: images.

    Returns:
        Numbers of at most ``most`` images, which are numbered label by label.
    """
    k = np.arange(min(most, num_labels * num))
    return k % num_labels * num + k // num_labels


def draw(
    generator: Generator,
    labels: Sequence[int] | Int[np.ndarray, " n"] | None = None,
    seed: int = 0,
    index: Sequence[int] | Int[np.ndarray, " n"] | None = None,
    most_frames: int = MAX_FRAMES,
    *,
    prompts: Prompts | None = None,
    negative_prompts: Prompts | None = None,
    names: Sequence[str] | None = None,
) -> Reveal:
    """Generates one image per label or prompt and keeps what the steps leave.

    Args:
        generator: draws the images, which are those of ``Generator.sample`` with the same seed,
            indices, labels and prompts.
        labels, seed, index, prompts, negative_prompts: as for ``Generator.trace``.
        most_frames: of more steps than this an even selection is decoded, the last included.
        names: texts of the images in the pictures; None: the prompts, if they are texts, or else
            the class names.

    Raises:
        ValueError: a label is out of range, or there is none.
    """
    if labels is not None and not len(labels):
        raise ValueError("labels=[]: name at least one to show how its image comes about")
    given = {"prompts": prompts, "negative_prompts": negative_prompts}
    trace = generator.trace(labels, seed, index, **given)
    t, n, _ = trace.tokens.shape
    if names is None and prompts is not None and not isinstance(prompts, Prompt):
        names = prompts
    of_texts = names is not None
    if names is None:
        known = [*generator.class_names, "no class"]
        names = [known[label] for label in ([len(known) - 1] * n if labels is None else labels)]
    steps = np.unique(np.rint(np.linspace(0, t, min(t, most_frames) + 1)).astype(int))
    decoded = generator.tokenizer.decode(np.concatenate(trace.tokens[steps[1:] - 1]))
    visible = np.concatenate([np.zeros_like(trace.visible[:1]), trace.visible])[steps]
    return Reveal(
        steps,
        decoded.reshape(len(steps) - 1, n, *decoded.shape[1:]),
        visible.reshape(len(steps), n, *generator.tokenizer.grid),
        list(names),
        of_texts,
    )


def draw_some(
    generator: Generator,
    labels: Sequence[int],
    num: int,
    seed: int = 0,
    texts: image_directory.Texts | None = None,
    most: int = MAX_IMAGES,
) -> Reveal:
    """Generates some of the images that ``image_directory.draw`` does: those of ``spread``.

    Args:
        generator, labels, num, seed, texts: as for ``image_directory.draw``.
        most: images.

    Raises:
        ValueError: as ``draw``.
    """
    numbers = spread(len(labels), num, most)
    rows = numbers // num
    prompts = {} if texts is None else texts.of(generator.reading_texts(), rows)
    return draw(
        generator,
        np.asarray(labels)[rows],
        seed,
        numbers,
        prompts=prompts.get("prompts"),
        negative_prompts=prompts.get("negative_prompts"),
        names=None if texts is None else [texts.prompts[row] for row in rows],
    )


def frames(
    generator: Generator,
    labels: Sequence[int] | Int[np.ndarray, " n"] | None = None,
    seed: int = 0,
    *,
    prompts: Prompts | None = None,
) -> UInt8[np.ndarray, "t+1 n h w c"]:
    """Generates images and returns a frame before and after every step, what is masked greyed.

    Raises:
        ValueError: a label is out of range, or there is none.
    """
    most = generator.settings.num_steps
    return draw(generator, labels, seed, most_frames=most, prompts=prompts).frames()


def strip(reveal: Reveal) -> UInt8[np.ndarray, "height width 3"]:
    """Returns one picture with time from left to right.

    It has two rows for each of the first 8 images: what has been revealed, and all that is guessed.
    Of more than 8 steps it shows an even selection.
    """
    chosen = np.unique(np.rint(np.linspace(0, len(reveal.steps) - 1, MAX_COLUMNS + 1)).astype(int))
    shown, guesses = _outlined(reveal, chosen), _large(reveal.guesses[chosen[1:] - 1])
    _, n, height, width, _ = shown.shape
    n = min(n, MAX_ROWS)
    down, right = 2 * height + 3 * GAP, width + GAP
    canvas = np.full((LINE * 2 + n * down, MARGIN + len(chosen) * right, 3), 255, np.uint8)
    for row in range(n):
        for column in range(len(chosen)):
            top, left = LINE * 2 + row * down, MARGIN + column * right
            canvas[top : top + height, left : left + width] = shown[column, row]
            if column:
                top += height + GAP
                canvas[top : top + height, left : left + width] = guesses[column - 1, row]
    picture = PIL.Image.fromarray(canvas)
    for column, at in enumerate(chosen):
        lines = f"step {reveal.steps[at]}", _progress(reveal, at)
        for i, line in enumerate(lines if column else ("start", "all masked")):
            write_line(picture, MARGIN + column * right, i * LINE, line)
    for row, name in enumerate(reveal.names[:n]):
        top = LINE * 2 + row * down
        words = wrapped(name, MARGIN - 2 * GAP) if reveal.of_texts else [name]
        for i, line in enumerate((*words, "revealed")):
            write_line(picture, GAP, top + i * LINE, line, MARGIN - 2 * GAP)
        write_line(picture, GAP, top + height + GAP, "guessed", MARGIN - 2 * GAP)
    return np.asarray(picture)


def write_strip(path: str | os.PathLike, reveal: Reveal) -> None:
    """Writes ``strip`` as a PNG file.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    png.write_png(path, strip(reveal))


def write_gif(path: str | os.PathLike, reveal: Reveal) -> None:
    """Writes an animation of all images side by side, which begins anew after the finished images.

    Raises:
        OSError: it cannot be written; the error names ``path``. What was there before is then still
            there.
    """
    shown = _outlined(reveal, range(len(reveal.steps)))
    shown = np.concatenate([shown, _large(reveal.guesses[-1:])])
    columns = int(np.ceil(np.sqrt(shown.shape[1])))
    last = len(reveal.steps) - 1
    pictures = _with_palette(
        [
            _captioned(_named(images, columns, reveal), reveal, min(i, last))
            for i, images in enumerate(shown)
        ]
    )
    step = int(np.clip(4000 / last, 60, 600))  # milliseconds
    content = io.BytesIO()
    pictures[0].save(
        content,
        "GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=[step] * (len(pictures) - 1) + [2500],
        loop=0,
    )
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, content.getvalue())


# The kinds of pictures by name: what their files are called, and what writes them.
KINDS: dict[str, tuple[str, Callable[[str | os.PathLike, Reveal], None]]] = {
    "gif": ("reveal.gif", write_gif),
    "strip": ("reveal.png", write_strip),
}


def _outlined(
    reveal: Reveal, chosen: Sequence[int] | Int[np.ndarray, " k"]
) -> UInt8[np.ndarray, "k n height width 3"]:
    """Returns large frames in colour, outlining what is new in each."""
    chosen = np.asarray(chosen)
    large = _large(reveal.frames()[chosen])
    for i in range(1, len(chosen)):
        new = reveal.pixels(reveal.visible[chosen[i]] & ~reveal.visible[chosen[i - 1]])
        new = _large(new[..., None])[..., 0]
        large[i][_edges(new, max(1, large.shape[2] // 80))] = OUTLINE
    return large


def _edges(places: Bool[np.ndarray, "n h w"], width: int) -> Bool[np.ndarray, "n h w"]:
    """Returns the pixels of ``places`` that are no more than ``width`` away from others."""
    padded = np.pad(places, ((0, 0), (width, width), (width, width)))
    inner = places.copy()
    for down in (0, width, 2 * width):
        for right in (0, width, 2 * width):
            inner &= padded[:, down:, right:][:, : places.shape[1], : places.shape[2]]
    return places & ~inner


def _large(images: Shaped[np.ndarray, "*n h w c"]) -> Shaped[np.ndarray, "*n height width 3"]:
    """Gives images three channels, and repeats pixels until the shorter side has ``SIDE``."""
    factor = -(-SIDE // min(images.shape[-3:-1]))
    images = np.broadcast_to(images, (*images.shape[:-1], 3))
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)


def _progress(reveal: Reveal, at: int) -> str:
    visible = reveal.visible[at, 0]  # of all images there are as many
    return f"{visible.sum()} of {visible.size} tokens"


def _named(
    images: UInt8[np.ndarray, "n h w 3"], columns: int, reveal: Reveal
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns images in one picture, with their prompts, if they have any, below each."""
    if not reveal.of_texts:
        return png.grid(images, columns, GAP)
    _, height, width, _ = images.shape
    names = [wrapped(name, width) for name in reveal.names]
    room = LINE * max(map(len, names))
    picture = PIL.Image.fromarray(
        png.grid(
            np.pad(images, ((0, 0), (0, room), (0, 0), (0, 0)), constant_values=255), columns, GAP
        )
    )
    for i, lines in enumerate(names):
        top = GAP + i // columns * (height + room + GAP) + height
        for j, line in enumerate(lines):
            write_line(picture, GAP + i % columns * (width + GAP), top + j * LINE, line, width)
    return np.asarray(picture)


def _captioned(image: UInt8[np.ndarray, "h w 3"], reveal: Reveal, at: int) -> PIL.Image.Image:
    """Returns the picture of a frame with a line of text below."""
    room = np.full((LINE, *image.shape[1:]), 255, np.uint8)
    picture = PIL.Image.fromarray(np.concatenate([image, room]))
    text = f"step {reveal.steps[at]} of {reveal.steps[-1]}: {_progress(reveal, at)}"
    write_line(picture, GAP, len(image), text)
    return picture


def write_line(
    picture: PIL.Image.Image, left: int, top: int, text: str, width: int | None = None
) -> None:
    """Writes a line into a picture, cut off where it is wider than ``width`` pixels."""
    draw, font = PIL.ImageDraw.Draw(picture), _font()
    while width and len(text) > 1 and font.getlength(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    draw.text((left, top), text, fill=(0, 0, 0), font=font)


def wrapped(text: str, width: int) -> list[str]:
    """Returns a prompt in lines of ``width`` pixels, at most ``MAX_LINES``; the rest is cut off."""
    printed = "".join(c if c.isprintable() else " " for c in text[: MAX_LETTERS + 1])
    cut = len(text) > MAX_LETTERS
    lines = [""]
    for word in printed[:MAX_LETTERS].split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or _font().getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if cut or len(lines) > MAX_LINES:
        lines = lines[:MAX_LINES]
        lines[-1] += " …"
    return lines


def _font() -> PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont:
    return PIL.ImageFont.load_default(14)


def _with_palette(pictures: list[PIL.Image.Image]) -> list[PIL.Image.Image]:
    """Gives pictures one palette, so that nothing flickers; exact up to 256 colours in all."""
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    packed = (stacked.astype(np.uint32) * PACK).sum(-1)
    colours, index = np.unique(packed, return_inverse=True)
    index = index.reshape(packed.shape)
    if len(colours) > 256:
        # What is grey, black, white or outline by intention stays so, to the bit.
        kept = np.array([(GREY,) * 3, (0,) * 3, (255,) * 3, OUTLINE], np.uint32) @ PACK
        some = stacked.reshape(1, -1, 3)[:, :: max(1, packed.size >> 20)]
        common = PIL.Image.fromarray(some).quantize(252, PIL.Image.Quantize.MEDIANCUT)
        found = [x.quantize(palette=common, dither=PIL.Image.Dither.NONE) for x in pictures]
        index = np.stack([np.asarray(x) for x in found])
        palette = np.array(common.getpalette(), np.uint32).reshape(-1, 3)[:252]
        colours = np.concatenate([palette @ PACK, kept])
        for i, colour in enumerate(kept, start=len(palette)):
            index[packed == colour] = i
    entries = [int(colour) >> shift & 255 for colour in colours for shift in (16, 8, 0)]
    made = [PIL.Image.fromarray(rows) for rows in index.astype(np.uint8)]
    for picture in made:
        picture.putpalette(entries)
    return made
