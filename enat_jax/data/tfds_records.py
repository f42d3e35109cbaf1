"""A TFDS data set that is prepared as ArrayRecord as a source of images, without TensorFlow."""

import functools
import os
import pathlib
import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from enat_jax.data import decoding, imagenet
from enat_jax.runtime import exits

PREFIX = "tfds:"
_NAME = re.compile(r"tfds:(?P<name>\w+)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_ADVICE = (
    "ImageNet is prepared by python -m enat_jax.prepare, other sets in Python by "
    "tfds.builder({name!r}, file_format='array_record', data_dir=...).download_and_prepare(), for "
    "which most of them need TensorFlow this one time"
)


class Records:
    """A split of a TFDS data set as a source of images; see ``images.Source``.

    Args:
        source: "tfds:NAME", with "/CONFIG" or ":VERSION" or both behind it; without a version the
            latest one is taken.
        split: TFDS's, slices such as "train[:10%]" included.
        framing: of each picture.
        data_dir: where TFDS keeps its data; None: TFDS's default.
        image_key: name of the feature that holds the picture.
        label_key: name of the feature that holds the label.

    Raises:
        ValueError: the set is not there, not prepared as ArrayRecord or not complete, or lacks the
            split or the features.
    """

    mirrored = True

    def __init__(
        self,
        source: str,
        split: str,
        framing: decoding.Framing,
        *,
        data_dir: str | os.PathLike | None = None,
        image_key: str = "image",
        label_key: str = "label",
    ) -> None:
        import tensorflow_datasets as tfds  # slow to import

        texts = {"image_key": image_key, "label_key": label_key, "data_dir": data_dir or ""}
        for name, value in texts.items():
            if not isinstance(value, (str, os.PathLike)):
                raise ValueError(f"{name}={value!r} is not a text")
        if data_dir:
            data_dir = os.path.abspath(os.path.expanduser(data_dir))
        self._reopened = functools.partial(
            Records,
            source,
            split,
            framing,
            data_dir=data_dir,
            image_key=image_key,
            label_key=label_key,
        )
        self._directory = _find(source, data_dir)
        try:
            self._builder = tfds.builder_from_directory(self._directory)
        except Exception as error:  # of TFDS and of protocol buffers, whatever damage they find
            raise ValueError(
                f"the description of the data set in {self._directory} is damaged "
                f"({exits.one_line(error)}): copy it again or prepare it again"
            ) from error
        self._split, self._framing = split, framing
        self._image_key, self._label_key = image_key, label_key
        features = self._builder.info.features
        needed = ((image_key, tfds.features.Image), (label_key, tfds.features.ClassLabel))
        for key, kind in needed:
            if key not in features or not isinstance(features[key], kind):
                found = {name: type(feature).__name__ for name, feature in features.items()}
                raise ValueError(
                    f"{self._directory} has no {kind.__name__} feature {key!r}: set image_key and "
                    f"label_key to some of {found}"
                )
        self.class_names = imagenet.readable_names(features[label_key].names)
        self.image_shape = framing.shape
        self.ignored: dict[str, int] = {}
        self._check_split()
        try:
            # Encoded as they are: we decode pictures ourselves, and alike from every source.
            self._data = self._builder.as_data_source(
                split, decoders={image_key: tfds.decode.SkipDecoding()}
            )
        except NotImplementedError as error:
            raise ValueError(
                f"{self._directory} is prepared as {self._builder.info.file_format.value}, which "
                f"TensorFlow alone can read: prepare it as array_record ({_advice(source)})"
            ) from error

    def __reduce__(self) -> tuple[Callable[[], "Records"], tuple[()]]:
        return self._reopened, ()  # files are opened anew

    def _check_split(self) -> None:
        splits = self._builder.info.splits
        try:
            found = splits[self._split]
            number, instructions = found.num_examples, found.file_instructions
        except (KeyError, ValueError, AssertionError) as error:
            raise ValueError(
                f"{self._directory} has no split {self._split!r}: it has {sorted(splits)}, and "
                "slices of them such as 'train[:10%]'"
            ) from error
        if not number:
            raise ValueError(f"{self._directory}: split {self._split!r} has no pictures")
        for instruction in instructions:
            if not os.path.isfile(instruction.filename):
                raise ValueError(
                    f"{self._directory} is not complete, {instruction.filename} is missing: copy "
                    "it again or prepare it again"
                )

    def __len__(self) -> int:
        return len(self._data)

    def key(self, index: int) -> str:
        return f"{self._split}[{decoding.checked(index, len(self))}]"

    def load(self, index: int, seed: int | None = None) -> decoding.Example:
        key = self.key(index)
        try:
            record = self._data[int(index)]
        except Exception as error:  # of ArrayRecord and of TFDS, whatever damage they find
            raise decoding.UnreadableImage(
                key, f"its record in {self._directory} cannot be read ({error})"
            ) from error
        if name := record.get("file_name"):
            key = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)
        label = int(record[self._label_key])
        if not 0 <= label < len(self.class_names):
            raise decoding.UnreadableImage(key, f"has no class: its label is {label}")
        with decoding.naming(key):
            pixels = self._framing.pixels(record[self._image_key], seed)
        return decoding.Example(pixels, label, key)

    def gather(
        self, indices: Int[np.ndarray, " b"], seeds: Int[np.ndarray, " b"] | None = None
    ) -> decoding.Batch:
        return decoding.gather(self.load, self.image_shape, indices, seeds)

    def identity(self) -> dict[str, object]:
        info = self._builder.info
        return {
            "source": f"tfds:{info.full_name}",  # name, config, version
            "split": self._split,
            "image_key": self._image_key,
            "label_key": self._label_key,
            **self._framing.identity(),
            "num_examples": len(self),
            "bytes": int(info.dataset_size),
        }


def _find(source: str, data_dir: str | os.PathLike | None) -> pathlib.Path:
    """Returns the directory of a prepared data set, NAME[/CONFIG]/VERSION below ``data_dir``."""
    import tensorflow_datasets as tfds

    match = _NAME.fullmatch(source)
    if not match:
        raise ValueError(f"{source=} is not tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:VERSION")
    root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR)
    folder = root / match["name"]
    if match["config"]:
        folder /= match["config"]
    elif not _versions(folder):
        # A set of one configuration leaves no choice.
        configs = [path for path in _folders(folder) if _versions(path)]
        if len(configs) > 1:
            names = [f"{PREFIX}{match['name']}/{path.name}" for path in configs]
            raise ValueError(f"{source=} has several configurations in {root}: choose of {names}")
        folder = configs[0] if configs else folder
    versions = _versions(folder)
    version = match["version"] or (versions[-1] if versions else None)
    if version not in versions:
        others = f"; there are the versions {versions}" if versions else ""
        raise ValueError(
            f"there is no prepared data set for {source=} in {root}{others}: set data_dir, or "
            f"prepare the data ({_advice(source)})"
        )
    return folder / version


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _versions(folder: pathlib.Path) -> list[str]:
    """Returns the names of prepared versions, the latest one last."""
    names = [
        path.name
        for path in _folders(folder)
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").is_file()
    ]
    return sorted(names, key=lambda name: [int(part) for part in name.split(".")])


def _advice(source: str) -> str:
    return _ADVICE.format(name=source.removeprefix(PREFIX))
