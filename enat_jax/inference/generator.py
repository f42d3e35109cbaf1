"""A trained model as one thing: class labels in, images out.

    from enat_jax.generator import Generator
    images = Generator.load("runs/digits/enat/model").sample([0, 1, 2], seed=0)

A model directory is all that is needed to draw images:

    model.json                 settings, class names, sampler, provenance, fingerprints
    transformer/               weights for JAX (Orbax)
    transformer.safetensors    the same weights for everyone; one of the two will do
    tokenizer/                 what turns tokens into images, see the tokenizer module
    README.md                  says the same to who finds the directory

``python -m enat_jax.export`` makes one from a run or from another one, and adds what others need.
"""

import dataclasses
import pathlib

import jax
import numpy as np

from enat_jax.checkpoints import hub, model_files
from enat_jax.inference import masked_scores, model_card, sampling, tokenizer
from enat_jax.models import enat, nat, transformers
from enat_jax.runtime import files, sharding

FORMAT = "enat_jax model 2"
BATCH_SIZE = 100  # images per call of the sampler, at most, where nothing else is said


@dataclasses.dataclass(frozen=True, eq=False)
class Generator(model_files.TrainedModel):
    """Transformer, tokenizer and sampler settings.

    Attributes:
        tokenizer: turns tokens into images.
        class_names: one name per class.
        settings: ``sampling.Settings`` to sample with.
        provenance: JSON values that say where the weights come from.

    Each of several processes draws images of its own, on its ``devices``.
    """

    model: enat.ENAT | nat.NAT
    tokenizer: tokenizer.Tokenizer
    class_names: tuple[str, ...]
    settings: sampling.Settings = sampling.Settings()
    provenance: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        rows, columns = self.tokenizer.grid
        found = (rows * columns, self.tokenizer.model.codebook_size, len(self.class_names))
        needed = (self.model.num_tokens, self.model.codebook_size, self.model.num_classes)
        if found != needed:
            raise ValueError(
                "tokens an image, codes and classes of the tokenizer and the class names are "
                f"{found}, of the transformer {needed}: they do not belong together"
            )

    def with_settings(self, **changes):
        """The same model with other sampler settings, for instance ``guidance_scale=3.0``."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **changes))

    def with_dtype(self, dtype):
        """The same with weights and computation in ``dtype``, "float32" or "bfloat16"."""
        tokenizer_ = self.tokenizer.with_dtype(dtype)
        return dataclasses.replace(super().with_dtype(dtype), tokenizer=tokenizer_)

    def sample(self, labels, seed=0, first_index=0, batch_size=None):
        """Generate one image per label.

        Args:
            labels: int [n], 0 <= label <= num_classes; ``num_classes`` means no class.
            seed: 0 <= seed < 2**32. An image depends on seed, its index and its label alone.
            first_index: index of the first image, to continue an earlier call.
            batch_size: images per call of the network, over all devices; the last batch is filled
                up to it, so that calls of any number of labels share one compilation. None: n,
                at most ``BATCH_SIZE``.

        Returns:
            uint8 [n, h, w, c].

        Raises:
            ValueError: a label or the seed is out of range, or ``batch_size`` is not positive.
        """
        batches = self._token_batches(labels, seed, first_index, batch_size)
        images = [self.tokenizer.decode(tokens)[:count] for count, tokens in batches]
        shape = (*self.tokenizer.image_size, self.tokenizer.model.image_channels)
        return np.concatenate(images or [np.zeros((0, *shape), np.uint8)])

    def sample_tokens(self, labels, seed=0, first_index=0, batch_size=None):
        """As ``sample`` without decoding: int32 tokens [n, l] in raster order."""
        batches = self._token_batches(labels, seed, first_index, batch_size)
        empty = np.zeros((0, self.model.num_tokens), np.int32)
        return np.concatenate([empty, *(tokens[:count] for count, tokens in batches)])

    def _token_batches(self, labels, seed, first_index, batch_size):
        """Pairs (number of images, tokens [b, l]); tokens beyond the number fill up the batch."""
        labels = self._checked(labels)
        if batch_size is None:
            batch_size = max(1, min(BATCH_SIZE, len(labels)))
        if batch_size < 1:
            raise ValueError(f"{batch_size=} must be at least 1")
        key = _key(seed)
        mesh, params = self.placed
        run = sampling.make(self.model, self.settings)
        for start in range(0, len(labels), batch_size):
            part = labels[start : start + batch_size]
            index = first_index + start + np.arange(batch_size, dtype=np.int32)
            # `place` fills up to a multiple of the devices.
            rows = [sharding.place(x, mesh) for x in (np.resize(part, batch_size), index)]
            yield len(part), np.asarray(run(params, *rows, key))

    def masked_scores(self, tokens, labels, num_visible, seed=0):
        """How well the model predicts masked tokens when ``num_visible`` random ones are seen.

        Args:
            tokens: int [n, l] in raster order; labels: int [n].
            num_visible: 0 <= num_visible < l; seed: of the random orders.

        Returns:
            ``(loss, hits)``: float32 [n, m] cross-entropy in nats, bool [n, m] argmax hits.
        """
        tokens = np.asarray(tokens, np.int32)
        if not 0 <= num_visible < self.model.num_tokens:
            raise ValueError(f"{num_visible=} must lie in [0, {self.model.num_tokens})")
        order = np.asarray(masked_scores.random_order(jax.random.key(seed), tokens.shape))
        mesh, params = self.placed
        rows = [sharding.place(x, mesh) for x in (tokens, self._checked(labels), order)]
        scores = masked_scores.scores(self.model, params, *rows, int(num_visible))
        return tuple(np.asarray(x)[: len(tokens)] for x in scores)

    def save(self, directory, formats=model_files.WEIGHTS):
        """Write a model directory; ``model.json`` comes last, so that one that has it is whole.

        Args:
            directory: created if missing; the model's files there are replaced.
            formats: of the weights, of ``model_files.WEIGHTS``.

        Raises:
            ValueError: the weights were loaded in another dtype than they were saved in.
            OSError: it cannot be written.
        """
        directory = pathlib.Path(directory)
        self.save_weights(directory / "transformer", formats, FORMAT)
        self.tokenizer.save(directory / "tokenizer", formats)
        if jax.process_index() == 0:
            self.write_readme(directory)
            files.write_json(directory / "model.json", self.description)

    @property
    def description(self):
        """The content of ``model.json``."""
        return {
            "format": FORMAT,
            "kind": "nat" if isinstance(self.model, nat.NAT) else "enat",
            "model": model_files.settings_of(self.model),
            "sampler": dataclasses.asdict(self.settings),
            "class_names": list(self.class_names),
            "fingerprint": {
                "transformer": self.fingerprint,
                "tokenizer": self.tokenizer.fingerprint,
            },
            "provenance": self.provenance,
        }

    def write_readme(self, directory, compiled=False):
        """Write ``README.md``; ``compiled``: whether the directory has a compiled sampler."""
        size = sum(x.size for x in jax.tree.leaves(self.params))
        text = model_card.text(self.description, self.tokenizer.image_size, size, compiled)
        files.write_atomically(pathlib.Path(directory) / "README.md", text.encode())

    @classmethod
    def load(cls, directory, dtype=None, devices=None):
        """Read a model directory.

        Args:
            directory: path, or "hf://OWNER/NAME" or "hf://OWNER/NAME@REVISION" of the Hugging
                Face Hub.
            dtype: of weights and computation, "float32" or "bfloat16"; None: weights in float32
                and the computation as trained.
            devices: of this process, to divide images over; None: all.

        Raises:
            OSError: there is no model, or it cannot be read.
            ValueError: it is damaged or not a model of ours, or an argument is wrong.
        """
        if hub.is_address(directory):
            directory = hub.download(directory)
        directory = pathlib.Path(directory)
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
        params = model_files.load_saved(directory / "transformer", expected)
        codec = tokenizer.Tokenizer.load(directory / "tokenizer", dtype, devices)
        if codec.fingerprint != expected_tokenizer:
            raise ValueError(
                f"the tokenizer in {directory} is not the one that the model was trained with: "
                "copy the whole model directory again"
            )
        found = cls(
            *(model, params, codec, names, settings, provenance),
            devices=codec.devices,
            saved_fingerprint=expected,
        )
        return found.on_devices(dtype)

    def trace(self, labels, seed=0, index=None):
        """What the sampler knows after each step, of all images in one call of the network.

        Args:
            labels, seed: as for ``sample``.
            index: int [n], the images' indices; None: 0 to n - 1.

        Returns:
            ``sampling.Trace`` of numpy arrays; ``tokens[-1]`` are those of ``sample_tokens``.

        Raises:
            ValueError: a label is out of range.
        """
        labels = self._checked(labels)
        index = np.arange(len(labels)) if index is None else np.asarray(index)
        mesh, params = self.placed
        rows = [sharding.place(x, mesh) for x in (labels, index.astype(np.int32))]
        static, inputs = sampling.make_schedule(self.settings, self.model)
        found = sampling.trace_tokens(self.model, static, inputs, params, *rows, _key(seed))
        return sampling.Trace(*(np.asarray(x)[:, : len(labels)] for x in found))

    def _checked(self, labels):
        labels = np.asarray(labels)
        if labels.ndim != 1 or (labels.size and labels.dtype.kind not in "iu"):
            raise ValueError(f"labels must be a list of whole numbers, not {labels.tolist()!r}")
        wrong = labels[(labels < 0) | (labels > self.model.num_classes)]
        if wrong.size:
            raise ValueError(
                f"label {wrong[0]} is out of range: this model has the classes 0 to "
                f"{self.model.num_classes - 1}, and {self.model.num_classes} for no class"
            )
        return labels.astype(np.int32)


def _key(seed):
    if not 0 <= seed < 2**32:  # JAX would take the lower 32 bits alone
        raise ValueError(f"{seed=} must lie in [0, 2**32)")
    return jax.random.key(seed)


def _description(directory):
    """Values of ``model.json``; raises what ``Generator.load`` does, with advice for this place."""
    advice = "name the `model` directory of a finished run of python -m enat_jax.train"
    if (directory / "model" / "model.json").is_file():
        advice = f"name {directory / 'model'}"
    elif (directory / "tokenizer.json").is_file():
        advice = "this is a tokenizer, which draws nothing: name the model of a transformer"
    elif (directory / "checkpoints").is_dir():
        advice = "this run is not finished, see python -m enat_jax.export --help for its model"
    return files.read_description(directory / "model.json", FORMAT, advice)
