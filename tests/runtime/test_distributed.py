"""Several processes: found by their environment, stopped at the same step, never left hanging."""

import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest
import several

from enat_jax.runtime import distributed, exits

WORKER = pathlib.Path(__file__).parents[1] / "steps_worker.py"
PLAIN = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def calls(monkeypatch):
    """Arguments of the calls of ``jax.distributed.initialize``, which does nothing."""
    made = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: made.append(arguments))
    monkeypatch.setattr(exits, "connecting", lambda otherwise: None)
    monkeypatch.setattr(exits, "connected", lambda: None)
    return made


# --- finding each other -------------------------------------------------------------------------


def test_one_process_is_left_alone(calls):
    distributed.initialize("auto", {})
    distributed.initialize("auto", {"TPU_WORKER_HOSTNAMES": "localhost", "SLURM_JOB_ID": "77"})
    distributed.initialize("auto", {**SLURM, "SLURM_NTASKS": "1"})
    # Of several tasks, but within the job's script, which is no task, ...
    distributed.initialize("auto", {k: v for k, v in SLURM.items() if "STEP" not in k})
    # ... or within an interactive shell, which is the only task of its step.
    shell = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    distributed.initialize("auto", {**SLURM, **shell})
    distributed.initialize("off", {**PLAIN, **SLURM})
    assert calls == []


def test_plain_variables_say_who_this_is(calls):
    distributed.initialize("auto", PLAIN, connect_timeout=7, heartbeat_timeout=8)
    assert calls == [
        {
            "coordinator_address": "10.0.0.1:1234",
            "num_processes": 4,
            "process_id": 3,
            "cluster_detection_method": "deactivate",
            "initialization_timeout": 7,
            "heartbeat_timeout_seconds": 8,
        }
    ]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID must be set, as JAX_COORDINATOR_ADDRESS and"),
        ({"JAX_PROCESS_ID": "", "JAX_NUM_PROCESSES": ""}, "NUM_PROCESSES and JAX_PROCESS_ID must"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS='host' must be host:port"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES='0' must be a whole number from 1 on"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' must be"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID='4' must be a whole number from 0 to .* = 3"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1' must be"),
    ],
)
def test_what_does_not_say_who_this_is_is_refused(calls, variables, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize("auto", {**PLAIN, **variables})
    assert calls == []


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode='yes' .* is unknown: one of"):
        distributed.initialize("yes", {})


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        # One task per GPU: JAX takes the GPU with the task's number on the node.
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_GPUS_ON_NODE": "8"}, None),
        # One task per node has all of its GPUs, ...
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"}, [0, 1, 2, 3]),
        # ... unless somebody has chosen.
        (
            {
                "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                "SLURM_GPUS_ON_NODE": "4",
                "JAX_LOCAL_DEVICE_IDS": "1",
            },
            None,
        ),
        # A task that sees its own GPU only knows it as number 0.
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "5"}, [0]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
    ],
)
def test_tasks_of_slurm_are_found_by_jax(calls, variables, devices):
    distributed.initialize("auto", {**SLURM, **variables})
    assert calls[0].get("local_device_ids") == devices
    assert calls[0]["cluster_detection_method"] == "slurm"


