"""A directory of drawn images, which an interrupted program completes when it is started again.

It holds ``NNNNN_<class name>.png``, of a prompt ``NNNNN_<first words>.png``, ``grid.png`` with a
row per label or prompt, or several in a row if it were a column otherwise, and ``settings.json``.
On request all images stand in ``samples.npz``, too, as ADM's evaluation program reads them. Images
are numbered through, label by label or prompt by prompt; an image depends on seed, number, label
and prompt alone, whatever JAX is set to. A precision of products or flags of XLA that the user
chose stand in the settings as ``numerics``. What an image was made with, its whole prompt
included, stands in its text chunk "parameters", too, as JSON.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import pathlib
import zipfile
from collections.abc import Iterable, Sequence
from typing import IO, Any

import jax
import numpy as np
import PIL.Image
from jaxtyping import Bool, Int, UInt8

import enat_jax
from enat_jax.checkpoints import model_files
from enat_jax.data import drawn, text_tokens
from enat_jax.inference import editing, generator, text_encoder
from enat_jax.models.blocks import Prompt
from enat_jax.runtime import files, numerics, os_errors, paths, png, progress

NPZ = "samples.npz"
MAX_IMAGES = 10**7  # of a directory
GRID_COLUMNS = 50  # images of a label in `grid.png` at most, its first
GRID_IMAGES = 2500  # images of `grid.png` at most, in whole rows
GRID_PIXELS = 1 << 25  # pixels of `grid.png` at most
SOFTWARE = f"enat_jax {enat_jax.__version__}"


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """What images are to show in words.

    Attributes:
        prompts: the texts; where there are states, those that they were made of, or "".
        states: prompts in place of the texts; None: the texts are read.
        negative: a text that guidance leads away from; None: the empty one.
    """

    prompts: Sequence[str]
    states: Prompt | None = None
    negative: str | None = None

    def of(
        self, encoder: text_encoder.TextEncoder, rows: Int[np.ndarray, " b"]
    ) -> dict[str, Prompt]:
        """Returns the arguments of ``Generator.sample`` for the prompts of these numbers."""
        if self.states is None:
            prompt = encoder.prompt([self.prompts[row] for row in rows])
        else:
            prompt = Prompt(*(np.asarray(x)[rows] for x in self.states))
        if self.negative is None:
            return {"prompts": prompt}
        return {
            "prompts": prompt,
            "negative_prompts": encoder.prompt([self.negative] * len(rows)),
        }

    def repeated(self, num: int) -> "Texts":
        """Returns each prompt ``num`` times."""
        prompts = [prompt for prompt in self.prompts for _ in range(num)]
        states = self.states
        if states is not None:
            states = Prompt(*(np.repeat(np.asarray(x), num, axis=0) for x in states))
        return Texts(prompts, states, self.negative)

    def settings(self, row: int | None = None) -> dict[str, Any]:
        """Returns JSON values that decide what is read; ``row``: of this prompt alone."""
        found: dict[str, Any] = {"prompts": list(self.prompts)}
        if row is not None:
            found = {"prompt": self.prompts[row]}
        if self.negative is not None:
            found["negative_prompt"] = self.negative
        if self.states is not None:
            found["states"] = self._fingerprints if row is None else self._fingerprints[row]
        return found

    @functools.cached_property
    def _fingerprints(self) -> list[str]:
        if self.states is None:
            return []
        rows = zip(*map(np.asarray, self.states), strict=True)
        return [model_files.fingerprint(tokens[:length]) for tokens, length in rows]


def paired(labels: list[int], texts: Texts) -> tuple[list[int], Texts]:
    """Returns as many labels as prompts, where there is one of either for all.

    Raises:
        ValueError: there are several of both, and not as many.
    """
    if len(texts.prompts) == 1:
        texts = texts.repeated(len(labels))
    n = len(texts.prompts)
    if len(labels) not in (1, n):
        raise ValueError(
            f"{len(labels)} labels and {n} prompts: give as many, or one of either for all"
        )
    return labels * (n // len(labels)), texts


@dataclasses.dataclass(frozen=True, eq=False)
class Originals:
    """Pictures that are to be edited, see ``Generator.edit``.

    Attributes:
        names: of the pictures, without folders.
        images, masks: of the model's size; True where a pixel is to be changed.
        grow, blend, keep: arguments of ``Generator.edit``.
    """

    names: Sequence[str]
    images: UInt8[np.ndarray, "n h w c"]
    masks: Bool[np.ndarray, "n h w"]
    grow: int = 1
    blend: float | None = 1.0
    keep: float = 1.0

    def of(self, rows: Int[np.ndarray, " b"]) -> dict[str, Any]:
        """Returns the arguments of ``Generator.edit`` for the pictures of these numbers."""
        how = {name: getattr(self, name) for name in ("grow", "blend", "keep")}
        return {"images": self.images[rows], "masks": self.masks[rows], **how}

    def beside(
        self, drawn: UInt8[np.ndarray, "m h w c"], each: int
    ) -> UInt8[np.ndarray, "k h w c"]:
        """Returns what ``grid.png`` shows: before ``each`` results an original and its mask."""
        n = len(drawn) // each
        hidden = np.where(self.masks[:n, ..., None], np.uint8(editing.GREY), self.images[:n])
        rows = drawn.reshape(n, each, *drawn.shape[1:])
        both = np.stack([self.images[:n], hidden], axis=1)
        return np.concatenate([both, rows], axis=1).reshape(-1, *drawn.shape[1:])

    def settings(self, row: int | None = None) -> dict[str, Any]:
        """Returns JSON values that decide what is kept; ``row``: of this picture alone."""
        how = {name: getattr(self, name) for name in ("grow", "blend", "keep")}
        if row is None:
            return {"images": list(self.names), "pixels": self._fingerprints, **how}
        return {"image": self.names[row], "pixels": self._fingerprints[row], **how}

    @functools.cached_property
    def _fingerprints(self) -> list[str]:
        return [model_files.fingerprint(x) for x in zip(self.images, self.masks, strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """The images that are asked for: number i is of label and prompt ``i // num``.

    Attributes:
        model: draws them.
        labels: each for ``num`` images in a row.
        num: images per label.
        seed: 0 <= seed < 2**32.
        out: directory of the files.
        texts: as many prompts as labels; None: none.
        originals: as many pictures as labels, which are edited; None: images are drawn anew.
    """

    model: generator.Generator
    labels: list[int]
    num: int
    seed: int
    out: pathlib.Path
    texts: Texts | None = None
    originals: Originals | None = None

    def __len__(self) -> int:
        return len(self.labels) * self.num

    def path(self, number: int) -> pathlib.Path:
        """Returns the file of an image."""
        row = number // self.num
        texts = self.texts
        name = self._class_name(self.labels[row]) if texts is None else texts.prompts[row]
        if self.originals is not None:
            name = pathlib.Path(self.originals.names[row]).stem
        return self.out / drawn.file_name(number, name)

    def text(self, number: int) -> dict[str, str]:
        """Returns the text chunks of the file of an image: all that the image depends on."""
        row = number // self.num
        label = self.labels[row]
        values = {
            "index": number,
            "label": label,
            "class_name": self._class_name(label),
            "seed": self.seed,
            **self._made_with(),
        }
        if self.texts is not None:
            values |= self.texts.settings(row)
        if self.originals is not None:
            values |= self.originals.settings(row)
        if not self.model.class_names:
            del values["label"], values["class_name"]
        return {"Software": SOFTWARE, "parameters": json.dumps(values, sort_keys=True)}

    def settings(self) -> dict[str, Any]:
        """Returns what all images have in common, the content of ``settings.json``."""
        values = {
            "software": SOFTWARE,
            "labels": self.labels,
            "class_names": [self._class_name(label) for label in self.labels],
            "num": self.num,
            "seed": self.seed,
            "provenance": self.model.provenance,
            **self._made_with(),
        }
        if self.texts is not None:
            values |= self.texts.settings()
        if self.originals is not None:
            values |= self.originals.settings()
        if not self.model.class_names:
            del values["labels"], values["class_names"]
        return values

    def is_there(self, number: int) -> bool:
        """Says whether the file of an image is whole and was made with the same settings."""
        try:
            with PIL.Image.open(self.path(number), formats=("PNG",)) as image:
                found = dict(image.info)
                image.verify()  # reads every chunk up to the last and compares the checksums
        except (OSError, SyntaxError, ValueError) as error:
            os_errors.pass_on(error, self.path(number))  # it may be there, and good
            return False
        return found.items() >= self.text(number).items()

    def _made_with(self) -> dict[str, Any]:
        return {
            "sampler": self.model.settings.described(),
            "dtype": np.dtype(self.model.model.dtype).name,
            "transformer": self.model.fingerprint,
            "tokenizer": self.model.tokenizer.fingerprint,
            **numerics.recorded(),
        }

    def _class_name(self, label: int) -> str:
        names = self.model.class_names
        return names[label] if label < len(names) else "no class"


def draw(
    model: generator.Generator,
    labels: list[int],
    num: int,
    out: pathlib.Path,
    *,
    texts: Texts | None = None,
    originals: Originals | None = None,
    seed: int = 0,
    batch_size: int = generator.BATCH_SIZE,
    npz: bool = False,
) -> UInt8[np.ndarray, "n h w c"]:
    """Draws ``num`` images of each label into a directory, but for those that are there already.

    What of a prompt the model does not read is printed before anything is drawn.

    Args:
        model: draws them.
        labels: 0 <= label <= num_classes, which means no class.
        num: images per label, at least 1.
        out: directory, created if missing.
        texts: as many prompts as labels; None: labels alone.
        originals: as many pictures as labels, which are edited; None: images are drawn anew.
        seed: 0 <= seed < 2**32.
        batch_size: images per call of the network.
        npz: whether ``samples.npz`` is written, too.

    Returns:
        The images of ``grid.png``.

    Raises:
        ValueError: an argument is out of range, a text cannot be read, ``out`` holds images of
            other settings, another process is at work there, or the batch does not fit into memory.
        OSError: ``out`` cannot be written. What is there stays there.
    """
    for name, value in (("num", num), ("batch_size", batch_size), ("labels", len(labels))):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"{seed=} must be a whole number from 0 to 2**32 - 1")
    model = dataclasses.replace(model, planned=num * len(labels))
    images = Images(model, labels, num, seed, paths.local(out), texts, originals)
    # Not len, which has a limit of its own.
    if num * len(labels) > MAX_IMAGES:
        raise ValueError(
            f"{num=} images of {len(labels)} labels are more than the {MAX_IMAGES:,} that a "
            "directory may have: use several, each with a seed of its own"
        )
    if texts is not None:
        for words in without_room(model, texts):
            print(f"[sample] {words}")
    with files.lock_directory(images.out):
        for path in filter(files.is_unfinished, images.out.iterdir()):
            path.unlink()  # of a process that was killed
        _claim(images)
        _draw_missing(images, min(batch_size, len(images)))
        each = min(num, GRID_COLUMNS)
        first = _for_grid(images, each)
        shown, wide = first, each
        if originals is not None:
            shown, wide = originals.beside(first, each), each + 2
        columns = wide * _labels_in_a_row(len(first) // each, wide)
        png.write_png(images.out / "grid.png", png.grid(shown, columns))
        if npz:
            _write_npz(images)
    return first


def without_room(model: generator.Generator, texts: Texts) -> list[str]:
    """Reads all texts, and says what has no room; raises ValueError if one cannot be read."""
    encoder = model.reading_texts()
    read = [] if texts.states is not None else list(texts.prompts)
    if texts.negative is not None:
        model.check_guided()
        read.append(texts.negative)
    if not read:
        return []
    return [
        f"the prompt {text_tokens.shortened(text)} is longer than the {encoder.context} tokens "
        f"that the model reads; left out: {rest!r}"
        for text, rest in dict(zip(read, encoder.window(read).dropped, strict=True)).items()
        if rest
    ]


def _claim(images: Images) -> None:
    """Writes ``settings.json``, unless the directory belongs to other settings."""
    path = images.out / "settings.json"
    settings = files.as_json(images.settings())
    if not path.exists():
        files.write_json(path, settings)
        return
    advice = "choose another directory"
    found = files.read_json(path, advice)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged, it holds no settings: {advice}")
    both = [numerics.with_all(values) for values in (found, settings)]
    if differ := sorted(files.differences(*both), key=lambda found: found[0]):
        some = [f"{name} is {_shortened(was)}, not {_shortened(now)}" for name, was, now in differ]
        more = f", and {len(some) - 3} more" if len(some) > 3 else ""
        raise ValueError(
            f"{images.out} holds images of other settings ({', '.join(some[:3])}{more}): "
            f"set as before, or {advice}"
        )


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _draw_missing(images: Images, batch_size: int) -> None:
    """Draws every batch of which a file is missing, with two batches in memory at most.

    The batches are always whole and the same ones: images of a program that was interrupted do not
    differ in a single bit from those of one that was not.
    """
    starts = range(0, len(images), batch_size)
    batches = [range(i, min(i + batch_size, len(images))) for i in starts]
    todo = [batch for batch in batches if not all(map(images.is_there, batch))]
    done = len(images) - sum(map(len, todo))
    if done:
        program = "sample" if images.originals is None else "edit"
        print(f"[{program}] {done} of {len(images)} images are there already")
    with (
        # Files are written while the devices draw the next batch.
        concurrent.futures.ThreadPoolExecutor() as pool,
        progress.Progress(len(images), 1, done, unit="image") as bar,
    ):
        writing: Iterable[None] = ()
        for batch in todo:
            drawn = draw_batch(images, batch, batch_size)
            done += len(list(writing))  # raises what went wrong
            bar.update(done)
            paths, texts = map(images.path, batch), map(images.text, batch)
            writing = pool.map(png.write_png, paths, drawn, texts)
        bar.update(done + len(list(writing)))


def draw_batch(images: Images, batch: range, batch_size: int) -> UInt8[np.ndarray, "n h w c"]:
    """Draws images of these numbers, or edits their originals, in one call of the network.

    Raises:
        ValueError: the batch does not fit into memory, or as ``Generator.sample`` and ``edit``.
    """
    try:
        # One batch size, one compilation: `sample` fills up the last batch.
        rows = np.asarray(batch) // images.num
        labels = np.asarray(images.labels, np.int32)[rows]
        texts = {} if images.texts is None else images.texts.of(images.model.reading_texts(), rows)
        of_batch: Any = dict(first_index=batch[0], batch_size=batch_size, **texts)
        if images.originals is not None:
            of_batch |= images.originals.of(rows)
            return images.model.edit(labels=labels, seed=images.seed, **of_batch)
        return images.model.sample(labels, images.seed, **of_batch)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise ValueError(
                f"{batch_size} images at a time do not fit into memory: choose a smaller "
                "--batch-size"
            ) from error
        raise


def _labels_in_a_row(labels: int, each: int) -> int:
    """Returns 1, or of a grid more than twice as high as wide what makes it about square."""
    return 1 if labels <= 2 * each else round(math.sqrt(labels / each))


def _for_grid(images: Images, each: int) -> UInt8[np.ndarray, "n h w c"]:
    """Reads ``each`` images of a label, of as many labels as ``grid.png`` has room for."""
    height, width = images.model.tokenizer.image_size
    most = min(GRID_IMAGES, GRID_PIXELS // (height * width))
    labels = range(min(len(images.labels), max(1, most // each)))
    numbers = [label * images.num + i for label in labels for i in range(each)]
    first = [_read(images.path(number)) for number in numbers]
    return np.stack(first).reshape(len(first), height, width, -1)


def _write_npz(images: Images) -> None:
    """Writes ``arr_0``, uint8 ``[n, h, w, 3]``, and ``arr_1``, the labels, an image at a time.

    Of a model without classes there is no ``arr_1``. The format is that of
    github.com/openai/guided-diffusion; grey is repeated to three channels.
    """
    shape = (*images.model.tokenizer.image_size, 3)

    def write(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                about = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *shape)}
                np.lib.format.write_array_header_1_0(member, about)
                for number in range(len(images)):
                    pixels = _read(images.path(number))
                    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
                    member.write(np.broadcast_to(pixels, shape).tobytes())
            if images.model.class_names:
                with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(
                        member, np.repeat(np.asarray(images.labels, np.int64), images.num)
                    )

    files.write_atomically(images.out / NPZ, write)


def _read(path: pathlib.Path) -> UInt8[np.ndarray, "h w ..."]:
    with PIL.Image.open(path) as image:
        return np.asarray(image)
