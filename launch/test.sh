#!/usr/bin/env bash
# Everything from nothing: the environment, lint, types, the test suite.
#
#   bash launch/test.sh                     all but the slow tests, a process for each core
#   bash launch/test.sh --all               all tests, the slow ones, too
#   bash launch/test.sh tests/inference     what follows goes to pytest
#
# ENAT_JAX_VENV   virtual environment to use or create   (default: .venv in the repository)
# PYTHON          interpreter to create it with          (default: python3 if it is 3.11 to 3.13)
# JAX_PLATFORMS   where the tests run                    (default: cpu)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/environment.sh

all=
if [[ "${1:-}" == --all ]]; then
  all=yes
  shift
fi

prepare_environment dev
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"

# All processes of a run share what they compile.
if [[ -z "${JAX_COMPILATION_CACHE_DIR:-}" ]]; then
  export JAX_COMPILATION_CACHE_DIR=$(mktemp -d)
  trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
fi

# run MARKERS OPTIONS...: pytest, for which a selection without a test is no failure.
run() {
  local markers=$1 code=0
  shift
  "$venv/bin/python" -m pytest -m "$markers" "$@" || code=$?
  [[ $code == 0 || $code == 5 ]] || failed=$code
}

failed=0
# A test mostly compiles, on one core: a process for each.
run "not slow" --numprocesses logical --dist worksteal "$@"
if [[ -n "$all" ]]; then
  run slow --numprocesses logical --dist worksteal "$@"
fi
exit "$failed"
