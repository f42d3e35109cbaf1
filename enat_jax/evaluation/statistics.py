"""Statistics of a set of images in a file: ours, and those that others publish.

What ``Statistics.load`` reads is known by its content:

    ours                 "enat_jax statistics 1": all that ``Statistics`` has.
    ADM's                ``mu``, ``sigma``, ``mu_s``, ``sigma_s``: pool and spatial features of the
                         TensorFlow Inception (github.com/openai/guided-diffusion, evaluations/).
                         Often with images, ``arr_0``, from which ADM takes precision and recall.
    ``mu``, ``sigma``    pytorch-fid's, and in the same form those of the first FID in TensorFlow,
                         which resizes images in another way. Nothing in the file says which.

What a file does not say is None in its description, and ``caveats.of_reference`` says that it is
not known.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
from jaxtyping import Float, UInt8

from enat_jax.evaluation import caveats, npz_files
from enat_jax.metrics.moments import Gaussian, Moments
from enat_jax.runtime import files

FORMAT = "enat_jax statistics 1"
# The keys of a description; there may be more.
DESCRIPTION = "features source resolution crop num_images class_counts versions".split()
ADVICE = "make statistics anew with `python -m enat_jax.evaluate --make-reference`"
_SIZES = {"pool": 2048, "spatial": 2023}  # of ADM's


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What is kept of a set of images to compare others with it.

    Attributes:
        moments: mean and covariance of features by their name, "pool" and perhaps "spatial".
        pool: pool features of some or all images, for precision, recall, density and coverage;
            None: not kept.
        description: JSON values by the names ``DESCRIPTION``, None for what is not known:
            features: description of the network; source: identity of the images, by names;
            resolution: [height, width]; crop: how pictures were cut; num_images; class_counts:
            images of each class; versions: of libraries, by name.
    """

    moments: Mapping[str, Moments | Gaussian]
    pool: Float[np.ndarray, "k d"] | None
    description: dict[str, Any]

    def __post_init__(self) -> None:
        if missing := [name for name in DESCRIPTION if name not in self.description]:
            raise ValueError(f"a description without {', '.join(missing)}")
        if "pool" not in self.moments:
            raise ValueError("statistics without moments of pool features")
        size = self.moments["pool"].mean.size
        if self.pool is not None and self.pool.shape[1:] != (size,):
            raise ValueError(f"{self.pool.shape=}: need [k, {size}], as the moments")

    def gaussian(self, name: str) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
        """Returns mean and covariance of "pool" or "spatial", float64.

        Raises:
            ValueError: if there are none, or of fewer than two images.
        """
        if name not in self.moments:
            raise ValueError(f"there are no statistics of {name} features")
        return self.moments[name].mean, self.moments[name].covariance()

    def check_dimensions(self, dimensions: Mapping[str, int], where: object) -> None:
        """Raises ValueError, which names ``where``, unless features of these lengths compare.

        Only names that are in both are looked at.
        """
        for name, moments in self.moments.items():
            wanted = dimensions.get(name, moments.mean.size)
            if moments.mean.size != wanted:
                raise ValueError(
                    f"{where} is of other features: {name} has {moments.mean.size} values, "
                    f"those in use have {wanted}: {ADVICE} and the same --features"
                )

    def check_features(self, features: Mapping[str, Any], where: object) -> None:
        """Raises ValueError, which names ``where``, if these are known to be of another network.

        Another ``resize`` of the same network passes: ``caveats.of_reference`` says it.
        """
        mine = self.description["features"] or {}
        for name in ("kind", "fingerprint"):
            known = None not in (mine.get(name), features.get(name))
            if known and mine[name] != features[name]:
                raise ValueError(
                    f"{where} is of other features: {name} {caveats.short(mine[name])}, those in "
                    f"use have {caveats.short(features[name])}: {ADVICE} and the same --features"
                )

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz file, whole or not at all; the same statistics give the same bytes.

        Raises:
            OSError: if it cannot be written.
            ValueError: if moments are of an unknown number of images, as those of other programs.
        """
        about = {"format": FORMAT} | self.description
        arrays: dict[str, Any] = {"description": np.frombuffer(files.json_bytes(about), np.uint8)}
        for name, moments in self.moments.items():
            if not isinstance(moments, Moments):
                raise ValueError(f"{path}: statistics without a number of images: copy their file")
            arrays |= {f"{name}/{key}": array for key, array in moments.arrays().items()}
        if self.pool is not None:
            arrays["kept"] = np.asarray(self.pool, np.float32)
        files.write_npz(pathlib.Path(path), arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Returns the statistics of a file, of any of the kinds above; never unpickles.

        Raises:
            OSError: if there is no such file or it cannot be read.
            ValueError: if it is something else, damaged, or holds what cannot be statistics.
        """
        with npz_files.open_npz(path, ADVICE) as archive:
            if "description" in archive:
                return cls(*_ours(path, archive))
            if not {"mu", "sigma"} <= set(archive):
                if "arr_0" in archive:
                    raise ValueError(
                        f"{path} holds images (arr_0) and no statistics: make those with `python "
                        f"-m enat_jax.evaluate --make-reference FILE.npz --reference {path}`"
                    )
                names = ", ".join(archive) or "no arrays"
                raise ValueError(f"{path} holds {names} and no statistics: {ADVICE}")
            return cls(*_of_others(path, archive))


