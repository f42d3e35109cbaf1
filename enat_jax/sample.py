"""Draw images with a trained model.

    python -m enat_jax.sample --model MODEL_DIR --labels all --num 10 --out runs/pictures
    python -m enat_jax.sample --model MODEL_DIR --labels 207,"tabby cat" --steps 16 --out runs/cats
    python -m enat_jax.sample --model MODEL_DIR --labels 3,7 --reveal gif,strip --out runs/reveal

DIR receives `NNNNN_<class name>.png`, `grid.png` with a row per label, and `settings.json`. Images
are numbered through, label by label; an image depends on seed, number and label alone. What it was
made with stands in its text chunk "parameters", too, as JSON. Interrupt it whenever you like: the
same command again draws what is missing and makes the same files; a directory with images of other
settings is left alone.
"""

import argparse
import concurrent.futures
import dataclasses
import difflib
import json
import pathlib
import re

import jax
import numpy as np
import PIL.Image

import enat_jax
from enat_jax.inference import generator, guidance, reveal_pictures
from enat_jax.runtime import cli, files, png, progress

MAX_IMAGES = 10**7  # of a directory
MAX_NAME = 180  # bytes of a class name in a file's name, which has 255 and needs some for a while
GRID_COLUMNS = 50  # most images of a label in `grid.png`, its first
GRID_IMAGES = 2500  # most images of `grid.png`, in whole rows, and
GRID_PIXELS = 1 << 25  # most pixels
SOFTWARE = f"enat_jax {enat_jax.__version__}"
SAMPLER_OPTIONS = {  # option: field of sampling.Settings
    "steps": "num_steps",
    "guidance_scale": "guidance_scale",
    "guidance_schedule": "guidance_schedule",
    "guidance_interval": "guidance_interval",
    "token_temperature": "token_temperature",
    "mask_temperature": "mask_temperature",
    "segments": "num_segments",
}


def parse_labels(text, class_names):
    """Labels named by a comma-separated list of class names or numbers, or by "all".

    Args:
        text: what was asked for. A name goes before a number; ``len(class_names)`` is no class. Of
            a name such as "tabby, tabby cat" each part will do.
        class_names: of the model.

    Returns:
        list of int, 0 <= label <= len(class_names).

    Raises:
        ValueError: a label is unknown or out of range.
    """
    if text == "all":
        return list(range(len(class_names)))
    # Names of classes may have commas in them.
    parts = [text] if text in class_names else [part.strip() for part in text.split(",")]
    return [_label(part, class_names) for part in parts]


def _label(text, class_names):
    if text in class_names:
        return class_names.index(text)
    # "tabby, tabby cat" is called by either name, in any case and with spaces or underscores.
    wanted, synonyms = _normal(text), {}
    for label, name in enumerate(class_names):
        for synonym in {_normal(name), *map(_normal, name.split(","))}:
            synonyms.setdefault(synonym, []).append(label)
    meant = synonyms.get(wanted, [])
    if len(meant) > 1:
        raise ValueError(
            f"label {text!r} may be " + " or ".join(f"{i} ({class_names[i]})" for i in meant)
        )
    if meant:
        return meant[0]
    number = int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None
    if number is None:
        near = difflib.get_close_matches(wanted, synonyms, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"label {text!r} is neither a class name nor a number{hint or ':'} this model has "
            f"the classes 0 ({class_names[0]}) to {len(class_names) - 1} ({class_names[-1]})"
        )
    if not 0 <= number <= len(class_names):
        raise ValueError(
            f"label {number} is out of range: this model has the classes 0 to "
            f"{len(class_names) - 1}, and {len(class_names)} for no class"
        )
    return number


