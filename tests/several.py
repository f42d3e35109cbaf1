"""Runs scripts as several processes of one program, with fake CPU devices each."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(devices=1, flags="", **more):
    """Variables of a process of its own, without what a cluster may have set for the tests."""
    foreign = ("SLURM_", "JAX_", "TPU_", "MEGASCALE_", "ENAT_JAX_", "XLA_")
    ours = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in ours or not name.startswith(foreign)
    }
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}",
        "PYTHONPATH": str(ROOT),
        **more,
    }


class Process:
    """One of several: a running Python script whose output goes to a file.

    Attributes:
        handle: the ``subprocess.Popen``.
    """

    def __init__(self, arguments, output, env):
        self._output = output
        with output.open("w") as file:
            self.handle = subprocess.Popen(
                [sys.executable, "-u", *map(str, arguments)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def output(self):
        return self._output.read_text(errors="replace")

    def line(self, start):
        """The one line that begins with ``start``; JAX's own threads may print after it."""
        (found,) = [line for line in self.output().splitlines() if line.startswith(start)]
        return found

    def wait_for(self, text, timeout=60):
        """Until ``text`` has been printed."""
        end = time.monotonic() + timeout
        while text not in self.output():
            assert self.handle.poll() is None, f"ended before {text!r}:\n{self.output()}"
            assert time.monotonic() < end, f"no {text!r} in {timeout} s:\n{self.output()}"
            time.sleep(0.02)

    def code(self, timeout=60):
        """The exit code, when it has ended."""
        try:
            return self.handle.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {timeout} s:\n{self.output()}") from None


@contextlib.contextmanager
def processes(arguments, directory, *, number=2, devices=1, flags="", **more):
    """A list of ``number`` started ``Process``, all killed in the end.

    Args:
        arguments: of Python, the script first.
        directory: for their output.
        number: of processes.
        devices: CPU devices of each.
        flags: of XLA, more than that.
        more: further environment variables.
    """
    address = f"127.0.0.1:{free_port()}"
    started = []
    try:
        for i in range(number):
            env = environment(
                devices,
                flags,
                JAX_COORDINATOR_ADDRESS=address,
                JAX_NUM_PROCESSES=str(number),
                JAX_PROCESS_ID=str(i),
                **more,
            )
            started.append(Process(arguments, directory / f"output_{i}.txt", env))
        yield started
    finally:
        for process in started:
            process.handle.kill()
            process.handle.wait()
