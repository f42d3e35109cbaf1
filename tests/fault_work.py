"""Programs on tiny data, as work that can be begun, and run in processes that are forked.

What is imported before is shared by all of them; JAX is started by each for itself.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT_S = 90

# --- what is run ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """A command with what it needs and writes, all in the working directory.

    Attributes:
        program: module of ``enat_jax``.
        arguments: of the command.
        inputs: from the directory of materials, or what other work wrote.
        out: what it writes.
        unfinish: removes a part of ``out``, as if the command had been interrupted.
        unchecked: files whose removal and change nobody can notice before the work has begun.
    """

    program: str
    arguments: str
    inputs: tuple[str, ...]
    out: str
    unfinish: Callable[[pathlib.Path], None]
    unchecked: str = ""


def _unfinish_run(out: pathlib.Path) -> None:
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "6")


def _remove(*names: str) -> Callable[[pathlib.Path], None]:
    def remove(out: pathlib.Path) -> None:
        for name in names:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


TRAIN = (
    "--config.train.num_steps=6 --config.train.save_every=2 --config.train.log_every=2 "
    "--config.train.eval_every=6 --config.train.keep=10 --config.train.matrix_rate=False "
    "--config.optimizer.warmup_steps=1 --config.optimizer.schedule=constant"
)
EVALUATE = "--set channels=1 --features random:0 --replicates 0 --keep 4 --batch-size 2"
WORK = {
    "tokenizer": Work(
        "train",
        f"--config {ROOT}/configs/images_vqgan.py --workdir tokenizer_run {TRAIN} "
        "--config.data.source=pictures.zip --config.data.size=8 --config.data.held_out=0.2 "
        "--config.train.batch_size=2 --config.loss.restart_every=0 --config.model.codebook_size=8 "
        "--config.model.channels=8 --config.model.channel_multipliers=(1,2) "
        "--config.model.num_groups=4 --config.model.embed_dim=4",
        ("pictures.zip",),
        "tokenizer_run",
        _unfinish_run,
    ),
    "transformer": Work(
        "train",
        f"--config {ROOT}/configs/images.py --workdir run {TRAIN} --config.data.tokens=tokens "
        "--config.data.tokenizer=tokenizer --config.model.width=16 --config.model.num_heads=2 "
        "--config.model.encoder_layers=1 --config.model.dtype=float32 "
        "--config.train.batch_size=4 --config.loss.max_shapes=2 --config.loss.ema_decay=0.5 "
        "--config.sampler.num_steps=2 --config.sampler.num_segments=1",
        ("tokenizer", "tokens"),
        "run",
        _unfinish_run,
    ),
    "tokens": Work(
        "tokenize_images",
        "--model tokenizer --source pictures --set channels=1 --out tokens --batch-size 2 "
        "--shard-items 4",
        ("tokenizer", "pictures"),
        "tokens",
        _remove("00001-of-00003.json", "00001-of-00003.npy", "metadata.json"),
        unchecked="pictures",
    ),
    "samples": Work(
        "sample",
        "--model model --labels 0,1,2 --num 2 --steps 2 --out samples",
        ("model",),
        "samples",
        _remove("00001_cat.png", "grid.png"),
    ),
    "card": Work(
        "evaluate",
        f"--model model --reference pictures.zip {EVALUATE} --num 6 --steps 2 --out card",
        ("model", "pictures.zip"),
        "card",
        _remove("card.json", "card.md"),
    ),
    "model": Work(
        "export",
        "--workdir run --out exported --format orbax,safetensors",
        ("run", "tokenizer", "tokens"),
        "exported",
        _remove("transformer", "transformer.safetensors"),
    ),
}


def _make_materials() -> None:
    """Writes pictures, a tokenizer and a model with random weights."""
    import hostile
    import tiny

    hostile.write_zip(pathlib.Path("pictures.zip"))
    hostile.write_folder(pathlib.Path("pictures"))
    tiny.make_tokenizer().save(pathlib.Path("tokenizer"))
    tiny.make_generator().save(pathlib.Path("model"))


class Stages:
    """Working directories before, amid and after each work, made when they are asked for."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._found: dict[str, dict[str, str]] = {}

    def materials(self) -> pathlib.Path:
        path = self._directory / "materials"
        if not path.exists():
            path.mkdir()
            ended = run_forked(_make_materials, path)
            assert ended.code == 0, ended.errors
        return path

    def stage(self, name: str, which: str) -> pathlib.Path:
        """Returns the directory in which work is "new", "begun" or "done"."""
        work, base = WORK[name], self._directory / name
        if not base.exists():
            (base / "new").mkdir(parents=True)
            for wanted in work.inputs:
                maker = next((x for x in WORK if WORK[x].out == wanted), None)
                source = self.materials() if maker is None else self.stage(maker, "done")
                copy(source / wanted, base / "new" / wanted)
            copy(base / "new", base / "done")
            ended = run_forked(lambda: run_program(work), base / "done")
            assert ended.code == 0, f"{name}:\n{ended.output}{ended.errors}"
            copy(base / "done", base / "begun")
            work.unfinish(base / "begun" / work.out)
        return base / which

    def results(self, name: str) -> dict[str, str]:
        """Returns what a right result is."""
        if name not in self._found:
            done = self.stage(name, "done")
            self._found[name] = in_fork(lambda: results(name, done))
        return self._found[name]


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


