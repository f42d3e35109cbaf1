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

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python python3.13 python3.12 python3.11}; do
    if supported "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python of version 3.11, 3.12 or 3.13 found${PYTHON:+ at PYTHON=$PYTHON};" \
    "install one, or name it: PYTHON=/path/to/python3.12 bash launch/test.sh" >&2
  exit 2
}

selection=(-m "not slow")
if [[ "${1:-}" == --all ]]; then
  selection=()
  shift
fi

venv=${ENAT_JAX_VENV:-.venv}
if [[ ! -x "$venv/bin/python" ]]; then
  python=$(find_python)
  echo "Creating a virtual environment in $venv ($("$python" --version))."
  "$python" -m venv "$venv"
fi
if ! supported "$venv/bin/python"; then
  echo "error: $venv holds $("$venv/bin/python" --version), but 3.11, 3.12 or 3.13 is needed;" \
    "remove it or set ENAT_JAX_VENV to another directory" >&2
  exit 2
fi

# The stamp names the tree and its setup.py: another checkout or another requirement installs anew.
stamp=$venv/enat_jax.stamp
wanted=$(pwd; cat setup.py)
if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
  echo "Installing enat_jax and its requirements (a minute or two)."
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev,quickstart]'
  echo "$wanted" >"$stamp"
fi

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
exec "$venv/bin/python" -m pytest ${selection[@]+"${selection[@]}"} "$@"
