"""Exit codes, errors in one line, and how a process that is one of several ends.

JAX's runtime ends a process by an abort when it loses another one, and waits for all others when a
process ends in the usual way. Here the first becomes a line on stderr and ``PEER_LOST``, the second
a farewell that takes ``FAREWELL_S`` at most.
"""

# jax is imported where it is needed: every program has this module, and some have no use for jax.
import contextlib
import ctypes
import dataclasses
import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

BUG = 1
MISTAKE = 2
DIVERGED = 3
STOPPED = 75  # EX_TEMPFAIL of sysexits.h
PEER_LOST = 76
INTERRUPTED = 130  # as a shell reports a program that SIGINT ended

FAREWELL_S = 10  # how long a process that ends with an error waits for the others to end, too
FLUSH_S = 2

AGAIN = "start the same command again to go on from the last checkpoint"

# What pip calls a package whose module has another name.
PACKAGES = {
    "PIL": "pillow",
    "absl": "absl-py",
    "etils": "'etils[epath]'",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
}

# Errors of JAX's runtime begin with a status. On the way to Python they become JaxRuntimeError, or
# ValueError where a computation is run within its call, as on CPU.
_STATUS = re.compile(r"[A-Z_]+: ")
# Gloo connects CPUs, NCCL GPUs, and the coordination service the processes.
_LOST = re.compile(
    r"gloo|nccl.*(remote|system error|internal error|network)|connection (reset|closed|refused)"
    r"|socket closed|broken pipe|coordination ?service|heartbeat|barrier"
    r"|tasks? (are|is) unhealthy|^unavailable:",
    re.IGNORECASE | re.DOTALL,
)


@dataclasses.dataclass
class _Process:
    """What this process is in the middle of; there is one, as of JAX's distributed runtime."""

    several: bool = False
    connecting: str | None = None  # what to say if that takes too long
    leaving: int | None = None  # the exit code, once it is decided


_process = _Process()
_ending = threading.Lock()  # taken by the first that ends the process, and never given back


def connecting(otherwise: str) -> None:
    """Notes that this process is about to be connected to others by JAX.

    Args:
        otherwise: what to say if JAX ends the process because that takes too long.
    """
    # JAX aborts from a thread of its own when it has lost the coordinator, when the coordinator has
    # lost any process, and when connecting takes too long; the callback that jaxlib has for this
    # cannot be called from C++. Python's own signal handlers run in the main thread, for which an
    # abort does not wait, so this one is given to the C library.
    ctypes.pythonapi.PyOS_setsig.restype = ctypes.c_void_p
    ctypes.pythonapi.PyOS_setsig(signal.SIGABRT, _abort_handler)
    _process.connecting = otherwise


def connected() -> None:
    """Notes that this process is now one of several."""
    _process.several, _process.connecting = True, None


def one_of_several() -> bool:
    """Says whether this process is connected to others."""
    return _process.several


def peer_lost(error: BaseException | None) -> str | None:
    """Returns one line about the loss of another process, or None if ``error`` is another one.

    Args:
        error: an exception, whose causes are looked at, too.
    """
    while error is not None:
        ours = isinstance(error, (RuntimeError, ValueError)) and _STATUS.match(str(error))
        if ours and _LOST.search(str(error)):
            return f"the connection to another process was lost ({one_line(error)}); {AGAIN}"
        error = error.__cause__ or error.__context__
    return None


def one_line(error: object, limit: int | None = 300, named: bool = False) -> str:
    """Returns the message of an error in one line; of JAX's runtime, which says much, the first.

    Args:
        error: an exception, or its message.
        limit: characters of the message at most; None: all of it.
        named: begin with the type of the error. One without a message is always named.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:1] if _STATUS.match(str(error)) else lines)[:limit]
    name = type(error).__name__
    return f"{name}: {text}" if named and text else text or name


def no_package(error: BaseException) -> str | None:
    """Returns one line about a package that is not installed, or None if ``error`` is another one.

    A module that is missing in this package, or in one that is installed, is a bug.
    """
    name = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    package = (name or "").partition(".")[0]
    if not package or package == "enat_jax" or package in sys.modules:
        return None
    return f"the package {package} is not installed: pip install {PACKAGES.get(package, package)}"


def raised_in(error: BaseException, module: str) -> bool:
    """Says whether an error was raised by the code of a module, such as "jax._src.config"."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == module


