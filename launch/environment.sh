# Sourced by the other scripts, from the root of the repository: the Python environment, and what the
# quickstarts share.
#
# ENAT_JAX_VENV   virtual environment to use or create   (default: .venv in the repository)
# PYTHON          interpreter to create it with          (default: python3 if it is 3.11 to 3.13)

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
    "install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
  exit 2
}

# prepare_environment EXTRAS: sets $venv, a virtual environment with enat_jax and these extras.
prepare_environment() {
  local extras=$1 python stamp wanted
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
  # The stamp names the tree and its setup.py: another checkout or requirement installs anew.
  stamp=$venv/enat_jax-$extras.stamp
  wanted=$(pwd; cat setup.py)
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
    echo "Installing enat_jax and its requirements (a minute or two)."
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
    echo "$wanted" >"$stamp"
  fi
}

# begin_quickstart CALLER DEFAULT [--compare] [DIR]: sets $compare and $dir, which is made, and $begun;
# prepares the environment. CALLER is the directory that DIR is relative to.
begin_quickstart() {
  local caller=$1 default=$2
  shift 2
  compare=
  if [[ "${1:-}" == --compare ]]; then
    compare=yes
    shift
  fi
  if [[ $# -gt 1 || "${1:-}" == -* ]]; then
    echo "usage: bash launch/${0##*/} [--compare] [DIR]" >&2
    exit 2
  fi
  dir=${1:-$PWD/$default}
  [[ "$dir" == /* ]] || dir=$caller/$dir
  mkdir -p "$dir"
  echo "[1/6] Python environment: a minute or two, the first time."
  prepare_environment quickstart
  begun=$SECONDS
}

# stage TITLE RESULT COMMAND...: run unless the result, which each program writes last, is there.
stage() {
  local title=$1 result=$2
  shift 2
  if [[ -e "$result" ]]; then
    echo "$title Already there."
  else
    echo "$title"
    "$venv/bin/python" -m "$@"
  fi
}
