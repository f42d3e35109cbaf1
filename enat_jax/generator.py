"""A trained model as one thing: class labels in, images out.

    from enat_jax.generator import Generator
    images = Generator.load("runs/digits/enat/model").sample([0, 1, 2], seed=0)

A model directory holds `model.json` (settings, class names, provenance), `transformer/` (Orbax)
and `tokenizer/` (see the tokenizer module).
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enat_jax import checkpoint, model_files, sampling, tokenizer
from enat_jax.data import tokens as token_data
from enat_jax.models import enat, nat
from enat_jax.tasks import enat as enat_task

FORMAT = "enat_jax model 2"
BATCH_SIZE = 100  # images per call of the sampler


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """Transformer, tokenizer and sampler settings.

    Attributes:
        model: ``enat.ENAT`` or ``nat.NAT``; params: its (EMA) parameters.
        tokenizer: turns tokens into images.
        class_names: one name per class.
        settings: ``sampling.Settings`` to sample with.
        provenance: JSON values that say where the weights come from.
    """

    model: enat.ENAT | nat.NAT
    params: Any
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

    @functools.cached_property
    def fingerprint(self):
        """SHA-256 of the transformer's weights, hexadecimal."""
        return token_data.fingerprint(self.params)

    def with_settings(self, **changes):
        """The same model with other sampler settings, for instance ``guidance_scale=3.0``."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **changes))

    def sample(self, labels, seed=0, first_index=0, batch_size=BATCH_SIZE):
        """Generate one image per label.

        Args:
            labels: int [n], 0 <= label <= num_classes; ``num_classes`` means no class.
            seed: int. An image depends on seed, its index and its label alone.
            first_index: index of the first image, to continue an earlier call.
            batch_size: images per call of the network.

        Returns:
            uint8 [n, h, w, c].

        Raises:
            ValueError: a label is out of range, or ``batch_size`` is not positive.
        """
        return self.tokenizer.decode(self.sample_tokens(labels, seed, first_index, batch_size))

    def sample_tokens(self, labels, seed=0, first_index=0, batch_size=BATCH_SIZE):
        """As ``sample`` without decoding: int32 tokens [n, l] in raster order."""
        labels = self._checked(labels)
        if batch_size < 1:
            raise ValueError(f"{batch_size=} must be at least 1")
        run = sampling.make(self.model, self.settings)
        key = jax.random.key(seed)
        parts = [np.zeros((0, self.model.num_tokens), np.int32)]
        for start in range(0, len(labels), batch_size):
            part = labels[start : start + batch_size]
            # One batch size, one compilation: the last batch is filled up.
            size = min(batch_size, len(labels))
            padded = np.resize(part, size)
            index = first_index + start + np.arange(size, dtype=np.int32)
            parts.append(np.asarray(run(self.params, padded, index, key))[: len(part)])
        return np.concatenate(parts)

    def masked_scores(self, tokens, labels, num_visible, seed=0):
        """How well the model predicts masked tokens when ``num_visible`` random ones are seen.

        Args:
            tokens: int [n, l] in raster order; labels: int [n].
            num_visible: 0 <= num_visible < l; seed: of the random orders.

        Returns:
            ``(loss, hits)``: float32 [n, m] cross-entropy in nats, bool [n, m] argmax hits.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        if not 0 <= num_visible < self.model.num_tokens:
            raise ValueError(f"{num_visible=} must lie in [0, {self.model.num_tokens})")
        order = enat_task.random_order(jax.random.key(seed), tokens.shape)
        return enat_task.masked_scores(
            self.model, self.params, tokens, self._checked(labels), order, int(num_visible)
        )

    def save(self, directory):
        """Write a model directory; `model.json` comes last, so that one that has it is whole."""
        directory = pathlib.Path(directory)
        checkpoint.save_params(directory / "transformer", self.params)
        self.tokenizer.save(directory / "tokenizer")
        description = {
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
        if jax.process_index() == 0:
            model_files.write_json(directory / "model.json", description)

    @classmethod
    def load(cls, directory):
        """Read a model directory.

        Raises:
            FileNotFoundError: there is no model in the directory.
            ValueError: it is damaged or not a model of ours.
        """
        directory = pathlib.Path(directory)
        description = model_files.read_json(
            directory / "model.json",
            FORMAT,
            "name the `model` directory of a finished run of python -m enat_jax.train",
        )
        try:
            model = enat_task.MODELS[description["kind"]](
                **model_files.settings_from(description["model"])
            )
            settings = sampling.Settings(**description["sampler"])
            names = tuple(description["class_names"])
            provenance = description["provenance"]
            expected = description["fingerprint"]["transformer"]
            expected_tokenizer = description["fingerprint"]["tokenizer"]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{directory / 'model.json'} is damaged: {error!r}") from error
        # To the device once, not anew with every batch.
        params = jax.device_put(checkpoint.load_params(directory / "transformer"))
        codec = tokenizer.Tokenizer.load(directory / "tokenizer")
        found = cls(model, params, codec, names, settings, provenance)
        if found.fingerprint != expected:
            raise ValueError(f"the weights in {directory} are not those that were saved: damaged")
        if codec.fingerprint != expected_tokenizer:
            raise ValueError(
                f"the tokenizer in {directory} is not the one that the model was trained with: "
                "copy the whole model directory again"
            )
        return found

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
