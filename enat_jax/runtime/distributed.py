"""One program in several processes: how they find each other, stop together and notice a loss.

    distributed.initialize()                        # before anything asks JAX for devices
    with distributed.Preemption() as preemption, distributed.Watchdog(1800) as watchdog:
        for step in range(num_steps):
            ...                                     # one step, known to be complete
            watchdog.completed("the next step")
            if preemption.reached(step):
                ...                                 # all processes at the same step: save and stop

With one process ``initialize`` does nothing and the rest works as it is.
How a process ends is in ``exits``.
"""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from enat_jax.runtime import exits

MODES = ("auto", "on", "off")
PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

WAITING_S = 5  # between two lines of a process that waits for the others
ALONE = "if there are no others, start with --distributed=off"


# --- finding each other -------------------------------------------------------------------------


def initialize(
    mode: str = "auto",
    environ: Mapping[str, str] = os.environ,
    *,
    connect_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Connects this process to the others of the same program, if it is one of several.

    To be called before anything asks JAX for devices. With mode "auto" a process is one of several
    if the environment says so, by one of

    - ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and
      ``JAX_PROCESS_ID``, all three, also for a single process,
    - a step of a SLURM job (``srun``) that has more than one task itself, however many the job
      has; an interactive shell is a step of one task, or none,
    - ``TPU_WORKER_HOSTNAMES`` with several names, or ``MEGASCALE_NUM_SLICES`` above 1, as on GKE.

    The hosts of a TPU slice outside GKE can be told from a single one only by asking Google's
    metadata server, which JAX does with mode "on".

    Args:
        mode: "auto"; "on": always connect, JAX finds out to whom; "off": never.
        environ: environment variables to decide by. JAX itself reads ``os.environ``.
        connect_timeout: seconds for all processes to appear. Afterwards the process ends with
            ``exits.PEER_LOST``.
        heartbeat_timeout: seconds of silence after which a process counts as lost.

    Raises:
        ValueError: the mode is unknown, or the environment says too little or nonsense.
        ConnectionError: the connection failed at once, as for a port that is in use.
    """
    arguments = _connection(mode, environ)
    if arguments is None:
        return
    several = arguments.get("num_processes") != 1
    address = f"the address {arguments.get('coordinator_address', 'of process 0 that JAX found')}"
    waiting: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if several:
        exits.connecting(
            f"the processes of this run did not all appear within {connect_timeout} s: see that "
            f"each of them runs and reaches {address}; {ALONE}"
        )
        number = arguments.get("num_processes")
        who = f"process {arguments['process_id']} of {number}" if number else "this process"
        waiting = _saying(f"{who} waits for the others, to meet at {address}", connect_timeout)
    with _interruptible(), waiting:
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=connect_timeout,
                heartbeat_timeout_seconds=heartbeat_timeout,
            )
        except jax.errors.JaxRuntimeError as error:
            cause = exits.one_line(error)
            raise ConnectionError(f"could not connect the processes: {cause}") from error
        except ValueError as error:
            if mode != "on":
                raise
            cause = exits.one_line(error)
            raise ValueError(
                f"JAX does not find the other processes ({cause}): set {', '.join(PLAIN)}"
            ) from error
    if several:
        exits.connected()


def _connection(mode: str, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments of ``jax.distributed.initialize``, or None: it is not to be called."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} of several processes is unknown: one of {MODES}")
    if mode == "off":
        return None
    given = [name for name in PLAIN if environ.get(name)]
    if len(given) == len(PLAIN):
        return _plain(*(environ[name] for name in PLAIN))
    if given:
        missing = [name for name in PLAIN if name not in given]
        raise ValueError(
            f"{' and '.join(missing)} must be set, as {' and '.join(given)} is: all three or none"
        )
    if all(environ.get(name) for name in SLURM) and (found := _slurm(mode, environ)):
        return found
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    slices = _whole(environ, "MEGASCALE_NUM_SLICES") if environ.get("MEGASCALE_NUM_SLICES") else 1
    if mode == "on" or len(hosts) > 1 or slices > 1:
        return {}
    return None


def _whole(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdecimal():
        raise ValueError(f"{name}={environ[name]!r} must be a whole number; {ALONE}")
    return int(environ[name])


def _plain(address: str, num_processes: str, process_id: str) -> dict[str, Any]:
    if not re.fullmatch(r".+:\d{1,5}", address):
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address!r} must be host:port of process 0")
    if not num_processes.isdecimal() or not int(num_processes):
        raise ValueError(f"JAX_NUM_PROCESSES={num_processes!r} must be a whole number from 1 on")
    if not process_id.isdecimal() or int(process_id) >= int(num_processes):
        raise ValueError(
            f"JAX_PROCESS_ID={process_id!r} must be a whole number from 0 to "
            f"JAX_NUM_PROCESSES - 1 = {int(num_processes) - 1}"
        )
    return {
        "coordinator_address": address,
        "num_processes": int(num_processes),
        "process_id": int(process_id),
        "cluster_detection_method": "deactivate",
    }


def _slurm(mode: str, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns who this task of a SLURM step is; None with mode "auto" if it is the only one.

    JAX goes by ``SLURM_NTASKS``, which in an interactive step is that of the whole job. The address
    is the one that JAX would choose.
    """
    counted = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    tasks = _whole(environ, counted)
    if tasks < 2 and mode == "auto":
        return None
    process_id = _whole(environ, "SLURM_PROCID")
    if process_id >= tasks:
        raise ValueError(f"SLURM_PROCID={process_id} must be below {counted}={tasks}; {ALONE}")
    # The first of a list such as "node[001,007-015],host2".
    first = re.match(r"([^,\[]*)(?:\[([^,\]-]*))?", environ["SLURM_STEP_NODELIST"])
    host = "".join(part for part in first.groups() if part) if first else ""
    port = environ.get("JAX_COORDINATOR_PORT") or _whole(environ, "SLURM_JOB_ID") % 4096 + 61440
    return {
        "coordinator_address": f"{host}:{port}",
        "num_processes": tasks,
        "process_id": process_id,
        "cluster_detection_method": "slurm",
        **_slurm_devices(environ),
    }


def _slurm_devices(environ: Mapping[str, str]) -> dict[str, list[int]]:
    """Says which of the GPUs that it sees a SLURM task uses, where JAX's own choice is wrong.

    JAX takes the one GPU whose number is the task's on its node. That fits one task per GPU, where
    each sees all GPUs of the node.
    """
    if environ.get("JAX_LOCAL_DEVICE_IDS"):
        return {}
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible and "," not in visible:  # each task has been given its own GPU, number 0 to it
        return {"local_device_ids": [0]}
    alone = re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if alone and gpus.isdecimal() and int(gpus) > 1:
        return {"local_device_ids": list(range(int(gpus)))}
    return {}


@contextlib.contextmanager
def _saying(what: str, timeout_s: float) -> Iterator[None]:
    """Within, a thread says every ``WAITING_S`` seconds what this process waits for."""
    start, met = time.monotonic(), threading.Event()

    def say() -> None:
        while not met.wait(WAITING_S):
            left = max(0, round(start + timeout_s - time.monotonic()))
            os.write(2, f"[distributed] {what}; it gives up in {left} s\n".encode())

    thread = threading.Thread(target=say, name="saying", daemon=True)
    thread.start()
    try:
        yield
    finally:
        met.set()
        thread.join()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Within, Ctrl-C ends the process at once: connecting is one long call into C++."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# --- stopping together --------------------------------------------------------------------------


class Preemption:
    """Whether somebody has asked this run to stop, by SIGTERM or Ctrl-C; a context manager.

    In one process the first signal only sets a flag; a second one ends the program at once, Ctrl-C
    by KeyboardInterrupt. In several processes a signal to any of them is enough: JAX agrees on a
    step that none of them has passed, about a second later. Further SIGTERMs then change nothing.

    Handlers are installed in the main thread only, and are gone after the context.
    """

    def __init__(self) -> None:
        self._asked = False
        # In several processes: asks JAX whether this is the step.
        self._agreed: Callable[[int], bool] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        ours = [signal.SIGINT, signal.SIGTERM]
        if jax.distributed.is_initialized():
            self._agreed = multihost_utils.reached_preemption_sync_point
            ours = [signal.SIGINT]  # JAX has a handler of its own for SIGTERM
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in ours}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def reached(self, step: int) -> bool:
        """Says whether to save and stop after this step, the same in all processes.

        Args:
            step: number of the step; every process asks once after each step.
        """
        if self._agreed is not None and not self._asked:
            self._asked = self._agreed(step)
        return self._asked

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        os.write(2, b"saving, then stopping; once more to stop at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._agreed is not None:
            os.kill(os.getpid(), signal.SIGTERM)  # to JAX's handler, which tells the others
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._asked = True


# --- noticing a loss -----------------------------------------------------------------------------


class Watchdog:
    """Ends the process if no step is completed for a while; a context manager.

    A process whose peer hangs waits for ever within a call into JAX, where no exception reaches it.
    So a thread waits here: when ``completed`` has not been called for ``timeout_s`` seconds, it
    prints a line and the stacks of all threads and ends the process with ``exits.PEER_LOST``.

    Args:
        timeout_s: seconds, more than the longest step; None: never.
        what: what is to be completed, for the message.
    """

    def __init__(self, timeout_s: float | None, what: str = "step") -> None:
        if timeout_s is not None and not 0 < timeout_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"timeout_s={timeout_s} of the watchdog must be positive or None")
        self._timeout_s = timeout_s
        self._what = what
        self._doing = f"the first {what}"
        self._since = time.monotonic()
        self._paused = 0
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        if self._timeout_s is not None:
            self._since = time.monotonic()
            watch = threading.Thread(
                target=self._watch, args=(self._timeout_s,), name="watchdog", daemon=True
            )
            watch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()

    def completed(self, following: str) -> None:
        """Notes that a step is complete, and what follows it, as in "step 17"."""
        self._doing = following
        self._since = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, nothing is watched: for compiling, evaluating and saving, which take their time.

        A peer that hangs in the meantime is noticed afterwards, by the step that needs it.
        """
        self._paused += 1
        try:
            yield
        finally:
            self._since = time.monotonic()
            self._paused -= 1

    def _watch(self, timeout_s: float) -> None:
        left = timeout_s
        while not self._closed.wait(left):
            if self._paused:
                left = timeout_s
                continue
            left = self._since + timeout_s - time.monotonic()
            if left <= 0:
                message = (
                    f"no {self._what} has been completed for {timeout_s:g} s, during "
                    f"{self._doing}: a host may be lost or hung; {exits.AGAIN}"
                )
                exits.end_without(message, stacks=True)
                return