@pytest.mark.parametrize(
    ("mode", "variables", "who"),
    [
        ("auto", {}, ("node01:61517", 2, 1)),
        (
            "auto",
            {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "a-b,c[1-2]"},
            ("a-b:61441", 2, 1),
        ),
        ("auto", {"SLURM_STEP_NODELIST": "gpu-a[007,012-015],b"}, ("gpu-a007:61517", 2, 1)),
        ("auto", {"JAX_COORDINATOR_PORT": "99"}, ("node01:99", 2, 1)),
        # The step decides, in a job of more tasks, of fewer, ...
        ("auto", {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "3"}, ("node01:61517", 3, 1)),
        ("auto", {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "3"}, ("node01:61517", 3, 1)),
        # ... and when its only task is to be connected nevertheless.
        ("on", {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ("node01:61517", 1, 0)),
    ],
)
def test_a_step_of_slurm_says_who_this_is(calls, mode, variables, who):
    distributed.initialize(mode, {**SLURM, **variables})
    names = ("coordinator_address", "num_processes", "process_id")
    assert tuple(calls[0][name] for name in names) == who


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_NTASKS": "two"}, "SLURM_NTASKS='two' must be a whole number; if there are no"),
        ({"SLURM_PROCID": "2"}, "SLURM_PROCID=2 must be below SLURM_NTASKS=2; if there are no"),
        ({"SLURM_NTASKS": "1", "MEGASCALE_NUM_SLICES": "x"}, "MEGASCALE_NUM_SLICES='x' must be"),
    ],
)
def test_a_step_of_slurm_that_contradicts_itself_is_refused(calls, variables, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize("auto", {**SLURM, **variables})
    distributed.initialize("off", {**SLURM, **variables})
    assert calls == []


def test_waiting_is_said(monkeypatch, capfd):
    monkeypatch.setattr(distributed, "WAITING_S", 0.05)
    monkeypatch.setattr(exits, "connecting", lambda otherwise: None)
    monkeypatch.setattr(exits, "connected", lambda: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: time.sleep(0.12))
    distributed.initialize("auto", PLAIN, connect_timeout=40)
    time.sleep(0.1)  # nothing more is said when the others are there
    assert capfd.readouterr().err == 2 * (
        "[distributed] process 3 of 4 waits for the others, to meet at the address 10.0.0.1:1234; "
        "it gives up in 40 s\n"
    )
    distributed.initialize("on", {}, connect_timeout=7)
    line = "this process waits for the others, to meet at the address of process 0 that JAX found"
    assert f"{line}; it gives up in 7 s\n" in capfd.readouterr().err
    # A single one waits for nobody.
    distributed.initialize("auto", {**PLAIN, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"})
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("mode", "variables"),
    [
        ("auto", {"TPU_WORKER_HOSTNAMES": "host-0,host-1"}),
        ("auto", {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}),
        ("on", {}),
    ],
)
def test_jax_finds_the_hosts_of_a_tpu_slice(calls, mode, variables):
    distributed.initialize(mode, variables)
    assert calls == [{"initialization_timeout": 300, "heartbeat_timeout_seconds": 100}]


def test_nothing_to_be_found_is_a_mistake(monkeypatch):
    def nothing(**arguments):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing)
    monkeypatch.setattr(exits, "connecting", lambda otherwise: None)
    with pytest.raises(ValueError, match=r"does not find .* \(coordinator_address .* set JAX_COO"):
        distributed.initialize("on", {})


# --- stopping together, in one process ----------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noticed_at_the_next_step(capfd, number):
    before = signal.getsignal(number)
    with distributed.Preemption() as preemption:
        assert not preemption.reached(1)
        signal.raise_signal(number)
        assert preemption.reached(2) and preemption.reached(3)
    assert capfd.readouterr().err == "saving, then stopping; once more to stop at once\n"
    assert signal.getsignal(number) is before


def test_a_second_interrupt_comes_at_once():
    with pytest.raises(KeyboardInterrupt), distributed.Preemption():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


def test_a_second_sigterm_ends_the_process():
    script = """
import os, signal
from enat_jax.runtime import distributed
with distributed.Preemption():
    os.kill(os.getpid(), signal.SIGTERM)
    print("first", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("second", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=several.environment(),
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "first\n")


def test_other_threads_install_no_handlers():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def run():
        with distributed.Preemption() as preemption:
            found.extend([signal.getsignal(signal.SIGTERM), preemption.reached(1)])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before, False]


def test_asking_costs_nothing():
    with distributed.Preemption() as preemption:
        start = time.perf_counter()
        for step in range(10_000):
            preemption.reached(step)
        assert (time.perf_counter() - start) / 10_000 < 10e-6


# --- noticing a loss, in one process ------------------------------------------------------------


@pytest.fixture
def ends(monkeypatch):
    """What the watchdog says at the end of the process, which does not end."""
    said = []
    monkeypatch.setattr(exits, "end_without", lambda message, stacks: said.append(message))
    yield said
    for thread in threading.enumerate():
        if thread.name == "watchdog":
            thread.join(10)  # or it would find the real function
            assert not thread.is_alive()


def wait_for(condition, timeout=10):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_watchdog_says_what_takes_too_long(ends):
    with distributed.Watchdog(0.05, "step") as watchdog:
        watchdog.completed("step 17")
        wait_for(lambda: ends)
    assert ends[0] == (
        "no step has been completed for 0.05 s, during step 17: a host may be lost or hung; "
        "start the same command again to go on from the last checkpoint"
    )


def test_the_watchdog_is_content_with_beats(ends):
    longest, last = 0.0, time.monotonic()
    with distributed.Watchdog(1.0) as watchdog:
        for step in range(30):
            time.sleep(0.05)  # 1.5 s in all
            watchdog.completed(f"step {step}")
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert not ends or longest > 0.9  # on a machine that is busy with something else


def test_a_paused_watchdog_waits_and_begins_anew(ends):
    with distributed.Watchdog(0.2) as watchdog:
        with watchdog.paused(), watchdog.paused():
            time.sleep(0.5)
        start = time.monotonic()
        assert not ends
        wait_for(lambda: ends)
        assert time.monotonic() - start > 0.15


def test_a_watchdog_may_be_off(ends):
    threads = threading.active_count()
    with distributed.Watchdog(None) as watchdog:
        assert threading.active_count() == threads
        watchdog.completed("step 1")
    assert not ends


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan")])
def test_a_watchdog_needs_some_time(timeout_s):
    with pytest.raises(ValueError, match="must be positive or None"):
        distributed.Watchdog(timeout_s)


# --- real processes -----------------------------------------------------------------------------


def running(directory, *arguments, **more):
    """Two processes of the worker, in the midst of their steps."""
    return several.processes([WORKER, *arguments], directory, **more)


@pytest.mark.parametrize(
    ("whom", "number"), [([1], signal.SIGTERM), ([0], signal.SIGINT), ([0, 1], signal.SIGTERM)]
)
def test_all_processes_stop_at_the_same_step(tmp_path, whom, number):
    with running(tmp_path) as both:
        for process in both:
            process.wait_for("running as")
        for i in whom:
            both[i].handle.send_signal(number)
        assert [process.code() for process in both] == [75, 75]
        assert both[0].line("stopped: after step ") == both[1].line("stopped: after step ")


def test_a_single_process_may_be_connected_too(tmp_path):
    with running(tmp_path, number=1) as (process,):
        process.wait_for("running as")
        process.handle.send_signal(signal.SIGTERM)
        assert process.code() == 75


@pytest.mark.parametrize("dead", [0, 1])
def test_who_loses_a_process_ends(tmp_path, dead):
    with running(tmp_path, "--heartbeat=10") as both:
        for process in both:
            process.wait_for("running as")
        both[dead].handle.kill()
        survivor = both[1 - dead]
        assert survivor.code(30) == 76
        assert "stopped: " in survivor.output() and exits.AGAIN in survivor.output()


def test_who_waits_for_a_hung_process_ends(tmp_path):
    with running(tmp_path, "--watchdog=2") as both:
        for process in both:
            process.wait_for("running as")
        both[1].handle.send_signal(signal.SIGSTOP)
        assert both[0].code(30) == 76
        output = both[0].output()
        assert "stopped: no step has been completed for 2 s, during step" in output
        assert "steps_worker.py" in output  # where it was


@pytest.mark.slow
@pytest.mark.parametrize("hung", [0, 1])
def test_a_hung_process_is_noticed_without_a_watchdog(tmp_path, hung):
    with running(tmp_path, "--heartbeat=5") as both:
        for process in both:
            process.wait_for("running as")
        both[hung].handle.send_signal(signal.SIGSTOP)
        assert both[1 - hung].code(60) == 76
        assert "stopped: JAX's runtime has ended this process" in both[1 - hung].output()


def test_a_process_that_never_appears_is_missed(tmp_path):
    address = f"127.0.0.1:{several.free_port()}"
    env = several.environment(
        JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1"
    )
    process = several.Process([WORKER, "--connect=1"], tmp_path / "output.txt", env)
    assert process.code(60) == 76
    assert process.line("stopped: ") == (
        "stopped: the processes of this run did not all appear within 1 s: see that each of them "
        f"runs and reaches the address {address}; if there are no others, start with "
        "--distributed=off"
    )


def test_an_interrupt_ends_waiting_at_once(tmp_path):
    script = """
from enat_jax.runtime import distributed
distributed.WAITING_S = 0.1
distributed.initialize()
"""
    address = f"127.0.0.1:{several.free_port()}"
    for i in range(2):
        env = several.environment(
            JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="3", JAX_PROCESS_ID=str(i)
        )
        process = several.Process(["-c", script], tmp_path / f"output_{i}.txt", env)
        process.wait_for(f"process {i} of 3 waits for the others, to meet at the address {address}")
        process.handle.send_signal(signal.SIGINT)
        assert process.code(5) == -signal.SIGINT
