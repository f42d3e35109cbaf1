"""CLIP's towers with their weights, in a directory of their own.

It holds ``encoder.json`` (sizes, activation, padding and provenance), the weights of the text tower
as ``text/`` (Orbax), ``text.safetensors`` or both, and ``null_text.npy``, float16 ``[p, e]``, the
states of the empty text. The vision tower may be beside it, see ``clip_towers``.
"""

import dataclasses
import functools
import io
import os
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Float32, Int, PyTree, Shaped

from enat_jax.checkpoints import model_files
from enat_jax.data import records, text_tokens
from enat_jax.models import clip
from enat_jax.runtime import buckets, files, numerics, paths, sharding

FORMAT = "enat_jax text encoder 1"
NULL = "null_text.npy"
BATCH_SIZE = 16  # texts per call of the network and device
MADE_BY = "python -m enat_jax.import_torch --clip FILE --out DIR"


@dataclasses.dataclass(frozen=True, eq=False)
class ClipText(model_files.TrainedModel):
    """CLIP's text tower with its weights, which stay as they are.

    Attributes:
        pad: what follows a text, see ``text_tokens.Clip``.
        provenance: JSON values that say where the weights come from.
        saved_null: ``null_states`` on disk, which weights in another dtype would not give again.
    """

    model: clip.TextTower
    pad: int
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    saved_null: Float16[np.ndarray, "p e"] | None = None

    def __repr__(self) -> str:
        return self.described(f"states of {self.model.width} of {self.model.context} tokens")

    @property
    def kind(self) -> text_tokens.Clip:
        """The tokens that it reads."""
        return text_tokens.Clip(self.pad)

    def identity(self) -> dict[str, Any]:
        """Returns JSON values that decide the states of a text."""
        settings = model_files.settings_of(self.model)
        names = ("activation", "final_norm", "num_heads", "num_layers", "width")
        return {
            "kind": "clip",
            "weights": self.fingerprint,
            "pad": self.pad,
            **{name: settings[name] for name in names},
        }

    def states(self, ids: Int[np.ndarray, "n p"]) -> Float16[np.ndarray, "n p e"]:
        """Returns the states of texts.

        A half has a relative error of 0.0005. States are always handed out so, that those which
        were stored and those which are computed are the same.

        Args:
            ids: tokens with start, end and padding.
        """
        empty = np.zeros((0, ids.shape[1], self.model.width), np.float16)
        return in_batches(self, _states, ids, empty)

    def vectors(self, ids: Int[np.ndarray, "n p"]) -> Float32[np.ndarray, "n proj"]:
        """Returns the vectors of texts, in the space of those of pictures; their lengths differ.

        Args:
            ids: tokens with start, end and padding.

        Raises:
            ValueError: the tower has no projection.
        """
        if self.model.projection is None:
            why = "its weights have no projection"
            if not self.model.final_norm:
                why = "it was imported with --hidden-layer -2"
            raise ValueError(
                f"this CLIP has states of texts and no vectors of them, because {why}: import the "
                "whole model, with --hidden-layer -1"
            )
        empty = np.zeros((0, self.model.projection), np.float32)
        return in_batches(self, _vectors, ids, empty)

    @functools.cached_property
    def null_states(self) -> Float16[np.ndarray, "p e"]:
        """The states of the empty text, in a window of all tokens that there are."""
        if self.saved_null is not None:
            return self.saved_null
        none = np.zeros(1, np.int64)  # no token is read, so that no package is needed
        ids, _ = text_tokens.framed(self.kind, none[:0], none, none, self.model.context)
        return self.states(ids)[0]

    def save(
        self, directory: str | os.PathLike, formats: Collection[str] = model_files.WEIGHTS
    ) -> None:
        """Writes a directory; ``encoder.json`` comes last: a directory that has it is whole.

        Args:
            directory: created if missing; weights there are replaced.
            formats: of the weights, of ``model_files.WEIGHTS``.

        Raises:
            ValueError: the weights were loaded in another dtype than they were saved in.
            OSError: it cannot be written.
        """
        directory = paths.place(directory)
        self.save_weights(directory / "text", formats, FORMAT)
        if jax.process_index() == 0:
            null = records.npy_bytes(self.null_states)
            files.write_atomically(directory / NULL, null)
            files.write_json(directory / "encoder.json", self.description)

    @property
    def description(self) -> dict[str, Any]:
        """The content of ``encoder.json``."""
        null = model_files.fingerprint({"null": self.null_states})
        text = {"pad": self.pad, "fingerprint": self.fingerprint, "null": null}
        return {
            "format": FORMAT,
            "text": {"model": model_files.settings_of(self.model), **text},
            "provenance": self.provenance,
        }

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        dtype: str | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> Self:
        """Reads what ``save`` wrote.

        Args:
            directory: of the encoder.
            dtype: of weights and computation, "float32" or "bfloat16"; None: as saved.
            devices: of this process, to divide texts over; None: all.

        Raises:
            FileNotFoundError: there is no encoder in the directory.
            ValueError: it is damaged or not an encoder of ours.
        """
        directory = buckets.fetched(directory)
        path = directory / "encoder.json"
        description = files.read_description(path, FORMAT, f"make one with {MADE_BY}")
        with model_files.parsing(path):
            described = description["text"]
            model = clip.TextTower(**model_files.settings_from(described["model"]))
            pad, expected, null_expected = (described[x] for x in ("pad", "fingerprint", "null"))
            provenance = description["provenance"]
        params = model_files.load_weights(directory / "text", expected)
        null = read_null(directory, model.width, null_expected)
        found = cls(
            *(model, params, pad, provenance, null),
            devices=tuple(jax.local_devices() if devices is None else devices),
            saved_fingerprint=expected,
        )
        return found.on_devices(dtype)


