"""The scripts that start several processes, with stand-ins for what only clusters have."""

import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import several

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
WORKER = pathlib.Path(__file__).parent / "steps_worker.py"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in {".sh", ".sbatch"})


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


def make_venv(folder, repository):
    """An environment that counts as installed, in which the training program is the worker."""
    script(
        folder / "bin" / "python",
        f'if [[ "$1 $2" == "-m enat_jax.train" ]]; then\n'
        f'  shift 2\n  exec "{sys.executable}" "{WORKER}" "$@"\nfi\n'
        f'exec "{sys.executable}" "$@"\n',
    )
    for extras in ("quickstart", "cuda"):
        stamp = f"{repository}\n{(ROOT / 'setup.py').read_text()}"
        (folder / f"enat_jax-{extras}.stamp").write_text(stamp)
    return folder


def finish(process, timeout=60):
    """Exit code and output of a script."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"not done in {timeout} s:\n{process.communicate()[0]}") from None
    return process.returncode, output


def kill_groups(pids):
    for pid in pids:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_read_by_bash(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize(
    ("codes", "overall"),
    [
        (["0", "0"], 0),
        (["75", "75"], 75),
        (["0", "75"], 75),
        (["76", "0"], 76),
        (["75", "76", "75"], 76),
        (["76", "137"], 76),
        (["134"], 76),
        (["", "0"], 76),
        (["76", "2", "76"], 2),
        (["3", "75"], 3),
        (["137", "1"], 1),
        (["76", "130"], 130),
        (["74"], 74),
    ],
)
def test_codes_of_processes_make_one(codes, overall):
    command = f'source "{LAUNCH}/exit_codes.sh"; overall_code "$@"; start_again {overall} && echo +'
    done = subprocess.run(["bash", "-c", command, "-", *codes], capture_output=True, text=True)
    assert done.stdout.split() == [str(overall)] + ["+"] * (overall in (75, 76))


# --- several hosts on this machine --------------------------------------------------------------


@pytest.fixture
def local_hosts(tmp_path):
    """Starts launch/local_hosts.sh with arguments, its output going to a pipe."""
    started = []

    def start(*arguments):
        venv = make_venv(tmp_path / "venv", ROOT)
        process = subprocess.Popen(
            ["bash", LAUNCH / "local_hosts.sh", *arguments],
            cwd=tmp_path,
            env=several.environment(ENAT_JAX_VENV=str(venv), GRACE_S="20"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        kill_groups([process.pid])
        process.communicate()


def pids_of_hosts(process, number):
    """Process ids of the hosts, once all have begun with their steps, by host."""
    found = {}
    for line in process.stdout:
        if match := re.match(r"\[host (\d)\] running as (\d+)", line):
            found[int(match[1])] = int(match[2])
            if len(found) == number:
                return found
    raise AssertionError(f"only {found}")


def test_local_hosts_train_together(local_hosts):
    code, output = finish(local_hosts("--hosts", "2", "--devices", "3", "--", "--steps=5"))
    assert code == 0, output
    for host in (0, 1):
        assert re.search(rf"^\[host {host}\] running as \d+ with 6 devices\.$", output, re.M)


def test_local_hosts_are_asked_to_stop(local_hosts):
    process = local_hosts("--")
    pids_of_hosts(process, 2)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    assert len(re.findall(r"^\[host [01]\] stopped: after step \d+$", output, re.M)) == 2


def test_losing_one_local_host_ends_the_others(local_hosts):
    process = local_hosts("--", "--heartbeat=10")
    os.kill(pids_of_hosts(process, 2)[1], signal.SIGKILL)
    code, output = finish(process)
    assert code == 76, output
    assert "[host 1] ended with exit code 137" in output
    assert "[host 0] ended with exit code 76" in output


def test_the_mistake_of_local_hosts_is_the_result(local_hosts):
    code, output = finish(local_hosts("--", "--fail-at=5", "--error=everybody"))
    assert code == 2, output
    assert "[host 0] error: a mistake" in output and "[host 1] error: a mistake" in output


@pytest.mark.parametrize(
    "arguments", [[], ["--hosts"], ["--hosts", "0", "--"], ["--host", "2", "--"], ["--config", "x"]]
)
def test_local_hosts_say_how_they_are_used(local_hosts, arguments):
    code, output = finish(local_hosts(*arguments))
    assert code == 2 and output.startswith("usage: bash launch/local_hosts.sh [--hosts N]")


# --- SLURM --------------------------------------------------------------------------------------

SRUN = """
while [[ "$1" == --* ]]; do
  echo "$1" >>"$RECORDS/srun"
  shift