def _normal(name):
    return " ".join(name.replace("_", " ").casefold().split())


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """The images that are asked for: number i is of label ``labels[i // num]``.

    Attributes:
        model: ``Generator``.
        labels: list of int, each for ``num`` images in a row.
        seed: int, 0 <= seed < 2**32.
        out: directory of the files.
    """

    model: generator.Generator
    labels: list
    num: int
    seed: int
    out: pathlib.Path

    def __len__(self):
        return len(self.labels) * self.num

    def labels_of(self, numbers):
        return np.asarray(self.labels, np.int32)[np.asarray(numbers) // self.num]

    def path(self, number):
        """File of an image."""
        name = re.sub(r"[^\w-]+", "_", self._class_name(self.labels[number // self.num]))[:60]
        name = name.encode()[:MAX_NAME].decode(errors="ignore")  # a letter takes up to 4 bytes
        return self.out / f"{number:05d}_{name}.png"

    def text(self, number):
        """Text chunks of its file: all that the image depends on."""
        label = self.labels[number // self.num]
        values = {
            "index": number,
            "label": label,
            "class_name": self._class_name(label),
            "seed": self.seed,
            **self._made_with(),
        }
        return {"Software": SOFTWARE, "parameters": json.dumps(values, sort_keys=True)}

    def settings(self):
        """What all images have in common, the content of ``settings.json``."""
        return {
            "software": SOFTWARE,
            "labels": self.labels,
            "class_names": [self._class_name(label) for label in self.labels],
            "num": self.num,
            "seed": self.seed,
            "provenance": self.model.provenance,
            **self._made_with(),
        }

    def is_there(self, number):
        """Whether the file of an image is whole and its own."""
        try:
            with PIL.Image.open(self.path(number), formats=("PNG",)) as image:
                found = dict(image.info)
                image.verify()  # reads every chunk up to the last and compares the checksums
        except (OSError, SyntaxError, ValueError):
            return False
        return found.items() >= self.text(number).items()

    def _made_with(self):
        return {
            "sampler": dataclasses.asdict(self.model.settings),
            "dtype": np.dtype(self.model.model.dtype).name,
            "transformer": self.model.fingerprint,
            "tokenizer": self.model.tokenizer.fingerprint,
        }

    def _class_name(self, label):
        names = self.model.class_names
        return names[label] if label < len(names) else "no class"


def sample(model, labels, num, out, *, seed=0, batch_size=generator.BATCH_SIZE):
    """Draw ``num`` images of each label into a directory, but for those that are there already.

    Args:
        model: ``Generator``.
        labels: list of int; num: images per label, at least 1.
        out: directory, created if missing.
        seed: int, 0 <= seed < 2**32.
        batch_size: images per call of the network.

    Returns:
        uint8 [n, h, w, c], the images of ``grid.png``.

    Raises:
        ValueError: an argument is out of range, ``out`` holds images of other settings, another
            process is at work there, or the batch does not fit into memory.
        OSError: ``out`` cannot be written. What is there stays there.
    """
    for name, value in (("num", num), ("batch_size", batch_size), ("labels", len(labels))):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"{seed=} must be a whole number from 0 to 2**32 - 1")
    images = Images(model, labels, num, seed, pathlib.Path(out))
    # Not len, which has a limit of its own.
    if num * len(labels) > MAX_IMAGES:
        raise ValueError(
            f"{num=} images of {len(labels)} labels are more than the {MAX_IMAGES:,} that a "
            "directory may have: use several, each with a seed of its own"
        )
    with files.lock_directory(images.out):
        _claim(images)
        _draw_missing(images, min(batch_size, len(images)))
        columns = min(num, GRID_COLUMNS)
        first = _for_grid(images, columns)
        png.write_png(images.out / "grid.png", png.grid(first, columns))
    return first


def _claim(images):
    """Write ``settings.json``, unless the directory belongs to other settings."""
    path = images.out / "settings.json"
    settings = files.as_json(images.settings())
    if not path.exists():
        files.write_json(path, settings)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differ = sorted(k for k in settings.keys() | found if found.get(k) != settings.get(k))
    except (ValueError, AttributeError, TypeError):
        differ = ["settings.json"]
    if differ:
        raise ValueError(
            f"{images.out} holds images of other settings ({', '.join(differ)} differ): choose "
            "another directory"
        )


def _draw_missing(images, batch_size):
    """Draw every batch of which a file is missing, in memory for two batches.

    Always whole batches, the same ones: then resumed or not makes no difference to the last bit.
    """
    starts = range(0, len(images), batch_size)
    batches = [range(i, min(i + batch_size, len(images))) for i in starts]
    todo = [batch for batch in batches if not all(map(images.is_there, batch))]
    done = len(images) - sum(map(len, todo))
    if done:
        print(f"[sample] {done} of {len(images)} images are there already")
    with (
        # Files are written while the devices draw the next batch.
        concurrent.futures.ThreadPoolExecutor() as pool,
        progress.Progress(len(images), 1, done, unit="image") as bar,
    ):
        writing = iter(())
        for batch in todo:
            drawn = _draw(images, batch, batch_size)
            for _ in writing:  # raises what went wrong
                done += 1
            bar.update(done)
            writing = pool.map(lambda i, image: _write(images, i, image), batch, drawn)
        for _ in writing:
            done += 1
        bar.update(done)


def _draw(images, batch, batch_size):
    try:
        # One batch size, one compilation: `sample` fills up the last batch.
        return images.model.sample(images.labels_of(batch), images.seed, batch[0], batch_size)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise ValueError(
                f"{batch_size} images at a time do not fit into memory: choose a smaller "
                "--batch-size"
            ) from error
        raise


def _write(images, number, image):
    png.write_png(images.path(number), image, images.text(number))


def _for_grid(images, columns):
    """The first images of each label, as many labels as ``grid.png`` has room for, from the
    files."""
    height, width = images.model.tokenizer.image_size
    most = min(GRID_IMAGES, GRID_PIXELS // (height * width))
    labels = range(min(len(images.labels), max(1, most // columns)))
    numbers = [label * images.num + i for label in labels for i in range(columns)]
    first = [_read(images.path(number)) for number in numbers]
    return np.stack(first).reshape(len(first), height, width, -1)


def _read(path):
    with PIL.Image.open(path) as image:
        return np.asarray(image)


def main(argv):
    options = _parser().parse_args(argv)
    model = generator.Generator.load(options.model, options.dtype)
    changes = {field: getattr(options, name) for name, field in SAMPLER_OPTIONS.items()}
    model = model.with_settings(**{k: v for k, v in changes.items() if v is not None})
    if options.guidance_interval and model.settings.guidance_schedule != "interval":
        raise ValueError("--guidance-interval needs --guidance-schedule interval")
    labels = parse_labels(options.labels, model.class_names)
    sample(
        model, labels, options.num, options.out, seed=options.seed, batch_size=options.batch_size
    )
    print(f"[sample] images and grid.png in {options.out}")
    if options.reveal:
        numbers = reveal_pictures.spread(len(labels), options.num)
        found = reveal_pictures.draw(
            model, np.repeat(labels, options.num)[numbers], options.seed, numbers
        )
        for kind in options.reveal:
            path = options.out / {"gif": "reveal.gif", "strip": "reveal.png"}[kind]
            reveal_pictures.WRITERS[kind](path, found)
            print(f"[sample] {path}")


def _interval(text):
    parts = text.split(",")
    try:
        return tuple(float(part) for part in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW,HIGH, such as 0.2,0.8") from None


def _reveal(text):
    kinds = text.split(",")
    if unknown := [kind for kind in kinds if kind not in ("gif", "strip")]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is neither gif nor strip")
    return kinds


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m enat_jax.sample", description="Draws images with a trained model."
    )
    add = parser.add_argument
    add("--model", type=pathlib.Path, required=True, metavar="DIR", help="model directory")
    add("--labels", default="all", help="class names or numbers, such as 0,1,2 (default: all)")
    add("--num", type=int, default=10, help="images per label (default 10)")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, required=True, metavar="DIR", help="for the images")
    add("--batch-size", type=int, default=generator.BATCH_SIZE, help="images at a time")
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation, instead of its own")
    add(
        "--reveal",
        type=_reveal,
        default=[],
        metavar="gif,strip",
        help="also show step by step how images come about, in reveal.gif, reveal.png or both: of "
        f"{reveal_pictures.MAX_IMAGES} images at most, the first of each label, then the second",
    )
    add("--steps", type=int, help="sampling steps; this and what follows: default, the model's")
    add("--guidance-scale", type=float)
    add("--guidance-schedule", metavar="NAME", help=", ".join(guidance.SCHEDULES))
    add(
        "--guidance-interval",
        type=_interval,
        metavar="LOW,HIGH",
        help="share of the steps that the schedule interval guides, such as 0.2,0.8",
    )
    add("--token-temperature", type=float)
    add("--mask-temperature", type=float)
    add("--segments", type=int, help="compiled parts of the sampler; only speed depends on it")
    return parser


if __name__ == "__main__":
    cli.run(main)
