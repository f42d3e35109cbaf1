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
import functools
import hashlib
import io
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Int, Shaped

from enat_jax.data import records, token_plans
from enat_jax.data.decoding import Batch
from enat_jax.runtime import buckets, files, paths, versions

FORMAT = "enat_jax tokens 3"
MAX_SHARDS = 128  # of which ``records`` keeps as many open as a process may
MIN_ITEMS = 256  # of a shard, or a small set would be many tiny files
MADE_BY = "python -m enat_jax.tokenize_images"


@dataclasses.dataclass(frozen=True)
class TokenSetSpec:
    """What is to be made: a row of items, each an image in one of its ``copies``, cut into shards.

    Item i is copy i % copies of image i // copies. An item gives one record, or two with ``flips``,
    the second of the mirrored image.

    Raises:
        ValueError: a number is below 1.
    """

    num_images: int
    copies: int
    flips: bool
    batch_size: int  # items of one call of the tokenizer on one device; shards hold whole batches
    grid: tuple[int, int]  # rows and columns of tokens
    codebook_size: int
    class_names: tuple[str, ...]
    tokenizer: str  # ``fingerprint`` of its weights
    preprocessing: dict[str, Any]  # what was done to which images, JSON values
    location: dict[str, Any]  # of the images, to find them again; no part of what is compared
    shard_items: int | None = None  # None: as many as give at most MAX_SHARDS shards

    def __post_init__(self) -> None:
        for name in ("num_images", "copies", "batch_size", "shard_items"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    @property
    def num_items(self) -> int:
        """Number of items of all shards."""
        return self.num_images * self.copies

    @property
    def views(self) -> int:
        """Number of records of an item."""
        return 1 + self.flips

    @property
    def items_per_shard(self) -> int:
        """Number of items of every shard but the last, whole batches."""
        least = self.shard_items or max(math.ceil(self.num_items / MAX_SHARDS), MIN_ITEMS)
        return math.ceil(least / self.batch_size) * self.batch_size

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.num_items / self.items_per_shard)

    @property
    def dtype(self) -> np.dtype:
        """Type of a record."""
        return records.dtype(self.grid[0] * self.grid[1], self.codebook_size)

    def items(self, shard: int) -> range:
        """Returns the items of a shard."""
        first = shard * self.items_per_shard
        return range(first, min(first + self.items_per_shard, self.num_items))

    def path(self, directory: pathlib.Path, shard: int, suffix: str) -> pathlib.Path:
        """Returns the file of a shard: ".npy" for its records, ".json" for its images."""
        return _shard_path(directory, shard, self.num_shards, suffix)

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What plan.json says: the fields, versions of libraries and ``digest`` as JSON values."""
        values = {"format": FORMAT} | dataclasses.asdict(self)
        values["shard_items"] = self.items_per_shard
        values["versions"] = versions.library_versions()
        values = files.as_json(values)
        return values | {"digest": token_plans.digest(values)}


def begin(directory: str | os.PathLike, spec: TokenSetSpec) -> list[int]:
    """Writes plan.json, or checks that ``directory`` was begun with the same spec.

    Returns:
        The unfinished shards.

    Raises:
        ValueError: the directory holds something else; the message names what differs.
        OSError: it cannot be written.
    """
    directory = paths.place(directory)
    path = directory / "plan.json"
    wanted = spec.description
    if not path.exists():
        _refuse_other_files(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files.write_json(path, wanted)
    # Checked even if it was just written: another process may have begun at the same moment.
    _read_plan(directory, wanted)
    return [s for s in range(spec.num_shards) if not spec.path(directory, s, ".json").exists()]


def write_shard(
    directory: str | os.PathLike,
    spec: TokenSetSpec,
    shard: int,
    rows: Shaped[np.ndarray, " n"],
    keys: Sequence[str],
    skipped: Sequence[dict[str, Any]],
) -> None:
    """Finishes a shard, whole or not at all.

    Args:
        directory: of the token set.
        spec: of the token set.
        shard: its number.
        rows: records of ``spec.dtype``.
        keys: of the shard's images, in order.
        skipped: images that could not be read, each {"image", "key", "reason"}.

    Raises:
        OSError: it cannot be written.
    """
    directory = paths.place(directory)
    content = records.npy_bytes(rows.astype(spec.dtype, copy=False))
    items = spec.items(shard)
    description = {
        "plan": spec.description["digest"],
        "num_records": len(rows),
        "sha256": hashlib.sha256(content).hexdigest(),
        "first_image": items[0] // spec.copies,
        "keys": list(keys),
        "skipped": list(skipped),
    }
    files.write_atomically(spec.path(directory, shard, ".npy"), content)
    files.write_json(spec.path(directory, shard, ".json"), description)


def finish(directory: str | os.PathLike, spec: TokenSetSpec) -> bool:
    """Writes ``metadata.json`` if all shards are finished, and says whether they are.

    Any process may call it, at any time and again: it always writes the same.

    Raises:
        ValueError: no image could be read, or a file is damaged or of another set.
        OSError: it cannot be written.
    """
    directory = paths.place(directory)
    begun = _read_plan(directory, spec.description)
    lengths: list[int] = []
    skipped: dict[int, dict[str, Any]] = {}
    counts = np.zeros(len(spec.class_names), np.int64)
    for shard in range(spec.num_shards):
        path = spec.path(directory, shard, ".json")
        if not path.exists():
            return False
        description, rows = read_shard(path, begun)
        lengths.append(description["num_records"])
        # An image whose copies lie in two shards is skipped once.
        skipped |= {s["image"]: s for s in description["skipped"]}
        counts += np.bincount(rows["label"], minlength=len(counts))
    if not sum(lengths):
        raise ValueError(
            f"none of the {spec.num_images} images could be read: {directory} is empty"
        )
    # From plan.json as it was begun: byte for byte the same, whichever process finishes.
    metadata = begun | {
        "num_records": sum(lengths),
        "shards": lengths,
        "token_dtype": spec.dtype["tokens"].base.name,
        "class_counts": counts.tolist(),
        "skipped": [skipped[i] for i in sorted(skipped)],
    }
    path, content = directory / "metadata.json", files.json_bytes(metadata)
    if not path.exists() or path.read_bytes() != content:
        files.write_atomically(path, content)
    for path in directory.iterdir():
        if files.is_unfinished(path):
            path.unlink(missing_ok=True)  # of a process that was killed
    return True


def read_shard(
    path: pathlib.Path, plan: dict[str, Any]
) -> tuple[dict[str, Any], Shaped[np.ndarray, " n"]]:
    """Reads what the .json file of a finished shard says, and the records beside it.

    Args:
        path: of the .json file.
        plan: what plan.json or metadata.json says.

    Raises:
        ValueError: a byte of the records is wrong, or the shard is of another set.
    """
    again = f"remove {path.name} and start {MADE_BY} again, it makes these records anew"
    names = ("plan", "sha256", "num_records", "first_image", "keys", "skipped")
    npy = path.with_suffix(".npy")
    try:
        with files.naming(path):
            description = json.loads(path.read_text(encoding="utf-8"))
        digest, sha256, num_records, first, *_ = (description[name] for name in names)
        place = plan["digest"], int(path.name[:5]) * plan["shard_items"] // plan["copies"]
        with files.naming(npy):
            content = npy.read_bytes()
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or stands alone ({error}): {again}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{npy} is damaged: {again}")
    rows = np.load(io.BytesIO(content), allow_pickle=False)
    if (digest, first) != place or num_records != len(rows):
        raise ValueError(f"{path} is of another token set, or of another place: {again}")
    return description, rows


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSet:
    """Records and where they come from.

    ``rows`` is anything that gives records, of ``records.dtype``, for an int64 array of indices:
    files on disk, or an array in memory.
    """

    rows: Shaped[np.ndarray, " n"] | records.Files | records.Reference
    grid: tuple[int, int]  # rows and columns of tokens
    codebook_size: int
    class_names: tuple[str, ...]
    tokenizer: str | None  # ``fingerprint`` of its weights; None: not known
    preprocessing: dict[str, Any]  # what was done to which images, for people and for comparison

    def __len__(self) -> int:
        return len(self.rows)

    def gather(
        self, indices: Int[np.ndarray, " b"], seeds: Int[np.ndarray, " b"] | None = None
    ) -> Batch:
        """Returns {"tokens": int32 ``[b, l]``, "labels": int32 ``[b]``}.

        Args:
            indices: in [0, n).
            seeds: what every source of the loader takes; tokens have no use for it.

        Raises:
            ValueError: a record is damaged so that it could not be trained on.
        """
        del seeds
        return as_batch(self.read(indices))

    def read(self, indices: Int[np.ndarray, " b"]) -> Shaped[np.ndarray, " b"]:
        """Returns records, see ``records.dtype``; raises as ``gather`` does."""
        rows = self.rows[np.asarray(indices, np.int64)]
        for name, limit in (("tokens", self.codebook_size), ("label", len(self.class_names))):
            if rows[name].size and not 0 <= rows[name].min() <= rows[name].max() < limit:
                raise ValueError(
                    f"a record of the token set has {name} outside of [0, {limit}), it is damaged: "
                    f"{MADE_BY} --inspect says which file"
                )
        return rows

    def in_memory(self) -> Self:
        """Returns the same set, read once and kept."""
        return dataclasses.replace(self, rows=self.rows[np.arange(len(self.rows))])

    @classmethod
    def open(cls, directory: str | os.PathLike) -> "TokenSet":
        """Opens a set; the records stay on disk and are read as they are gathered.

        Of a set in a bucket, they are fetched first, see ``buckets.fetched``.

        Raises:
            FileNotFoundError: there is no token set.
            OSError: it cannot be read.
            ValueError: it is unfinished, damaged or of another format.
        """
        directory = buckets.fetched(directory)
        metadata = read_metadata(directory)
        try:
            grid = tuple(metadata["grid"])
            lengths = metadata["shards"]
            num_shards = len(lengths)
            shards = [_shard_path(directory, i, num_shards, ".npy") for i in range(num_shards)]
            if not lengths or not all(n >= 0 for n in lengths) or not sum(lengths):
                raise ValueError("it has no records")
            dtype = records.dtype(grid[0] * grid[1], metadata["codebook_size"])
            return cls(
                rows=records.Files(shards, lengths, dtype),
                grid=grid,
                codebook_size=metadata["codebook_size"],
                class_names=tuple(metadata["class_names"]),
                tokenizer=metadata["tokenizer"],
                preprocessing=metadata["preprocessing"],
            )
        except (FileNotFoundError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the token set in {directory} is damaged ({error}): start the command that made "
                f"it ({MADE_BY}) again, it says what to remove and makes only that anew"
            ) from error

    @classmethod
    def open_reference(
        cls, path: str | os.PathLike, codebook_size: int, class_names: Sequence[str]
    ) -> "TokenSet":
        """Opens a feature file of the reference: ``.npy``, int64 ``[n, 1 + l]``, label and tokens.

        It says nothing of the tokenizer; codebook and classes are the caller's, and every record
        that does not fit them raises when it is read.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such file, or its tokens are no square grid.
        """
        rows = records.Reference(buckets.fetched(path), codebook_size, len(class_names))
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


def as_batch(rows: Shaped[np.ndarray, " b"]) -> Batch:
    """Returns records as ``TokenSet.gather`` does."""
    return {"tokens": rows["tokens"].astype(np.int32), "labels": rows["label"].astype(np.int32)}


def image_keys(directory: str | os.PathLike) -> list[str]:
    """Returns what the images of a finished token set are called, by the ``image`` of its records.

    Raises:
        FileNotFoundError: there is no token set.
        ValueError: it is unfinished or damaged.
    """
    directory = buckets.fetched(directory)
    metadata = read_metadata(directory)
    keys: dict[int, str] = {}
    num_shards = len(metadata["shards"])
    for shard in range(num_shards):
        path = _shard_path(directory, shard, num_shards, ".json")
        again = f"remove {path.name} and start {MADE_BY} again, it makes these records anew"
        found = files.read_json(path, again)
        try:
            if found["plan"] != metadata["digest"]:
                raise ValueError("it is of another token set")
            keys |= enumerate(found["keys"], found["first_image"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): {again}") from error
    if len(keys) != metadata["num_images"]:
        raise ValueError(
            f"{directory} names {len(keys)} of {metadata['num_images']} images: start {MADE_BY} "
            "again"
        )
    return [keys[image] for image in range(len(keys))]


def read_metadata(directory: str | os.PathLike) -> dict[str, Any]:
    """Returns the metadata of a finished token set; raises as ``TokenSet.open`` does."""
    directory = buckets.fetched(directory)
    path = directory / "metadata.json"
    try:
        metadata = files.read_json(path, f"start {MADE_BY} again, it writes this file anew")
    except (FileNotFoundError, NotADirectoryError) as error:
        if (directory / "plan.json").is_file():
            raise ValueError(
                f"the token set in {directory} is not finished: start the command that made it "
                f"({MADE_BY}) again, it goes on where it was"
            ) from error
        raise FileNotFoundError(
            f"there is no token set in {directory} (no metadata.json): make one with {MADE_BY}"
        ) from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"{path} does not say {FORMAT!r}: make the token set again with {MADE_BY}")
    if missing := {"shards", "class_counts", "skipped"} - metadata.keys():
        raise ValueError(f"{path} lacks {min(missing)!r}: start {MADE_BY} again, it writes it anew")
    return metadata


def _shard_path(directory: pathlib.Path, shard: int, num_shards: int, suffix: str) -> pathlib.Path:
    return directory / f"{shard:05d}-of-{num_shards:05d}{suffix}"


def _read_plan(directory: pathlib.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Reads plan.json; raises ValueError if it would give other records than ``wanted``."""
    found = files.read_json(directory / "plan.json", f"remove {directory} and start again")
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{directory} holds no token set of ours: choose another directory")
    token_plans.refuse_others(directory, found, wanted)
    return found


def _refuse_other_files(directory: pathlib.Path) -> None:
    """Raises ValueError if there is anything that no beginning of a token set leaves behind."""
    found = directory.iterdir() if directory.is_dir() else [directory]
    # A process that was killed leaves a temporary file; another may write its plan just now.
    others = [p for p in found if p.name != "plan.json" and not files.is_unfinished(p)]
    if directory.exists() and others:
        raise ValueError(
            f"{directory} exists and is no token set: choose another directory (it holds "
            f"{min(others).name!r}, but no plan.json)"
        )