done
export SLURM_STEP_NODELIST=localhost SLURM_STEP_TASKS_PER_NODE=2
for i in 0 1; do
  # Each task is the head of a process group, as with SLURM.
  SLURM_PROCID=$i SLURM_LOCALID=$i setsid "$@" >>"$RECORDS/task_$i" 2>&1 </dev/null &
  tasks[i]=$!
done
printf '%s\\n' "${tasks[@]}" >"$RECORDS/pids.part"
mv "$RECORDS/pids.part" "$RECORDS/pids"
worst=0
for task in "${tasks[@]}"; do
  code=0
  wait "$task" || code=$?
  ((code > worst)) && worst=$code
done
exit "$worst"
"""


class Slurm:
    """A cluster of which there is only a job of two tasks."""

    def __init__(self, folder):
        self.records = folder / "records"
        self.records.mkdir()
        script(folder / "bin" / "srun", SRUN)
        script(folder / "bin" / "scontrol", 'echo "$@" >>"$RECORDS/scontrol"\n')
        self.repository = folder / "repository"
        self.repository.mkdir()
        for name in ("launch", "setup.py"):
            (self.repository / name).symlink_to(ROOT / name)
        self.venv = make_venv(folder / "venv", self.repository)
        self.path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        # JAX derives the coordinator's port from the job's number.
        self.job = str(self._free_port() - (2**16 - 2**12))
        self.script = None

    @staticmethod
    def _free_port():
        while True:
            port = random.randrange(2**16 - 2**12, 2**16)
            with socket.socket() as attempt:
                try:
                    attempt.bind(("127.0.0.1", port))
                    return port
                except OSError:
                    continue

    def submit(self, *arguments, **variables):
        self.script = subprocess.Popen(
            ["bash", LAUNCH / "slurm.sbatch", *arguments],
            cwd=self.records,
            env=several.environment(
                PATH=self.path,
                RECORDS=str(self.records),
                ENAT_JAX_VENV=str(self.venv),
                SLURM_SUBMIT_DIR=str(self.repository),
                SLURM_JOB_ID=self.job,
                SLURM_NTASKS="2",
                SLURM_CPUS_PER_TASK="1",
                **variables,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def tasks(self):
        """Process ids of the tasks, once both are within their steps."""
        end = time.monotonic() + 60
        while not all("running as" in self.output(i) for i in (0, 1)):
            assert self.script.poll() is None, self.script.communicate()[0]
            assert time.monotonic() < end, self.output(0) + self.output(1)
            time.sleep(0.05)
        return self.pids()

    def pids(self):
        path = self.records / "pids"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def output(self, task):
        path = self.records / f"task_{task}"
        return path.read_text() if path.exists() else ""

    def requeued(self):
        path = self.records / "scontrol"
        return path.read_text().splitlines() if path.exists() else []

    def close(self):
        kill_groups(self.pids())
        if self.script is not None:
            self.script.kill()
            self.script.communicate()


@pytest.fixture
def slurm(tmp_path):
    cluster = Slurm(tmp_path)
    yield cluster
    cluster.close()


def test_a_job_of_slurm_ends_when_training_is_done(slurm):
    slurm.submit("--steps=5")
    code, output = finish(slurm.script)
    assert code == 0, output + slurm.output(0)
    assert "with 2 devices." in slurm.output(0) and "with 2 devices." in slurm.output(1)
    assert slurm.requeued() == []
    assert "--cpus-per-task=1" in (slurm.records / "srun").read_text()
    assert sorted(path.name for path in slurm.repository.iterdir()) == ["launch", "setup.py"]


def test_a_job_that_has_to_stop_goes_back_into_the_queue(slurm):
    slurm.submit(SLURM_RESTART_COUNT="3")
    for pid in slurm.tasks():
        os.killpg(pid, signal.SIGTERM)
    slurm.script.send_signal(signal.SIGTERM)
    code, output = finish(slurm.script)
    assert code == 75, output
    assert slurm.requeued() == [f"requeue {slurm.job}"]
    assert "Exit code 75 after 3 restart(s): back into the queue." in output
    assert "stopped: after step" in slurm.output(0) and "stopped: after step" in slurm.output(1)


def test_a_job_that_loses_a_node_goes_back_into_the_queue(slurm):
    slurm.submit("--heartbeat=10")
    os.killpg(slurm.tasks()[1], signal.SIGKILL)
    code, output = finish(slurm.script)
    assert code == 76, output
    assert slurm.requeued() == [f"requeue {slurm.job}"]


def test_a_job_is_not_started_again_after_a_mistake(slurm):
    slurm.submit("--fail-at=5", "--error=everybody")
    code, output = finish(slurm.script)
    assert code == 2, output
    assert slurm.requeued() == []


def test_a_job_does_not_go_back_for_ever(slurm):
    slurm.submit(SLURM_RESTART_COUNT="2", MAX_RESTARTS="2")
    for pid in slurm.tasks():
        os.killpg(pid, signal.SIGTERM)
    assert finish(slurm.script)[0] == 75
    assert slurm.requeued() == []


# --- TPU ----------------------------------------------------------------------------------------

GCLOUD = """
printf '%s\\n' "${*//$'\\n'/ }" >>"$RECORDS/calls"
case "$4" in
  describe) cat "$RECORDS/state" 2>/dev/null ;;
  create) echo READY >"$RECORDS/state" ;;
  delete) rm -f "$RECORDS/state" ;;
  *) [[ "$(cat "$RECORDS/state" 2>/dev/null)" == READY ]] || exit 1 ;;&
  scp) tar -tzf "$5" >"$RECORDS/copied" ;;
  ssh)
    for argument; do
      case "$argument" in
        --command=*prepare_environment*) bash -n -c "${argument#--command=}" ;;
        --command=*) HOME=$RECORDS/home bash -c "${argument#--command=}" ;;
      esac
    done
    ;;
