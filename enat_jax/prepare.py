"""ImageNet-2012 from its official tar files to a TFDS data set, without TensorFlow.

    python -m enat_jax.prepare --tars DIR --out DATA_DIR

DIR holds what image-net.org gives to registered people: ILSVRC2012_img_train.tar (a tar file of
1000 tar files), ILSVRC2012_img_val.tar and, if wanted, ILSVRC2012_img_test.tar. The result is
DATA_DIR/imagenet2012/5.1.0, which TFDS reads as if it had built it itself:

    tfds.data_source("imagenet2012", split="train", data_dir=DATA_DIR)

Records, order and files are those of TFDS's own builder with file_format="array_record". Only 23
training pictures differ in some pixels: 22 CMYK files and one PNG file, which become RGB JPEG files
there and here, but by other decoders and encoders.

Several processes write. After an interruption the same command goes on with the files that are
missing; until all are there, everything lies in DATA_DIR/imagenet2012/5.1.0.unfinished.
Pictures are read in the order of the result, all over the tar files: keep these on a disk without
seek times.
"""

import concurrent.futures.process
import hashlib
import multiprocessing
import os
import pathlib
import shutil
import signal
from collections.abc import Sequence

import numpy as np

# The workers import this module, too: what is slow to import and needed by the main process alone,
# such as jax, is imported where it is used.
from enat_jax.data import imagenet, imagenet_records
from enat_jax.runtime import cli, exits, files, os_errors

_PLAN_FORMAT = "enat_jax.prepare.plan.1"
_REGISTER = "image-net.org gives it to people who register at https://image-net.org/download-images"


def prepare(
    tars: pathlib.Path,
    out: pathlib.Path,
    splits: Sequence[str] | None = None,
    processes: int = 1,
    allow_incomplete: bool = False,
    num_shards: int | None = None,
) -> pathlib.Path:
    """Writes the data set, or what is missing of it.

    Args:
        tars: directory of the official tar files.
        out: TFDS's ``data_dir``; created if missing.
        splits: some of "train", "validation", "test"; None: the first two, and "test" if its file
            is there.
        processes: how many write at the same time.
        allow_incomplete: take tar files that do not hold all pictures.
        num_shards: files of each split; None: as many as TFDS would write.

    Returns:
        The directory of the data set.

    Raises:
        OSError: a tar file is missing, something cannot be read or written, the disk is too small,
            or a worker was killed.
        ValueError: a tar file is not as it should be (see ``imagenet.scan``) or not complete; what
            is already in ``out`` is something else than what was asked for; or another process is
            preparing the same.
    """
    final = pathlib.Path(out).absolute() / imagenet_records.NAME / imagenet_records.VERSION
    unfinished = final.with_name(f"{final.name}.unfinished")
    if is_done(final, splits):
        print(f"{final} is already there")
    else:
        tar_files = _tar_files(pathlib.Path(tars), splits)
        directory = unfinished / "records"
        directory.mkdir(parents=True, exist_ok=True)
        with files.lock_directory(unfinished):
            shards = {}
            for split, tar in tar_files.items():
                pictures = _scanned(tar, split, unfinished / f"index-{split}.npz")
                expected = imagenet.NUM_PICTURES[split]
                if len(pictures) != expected and not allow_incomplete:
                    raise ValueError(
                        f"{tar} holds {len(pictures)} pictures, not {expected}: get the file "
                        "again, or say --allow-incomplete"
                    )
                shards[split] = imagenet_records.plan_shards(
                    split, tar, pictures, directory, num_shards
                )
            _keep_plan(unfinished, shards)
            everything = [shard for of_split in shards.values() for shard in of_split]
            _write_missing(everything, processes)
            imagenet_records.describe(directory, shards)
            for path in [*directory.iterdir(), directory]:
                imagenet_records.sync(path)
            directory.rename(final)
            imagenet_records.sync(final.parent)
        print(f"{final}: {sum(len(shard.pictures) for shard in everything)} images")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an earlier run, it may be gone by now
    return final


def is_done(final: pathlib.Path, splits: Sequence[str] | None) -> bool:
    """Says whether ``final`` holds a finished data set with these splits (None: with any).

    Raises:
        ValueError: it holds anything else.
    """
    if not final.exists():
        return False
    import tensorflow_datasets as tfds

    try:
        info = tfds.builder_from_directory(final).info
    except (OSError, AssertionError, ValueError) as error:
        os_errors.pass_on(error, final)
        raise ValueError(f"{final} is there, but is no TFDS data set: remove it") from error
    if info.file_format.value != imagenet_records.FILE_FORMAT:
        raise ValueError(
            f"{final} is of format {info.file_format.value}, not {imagenet_records.FILE_FORMAT}: "
            "remove it, or choose another --out"
        )
    if missing := sorted(set(splits or ()) - set(info.splits)):
        raise ValueError(
            f"{final} is there, but has no split {' and no split '.join(missing)}: remove it, or "
            "choose another --out"
        )
    return True