# --- results -----------------------------------------------------------------------


def snapshot(root: pathlib.Path) -> dict[str, str]:
    """Returns what every file, folder and link below ``root`` holds, by its path."""
    found = {}
    for path in root.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(root))] = f"link to {os.readlink(path)}"
        elif path.is_dir():
            found[str(path.relative_to(root))] = "folder"
        else:
            found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def results(name: str, root: pathlib.Path) -> dict[str, str]:
    """Returns what decides whether a result is right."""
    out = root / WORK[name].out
    if name in ("tokens", "samples"):
        return snapshot(out)
    if name == "card":
        card = json.loads((out / "card.json").read_text())
        for key in ("date", "seconds", "versions", "hardware"):
            del card[key]
        return {key: json.dumps(value, sort_keys=True) for key, value in card.items()}
    found = weights(name, root)
    for key, content in found.items():
        assert not content.startswith("unreadable"), f"{key} is {content}"
    return found


def weights(name: str, root: pathlib.Path) -> dict[str, str]:
    """Returns the fingerprints of all weights of a model that was written."""
    from enat_jax.checkpoints import model_files, weight_files

    out = root / WORK[name].out
    model = out / "model" if WORK[name].program == "train" else out
    found = {}
    for path in sorted(model.rglob("*")) if WORK[name].program in ("train", "export") else ():
        try:
            if path.suffix == ".safetensors":
                key, params = path, weight_files.read(path)
            elif path.name == "_METADATA":
                key, params = path.parent, model_files.load_params(path.parent)
            else:
                continue
            found[str(key.relative_to(out))] = model_files.fingerprint(params)
        except Exception as error:
            found[str(path.relative_to(out))] = f"unreadable: {error}"
    return found


# --- processes -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, and what it printed on stdout and on stderr."""

    code: int
    output: str
    errors: str


def run_program(work: Work) -> None:
    """Does what ``python -m enat_jax.PROGRAM ARGUMENTS`` does."""
    from enat_jax.runtime import cli, exits

    sys.unraisablehook = exits.unraisable
    program = importlib.import_module(f"enat_jax.{work.program}")
    sys.argv = [work.program, *work.arguments.split()]
    (cli.run_absl if work.program == "train" else cli.run)(program.main)


def run_forked(action: Callable[[], object], directory: pathlib.Path) -> Ended:
    """Calls ``action`` in a directory, in a process of its own."""
    pipes = [os.pipe(), os.pipe()]
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, (_, writing) in enumerate(pipes, 1):
                os.dup2(writing, number)
            sys.stdout = open(1, "w", closefd=False)  # what they were may have been files
            sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")
            os.closerange(3, 1000)
            os.chdir(directory)
            action()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    for _, writing in pipes:
        os.close(writing)
    return _wait(pid, *(reading for reading, _ in pipes))


def _wait(pid: int, *readings: int) -> Ended:
    """Reads what a process prints until it ends; one that hangs is killed."""
    end, said = time.monotonic() + TIMEOUT_S, {reading: b"" for reading in readings}
    left = set(readings)
    while left and time.monotonic() < end:
        for reading in select.select([*left], [], [], 1)[0]:
            said[reading] += (more := os.read(reading, 1 << 16))
            if not more:
                left.remove(reading)
    if left:
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for reading in readings:
        os.close(reading)
    return Ended(code, *(text.decode(errors="replace") for text in said.values()))


def in_fork(function: Callable[[], object]) -> object:
    """Returns what ``function`` gives in a process of its own, by way of JSON."""
    ended = run_forked(lambda: print(json.dumps(function())), pathlib.Path.cwd())
    assert ended.code == 0, ended.output + ended.errors
    return json.loads(ended.output.splitlines()[-1])


def run_fresh(work: Work, directory: pathlib.Path, variables: dict[str, str | None]) -> Ended:
    """Runs the command in a new interpreter, for variables that are read when JAX is imported."""
    changed = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-m", f"enat_jax.{work.program}", *work.arguments.split()],
        cwd=directory,
        env={name: value for name, value in changed.items() if value is not None},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    output, errors = (x.decode(errors="replace") for x in (done.stdout, done.stderr))
    return Ended(done.returncode, output, errors)