esac
"""
# The training program of a worker: ends as the next line of a file says.
PYTHON = """
printf '<%s>' "$@" >>"$RECORDS/started"
echo >>"$RECORDS/started"
read -r end <"$RECORDS/ends"
sed -i 1d "$RECORDS/ends"
if [[ "$end" == preempted ]]; then
  echo PREEMPTED >"$RECORDS/state"
  kill -9 "$PPID"
fi
exit "$end"
"""


@pytest.fixture
def tpu_pod(tmp_path):
    """Runs launch/tpu_pod.sh; returns exit code, output, calls of gcloud and starts of training."""
    script(tmp_path / "bin" / "gcloud", GCLOUD)
    script(tmp_path / "home" / "enat_jax" / ".venv" / "bin" / "python", PYTHON)

    def call(*arguments, ends=(), **variables):
        (tmp_path / "ends").write_text("".join(f"{end}\n" for end in ends))
        process = subprocess.Popen(
            ["bash", LAUNCH / "tpu_pod.sh", *arguments],
            env=several.environment(
                PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
                RECORDS=str(tmp_path),
                RETRY_S="0",
                **{
                    "TPU_NAME": "pod",
                    "TPU_ZONE": "here",
                    "TPU_TYPE": "v5litepod-16",
                    "TPU_VERSION": "v2",
                    **variables,
                },
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        code, output = finish(process)
        found = [
            path.read_text().splitlines() if path.exists() else []
            for path in (tmp_path / "calls", tmp_path / "started")
        ]
        return code, output, *found

    return call


def verbs(calls):
    """The fourth words: ``gcloud compute tpus tpu-vm VERB``, without questions about the state."""
    return [call.split()[3] for call in calls if "describe" not in call]


def test_a_pod_is_created_and_deleted(tpu_pod):
    assert tpu_pod("create", TPU_SPOT="yes", TPU_PROJECT="mine")[0] == 0
    code, _, calls, _ = tpu_pod("delete")
    assert code == 0
    assert calls == [
        "compute tpus tpu-vm create pod --accelerator-type=v5litepod-16 --version=v2 --spot "
        "--zone=here --project=mine",
        "compute tpus tpu-vm delete pod --quiet --zone=here",
    ]


def test_a_pod_may_be_waited_for(tpu_pod):
    assert tpu_pod("create", TPU_QUEUED="yes")[0] == 0
    code, _, calls, _ = tpu_pod("delete", TPU_QUEUED="yes")
    assert code == 0
    assert calls[0] == (
        "compute tpus queued-resources create pod --node-id=pod --accelerator-type=v5litepod-16 "
        "--runtime-version=v2 --zone=here"
    )
    assert calls[-1] == "compute tpus queued-resources delete pod --force --quiet --zone=here"


def test_what_is_installed_can_be(tpu_pod, tmp_path):
    tpu_pod("create")
    code, output, calls, _ = tpu_pod("install", TPU_SETUP="mount -a")
    assert code == 0, output
    assert verbs(calls) == ["create", "scp", "ssh"]
    copied = (tmp_path / "copied").read_text().split()
    assert {"setup.py", "README.md", "enat_jax/train.py", "launch/environment.sh"} <= set(copied)
    assert "--worker=all" in calls[2] and "mount -a --zone=here" in calls[2]


def test_arguments_reach_the_workers_as_they_are(tpu_pod):
    tpu_pod("create")
    arguments = ["--workdir", "/mnt/runs/a b", "--config.data.class_names=it's $HOME"]
    code, output, _, started = tpu_pod("run", *arguments, ends=[0])
    assert code == 0, output
    rest = "".join(f"<{argument}>" for argument in arguments)
    assert started == [f"<-m><enat_jax.train><--distributed=on>{rest}"]


def test_a_run_ends_what_an_earlier_one_left_behind(tpu_pod, tmp_path):
    tpu_pod("create")
    left = subprocess.Popen(["bash", "-c", "exec -a enat_jax.train sleep 60"])
    (tmp_path / "home" / "enat_jax" / "train.pid").write_text(f"{left.pid}\n")
    assert tpu_pod("run", ends=[0])[0] == 0
    assert left.wait(1) == -signal.SIGTERM


@pytest.mark.parametrize("code", [2, 3, 75, 76])
def test_the_code_of_a_run_is_that_of_the_workers(tpu_pod, code):
    tpu_pod("create")
    assert tpu_pod("run", ends=[code])[0] == code


def test_a_pod_is_kept_running_until_training_is_done(tpu_pod):
    ends = ["preempted", 76, 75, 0]
    code, output, calls, started = tpu_pod("keep-running", "--config=x", ends=ends)
    assert code == 0, output
    assert len(started) == 4
    made = ["create", "scp", "ssh"]  # the third installs
    run = ["ssh", "ssh"]  # the second asks for the exit codes
    assert verbs(calls) == [*made, *run, "delete", *made, *run, *run, *run]


def test_a_pod_is_not_kept_running_after_a_mistake(tpu_pod):
    code, output, _, started = tpu_pod("keep-running", ends=[76, 2])
    assert code == 2, output
    assert len(started) == 2


def test_a_pod_is_not_kept_running_for_ever(tpu_pod):
    code, output, _, started = tpu_pod("keep-running", ends=[76] * 5, MAX_RESTARTS="2")
    assert code == 76, output
    assert len(started) == 3


def test_a_pod_needs_a_name(tpu_pod):
    code, output, calls, _ = tpu_pod("create", TPU_NAME="")
    assert (code, output) == (2, "error: set TPU_NAME; see the head of launch/tpu_pod.sh\n")
    assert tpu_pod("destroy")[0] == 2
    assert calls == []


def test_a_step_to_start_from_is_not_repeated_at_each_restart():
    for argument in ("--from_step=3", "--from_step"):
        script = 'source launch/exit_codes.sh; refuse_from_step --workdir x "$1"; echo went on'
        done = subprocess.run(
            ["bash", "-c", script, "bash", argument], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2 and "--from_step would be repeated" in done.stderr
