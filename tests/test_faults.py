"""200 random single faults around the programs: each ends in a right result, or in one clear line.

The seed is 0, or what ENAT_JAX_FAULTS_SEED says.
"""

import json
import os
import subprocess
import sys

import pytest
import several

pytestmark = pytest.mark.slow
SEED = os.environ.get("ENAT_JAX_FAULTS_SEED", "0")
BLOCKS, EACH = 20, 10
# As for the tests: machine code that is quickly made.
QUICK = [x for x in os.environ["XLA_FLAGS"].split() if "host_platform" not in x]


@pytest.fixture(scope="module")
def judge():
    """Tries a fault by its name, in a process that has imported everything."""
    environment = several.environment(
        flags=" ".join(QUICK),
        JAX_COMPILATION_CACHE_DIR=os.environ["JAX_COMPILATION_CACHE_DIR"],
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    command = [sys.executable, str(several.ROOT / "tests" / "faults.py"), "--serve"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as server:

        def ask(name):
            print(name, file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield ask
        server.stdin.close()


@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_single_fault_ends_well(judge, block):
    print(f"seed {SEED}, of ENAT_JAX_FAULTS_SEED")
    failed = []
    for number in range(block * EACH, (block + 1) * EACH):
        found = judge(f"{SEED}/{number}")
        if found["wrong"]:
            failed.append(f"{found['fault']}: {'; '.join(found['wrong'])}")
            print(f"{failed[-1]}\nAgain: python tests/faults.py {SEED}/{number}")
            print(*found["ended"], sep="\n")
    assert not failed, "\n".join(failed)
