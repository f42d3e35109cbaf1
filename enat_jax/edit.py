"""Draw parts of pictures anew: fill holes, extend pictures, change what is in a region, vary.

    python -m enat_jax.edit --model MODEL_DIR --image cat.png --mask hole.png --out runs/filled
    python -m enat_jax.edit --model MODEL_DIR --image a.png b.png --mask 64,64,192,192 \\
        --labels "tabby cat" --num 4 --out runs/cats
    python -m enat_jax.edit --model MODEL_DIR --image cat.jpg --crop adm --outpaint left=64 \\
        --prompt "a cat on a sofa" --out runs/wider
    python -m enat_jax.edit --model MODEL_DIR --image cat.png --variation 0.5 --out runs/like_it

A mask is a picture that is white where something is to change, of the size of its picture, or a box
LEFT,TOP,RIGHT,BOTTOM in pixels of the picture as the model takes it, without its right and bottom
edge. Masks, labels and prompts are one for all pictures or one for each, and one picture may have
several masks, labels or prompts. Without labels and prompts, what is kept decides alone.

Whatever token of the model has a masked pixel is drawn anew, and so are its neighbours, which have
seen what is hidden: --grow 0 keeps these. Outside the mask the pixels are those of the picture, and
around it new ones fade into them over --blend tokens; with --blend none all are as the model's
tokenizer gives them. --variation SHARE keeps that share of the tokens outside the mask, or of all,
at random, and gives all pixels by the tokenizer. --outpaint makes room on some sides: the picture
keeps its scale, and what has no room any more falls off at the other end. A smaller picture that
fills the model's size together with the room loses nothing. Pictures must have the model's size, or
--crop cuts their middle square out and resizes it, and that of their masks.

DIR receives `NNNNN_<picture>.png`, --num of each, `grid.png`, whose rows begin with the picture and
what is hidden of it, and `settings.json`; all as `python -m enat_jax.sample` has it: what an image
was made with stands in its file, the same command goes on where it was interrupted, and a directory
of other settings is left alone.
"""

import argparse
import math
import pathlib
import re
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Bool, UInt8

from enat_jax.data import decoding
from enat_jax.evaluation import drawing_arguments
from enat_jax.inference import editing, generator, image_directory
from enat_jax.runtime import cli

Box = tuple[int, ...]


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    if not (options.mask or options.outpaint) and options.variation is None:
        raise ValueError("nothing is to change: give --mask, --outpaint or --variation")
    model = drawing_arguments.load(options)
    reads = (options.labels, options.prompt, options.prompts, options.embeddings)
    if model.text is not None and all(given is None for given in reads):
        options.prompt = [""]
    labels, texts = drawing_arguments.shown(options, model, default="no class")
    masks = options.mask or [None]
    n = max(len(labels), len(options.image), len(masks))
    for name, count in (
        ("labels or prompts", len(labels)),
        ("pictures", len(options.image)),
        ("masks", len(masks)),
    ):
        if count not in (1, n):
            raise ValueError(f"{count} {name} of {n} images: give as many, or one for all")
    if len(labels) == 1:
        labels, texts = labels * n, texts and texts.repeated(n)
    pairs = list(zip(_times(options.image, n), _times(masks, n), strict=True))
    found = {pair: _prepared(*pair, model, options) for pair in dict.fromkeys(pairs)}
    originals = image_directory.Originals(
        [path.name for path, _ in pairs],
        images=np.stack([found[pair][0] for pair in pairs]),
        masks=np.stack([found[pair][1] for pair in pairs]),
        grow=options.grow,
        blend=options.blend,
        keep=1.0 if options.variation is None else options.variation,
    )
    image_directory.draw(
        model,
        labels,
        options.num,
        options.out,
        texts=texts,
        originals=originals,
        seed=options.seed,
        batch_size=min(options.batch_size, options.num * n),
    )
    print(f"[edit] images and grid.png in {options.out}")


def _times(given: list[Any], n: int) -> list[Any]:
    return given if len(given) == n else given * n


def _prepared(
    path: pathlib.Path,
    mask: pathlib.Path | Box | None,
    model: generator.Generator,
    options: argparse.Namespace,
) -> tuple[UInt8[np.ndarray, "h w c"], Bool[np.ndarray, "h w"]]:
    """Returns a picture and its mask as the model takes them; raises ValueError naming a file."""
    size, channels = model.tokenizer.image_size, model.tokenizer.model.image_channels
    picture = _read(path, channels)
    covered = None
    if isinstance(mask, pathlib.Path):
        covered = _read(mask, 1)
        if covered.size != picture.size:
            raise ValueError(
                f"{mask} is {_by(covered)} pixels and {path} {_by(picture)}: a mask must have the "
                "size of its picture"
            )
    image, hidden = (
        None if x is None else _framed(x, path, size, options) for x in (picture, covered)
    )
    assert image is not None
    cells = np.zeros(image.shape[:2], bool) if hidden is None else hidden[..., 0] > 127
    if isinstance(mask, tuple):
        _draw_box(cells, mask, path)
    try:
        image, cells = editing.outpainted(image, cells, size, **options.outpaint)
    except ValueError as error:
        raise ValueError(f"{path} {error}: choose another --outpaint") from error
    _check_something_kept_and_changed(path, mask, cells, model, options)
    return image, cells


