#!/usr/bin/env bash
# Several hosts on this machine: processes with fake CPU devices that train together.
#
#   bash launch/local_hosts.sh [--hosts N] [--devices M] -- ARGUMENTS OF enat_jax.train
#   bash launch/local_hosts.sh --hosts 2 --devices 4 -- \
#     --config configs/digits.py --workdir runs/two_hosts
#
# --hosts     processes                       (default: 2)
# --devices   CPU devices of each             (default: 1)
#
# Ctrl-C or SIGTERM asks all of them to save and stop; a second one kills them. When one fails the
# others get GRACE_S seconds to notice (default: 30). The exit code is 75 or 76 where the same
# command goes on from the last checkpoint; see enat_jax/runtime/cli.py and launch/exit_codes.sh.
# ENAT_JAX_VENV and PYTHON: see launch/environment.sh.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
source launch/exit_codes.sh

usage() {
  echo "usage: bash launch/local_hosts.sh [--hosts N] [--devices M] -- ARGUMENTS" >&2
  exit 2
}

hosts=2
devices=1
while [[ "${1:-}" != -- ]]; do
  [[ $# -ge 2 && "$2" =~ ^[1-9][0-9]{0,3}$ ]] || usage
  case "$1" in
    --hosts) hosts=$2 ;;
    --devices) devices=$2 ;;
    *) usage ;;
  esac
  shift 2
done
shift

prepare_environment quickstart
python=$(cd "$venv/bin" && pwd)/python
cd "$caller" # where relative paths among the arguments start from
pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
export JAX_NUM_PROCESSES=$hosts PYTHONUNBUFFERED=1
JAX_COORDINATOR_ADDRESS=127.0.0.1:$("$python" -c '
import socket
with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    print(found.getsockname()[1])
')
export JAX_COORDINATOR_ADDRESS

# prefixed TEXT: stdin, with TEXT before each line. It ends with its input, not by a signal that is
# meant for the processes.
prefixed() {
  local line
  trap '' INT TERM
  while IFS= read -r line || [[ -n "$line" ]]; do
    printf '%s%s\n' "$1" "$line"
  done
}

processes=() readers=() codes=() running=
for ((i = 0; i < hosts; i++)); do
  mkfifo "$pipes/$i"
  prefixed "[host $i] " <"$pipes/$i" &
  readers[i]=$!
  JAX_PROCESS_ID=$i "$python" -m enat_jax.train "$@" >"$pipes/$i" 2>&1 </dev/null &
  processes[i]=$!
  running+=" $i"
done

tell() {
  local i
  for i in $running; do
    kill -s "$1" "${processes[i]}" 2>/dev/null || true
  done
}

asked=
ask() {
  if [[ -z "$asked" ]]; then
    asked=yes
    tell TERM # for SIGINT, too: what a shell starts in the background may ignore that
  else
    tell KILL
  fi
}
trap ask INT TERM

deadline=
while [[ -n "$running" ]]; do
  still=
  for i in $running; do
    if kill -0 "${processes[i]}" 2>/dev/null; then
      still+=" $i"
      continue
    fi
    code=0
    wait "${processes[i]}" || code=$?
    codes+=("$code")
    if [[ $code != 0 && $code != 75 ]]; then
      echo "[host $i] ended with exit code $code"
      deadline=${deadline:-$((SECONDS + ${GRACE_S:-30}))}
    fi
  done
  running=$still
  if [[ -n "$deadline" && -n "$running" ]] && ((SECONDS >= deadline)); then
    echo "killing what is left: host(s)$running"
    tell KILL
  fi
  sleep 0.2 || true
done
wait "${readers[@]}" || true
exit "$(overall_code "${codes[@]}")"
