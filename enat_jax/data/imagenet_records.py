"""The records of ImageNet-2012 as TFDS's own builder writes them, made without TensorFlow.

What is in a record, the order of the records, the number of files and their names come from TFDS's
code for its data set "imagenet2012", as far as that runs without TensorFlow: all but the reading of
the tar files and the encoding of pictures. ``plan_shards`` says which record goes into which file,
``write`` writes one file, ``describe`` adds what TFDS needs to read them.

Serialised records differ from TFDS's in the order of their fields, which TFDS leaves to chance.
"""

import dataclasses
import functools
import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
from array_record.python import array_record_module
from jaxtyping import Int

if TYPE_CHECKING:  # slow to import
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_serializer, naming

NAME = "imagenet2012"
VERSION = "5.1.0"
FILE_FORMAT = "array_record"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records to be written.

    Attributes:
        path: of the file.
        tar: the file in which the pictures lie.
        pictures: ``imagenet.pictures``, in the order of the records.
        num_bytes: of all records together.
    """

    path: pathlib.Path
    tar: pathlib.Path
    pictures: np.recarray
    num_bytes: int


def validation_ids() -> list[str]:
    """Returns the class of each validation picture, a WordNet id, by the number in its name."""
    import tensorflow_datasets as tfds

    path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    return path.read_text(encoding="utf-8").split()


def plan_shards(
    split: str,
    tar: pathlib.Path,
    pictures: np.recarray,
    directory: pathlib.Path,
    num_shards: int | None,
) -> list[Shard]:
    """Returns the files of a split as TFDS's writer would make them, by hashed keys and total size.

    Args:
        split: the salt of the hashes.
        tar: the split's official tar file.
        pictures: what lies in it; see ``imagenet.pictures``.
        directory: where the files will lie.
        num_shards: None: TFDS's number for this many bytes.

    Raises:
        OSError: the tar file cannot be read.
        ValueError: there are fewer pictures than files, or one of those that must be encoded anew
            cannot be decoded.
    """
    from tensorflow_datasets.core import hashing
    from tensorflow_datasets.core.utils import shard_utils

    hasher = hashing.Hasher(split)
    keys = [hasher.hash_key(name.decode()) for name in pictures.names]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
    sizes = _record_sizes(tar, pictures)
    config = shard_utils.ShardConfig(num_shards=num_shards)
    count = config.get_number_shards(int(sizes.sum()), len(pictures))
    if count > len(pictures):
        raise ValueError(f"{len(pictures)} {split} pictures are too few for {count} files")
    ends = shard_utils.get_shard_boundaries(len(pictures), count)
    shards = []
    for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        rows = order[start:end]
        path = _template(directory, split).sharded_filepath(shard_index=number, num_shards=count)
        num_bytes = int(sizes[rows].sum())
        shards.append(Shard(pathlib.Path(path), tar, pictures[rows], num_bytes))
    return shards


def _record_sizes(tar: pathlib.Path, pictures: np.recarray) -> Int[np.ndarray, " n"]:
    """Returns the bytes of serialised records, int64; only what is encoded anew is read for it.

    A record is a protocol buffer: Example { Features { map<string, Feature> } }, where a feature is
    a list of one byte string or of one number.
    """

    def field(payload: int) -> int:  # of a message within a message: tag, length, payload
        return 1 + _varint_size(payload) + payload

    def entry(name: str, value: int) -> int:
        return field(field(len(name)) + field(field(value)))

    sizes = np.zeros(len(pictures), np.int64)
    with tar.open("rb") as file:
        for i, (name, label, _, size) in enumerate(pictures.tolist()):
            if name.decode() in _encoded_anew():
                size = len(_stored(file.fileno(), pictures[i]))
            sizes[i] = field(
                entry("image", field(size))
                + entry("label", field(_varint_size(label)))
                + entry("file_name", field(len(name)))
            )
    return sizes


def _varint_size(value: int) -> int:
    value %= 1 << 64  # negative numbers are stored as 64 bits
    return max(1, -(-value.bit_length() // 7))


def write(shard: Shard) -> None:
    """Writes a file of records, which has its name only once it is whole and on disk.

    Raises:
        OSError: the tar file cannot be read or the disk cannot be written.
        ValueError: the tar file is no longer what it was.
    """
    temporary = shard.path.with_name(f"{shard.path.name}.{os.getpid()}.unfinished")
    try:
        num_bytes = 0
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        for record in _records(shard):
            num_bytes += len(record)
            writer.write(record)
        writer.close()
        if num_bytes != shard.num_bytes:
            raise ValueError(f"{shard.path}: {num_bytes} bytes, not {shard.num_bytes} as planned")
        reader = array_record_module.ArrayRecordReader(str(temporary))
        if reader.num_records() != len(shard.pictures):
            raise OSError(f"{temporary} cannot be read back: is the disk full or damaged?")
        reader.close()
        sync(temporary)
        temporary.replace(shard.path)
    except RuntimeError as error:  # of ArrayRecord's files
        raise OSError(f"{shard.path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    sync(shard.path.parent)


def _records(shard: Shard) -> Iterator[bytes]:
    features, serializer = _record_code(shard.path.parent)
    with shard.tar.open("rb") as file:
        for picture in shard.pictures:
            image, name = _stored(file.fileno(), picture), picture.names.decode()
            values = {"image": image, "label": int(picture.labels), "file_name": name}
            example = serializer.get_tf_example(features.encode_example(values))
            # TFDS leaves the order of the fields to chance; sorted, each run gives the same bytes.
            yield example.SerializeToString(deterministic=True)


def _stored(file: int, picture: np.record) -> bytes:
    """Returns the picture as its record has it: the file, but for the few that are no RGB JPEG."""
    name = picture.names.decode()
    data = os.pread(file, picture.sizes, picture.offsets)
    if len(data) != picture.sizes:
        raise ValueError(f"{name} is cut short: has the tar file changed?")
    if name not in _encoded_anew():
        return data
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=["JPEG", "PNG"]).convert("RGB")
    except OSError as error:
        raise ValueError(f"{name} in the tar file cannot be decoded: {error}") from error
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=100, subsampling="4:2:0")  # TFDS's settings
    return encoded.getvalue()


def describe(directory: pathlib.Path, shards: Mapping[str, Sequence[Shard]]) -> None:
    """Writes TFDS's description of a data set whose files, by split, all are in ``directory``."""
    import tensorflow_datasets as tfds

    info = _builder(directory).info
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(shard.pictures) for shard in files],
            num_bytes=sum(shard.num_bytes for shard in files),
            filename_template=_template(directory, split),
        )
        for split, files in shards.items()
    ]
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.download_size = 0
    info.write_to_directory(directory)


def _builder(data_dir: pathlib.Path) -> "tfds.core.DatasetBuilder":
    """Returns TFDS's description of the data set; only its building needs TensorFlow."""
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder

    return imagenet2012_dataset_builder.Builder(
        data_dir=data_dir, version=VERSION, file_format=FILE_FORMAT
    )


@functools.cache
def _encoded_anew() -> frozenset[str]:
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as official

    return frozenset(official.CMYK_IMAGES) | frozenset(official.PNG_IMAGES)


@functools.cache
def _record_code(
    data_dir: pathlib.Path,
) -> "tuple[tfds.features.FeaturesDict, example_serializer.ExampleSerializer]":
    from tensorflow_datasets.core import example_serializer

    features = _builder(data_dir).info.features
    return features, example_serializer.ExampleSerializer(features.get_serialized_info())


def _template(directory: pathlib.Path, split: str) -> "naming.ShardedFileTemplate":
    from etils import epath
    from tensorflow_datasets.core import naming

    return naming.ShardedFileTemplate(
        data_dir=epath.Path(directory),
        dataset_name=NAME,
        split=split,
        filetype_suffix=FILE_FORMAT,
    )


def sync(path: pathlib.Path) -> None:
    """Returns when a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