def load_own(path: pathlib.Path, advice: str) -> Statistics:
    """Returns what ``Statistics.save`` wrote.

    Raises:
        OSError: if there is no such file or it cannot be read.
        ValueError: with ``advice``, if it is something else or damaged.
    """
    try:
        return Statistics.load(path)
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix(f': {ADVICE}')}: {advice}") from error


def sample_images(
    path: str | os.PathLike, batch_size: int
) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
    """Yields the images beside ADM's statistics, at most ``batch_size`` of them at a time.

    Raises:
        OSError: if there is no such file or it cannot be read.
        ValueError: if it holds no images, or is damaged.
    """
    with npz_files.open_npz(path, ADVICE) as archive:
        shape, dtype = archive.header("arr_0") if "arr_0" in archive else ((), None)
        if len(shape) != 4 or dtype != np.uint8:
            raise ValueError(f"{path} holds no images: arr_0 is no uint8 array [n, h, w, c]")
        yield from archive.rows("arr_0", batch_size)


# --- files ---------------------------------------------------------------------------------------


def _ours(path: object, archive: npz_files.Archive) -> tuple[dict, np.ndarray | None, dict]:
    text = archive.read("description").tobytes()
    try:
        about = json.loads(text)
        found = about.pop("format")
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, its description is no JSON: {ADVICE}") from error
    if found != FORMAT:
        raise ValueError(f"{path} is of format {found!r}, not {FORMAT!r}: {ADVICE}")
    parts: dict[str, dict[str, np.ndarray]] = {}
    for entry in archive:
        name, _, key = entry.partition("/")
        if key:
            parts.setdefault(name, {})[key] = archive.read(entry)
    moments = {name: Moments.from_arrays(arrays) for name, arrays in parts.items()}
    for name, value in moments.items():
        _check(path, name, value.mean, value.scatter)
    kept = archive.read("kept") if "kept" in archive else None
    if kept is not None and (kept.dtype != np.float32 or not np.isfinite(kept).all()):
        raise ValueError(f"{path}: its kept features are not finite float32: {ADVICE}")
    return moments, kept, about


def _of_others(path: object, archive: npz_files.Archive) -> tuple[dict, None, dict]:
    moments = {"pool": _gaussian(path, archive, "mu", "sigma")}
    resize = None
    if {"mu_s", "sigma_s"} <= set(archive):
        moments["spatial"] = _gaussian(path, archive, "mu_s", "sigma_s")
        sizes = {name: value.mean.size for name, value in moments.items()}
        if sizes != _SIZES:
            raise ValueError(
                f"{path}: mu has {sizes['pool']} values and mu_s {sizes['spatial']}, "
                f"not 2048 and 2023: they are swapped, or of another network: {ADVICE}"
            )
        resize = "adm"
    about = dict.fromkeys(DESCRIPTION)
    about["features"] = {"kind": "inception", "resize": resize, "fingerprint": None}
    if "arr_0" in archive:
        shape, dtype = archive.header("arr_0")
        if len(shape) == 4 and dtype == np.uint8:
            about["resolution"] = list(shape[1:3])
            about["sample_images"] = shape[0]
    return moments, None, about


def _gaussian(
    path: object, archive: npz_files.Archive, mean_name: str, matrix_name: str
) -> Gaussian:
    mean, matrix = archive.read(mean_name), archive.read(matrix_name)
    if mean.dtype.kind != "f" or matrix.dtype.kind != "f":
        raise ValueError(
            f"{path}: {mean_name} and {matrix_name} are {mean.dtype} and {matrix.dtype}, "
            f"not floating-point numbers: {ADVICE}"
        )
    if mean.ndim == 2 and matrix.ndim == 1:
        raise ValueError(f"{path}: {mean_name} and {matrix_name} are swapped: {ADVICE}")
    if mean.ndim != 1 or not mean.size or matrix.shape != (mean.size, mean.size):
        raise ValueError(
            f"{path}: {mean_name} and {matrix_name} have shapes {mean.shape} and {matrix.shape}, "
            f"not [d] and [d, d]: {ADVICE}"
        )
    mean, matrix = mean.astype(np.float64), matrix.astype(np.float64)
    _check(path, matrix_name, mean, matrix)
    return Gaussian(mean, (matrix + matrix.T) / 2)  # of float32, they may differ in rounding


def _check(path: object, name: str, mean: np.ndarray, matrix: np.ndarray) -> None:
    """Raises ValueError unless the matrix can be a covariance, as far as is quickly seen."""
    if not (np.isfinite(mean).all() and np.isfinite(matrix).all()):
        raise ValueError(f"{path}: mean or covariance of {name} hold NaN or infinity: {ADVICE}")
    scale = np.abs(matrix).max(initial=0.0)
    if np.abs(matrix - matrix.T).max() > 1e-6 * scale or matrix.diagonal().min() < 0:
        raise ValueError(
            f"{path}: {name} is no covariance, it is not symmetric or has negative variances: "
            f"{ADVICE}"
        )
