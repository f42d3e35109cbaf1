#!/usr/bin/env bash
# Everything from nothing: the environment, lint, the test suite.
#
#   bash launch/test.sh                     all but the slow tests
#   bash launch/test.sh --all               all tests
#   bash launch/test.sh tests/test_cli.py   what follows goes to pytest
#
# ENAT_JAX_VENV   virtual environment to use or create   (default: .venv in the repository)
# PYTHON          interpreter to create it with          (default: python3 if it is 3.11 to 3.13)
# JAX_PLATFORMS   where the tests run                    (default: cpu)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/environment.sh

selection=(-m "not slow")
if [[ "${1:-}" == --all ]]; then
  selection=()
  shift
fi

prepare_environment dev
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
exec "$venv/bin/python" -m pytest ${selection[@]+"${selection[@]}"} "$@"
