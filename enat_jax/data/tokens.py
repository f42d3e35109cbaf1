"""Token sets on disk: what the tokenizer made of a set of images, ready to train on.

A directory holds

    plan.json                   what is to be made of which images; written first
    00000-of-00128.npy ...      records of fixed length; each file appears whole
    00000-of-00128.json ...     the images behind them, and those that could not be read; written
                                after the records: a shard that has it is finished
    metadata.json               counts and all that training must know; written last

so that an interrupted tokenization goes on with the unfinished shards, by any number of processes
that share the directory. Nothing in it depends on when, where or by how many it was made.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from enat_jax.data import records

FORMAT = "enat_jax tokens 2"
MAX_SHARDS = 128  # open files; macOS lets a process have 256
MIN_ITEMS = 256  # of a shard, or small sets would be crumbs
MADE_BY = "python -m enat_jax.tokenize_images"


def fingerprint(params: Any) -> str:
    """SHA-256 of a tree of arrays: paths, shapes, types and bytes; the identity of a tokenizer."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of what decides pixels and tokens."""
    names = ("enat_jax", "jax", "flax", "numpy", "pillow")
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be made: a row of items, each an image in one of its `copies`, cut into shards.

    Item i is copy i % copies of image i // copies. An item gives one record, or two with `flips`,
    the second of the mirrored image.
    """

    num_images: int
    copies: int
    flips: bool
    batch_size: int  # items of one call of the tokenizer on one device; shards hold whole batches
    grid: tuple[int, int]  # rows and columns of tokens
    codebook_size: int
    class_names: tuple[str, ...]
    tokenizer: str  # `fingerprint` of its weights
    preprocessing: dict[str, Any]  # what was done to which images, JSON values
    location: dict[str, Any]  # of the images, to find them again; no part of what is compared
    shard_items: int | None = None  # None: as many as give at most MAX_SHARDS shards

    def __post_init__(self):
        for name in ("num_images", "copies", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.shard_items is not None and self.shard_items < 1:
            raise ValueError(f"shard_items={self.shard_items} must be at least 1")

    @property
    def num_items(self) -> int:
        return self.num_images * self.copies

    @property
    def views(self) -> int:
        """Records of an item."""
        return 1 + self.flips

    @property
    def items_per_shard(self) -> int:
        least = self.shard_items or max(math.ceil(self.num_items / MAX_SHARDS), MIN_ITEMS)
        return math.ceil(least / self.batch_size) * self.batch_size

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_items / self.items_per_shard)

    @property
    def dtype(self) -> np.dtype:
        """Of a record."""
        return records.dtype(self.grid[0] * self.grid[1], self.codebook_size)

    def items(self, shard: int) -> range:
        """The items of a shard."""
        first = shard * self.items_per_shard
        return range(first, min(first + self.items_per_shard, self.num_items))

    def path(self, directory: pathlib.Path, shard: int, suffix: str) -> pathlib.Path:
        """File of a shard: suffix ".npy" for its records, ".json" for its images."""
        return directory / f"{shard:05d}-of-{self.num_shards:05d}{suffix}"

    def description(self) -> dict[str, Any]:
        """As JSON values."""
        values = {"format": FORMAT} | dataclasses.asdict(self)
        values["shard_items"] = self.items_per_shard
        values["versions"] = library_versions()
        return json.loads(json.dumps(values))


def begin(directory: str | os.PathLike, plan: Plan) -> list[int]:
    """Writes the plan, or checks that `directory` was begun with the same.

    Returns the unfinished shards.
    Raises ValueError, naming what differs, if the directory holds anything else; OSError if it
    cannot be written.
    """
    directory = pathlib.Path(directory)
    path = directory / "plan.json"
    wanted = plan.description()
    if path.exists():
        _same_plan(directory, _read_json(path), wanted)
    else:
        # A process that was killed while it wrote the plan leaves no more than a temporary file.
        if directory.is_dir() and all(_TEMPORARY.fullmatch(p.name) for p in directory.iterdir()):
            pass
        elif directory.exists():
            raise ValueError(f"{directory} exists and is no token set: choose another directory")
        directory.mkdir(parents=True, exist_ok=True)
        _write(path, _json(wanted))
    return [s for s in range(plan.num_shards) if not plan.path(directory, s, ".json").exists()]


def write_shard(
    directory: str | os.PathLike,
    plan: Plan,
    shard: int,
    rows: np.ndarray,
    keys: Sequence[str],
    skipped: Sequence[dict[str, Any]],
) -> None:
    """Finishes a shard: `rows` [n] of `plan.dtype`, the `keys` of its images, in order, and those
    that were `skipped`, each {"image", "key", "reason"}. Whole or not at all."""
    directory = pathlib.Path(directory)
    content = records.npy_bytes(rows.astype(plan.dtype, copy=False))
    items = plan.items(shard)
    description = {
        "num_records": len(rows),
        "sha256": hashlib.sha256(content).hexdigest(),
        "first_image": items[0] // plan.copies,
        "keys": list(keys),
        "skipped": list(skipped),
    }
    _write(plan.path(directory, shard, ".npy"), content)
    _write(plan.path(directory, shard, ".json"), _json(description, indent=None))


def finish(directory: str | os.PathLike, plan: Plan) -> bool:
    """Writes `metadata.json` if all shards are finished; whether they are.

    Any process may call it, at any time and again: it always writes the same.
    Raises ValueError if no image could be read.
    """
    directory = pathlib.Path(directory)
    lengths, skipped = [], {}
    counts = np.zeros(len(plan.class_names), np.int64)
    for shard in range(plan.num_shards):
        path = plan.path(directory, shard, ".json")
        if not path.exists():
            return False
        description = _read_json(path)
        lengths.append(description["num_records"])
        # An image whose copies lie in two shards is skipped once.
        skipped |= {s["image"]: s for s in description["skipped"]}
        rows = np.load(plan.path(directory, shard, ".npy"), allow_pickle=False)
        counts += np.bincount(rows["label"], minlength=len(counts))
    if not sum(lengths):
        raise ValueError(
            f"none of the {plan.num_images} images could be read: {directory} is empty"
        )
    # Of the plan as it was begun: byte for byte the same, whoever finishes it.
    metadata = _read_json(directory / "plan.json") | {
        "num_records": sum(lengths),
        "shards": lengths,
        "token_dtype": plan.dtype["tokens"].base.name,
        "class_counts": counts.tolist(),
        "skipped": [skipped[i] for i in sorted(skipped)],
    }
    for path in directory.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)  # of a process that was killed
    _write(directory / "metadata.json", _json(metadata))
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSet:
    """Records and where they come from.

    `rows` is anything that gives records, of `records.dtype`, for an int64 array of indices: files
    on disk, or an array in memory.
    """

    rows: np.ndarray | records.Files | records.Reference
    grid: tuple[int, int]  # rows and columns of tokens
    codebook_size: int
    class_names: tuple[str, ...]
    tokenizer: str | None  # `fingerprint` of its weights; None: not known
    preprocessing: dict[str, Any]  # what was done to which images, for people and for comparison

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, indices: np.ndarray, seeds: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """{"tokens": int32 [b, l], "labels": int32 [b]} of `indices` in [0, n).

        `seeds` is what every source of the loader takes; tokens have no use for it.
        """
        del seeds
        rows = self.rows[np.asarray(indices, np.int64)]
        return {"tokens": rows["tokens"].astype(np.int32), "labels": rows["label"].astype(np.int32)}

    def in_memory(self) -> "TokenSet":
        """The same set, read once and kept."""
        return dataclasses.replace(self, rows=self.rows[np.arange(len(self))])

    @classmethod
    def open(cls, directory: str | os.PathLike) -> "TokenSet":
        """Opens a set; the records stay on disk and are read as they are gathered.

        Raises FileNotFoundError if there is no token set, ValueError if it is unfinished, damaged
        or of another format.
        """
        directory = pathlib.Path(directory)
        metadata = read_metadata(directory)
        try:
            grid = tuple(metadata["grid"])
            lengths = metadata["shards"]
            paths = [directory / f"{i:05d}-of-{len(lengths):05d}.npy" for i in range(len(lengths))]
            dtype = records.dtype(grid[0] * grid[1], metadata["codebook_size"])
            return cls(
                rows=records.Files(paths, lengths, dtype),
                grid=grid,
                codebook_size=metadata["codebook_size"],
                class_names=tuple(metadata["class_names"]),
                tokenizer=metadata["tokenizer"],
                preprocessing=metadata["preprocessing"],
            )
        except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the token set in {directory} is damaged ({error}): remove it and make it again "
                f"with {MADE_BY}"
            ) from error

    @classmethod
    def open_reference(
        cls, path: str | os.PathLike, codebook_size: int, class_names: Sequence[str]
    ) -> "TokenSet":
        """Opens a feature file of the reference: `.npy`, int64 [n, 1 + l], rows of label, tokens.

        It says nothing of the tokenizer; codebook and classes are the caller's, and every record
        that does not fit them raises when it is read.
        Raises FileNotFoundError, ValueError.
        """
        rows = records.Reference(pathlib.Path(path), codebook_size, len(class_names))
        side = math.isqrt(rows.num_tokens)
        if side * side != rows.num_tokens:
            raise ValueError(f"{path}: {rows.num_tokens} tokens an image are no square grid")
        return cls(
            rows=rows,
            grid=(side, side),
            codebook_size=codebook_size,
            class_names=tuple(class_names),
            tokenizer=None,
            preprocessing={"reference_file": pathlib.Path(path).name},
        )


def read_metadata(directory: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a finished token set; raises as `TokenSet.open` does."""
    directory = pathlib.Path(directory)
    path = directory / "metadata.json"
    if not path.is_file():
        if (directory / "plan.json").is_file():
            raise ValueError(
                f"the token set in {directory} is not finished: start the command that made it "
                f"({MADE_BY}) again, it goes on where it was"
            )
        raise FileNotFoundError(
            f"there is no token set in {directory} (no metadata.json): make one with {MADE_BY}"
        )
    metadata = _read_json(path)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"{path} does not say {FORMAT!r}: make the token set again with {MADE_BY}")
    return metadata


