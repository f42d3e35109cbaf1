"""Single random faults in what surrounds a program, and whether it ends well nevertheless.

    python tests/faults.py 0/17 0/18    # repeats faults, named SEED/NUMBER as a failed test does

A program ends well with a right result, the one that it has without the fault, or with one clear
line; and in both cases with no less data than before. Every fault is tried in a process that is
forked from this one, which has imported everything and has not started JAX.
"""

import ctypes
import dataclasses
import importlib
import json
import os
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import time

from fault_work import (
    ROOT,
    WORK,
    Ended,
    Stages,
    copy,
    in_fork,
    results,
    run_forked,
    run_fresh,
    run_program,
    snapshot,
    weights,
)

ENDED_WELL = (2, 3, 75, 76)  # exit codes that come with one line

# --- faults --------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
VARIABLES: tuple[dict[str, str | None], ...] = (
    {"JAX_PLATFORMS": "nonsense"},
    {"JAX_PLATFORMS": "tpu"},
    {"JAX_PLATFORMS": ""},
    {"JAX_ENABLE_X64": "1"},
    {"JAX_ENABLE_X64": "perhaps"},
    {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
    {"JAX_DEFAULT_PRNG_IMPL": "nonsense"},
    {"JAX_DEFAULT_MATMUL_PRECISION": "highest"},
    {"JAX_NUMPY_DTYPE_PROMOTION": "strict"},
    {"JAX_NUMPY_RANK_PROMOTION": "raise"},
    {"JAX_THREEFRY_PARTITIONABLE": "0"},
    {"JAX_DEBUG_NANS": "1"},
    {"JAX_COMPILATION_CACHE_DIR": os.devnull},
    {"JAX_COORDINATOR_ADDRESS": "localhost:1"},
    {"JAX_PROCESS_ID": "0"},
    {"XLA_FLAGS": "--nonsense"},
    {"XLA_PYTHON_CLIENT_MEM_FRACTION": "nonsense"},
    {"CUDA_VISIBLE_DEVICES": ""},
    {"CUDA_VISIBLE_DEVICES": "99"},
    {"TPU_WORKER_HOSTNAMES": "localhost"},
    {"MEGASCALE_NUM_SLICES": "many"},
    {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
    {**SLURM, "SLURM_NTASKS": "many"},
    {"TMPDIR": "/nonexistent"},
    {"HOME": None},
    {"HOME": "/nonexistent"},
    {"PATH": None},
    {"LANG": "C", "LC_ALL": "C"},
    {"LC_ALL": "nonsense"},
    {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONHASHSEED": "1"},
    {"PYTHONOPTIMIZE": "2"},
    {"PYTHONUNBUFFERED": "1"},
    {"COLUMNS": "0", "TERM": "nonsense"},
    {"TZ": "nonsense"},
    {"OMP_NUM_THREADS": "many"},
    {"http_proxy": "http://localhost:1", "https_proxy": "http://localhost:1"},
)
OF_FILES = ("cut", "empty", "flip", "gone", "unreadable", "folder", "loop")
OF_FOLDERS = ("gone", "unreadable", "file", "loop")
UNDAMAGED = ("unreadable", "full", "file size", "read-only", "descriptors")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
        name: SEED/NUMBER.
        work: key of ``WORK``.
        stage: "new" or "begun".
        kind: of the fault.
        target: file or folder that it hits, if it hits one.
        share: a number from 0 to 1, how far into the file or how much of the disk.
        variables: of the environment.
    """

    name: str
    work: str
    stage: str
    kind: str
    target: str = "."
    share: float = 0.0
    variables: dict[str, str | None] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        what = f"{self.kind} {self.target} {self.share:.3f}"
        if self.variables:
            what = " ".join(f"{key}={value}" for key, value in self.variables.items())
        return f"{self.name}: {WORK[self.work].program} ({self.work}, {self.stage}): {what}"


def choose(name: str, stages: Stages) -> Fault:
    """Returns the fault of a name, which decides it alone."""
    rng = random.Random(name)
    work, stage = rng.choice([*WORK]), rng.choice(["new", "begun"])
    root = stages.stage(work, stage)
    share = rng.random()
    area = rng.choices(["file", "disk", "descriptors", "variables"], [60, 16, 8, 16])[0]
    if area == "variables":
        return Fault(name, work, stage, "variables", variables=rng.choice(VARIABLES))
    if area == "descriptors":
        return Fault(name, work, stage, "descriptors", share=share)
    if area == "disk":
        kind = rng.choice(["full", "file size", "read-only"])
        target = rng.choice([".", *sorted(x.name for x in root.iterdir())])
        return Fault(name, work, stage, kind, target if kind == "read-only" else ".", share)
    target = root
    while target.is_dir() and (target == root or rng.random() < 0.8):
        target = rng.choice(sorted(target.iterdir()) or [target / "."])
    kinds = OF_FOLDERS if target.is_dir() else OF_FILES
    named = target.relative_to(root)
    if (unchecked := WORK[work].unchecked) and named.parts[0] == unchecked:
        # Nobody can know that a picture is missing which was never seen, or which pixels it had.
        unnoticed = {"flip"} | ({"gone", "file", "folder", "loop"} if stage == "new" else set())
        kinds = tuple(kind for kind in kinds if kind not in unnoticed)
    return Fault(name, work, stage, rng.choice(kinds), str(named), share)


def _change(path: pathlib.Path, fault: Fault) -> None:
    """Does to a file or folder what the fault says."""
    kind = fault.kind
    if kind in ("gone", "file", "folder", "loop"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if kind == "file":
            path.write_bytes(b"")
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
    elif kind != "unreadable":  # whose modes are changed last
        content = bytearray(path.read_bytes())
        position = min(int(fault.share * len(content)), len(content) - 1)
        if kind == "flip" and content:
            # In text, so that no other text results.
            text = path.suffix in (".json", ".jsonl", ".md") or not path.suffix
            content[position] ^= 0x80 if text else 1 << random.Random(fault.name).randrange(8)
        path.write_bytes(content[: {"cut": position, "empty": 0}.get(kind, len(content))])


_LIBC = ctypes.CDLL(None, use_errno=True)
_NEWNS, _REMOUNT, _BIND, _RDONLY, _PRIVATE = 0x20000, 32, 4096, 1, 0x44000


def _mount(source: str, target: pathlib.Path, kind: str, flags: int, data: str = "") -> None:
    if _LIBC.mount(source.encode(), str(target).encode(), kind.encode(), flags, data.encode()):
        raise OSError(ctypes.get_errno(), "mount")


def _own_mounts() -> bool:
    """Gives this process mounts of its own; says whether that was possible."""
    if not hasattr(_LIBC, "unshare") or _LIBC.unshare(_NEWNS):
        return False
    try:
        _mount("none", pathlib.Path("/"), "none", _PRIVATE)
    except OSError:
        return False
    return True


def _fill_disk(directory: pathlib.Path, room: int) -> None:
    """Puts a directory onto a disk that has ``room`` bytes left."""
    kept = directory.with_name(f"{directory.name}.kept")
    copy(directory, kept)
    _mount("none", directory, "tmpfs", 0, "size=64m")
    copy(kept, directory)
    now = os.statvfs(directory)
    used = (now.f_blocks - now.f_bfree) * now.f_frsize
    _mount("none", directory, "tmpfs", _REMOUNT, f"size={used + room}")


def _obey_modes() -> None:
    """Lets modes of files hold for this process, even if it is root's."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their higher halves
    if not hasattr(_LIBC, "capget") or _LIBC.capget(header, held):
        return
    held[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    _LIBC.capset(header, held)


def prepare(fault: Fault, directory: pathlib.Path) -> dict[int, int]:
    """Brings about what is wrong with files and disks; returns limits for the program."""
    target = directory / fault.target
    if fault.kind in OF_FILES + OF_FOLDERS:
        _change(target, fault)
    elif fault.kind == "descriptors":
        return {resource.RLIMIT_NOFILE: 16 + int(112 * fault.share)}
    elif fault.kind == "read-only":
        if _own_mounts():
            _mount(str(target), target, "none", _BIND)
            _mount("none", target, "none", _BIND | _REMOUNT | _RDONLY)
        else:
            for path in [target, *target.rglob("*")]:
                path.chmod(0o555 if path.is_dir() else 0o444)
    elif fault.kind == "full" and _own_mounts():
        _fill_disk(directory, int(200_000 * fault.share**2))
    elif fault.kind in ("full", "file size"):
        return {resource.RLIMIT_FSIZE: int(100_000 * fault.share**2)}
    return {}


def run_amid(fault: Fault, directory: pathlib.Path, limits: dict[int, int]) -> Ended:
    """Runs the program."""
    work = WORK[fault.work]
    if fault.variables:
        variables = dict(fault.variables)
        if "XLA_FLAGS" in variables:
            variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {variables['XLA_FLAGS']}"
        return run_fresh(work, directory, variables)

    def action() -> None:
        _obey_modes()
        for which, value in limits.items():
            resource.setrlimit(which, (value, value))
        run_program(work)

    return run_forked(action, directory)


# --- verdicts ------------------------------------------------------------------------------------


# Files that a program writes anew, or whose content depends on the time.
CHANGING = ("config.json", "metrics.jsonl", "card.json", "card.md", ".lock")


def losses(
    before: dict[str, str],
    after: dict[str, str],
    reference: dict[str, str],
    whole: set[str],
) -> list[str]:
    """Names what was there before the program and is not there after it.

    Args:
        before: as of ``snapshot``.
        after: as well.
        reference: after the program without a fault.
        whole: folders of weights that are right after it, in whichever files.
    """
    aside = [(path, content) for path, content in after.items() if "damaged" in path]
    lost = []
    for path, content in before.items():
        now = after.get(path)
        anew = path.endswith(CHANGING) or "/events.out" in path
        if now is not None and (now in (content, reference.get(path)) or anew):
            continue
        kept = any(x == content and pathlib.Path(path).name in y for y, x in aside)
        rewritten = "compilation_cache" in path or any(path.startswith(x) for x in whole)
        if not (kept or rewritten):
            lost.append(f"{path} is {'gone' if now is None else 'changed'}")
    return lost


def unclear(fault: Fault, ended: Ended) -> str | None:
    """Says what is wrong with how the program told its user that it cannot go on, if anything."""
    if fault.variables.get("XLA_FLAGS") and "Unknown flag in XLA_FLAGS" in ended.errors:
        return None  # XLA ends the process itself, by this line
    said = [x for x in ended.errors.splitlines() if x.startswith(("error: ", "stopped: "))]
    if ended.code not in ENDED_WELL or len(said) != 1:
        return f"exit code {ended.code} with {len(said)} lines that say why"
    if fault.kind in UNDAMAGED and "damaged" in said[0]:
        return "what is whole is called damaged"
    target = pathlib.PurePath(fault.target)
    names = {str(x) for x in (target, *target.parents)} - {"."} | {target.name}
    if target.parts and target.parts[0].startswith("pictures"):
        names |= {".png", "num_images"}  # one of those within, or how many there are
    if fault.target != "." and not any(name in said[0] for name in names):
        return "the line does not say where"
    for text in ("AttributeError", "KeyError", "TypeError", "NoneType"):
        if text in said[0]:
            return f"the line has {text!r}"
    return None


def judge(fault: Fault, stages: Stages) -> tuple[list[str], Ended]:
    """Runs a program amid a fault; returns what is wrong with how it ended, and its end."""
    right = stages.results(fault.work)
    reference = snapshot(stages.stage(fault.work, "done"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        directory = pathlib.Path(temporary) / "work"
        copy(stages.stage(fault.work, fault.stage), directory)

        def run() -> dict[str, object]:  # in a process of its own, whose mounts end with it
            limits = prepare(fault, directory)
            before, target = snapshot(directory), directory / fault.target
            if fault.kind == "unreadable":
                mode = target.stat().st_mode
                target.chmod(0)
            ended = run_amid(fault, directory, limits)
            if fault.kind == "unreadable" and target.exists():
                target.chmod(mode)
            found = weights(fault.work, directory)
            out = WORK[fault.work].out
            whole = {f"{out}/{key}" for key in found if found[key] == right.get(key)}
            wrong = losses(before, snapshot(directory), reference, whole)
            if ended.code:
                wrong += filter(None, [unclear(fault, ended)])
            else:
                wrong += _differences(fault, directory, right)
            if "Traceback (most recent call last)" in ended.output + ended.errors:
                wrong.append("a traceback")
            return {"ended": dataclasses.astuple(ended), "wrong": wrong}

        found = in_fork(run)
    return found["wrong"], Ended(*found["ended"])


def _differences(fault: Fault, directory: pathlib.Path, right: dict[str, str]) -> list[str]:
    try:
        found = results(fault.work, directory)
    except Exception as error:
        return [f"success is said, but the result cannot be read: {type(error).__name__}: {error}"]
    differ = sorted(key for key in right.keys() | found.keys() if right.get(key) != found.get(key))
    return [f"the result is another one: {', '.join(differ)}"] if differ else []


# --- programs ------------------------------------------------------------------------------------


def import_all() -> None:
    """Imports what the programs import, also late, so that processes that are forked have it."""
    import sklearn.datasets  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import sklearn.neighbors  # noqa: F401

    for name in {work.program for work in WORK.values()}:
        importlib.import_module(f"enat_jax.{name}")


def main(arguments: list[str]) -> None:
    """Tries the faults that are named on the command line, or, with --serve, on stdin."""
    serving = arguments == ["--serve"]
    import_all()
    with tempfile.TemporaryDirectory(prefix="enat_jax-faults-") as temporary:
        stages = Stages(pathlib.Path(temporary))
        for name in map(str.strip, sys.stdin) if serving else arguments:
            start = time.monotonic()
            fault = choose(name, stages)
            wrong, ended = judge(fault, stages)
            if serving:
                answer = {"fault": str(fault), "wrong": wrong, "ended": dataclasses.astuple(ended)}
                print(json.dumps(answer), flush=True)
                continue
            print(f"{fault}\n{ended.output}{ended.errors}exit code {ended.code}")
            print(f"{'; '.join(wrong) or 'well'} ({time.monotonic() - start:.1f} s)\n", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1:])
