"""Token sets on disk: what the tokenizer made of a set of images, ready to train on.

A directory with `tokens.npy`, the smallest unsigned type, `labels.npy`, int32, and `metadata.json`.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

FORMAT = "enat_jax tokens 1"


def fingerprint(params: Any) -> str:
    """SHA-256 of a tree of arrays: paths, shapes, types and bytes; the identity of a tokenizer."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """Tokens [n, l] in raster order, unsigned, labels [n] int32, and where they come from."""

    tokens: np.ndarray
    labels: np.ndarray
    grid: tuple[int, int]  # rows and columns of tokens
    codebook_size: int
    class_names: tuple[str, ...]
    tokenizer: str  # `fingerprint` of its weights
    preprocessing: dict[str, Any]  # what was done to which images, for people and for comparison

    def __post_init__(self):
        n, length = self.tokens.shape
        if length != self.grid[0] * self.grid[1]:
            raise ValueError(f"{length} tokens an image do not fill a grid of {self.grid}")
        if self.labels.shape != (n,):
            raise ValueError(f"labels of shape {self.labels.shape} for {n} images")

    def __len__(self) -> int:
        return len(self.tokens)

    def gather(self, indices: np.ndarray, seeds: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """{"tokens": int32 [b, l], "labels": int32 [b]} of `indices` in [0, n).

        `seeds` is what every source of the loader takes; tokens have no use for it.
        """
        del seeds
        return {"tokens": self.tokens[indices].astype(np.int32), "labels": self.labels[indices]}

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the set: all of it or, whatever happens, nothing.

        Raises FileExistsError if there is something at `directory` already.
        """
        directory = pathlib.Path(directory)
        if directory.exists():
            raise FileExistsError(f"{directory} exists: remove it or choose another place")
        metadata = {
            "format": FORMAT,
            "num_images": len(self),
            "grid": list(self.grid),
            "codebook_size": self.codebook_size,
            "class_names": list(self.class_names),
            "tokenizer": self.tokenizer,
            "preprocessing": self.preprocessing,
        }
        unfinished = directory.with_name(f"{directory.name}.unfinished-{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        small = np.min_scalar_type(self.codebook_size - 1)
        np.save(unfinished / "tokens.npy", np.asarray(self.tokens).astype(small))
        np.save(unfinished / "labels.npy", np.asarray(self.labels).astype(np.int32))
        (unfinished / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        unfinished.rename(directory)

    @classmethod
    def open(cls, directory: str | os.PathLike) -> "TokenSet":
        """Opens a set; the tokens stay on disk and are read as they are gathered.

        Raises FileNotFoundError if there is no token set, ValueError if it is damaged or of another
        format.
        """
        directory = pathlib.Path(directory)
        metadata = read_metadata(directory)
        try:
            tokens = np.load(directory / "tokens.npy", mmap_mode="r", allow_pickle=False)
            labels = np.load(directory / "labels.npy", allow_pickle=False)
            found = cls(
                tokens=tokens,
                labels=labels,
                grid=tuple(metadata["grid"]),
                codebook_size=metadata["codebook_size"],
                class_names=tuple(metadata["class_names"]),
                tokenizer=metadata["tokenizer"],
                preprocessing=metadata["preprocessing"],
            )
            if len(found) != metadata["num_images"]:
                raise ValueError(f"{len(found)} images instead of {metadata['num_images']}")
        except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the token set in {directory} is damaged ({error}): remove it and make it again "
                "with python -m enat_jax.tokenize_images"
            ) from error
        return found


def read_metadata(directory: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a finished token set; raises as `TokenSet.open` does."""
    path = pathlib.Path(directory) / "metadata.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no token set in {path.parent} (no metadata.json): make one with "
            "python -m enat_jax.tokenize_images"
        )
    try:
        metadata = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): is this a token set?") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"{path} does not say {FORMAT!r}: this is not a token set of ours")
    return metadata