def image_keys(directory: str | os.PathLike) -> list[str]:
    """What a finished set's images are called in their source, by the `image` of its records."""
    directory = pathlib.Path(directory)
    metadata = read_metadata(directory)
    keys: dict[int, str] = {}
    for shard in range(len(metadata["shards"])):
        path = directory / f"{shard:05d}-of-{len(metadata['shards']):05d}.json"
        description = _read_json(path)
        keys |= dict(enumerate(description["keys"], description["first_image"]))
    return [keys[image] for image in range(metadata["num_images"])]


_TEMPORARY = re.compile(r"\.(.+)\.\d+\.unfinished")


def _write(path: pathlib.Path, content: bytes) -> None:
    """Whole or not at all, even if the machine stops; several processes may write the same."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say whose
        raise


def _json(values: Any, indent: int | None = 2) -> bytes:
    return (json.dumps(values, indent=indent, ensure_ascii=False) + "\n").encode()


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): is this a token set?") from error


def _same_plan(directory: pathlib.Path, found: Any, wanted: dict[str, Any]) -> None:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{directory} holds no token set of ours: choose another directory")
    found, wanted = _flat(found), _flat(wanted)
    names = [name for name in wanted | found if not name.startswith("location.")]
    different = [name for name in names if found.get(name) != wanted.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"{directory} holds or has begun another token set: its {name} is "
            f"{_short(found.get(name))}, now it would be {_short(wanted.get(name))}"
            f"{f', and {len(different) - 1} more differ' if different[1:] else ''}; "
            "remove it or choose another directory"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out