def _tar_files(tars: pathlib.Path, splits: Sequence[str] | None) -> dict[str, pathlib.Path]:
    tar_files = {split: tars / name for split, name in imagenet.TAR_FILES.items()}
    if splits is None:
        splits = [split for split in tar_files if split != "test" or tar_files[split].exists()]
    if unknown := [split for split in splits if split not in tar_files]:
        raise ValueError(f"there is no split {unknown[0]!r}: choose among {', '.join(tar_files)}")
    tar_files = {split: path for split, path in tar_files.items() if split in splits}
    for split, path in tar_files.items():
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path} (for the split {split}): {_REGISTER}")
    return tar_files


def _scanned(tar: pathlib.Path, split: str, cache: pathlib.Path) -> np.recarray:
    """Returns the pictures of a tar file, kept in ``cache`` as long as the file is not touched."""
    found = tar.stat()
    stamp = np.array([found.st_size, found.st_mtime_ns])
    if cache.exists():
        with np.load(cache) as saved:
            if np.array_equal(saved["stamp"], stamp):
                return imagenet.pictures([saved[field] for field in imagenet.FIELDS])
    print(f"looking through {tar}", flush=True)
    pictures = imagenet.scan(tar, split, imagenet_records.validation_ids())
    files.write_npz(cache, {"stamp": stamp} | {x: pictures[x] for x in imagenet.FIELDS})
    return pictures


def _keep_plan(unfinished: pathlib.Path, shards: dict[str, list[imagenet_records.Shard]]) -> None:
    """Writes down what the files in this directory are made of, or checks that it is the same."""
    path = unfinished / "plan.json"
    splits = {}
    for split, of_split in shards.items():
        digest = hashlib.sha256()
        for shard in of_split:
            for field in imagenet.FIELDS:
                digest.update(shard.pictures[field].tobytes())
        splits[split] = {
            "pictures": digest.hexdigest(),
            "lengths": [len(shard.pictures) for shard in of_split],
            "bytes": [shard.num_bytes for shard in of_split],
        }
    plan = {"format": _PLAN_FORMAT, "splits": splits}
    advice = f"remove {unfinished} to start anew"
    if path.exists() and files.read_json(path, advice) != plan:
        raise ValueError(
            f"{unfinished} was begun with other tar files, other splits, or another version of "
            f"TFDS or Pillow: go on with those, or {advice}"
        )
    files.write_json(path, plan)


def _write_missing(shards: Sequence[imagenet_records.Shard], processes: int) -> None:
    from enat_jax.runtime import progress  # imports jax

    directory = shards[0].path.parent
    for leftover in set(directory.iterdir()) - {shard.path for shard in shards}:
        leftover.unlink()  # of a process that was killed
    missing = [shard for shard in shards if not shard.path.exists()]
    if not missing:
        return
    needed = sum(shard.num_bytes for shard in missing)
    if (free := shutil.disk_usage(directory).free) < needed:
        raise OSError(
            f"the disk of {directory} is too small: {needed / 1e9:.1f} GB are to be written, "
            f"{free / 1e9:.1f} GB are free"
        )
    total = sum(len(shard.pictures) for shard in shards)
    done = total - sum(len(shard.pictures) for shard in missing)
    workers = concurrent.futures.ProcessPoolExecutor(
        min(processes, len(missing)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=exits.end_with_parent,
        initargs=(signal.SIGINT,),  # the main process says when to stop
    )
    try:
        with progress.Progress(total, 1, done) as bar:
            futures = {workers.submit(imagenet_records.write, shard): shard for shard in missing}
            for future in concurrent.futures.as_completed(futures):
                future.result()
                done += len(futures[future].pictures)
                bar.update(done)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise OSError(
            "a worker was killed, perhaps for lack of memory: run the same again to go on, "
            "perhaps with fewer --processes"
        ) from error
    finally:
        workers.shutdown(cancel_futures=True)


def main(arguments: list[str]) -> None:
    parser = cli.Parser(
        prog="python -m enat_jax.prepare", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--tars", type=cli.path, required=True, help="directory of the official tar files"
    )
    parser.add_argument("--out", type=cli.path, required=True, help="TFDS's data_dir")
    parser.add_argument(
        "--processes", type=cli.at_least_one, default=os.cpu_count(), help="that write in parallel"
    )
    parser.add_argument(
        "--splits",
        type=lambda text: text.split(","),
        help="by default train,validation, with test if its file is there",
    )
    parser.add_argument(
        "--allow-incomplete",
        action="store_true",
        help="take tar files that do not hold all pictures",
    )
    flags = parser.parse_args(arguments)
    # Of jax only the progress line is needed, and no accelerator for that.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    prepare(flags.tars, flags.out, flags.splits, flags.processes, flags.allow_incomplete)


if __name__ == "__main__":
    cli.run(main)
