"""How a process ends that is one of several."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest
import several

from enat_jax.runtime import exits

WORKER = pathlib.Path(__file__).parents[1] / "steps_worker.py"


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError(
            "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read "
            "error [127.0.0.1]:21908: Connection reset by peer"
        ),
        ValueError(
            "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] "
            "Connection closed by peer [127.0.0.1]:41874"
        ),
        jax.errors.JaxRuntimeError(
            "INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a "
            "network error. Last NCCL warning(error) log entry (may be unrelated) ''."
        ),
        jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: save::7::0."),
        jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"),
    ],
)
def test_errors_about_another_process_are_recognised(error):
    line = exits.peer_lost(error)
    assert line.startswith(f"the connection to another process was lost ({str(error)[:20]}")
    assert line.endswith("start the same command again to go on from the last checkpoint")
    assert "\n" not in line


def test_the_cause_of_an_error_is_looked_at():
    try:
        try:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")
        except jax.errors.JaxRuntimeError as error:
            raise OSError("the checkpoint could not be written") from error
    except OSError as error:
        assert "UNAVAILABLE: Socket closed" in exits.peer_lost(error)


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 10 bytes."),
        jax.errors.JaxRuntimeError("INTERNAL: an error of the compiler"),
        ValueError("heartbeat=0 must be positive"),
        OSError("Connection reset by peer"),  # of a file server
    ],
)
def test_other_errors_are_not(error):
    assert exits.peer_lost(error) is None


def test_a_lone_process_ends_as_ever():
    for code in (0, None, 2, 75):
        with pytest.raises(SystemExit) as end:
            exits.leave(code)
        assert end.value.code == code
    assert not exits.one_of_several()


def test_the_last_words_and_the_output_before_them_are_not_lost():
    script = """
import sys
from enat_jax.runtime import exits
sys.stdout.write("half a line")
exits.end_without("the end", stacks=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=several.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (76, "half a line")
    assert done.stderr.startswith("stopped: the end\n") and 'File "<string>", line 5' in done.stderr


def test_programs_start_without_jax():
    script = "import sys; from enat_jax.runtime import cli; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], env=several.environment(), check=True)


def gone(pid):
    """Whether a process is no more, or only its remains are."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="needs /proc")
def test_no_child_stays_behind(tmp_path):
    with several.processes([WORKER, "--child", "--heartbeat=10"], tmp_path) as both:
        for process in both:
            process.wait_for("running as")
        children = [int(one.output().split("child ")[1].split(".")[0]) for one in both]
        assert not gone(children[0])
        both[1].handle.kill()
        os.kill(children[1], signal.SIGKILL)  # nobody can do so for a process that is killed
        assert both[0].code(30) == 76
        assert gone(children[0])


def test_a_mistake_of_all_is_everybodys(tmp_path):
    with several.processes([WORKER, "--fail-at=5", "--error=everybody"], tmp_path) as both:
        assert [process.code() for process in both] == [2, 2]
        for process in both:
            assert process.line("error: ") == "error: a mistake"


@pytest.mark.slow
@pytest.mark.parametrize(("error", "code"), [("mistake", 2), ("bug", 1)])
def test_an_error_of_one_ends_the_others(tmp_path, error, code):
    with several.processes([WORKER, "--fail-at=5", f"--error={error}"], tmp_path) as both:
        assert both[1].code(60) == code
        assert ("Traceback" in both[1].output()) == (error == "bug")
        assert both[0].code(60) == 76


@pytest.mark.parametrize(
    "error, options, line",
    [
        (ValueError("a  b\n\n  c\r\nd "), {}, "a  b c d"),
        (ValueError("INTERNAL: a\nand much more"), {}, "INTERNAL: a"),
        (ValueError("x" * 400), {}, "x" * 300),
        (ValueError("x" * 400), {"limit": None}, "x" * 400),
        (KeyError(), {}, "KeyError"),
        (OSError(), {"named": True}, "OSError"),
        (OSError("a\nb"), {"named": True, "limit": 2}, "OSError: a"),
        ("a\nb", {}, "a b"),
    ],
)
def test_errors_in_one_line(error, options, line):
    assert exits.one_line(error, **options).rstrip() == line
