"""A trained model as one thing: class labels or texts in, images out.

    from enat_jax.generator import Generator
    images = Generator.load("runs/digits/enat/model").sample([0, 1, 2], seed=0)
    images = Generator.load("runs/scenes/enat/model").sample(prompts=["a three left of a seven"])

A model directory is all that is needed to draw images:

    model.json                 settings, class names, sampler, provenance, fingerprints
    transformer/               weights for JAX (Orbax)
    transformer.safetensors    the same weights for everyone; one of the two will do
    tokenizer/                 the tokenizer, which turns tokens into images
    null_text.npy              of a model of states of texts, those of the empty text
    text_encoder/              on request, the encoder of the texts
    README.md                  the same for people

``python -m enat_jax.export`` makes one from a run or from another one, and adds what others need.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from enat_jax.checkpoints import hub, model_files
from enat_jax.inference import (
    conditions,
    editing,
    masked_scores,
    model_card,
    sampler_schedule,
    sampling,
    text_encoder,
    tokenizer,
)
from enat_jax.inference.conditions import Prompts
from enat_jax.models import nat, transformers
from enat_jax.runtime import buckets, files, numerics, paths, sharding
from enat_jax.schedules import reveal

FORMAT = "enat_jax model 2"
BATCH_SIZE = 100  # images per call of the sampler at most, by default
MAX_BLEND = 1000  # tokens

Integers = Sequence[int] | Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, eq=False)
class Generator(model_files.TrainedModel):
    """A transformer with its weights, its tokenizer, and settings of the sampler.

    Each of several processes draws images of its own, on its ``devices``.

    Attributes:
        tokenizer: turns tokens into images.
        class_names: one name per class.
        settings: of the sampler.
        provenance: JSON values that say where the weights come from.
        text: how texts are read; None: the model takes none.
        planned: images that are going to be drawn in all, in calls with a ``batch_size``: where
            the settings leave the sampler's segments open, more are compiled for more images.
            None: those of a batch.
    """

    model: transformers.Transformer
    tokenizer: tokenizer.Tokenizer
    class_names: tuple[str, ...]
    settings: sampling.Settings = sampling.Settings()
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    text: text_encoder.TextEncoder | None = None
    planned: int | None = None

    def __post_init__(self) -> None:
        rows, columns = self.tokenizer.grid
        found = (rows * columns, self.tokenizer.model.codebook_size, len(self.class_names))
        needed = (self.model.num_tokens, self.model.codebook_size, self.model.num_classes)
        if found != needed:
            raise ValueError(
                "tokens an image, codes and classes of the tokenizer and the class names are "
                f"{found}, of the transformer {needed}: they do not belong together"
            )
        self.settings.check_counts(self.model.num_tokens)
        if bool(getattr(self.model, "takes_text", False)) != (self.text is not None):
            raise ValueError("a model of text needs to know how texts are read, and no other does")
        if self.text is not None:
            self.text.check_model(self.model)

    def __repr__(self) -> str:
        read = [] if self.text is None else [repr(self.text)]
        if self.class_names or not read:
            read.append(f"{len(self.class_names):,} classes")
        return self.described(*read, f"{self.settings.num_steps} steps", repr(self.tokenizer))

    def with_settings(self, **changes: Any) -> Self:
        """Returns the same model with other sampler settings, such as ``guidance_scale=3.0``."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **changes))

    def with_dtype(self, dtype: str) -> Self:
        """Returns the same with weights and computation in ``dtype``, "float32" or "bfloat16"."""
        tokenizer_ = self.tokenizer.with_dtype(dtype)
        return dataclasses.replace(super().with_dtype(dtype), tokenizer=tokenizer_)

    def with_text_encoder(self, directory: str | os.PathLike) -> Self:
        """Returns the same model with the text encoder in a directory; raises as ``load``."""
        text = self.reading_texts().with_encoder(directory, self.devices)
        return dataclasses.replace(self, text=text)

    def sample(
        self,
        labels: Integers | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int | None = None,
        *,
        prompts: Prompts | None = None,
        negative_prompts: Prompts | None = None,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """Generates one image per label, per prompt, or per both.

        Args:
            labels: 0 <= label <= num_classes; ``num_classes`` means no class. None: no class.
            seed: 0 <= seed < 2**32. An image depends on seed, its index, label and prompt alone,
                and its noise on neither label nor prompt.
            first_index: index of the first image, to continue an earlier call.
            batch_size: images per call of the network, over all devices; the last batch is filled
                up to it, so that calls of any number of labels share one compilation. None: n,
                at most ``BATCH_SIZE``.
            prompts: a text an image, or their states, see ``blocks.Prompt``. None: no text.
            negative_prompts: likewise, what guidance leads away from in place of the empty text.

        Raises:
            ValueError: a label or the seed is out of range, ``batch_size`` is not positive, a text
                cannot be read, or there are neither labels nor prompts.
            ImportError: the packages that read texts are not installed.
        """
        wanted = self._wanted(labels, prompts, negative_prompts)
        index = first_index + np.arange(len(wanted.labels))
        batches = self._token_batches(wanted, seed, index, batch_size)
        images = [self.tokenizer.decode(tokens)[:count] for count, tokens in batches]
        shape = (*self.tokenizer.image_size, self.tokenizer.model.image_channels)
        return np.concatenate(images or [np.zeros((0, *shape), np.uint8)])

    def sample_tokens(
        self,
        labels: Integers | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int | None = None,
        *,
        prompts: Prompts | None = None,
        negative_prompts: Prompts | None = None,
    ) -> Int[np.ndarray, "n l"]:
        """Generates as ``sample`` does, and returns int32 tokens in raster order."""
        wanted = self._wanted(labels, prompts, negative_prompts)
        index = first_index + np.arange(len(wanted.labels))
        batches = self._token_batches(wanted, seed, index, batch_size)
        empty = np.zeros((0, self.model.num_tokens), np.int32)
        return np.concatenate([empty, *(tokens[:count] for count, tokens in batches)])

    def edit(
        self,
        images: UInt8[np.ndarray, "n h w c"],
        masks: Bool[np.ndarray, "n h w"] | None = None,
        labels: Integers | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int | None = None,
        *,
        prompts: Prompts | None = None,
        negative_prompts: Prompts | None = None,
        grow: int = 1,
        blend: float | None = 1.0,
        keep: float = 1.0,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """Draws parts of images anew, as what is kept and labels or prompts suggest.

        Args:
            images: of the size of the model's.
            masks: True where a pixel is to be changed; see ``editing.outpainted`` for masks that
                extend a picture. None: nothing is hidden.
            labels, prompts, negative_prompts: as for ``sample``, one for each image. Neither labels
                nor prompts: what is kept decides alone.
            seed, first_index, batch_size: as for ``sample``.
            grow: tokens around a mask that are drawn anew, too.
            blend: tokens outside a mask over which what was filled in fades into the original
                pixels, which all others are. None: all pixels are the tokenizer's, and of a mask
                that hides nothing its reconstruction.
            keep: share of the tokens outside a mask that are kept, drawn at random. Below 1 the
                result is a variation of the image, and all of its pixels are the tokenizer's.

        Raises:
            ValueError: an argument is out of range, or of another shape or number than the images.
            ImportError: the packages that read texts are not installed.
        """
        images = self.tokenizer.checked(images)
        masks = editing.checked_masks(masks, images)
        if blend is not None and not 0 <= blend <= MAX_BLEND:
            raise ValueError(f"{blend=} must be None or a number of tokens from 0 to {MAX_BLEND}")
        index = first_index + np.arange(len(images))
        masked = editing.token_masks(masks, self.tokenizer.grid, grow)
        numerics.key(seed)  # raises if it is out of range
        masked = editing.with_share_dropped(masked, keep, seed, index)
        tokens = self.tokenizer.encode(editing.neutralised(images, masks))
        texts: Any = dict(prompts=prompts, negative_prompts=negative_prompts)
        tokens = self.fill_tokens(tokens, masked, labels, seed, first_index, batch_size, **texts)
        filled = self.tokenizer.decode(tokens)
        if blend is None or keep < 1:
            return filled
        seam = blend * images.shape[1] / self.tokenizer.grid[0]
        return editing.blended(images, filled, masks, seam)

    def fill_tokens(
        self,
        tokens: Int[np.ndarray, "n l"],
        masked: Bool[np.ndarray, "n l"],
        labels: Integers | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int | None = None,
        *,
        prompts: Prompts | None = None,
        negative_prompts: Prompts | None = None,
    ) -> Int[np.ndarray, "n l"]:
        """Draws the masked ones of tokens in raster order; all others stay as they are.

        The other arguments are those of ``edit``. Images with all tokens masked are those of
        ``sample_tokens``. Batches are made of images with about as many masked tokens, so that
        four compiled shapes serve all masks, and an image has its shape whatever the others are.
        """
        tokens, masked = np.asarray(tokens, np.int32), np.asarray(masked)
        n, length = tokens.shape[0], self.model.num_tokens
        if masked.dtype != bool or not tokens.shape == masked.shape == (n, length):
            raise ValueError(
                f"tokens {tokens.shape} and a mask of {masked.dtype} {masked.shape}: need [n, "
                f"{length}] of both, and a mask of bool"
            )
        if labels is None and prompts is None:
            labels = np.full(n, self.model.num_classes)
        wanted = self._wanted(labels, prompts, negative_prompts)
        if len(wanted.labels) != n:
            raise ValueError(
                f"{len(wanted.labels)} labels or prompts of {n} images: give one for each image"
            )
        batch_size = max(1, min(BATCH_SIZE, n)) if batch_size is None else batch_size
        found = tokens.copy()
        groups: dict[int, list[int]] = {}
        for row in map(int, np.flatnonzero(masked.any(axis=1))):
            last = reveal.masked_range(length, int(masked[row].sum()))[-1]
            groups.setdefault(last, []).append(row)
        for last, members in groups.items():
            rows = np.array(members)
            given = None if last == length else sampling.Given(tokens[rows], masked[rows])
            part = wanted.part(rows), seed, first_index + rows, batch_size, given
            found[rows] = np.concatenate([x[:count] for count, x in self._token_batches(*part)])
        return found

    def _token_batches(
        self,
        wanted: conditions.Conditions,
        seed: int,
        index: Int[np.ndarray, " n"],
        batch_size: int | None,
        given: sampling.Given | None = None,
    ) -> Iterator[tuple[int, Int[np.ndarray, "b l"]]]:
        """Yields how many images a batch has, and its tokens; more of them fill up the batch."""
        n = len(wanted.labels)
        if batch_size is None:
            batch_size = max(1, min(BATCH_SIZE, n))
        if batch_size < 1:
            raise ValueError(f"{batch_size=} must be at least 1")
        key = numerics.key(seed)
        mesh, params = self.placed
        make_schedule = self._schedules(batch_size)
        static, inputs = make_schedule()
        for start in range(0, n, batch_size):
            rows = slice(start, start + batch_size)
            part = wanted.part(rows)
            # `place` fills up to a multiple of the devices.
            of_batch = [np.resize(part.labels, batch_size)]
            of_batch.append(np.resize(index[rows], batch_size).astype(np.int32))
            texts = part.placed(mesh, batch_size)
            if given is not None:
                known = [
                    np.resize(x[rows], (batch_size, x.shape[1])) for x in map(np.asarray, given)
                ]
                placed = sampling.Given(*(sharding.place(x, mesh) for x in known))
                number = np.resize(known[1].sum(axis=1), len(placed.masked))
                static, inputs = make_schedule(number)
                texts["given"] = placed
            labels, numbers = (sharding.place(x, mesh) for x in of_batch)
            tokens = sampling.sample_tokens(
                self.model, static, inputs, params, labels, numbers, key, **texts
            )
            yield len(part.labels), np.asarray(tokens)

    def _schedules(self, batch_size: int) -> Callable[..., Any]:
        """Returns ``sampler_schedule.make`` for this model, of a number of masked tokens.

        An image's segments depend on nothing that its compiled shape does not depend on: the batch.
        """
        return functools.partial(
            sampler_schedule.make,
            self.settings,
            self.model,
            grid=self.tokenizer.grid,
            num_images=self.planned or batch_size,
        )

    def _wanted(
        self,
        labels: Integers | None,
        prompts: Prompts | None,
        negative_prompts: Prompts | None = None,
    ) -> conditions.Conditions:
        if prompts is not None or negative_prompts is not None:
            self.reading_texts()
        if negative_prompts is not None:
            self.check_guided()
        given = None if labels is None else self._checked(labels)
        return conditions.make(self.model, self.text, given, prompts, negative_prompts)

    def check_guided(self) -> None:
        """Raises ValueError if the settings have no guidance, which negative prompts need."""
        if not self.settings.guidance_weights().any():
            raise ValueError(
                "a negative prompt is what guidance leads away from, and these settings have none "
                f"(guidance_scale={self.settings.guidance_scale} in {self.settings.num_steps} "
                "steps): raise guidance_scale, or leave the negative prompt out"
            )

    def reading_texts(self) -> text_encoder.TextEncoder:
        """Returns ``text``; raises ValueError if the model reads none."""
        if self.text is None:
            raise ValueError("this model reads no texts: give labels and no prompts")
        return self.text

    def masked_scores(
        self,
        tokens: Int[np.ndarray, "n l"],
        labels: Integers | None,
        num_visible: int,
        seed: int = 0,
        *,
        prompts: Prompts | None = None,
    ) -> tuple[Float[np.ndarray, "n m"], Bool[np.ndarray, "n m"]]:
        """Measures how well masked tokens are predicted when ``num_visible`` random ones are seen.

        Args:
            tokens: in raster order.
            labels, prompts: as for ``sample``.
            num_visible: 0 <= num_visible < l.
            seed: of the random orders.

        Returns:
            Cross-entropy in nats, and whether the most probable code is right.
        """
        tokens = np.asarray(tokens, np.int32)
        if not 0 <= num_visible < self.model.num_tokens:
            raise ValueError(f"{num_visible=} must lie in [0, {self.model.num_tokens})")
        order = np.asarray(masked_scores.random_order(numerics.key(seed), tokens.shape))
        wanted = self._wanted(labels, prompts)
        mesh, params = self.placed
        rows = [sharding.place(x, mesh) for x in (tokens, wanted.labels, order)]
        prompt = wanted.placed(mesh, len(tokens)).get("prompt")
        scores = masked_scores.scores(self.model, params, *rows, int(num_visible), prompt)
        loss, hits = (np.asarray(x)[: len(tokens)] for x in scores)
        return loss, hits

    def save(
        self,
        directory: str | os.PathLike,
        formats: Collection[str] = model_files.WEIGHTS,
        with_text_encoder: bool = False,
    ) -> None:
        """Writes a model directory; ``model.json`` comes last, so that one that has it is whole.

        Args:
            directory: created if missing; the model's files there are replaced.
            formats: of the weights, of ``model_files.WEIGHTS``.
            with_text_encoder: whether the weights of the text encoder are written, too.

        Raises:
            ValueError: the weights were loaded in another dtype than they were saved in, or there
                is no text encoder at hand.
            OSError: it cannot be written.
        """
        directory = paths.place(directory)
        self.save_weights(directory / "transformer", formats, FORMAT)
        self.tokenizer.save(directory / "tokenizer", formats)
        if with_text_encoder:
            self.reading_texts().save_encoder(directory, formats)
        if jax.process_index() == 0:
            if self.text is not None:
                self.text.save(directory)
            self.write_readme(directory)
            files.write_json(directory / "model.json", self.description)

    @property
    def description(self) -> dict[str, Any]:
        """The content of ``model.json``."""
        text = {} if self.text is None else {"text": self.text.description()}
        return {
            "format": FORMAT,
            "kind": "nat" if isinstance(self.model, nat.NAT) else "enat",
            "model": model_files.settings_of(self.model),
            "sampler": self.settings.described(),
            "class_names": list(self.class_names),
            "fingerprint": {
                "transformer": self.fingerprint,
                "tokenizer": self.tokenizer.fingerprint,
            },
            "provenance": self.provenance,
            **text,
        }

    def write_readme(self, directory: str | os.PathLike, compiled: bool = False) -> None:
        """Writes ``README.md``; ``compiled``: whether the directory has a compiled sampler."""
        size = sum(x.size for x in jax.tree.leaves(self.params))
        directory = paths.place(directory)
        inside = (directory / text_encoder.FOLDER / "encoder.json").is_file()
        about = self.description, self.tokenizer.image_size, size
        text = model_card.text(*about, compiled, with_text_encoder=inside)
        files.write_atomically(directory / "README.md", text.encode())

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        dtype: str | None = None,
        devices: Sequence[jax.Device] | None = None,
        text_encoder_directory: str | os.PathLike | None = None,
    ) -> Self:
        """Reads a model directory.

        Args:
            directory: path, or "hf://OWNER/NAME" or "hf://OWNER/NAME@REVISION" of the Hugging
                Face Hub, or the address of a bucket, see ``buckets.fetched``.
            dtype: of weights and computation, "float32" or "bfloat16"; None: weights in float32
                and the computation as trained.
            devices: of this process, to divide images over; None: all.
            text_encoder_directory: of the text encoder, which a model of states of texts needs to
                read them, unless it has it in ``text_encoder``.

        Raises:
            OSError: there is no model, or it cannot be read.
            ValueError: it is damaged or not a model of ours, or an argument is wrong.
        """
        if hub.is_address(directory):
            directory = hub.download(directory)
        directory = buckets.fetched(directory)
        description = _description(directory)
        with model_files.parsing(directory / "model.json"):
            model = transformers.MODELS[description["kind"]](
                **model_files.settings_from(description["model"])
            )
            settings = sampling.Settings(**description["sampler"])
            names = tuple(description["class_names"])
            provenance = description["provenance"]
            expected = description["fingerprint"]["transformer"]
            expected_tokenizer = description["fingerprint"]["tokenizer"]
            text = _text(directory, description, text_encoder_directory, devices)
        params = model_files.load_weights(directory / "transformer", expected)
        codec = tokenizer.Tokenizer.load(directory / "tokenizer", dtype, devices)
        if codec.fingerprint != expected_tokenizer:
            raise ValueError(
                f"the tokenizer in {directory} is not the one that the model was trained with: "
                "copy the whole model directory again"
            )
        found = cls(
            *(model, params, codec, names, settings, provenance, text),
            devices=codec.devices,
            saved_fingerprint=expected,
        )
        return found.on_devices(dtype)

    def trace(
        self,
        labels: Integers | None = None,
        seed: int = 0,
        index: Integers | None = None,
        *,
        prompts: Prompts | None = None,
        negative_prompts: Prompts | None = None,
    ) -> sampling.Trace:
        """Returns what the sampler knows after each step, of all images in one call of the network.

        Args:
            labels, seed, prompts, negative_prompts: as for ``sample``.
            index: of the images; None: 0 to n - 1.

        Returns:
            Numpy arrays; ``tokens[-1]`` are those of ``sample_tokens``.

        Raises:
            ValueError: a label is out of range.
        """
        wanted = self._wanted(labels, prompts, negative_prompts)
        n = len(wanted.labels)
        index = np.arange(n) if index is None else np.asarray(index)
        mesh, params = self.placed
        rows = [sharding.place(x, mesh) for x in (wanted.labels, index.astype(np.int32))]
        static, inputs = self._schedules(n)()
        texts = wanted.placed(mesh, n)
        key = numerics.key(seed)
        found = sampling.trace_tokens(self.model, static, inputs, params, *rows, key, **texts)
        return sampling.Trace(*(np.asarray(x)[:, :n] for x in found))

    def _checked(self, labels: Integers) -> Int[np.ndarray, " n"]:
        labels = np.asarray(labels)
        if labels.ndim != 1 or (labels.size and labels.dtype.kind not in "iu"):
            raise ValueError(f"labels must be a list of whole numbers, not {labels.tolist()!r}")
        wrong = labels[(labels < 0) | (labels > self.model.num_classes)]
        if wrong.size and not self.model.num_classes:
            raise ValueError(f"label {wrong[0]} is out of range: this model has no classes")
        if wrong.size:
            raise ValueError(
                f"label {wrong[0]} is out of range: this model has the classes 0 to "
                f"{self.model.num_classes - 1}, and {self.model.num_classes} for no class"
            )
        return labels.astype(np.int32)


def _text(
    directory: pathlib.Path,
    description: dict[str, Any],
    given: str | os.PathLike | None,
    devices: Sequence[jax.Device] | None,
) -> text_encoder.TextEncoder | None:
    if "text" in description:
        devices = jax.local_devices() if devices is None else devices
        return text_encoder.load(directory, description["text"], given, devices)
    if given is not None:
        raise ValueError(f"{directory} reads no texts, so a text encoder has no use")
    return None


def _description(directory: pathlib.Path) -> dict[str, Any]:
    """Reads ``model.json``, or says what there is instead; raises as ``Generator.load``."""
    advice = "name the `model` directory of a finished run of python -m enat_jax.train"
    if (directory / "model" / "model.json").is_file():
        advice = f"name {directory / 'model'}"
    elif (directory / "tokenizer.json").is_file():
        advice = "this is a tokenizer, which draws nothing: name the model of a transformer"
    elif (directory / "checkpoints").is_dir():
        advice = "this run is not finished, see python -m enat_jax.export --help for its model"
    return files.read_description(directory / "model.json", FORMAT, advice)