def uncaught(error: BaseException) -> None:
    """Says what no program has caught, as ``sys.excepthook`` does.

    It may come from an import, and then be a mistake of the user: a package is missing, or a
    variable of JAX has a wrong value.

    Args:
        error: whose traceback is printed, but for these.

    Raises:
        SystemExit: the mistake has been said, or the program was interrupted.
    """
    message = no_package(error)
    if isinstance(error, ValueError) and raised_in(error, "jax._src.config"):
        message = f"an environment variable of JAX is wrong: {one_line(error)}"
    if not shows_tracebacks():
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            raise SystemExit(INTERRUPTED)
        if message is not None:
            print(f"error: {message}", file=sys.stderr)
            raise SystemExit(MISTAKE)
    sys.__excepthook__(type(error), error, error.__traceback__)


def unraisable(found: "sys.UnraisableHookArgs") -> None:
    """Says what was raised where nobody can catch it, as ``sys.unraisablehook`` does.

    Where TensorStore fails, Orbax raises the error and closes its event loop. Each thread of
    TensorStore then finds it closed, which is left out: it would be a traceback of every thread.
    """
    error = found.exc_value
    closed = isinstance(error, RuntimeError) and raised_in(error, "asyncio.base_events")
    if not closed or shows_tracebacks():
        sys.__unraisablehook__(found)


def shows_tracebacks() -> bool:
    """Says whether the user asked for the tracebacks of mistakes, too."""
    return os.environ.get("ENAT_JAX_TRACEBACK", "0") not in ("", "0")


def leave(code: Any) -> NoReturn:
    """Ends the program as ``sys.exit`` does, but in one of several processes without hanging.

    JAX waits at the end of a process for all others to end. With an error in one process only they
    do not; so after ``FAREWELL_S`` it ends nevertheless, and the others notice that they lost it.

    Args:
        code: as for ``sys.exit``.
    """
    if not _process.several or not code:
        sys.exit(code)
    _process.leaving = code = code if isinstance(code, int) else BUG
    with _ending:
        import jax

        _within(FAREWELL_S, jax.distributed.shutdown)
        _exit(code)


def end_without(message: str, stacks: bool = False) -> NoReturn:
    """Ends this process at once with ``PEER_LOST``, waiting for nobody; works in any thread.

    Args:
        message: one line for stderr.
        stacks: whether the Python stacks of all threads are printed, too.
    """
    with _ending:
        # Not through sys.stderr: another thread may hold its lock for ever.
        os.write(2, f"stopped: {message}\n".encode())
        if stacks:
            faulthandler.dump_traceback(2, all_threads=True)
        _exit(PEER_LOST)


def end_with_parent(*ignored: signal.Signals) -> None:
    """Makes a worker process ignore some signals, and end when its parent has ended.

    Ctrl-C and a scheduler's SIGTERM go to all processes of a run, and its parent says when a worker
    is no longer needed. A parent that is killed cannot say it; no worker stays behind then.

    Args:
        ignored: signals that are left to the parent.
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    if parent := multiprocessing.parent_process():

        def end() -> None:
            parent.join()
            os._exit(BUG)

        threading.Thread(target=end, daemon=True).start()


def _on_abort(number: int) -> None:
    if _process.leaving is not None:
        _exit(_process.leaving)  # a farewell that failed
    lost = (
        "JAX's runtime has ended this process, by the message above, most often because another "
        f"process was lost; {AGAIN}"
    )
    end_without(_process.connecting or lost)


_abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_on_abort)  # must stay as long as it is set


def _exit(code: int) -> NoReturn:
    """Ends the process without waiting for threads, peers or what is registered by atexit."""
    _within(FLUSH_S, _flush)
    for child in multiprocessing.active_children():  # a loader's; they would stay behind
        child.kill()
    os._exit(code)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Calls ``action`` and returns when it is done, has failed, or has taken too long."""

    def call() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
