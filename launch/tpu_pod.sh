#!/usr/bin/env bash
# Training on a Cloud TPU slice, of one host or many, from one's own machine.
#
# This script has not been run on Google Cloud; it was tested with a stand-in for gcloud.
#
#   export TPU_NAME=enat TPU_ZONE=us-central1-a TPU_TYPE=v5litepod-64
#   export TPU_VERSION=v2-alpha-tpuv5-lite TPU_SPOT=yes
#   bash launch/tpu_pod.sh keep-running --config configs/enat_l_imagenet256.py \
#     --workdir gs://my-bucket/runs/enat_l --config.data.tokens=gs://my-bucket/tokens
#
#   create                   create the TPU VM
#   install                  copy this repository to all workers and install it
#   run ARGUMENTS            train on all workers, with arguments of enat_jax.train
#   keep-running ARGUMENTS   all of these, again and again until training is done: also when a spot
#                            TPU is taken away, a worker is lost, or somebody asks the run to stop
#   delete                   delete the TPU VM
#
# The working directory must outlive the TPU and be the same on all workers: gs://BUCKET/NAME, which
# the service account of the TPU may write to, or a directory into which TPU_SETUP mounts a shared
# disk. What is read from gs:// is copied to the disk of each worker.
#
# TPU_NAME, TPU_ZONE, TPU_TYPE, TPU_VERSION
#                name, zone, accelerator type, software     (needed)
# TPU_PROJECT    project                                    (default: gcloud's own)
# TPU_SPOT       yes: cheaper, may be taken away            (default: no)
# TPU_QUEUED     yes: wait for the TPU as a queued resource (default: no)
# TPU_SETUP      shell command run on each worker at the end of install, such as
#                'sudo mkdir -p /mnt/runs && sudo chmod 777 /mnt/runs && gcsfuse my-runs /mnt/runs'
# MAX_RESTARTS   of keep-running                            (default: 100)
# RETRY_S        seconds between its attempts               (default: 60)
#
# The exit code of run and keep-running: see enat_jax/runtime/cli.py and launch/exit_codes.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/exit_codes.sh

usage() {
  echo "usage: bash launch/tpu_pod.sh create|install|run|keep-running|delete [ARGUMENTS]" >&2
  exit 2
}

[[ $# -ge 1 ]] || usage
for name in TPU_NAME TPU_ZONE TPU_TYPE TPU_VERSION; do
  if [[ -z "${!name:-}" ]]; then
    echo "error: set $name; see the head of launch/tpu_pod.sh" >&2
    exit 2
  fi
done
where=(--zone="$TPU_ZONE" ${TPU_PROJECT:+--project="$TPU_PROJECT"})
spot=()
[[ "${TPU_SPOT:-no}" != yes ]] || spot=(--spot)

tpu_vm() { gcloud compute tpus tpu-vm "$@" "${where[@]}"; }
queued() { gcloud compute tpus queued-resources "$@" "${where[@]}"; }

# on_all COMMAND: on all workers at the same time.
on_all() { tpu_vm ssh "$TPU_NAME" --worker=all --batch-size=all --command="$1"; }

# State of the TPU VM, such as READY, CREATING or PREEMPTED; nothing if there is none.
state() { tpu_vm describe "$TPU_NAME" --format='value(state)' 2>/dev/null || true; }

create() {
  if [[ "${TPU_QUEUED:-no}" == yes ]]; then
    queued create "$TPU_NAME" --node-id="$TPU_NAME" --accelerator-type="$TPU_TYPE" \
      --runtime-version="$TPU_VERSION" ${spot[@]+"${spot[@]}"} || return
    until [[ "$(state)" == READY ]]; do
      sleep "${RETRY_S:-60}"
    done
  else
    tpu_vm create "$TPU_NAME" --accelerator-type="$TPU_TYPE" --version="$TPU_VERSION" \
      ${spot[@]+"${spot[@]}"}
  fi
}

delete() {
  if [[ "${TPU_QUEUED:-no}" == yes ]]; then
    queued delete "$TPU_NAME" --force --quiet
  else
    tpu_vm delete "$TPU_NAME" --quiet
  fi
}

# Ubuntu 22.04 has Python 3.10, but 3.11 among its packages.
install_there='set -e
mkdir -p ~/enat_jax && cd ~/enat_jax && tar -xzf ~/enat_jax.tar.gz
if ! command -v python3.11 >/dev/null; then
  sudo apt-get update -q && sudo apt-get install -q -y python3.11 python3.11-venv
fi
PYTHON=python3.11 bash -c "set -e; source launch/environment.sh; prepare_environment tpu,gcs"
'

install() {
  local folder code=0
  folder=$(mktemp -d)
  tar -czf "$folder/enat_jax.tar.gz" setup.py pyproject.toml README.md LICENSE enat_jax configs launch &&
    tpu_vm scp "$folder/enat_jax.tar.gz" "$TPU_NAME:enat_jax.tar.gz" --worker=all --batch-size=all &&
    on_all "$install_there${TPU_SETUP:-}" || code=$?
  rm -r "$folder"
  return "$code"
}

# run ARGUMENTS: sets $code.
run() {
  local arguments written=() line
  printf -v arguments ' %q' "$@"
  # What ssh returns does not tell which worker failed, and how: so each writes down its exit code.
  # A process that an interrupted ssh has left behind would keep the TPU for itself.
  on_all 'cd ~/enat_jax
left() { grep -qs enat_jax "/proc/$(cat train.pid 2>/dev/null)/cmdline"; }
for signal in TERM KILL; do
  if left; then kill -s "$signal" "$(cat train.pid)"; fi
  for i in $(seq 30); do if left; then sleep 1; fi; done
done
rm -f exit_code train.pid
.venv/bin/python -m enat_jax.train --distributed=on'"$arguments"' &
echo $! >train.pid
wait $!
echo $? >exit_code
rm -f train.pid' || true
  while IFS= read -r line; do
    [[ ! "$line" =~ ^exit_code=([0-9]*)$ ]] || written+=("${BASH_REMATCH[1]}")
  done < <(on_all 'echo "exit_code=$(cat ~/enat_jax/exit_code 2>/dev/null)"')
  code=76
  [[ ${#written[@]} == 0 ]] || code=$(overall_code "${written[@]}")
}

keep_running() {
  local attempt installed=
  for ((attempt = 0; attempt <= ${MAX_RESTARTS:-100}; attempt++)); do
    [[ $attempt == 0 ]] || sleep "${RETRY_S:-60}"
    case "$(state)" in
      READY) ;;
      CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING | STOPPING | DELETING) continue ;;
      "")
        create || continue
        installed=
        ;;
      *) # PREEMPTED, TERMINATED, STOPPED, ...: it does not come back
        delete || continue
        create || continue
        installed=
        ;;
    esac
    [[ -n "$installed" ]] || install || continue
    installed=yes
    run "$@"
    start_again "$code" || return 0
    echo "Exit code $code: once more."
  done
}

code=0
command=$1
shift
case "$command" in
  create | install | delete) "$command" ;;
  run) run "$@" ;;
  keep-running)
    refuse_from_step "$@"
    code=76
    keep_running "$@"
    ;;
  *) usage ;;
esac
exit "$code"