def _read(path: pathlib.Path, channels: int) -> PIL.Image.Image:
    with decoding.naming(str(path)):
        return decoding.decode(path.read_bytes(), channels)


def _by(picture: PIL.Image.Image) -> str:
    return f"{picture.width}x{picture.height}"


def _framed(
    picture: PIL.Image.Image,
    path: pathlib.Path,
    size: tuple[int, int],
    options: argparse.Namespace,
) -> UInt8[np.ndarray, "h w c"]:
    """Returns the pixels, cropped on request; raises ValueError if their size is another."""
    height, width = size
    if options.crop is not None:
        if height != width:
            raise ValueError(
                f"--crop cuts squares, and this model takes {width}x{height} pixels: resize {path} "
                "yourself"
            )
        with decoding.naming(str(path)):
            return decoding.CROPS[options.crop][1](picture, width)
    if not options.outpaint and picture.size != (width, height):
        crop = ", or let --crop adm cut the middle square out" if height == width else ""
        raise ValueError(
            f"{path} is {_by(picture)} pixels, and this model takes {width}x{height}: resize it"
            f"{crop}"
        )
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _draw_box(cells: Bool[np.ndarray, "h w"], box: Box, path: pathlib.Path) -> None:
    left, top, right, bottom = box
    height, width = cells.shape
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"--mask {','.join(map(str, box))} does not lie within {path}, which is "
            f"{width}x{height} pixels: give LEFT,TOP,RIGHT,BOTTOM, with right at most {width} and "
            f"bottom at most {height}, and both above the other two"
        )
    cells[top:bottom, left:right] = True


def _check_something_kept_and_changed(
    path: pathlib.Path,
    mask: pathlib.Path | Box | None,
    cells: Bool[np.ndarray, "h w"],
    model: generator.Generator,
    options: argparse.Namespace,
) -> None:
    name = ",".join(map(str, mask)) if isinstance(mask, tuple) else mask
    if options.variation is None and not cells.any():
        raise ValueError(
            f"the mask {name} hides nothing of {path}: it must be white where something is to "
            "change, or give --variation"
        )
    if cells.all():
        raise ValueError(
            f"the mask {name} hides all of {path}: keep some of it, or draw new pictures with "
            "python -m enat_jax.sample"
        )
    all_hidden = [
        bool(editing.token_masks(cells[None], model.tokenizer.grid, grow).all())
        for grow in (0, options.grow)
    ]
    if any(all_hidden):
        advice = "hide less" if all_hidden[0] else "choose --grow 0, or hide less"
        raise ValueError(
            f"nothing of {path} is kept, as every token of it has a masked pixel or a neighbour "
            f"with one: {advice}"
        )


def _mask(text: str) -> pathlib.Path | Box:
    """Reads a box, or the path of a mask."""
    if re.fullmatch(r"\s*-?[0-9]{1,9}(\s*,\s*-?[0-9]{1,9}){3}\s*", text):
        return tuple(int(part) for part in text.split(","))
    return cli.path(text)


def _sides(text: str) -> dict[str, int]:
    """Reads "left=8,top=4"."""
    found: dict[str, int] = {}
    for part in text.split(","):
        side, _, pixels = (x.strip() for x in part.partition("="))
        if side not in editing.SIDES or side in found or not re.fullmatch("[0-9]{1,9}", pixels):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not SIDE=PIXELS, such as left=8,top=4; sides are "
                f"{', '.join(editing.SIDES)}, each once"
            )
        found[side] = int(pixels)
    if not any(found.values()):
        raise argparse.ArgumentTypeError(f"{text!r} makes no room: give some pixels")
    return found


def _share(text: str) -> float:
    return _number(text, 1, "a share of the tokens")


def _blend(text: str) -> float | None:
    return None if text == "none" else _number(text, generator.MAX_BLEND, "none or tokens")


def _number(text: str, most: int, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}: a number from 0 to {most}")
    return value


def _tokens(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of tokens, 0 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m enat_jax.edit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=cli.model, required=True, metavar="DIR", help="or hf://OWNER/NAME")
    listed: Any = dict(nargs="+", action="extend")
    add("--image", type=cli.path, required=True, metavar="PICTURE", **listed)
    add("--mask", type=_mask, default=[], metavar="MASK", help="pictures or boxes", **listed)
    add(
        "--outpaint",
        type=_sides,
        default={},
        metavar="SIDE=PIXELS,...",
        help="new pixels on sides of the picture, such as left=8,top=4",
    )
    add("--variation", type=_share, metavar="SHARE", help="of the tokens that is kept, at random")
    add("--labels", help="class names or numbers, such as 0,1,2 (default: no class)")
    drawing_arguments.add_texts(parser)
    add("--grow", type=_tokens, default=1, help="tokens that a mask grows by (default 1)")
    add("--blend", type=_blend, default=1.0, help="tokens, or none, see above (default 1)")
    add("--crop", choices=tuple(decoding.CROPS), help="of pictures of another size")
    add("--num", type=int, default=4, help="images per picture (default 4)")
    drawing_arguments.add_output(parser)
    drawing_arguments.add_sampler(parser)
    return parser


if __name__ == "__main__":
    cli.run(main)