def read_null(directory: pathlib.Path, width: int, expected: str) -> Float16[np.ndarray, "p e"]:
    """Reads the states of the empty text, of ``width``, that stand in a directory.

    Args:
        directory: of an encoder or a model.
        width: e.
        expected: their fingerprint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another shape.
    """
    path = directory / NULL
    content = io.BytesIO(path.read_bytes())
    try:
        null = np.load(content, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    fits = null.dtype == np.float16 and null.ndim == 2 and null.shape[1] == width
    if not fits or not np.isfinite(null).all():
        raise ValueError(
            f"{path} holds {null.dtype} {null.shape}, and no states of the empty text: float16 "
            f"[p, {width}]"
        )
    if model_files.fingerprint({"null": null}) != expected:
        raise ValueError(f"{path} is not what was saved: damaged")
    return null


def in_batches(
    tower: model_files.TrainedModel,
    run: Callable[..., Array],
    rows: Shaped[np.ndarray, "n ..."],
    empty: Float[np.ndarray, "0 ..."],
) -> Float[np.ndarray, "n ..."]:
    """Returns what a tower makes of texts or pictures, which are divided over its devices.

    Args:
        tower: with its weights.
        run: jitted, of the model, its parameters and ``BATCH_SIZE`` rows for each device.
        rows: of the inputs.
        empty: what it makes of no rows.
    """
    mesh, params = tower.placed
    size = BATCH_SIZE * mesh.size
    found = [empty]
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        placed = sharding.place(np.resize(part, (size, *rows.shape[1:])), mesh)
        found.append(np.asarray(run(tower.model, params, placed), empty.dtype)[: len(part)])
    return np.concatenate(found)


def text_states(
    model: clip.TextTower, params: PyTree, ids: Int[Array, "b p"]
) -> Float[Array, "b p e"]:
    """Returns the states of texts; pure, to be jitted."""
    states, _ = model.apply({"params": params}, ids)
    return states


def _rounded(model: clip.TextTower, params: PyTree, ids: Int[Array, "b p"]) -> Array:
    return text_states(model, params, ids).astype(jnp.float16)


def _pooled(model: clip.TextTower, params: PyTree, ids: Int[Array, "b p"]) -> Array:
    apply: Callable[..., Any] = model.apply
    _, vectors = apply({"params": params}, ids)
    return vectors.astype(jnp.float32)


_states = numerics.jit(_rounded, static_argnums=0)
_vectors = numerics.jit(_pooled, static_argnums=0)
