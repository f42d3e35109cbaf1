# Sourced by the scripts that start several processes: what their exit codes mean together. The
# codes are those of enat_jax/runtime/cli.py.

# overall_code CODE...: the exit code of a run, from those of its processes; an empty one is of a
# process that is gone without a word.
#   a failure that would come again (1 to 74, 130)  before all else: who fails takes the others along
#   76  some process was lost; so were those that a signal ended
#   75  stopped on request, after saving
#   0   all of them are done
overall_code() {
  local code overall=0
  for code; do
    case "${code:-lost}" in
      0) ;;
      75) [[ $overall == 76 ]] || overall=75 ;;
      [1-9] | [1-6][0-9] | 7[0-4] | 130)
        echo "$code"
        return
        ;;
      *) overall=76 ;;
    esac
  done
  echo "$overall"
}

# refuse_from_step ARGUMENTS: started again, a run would go back to that step each time.
refuse_from_step() {
  local argument
  for argument; do
    if [[ "$argument" == --from_step* || "$argument" == -from_step* ]]; then
      echo "error: --from_step would be repeated at each restart; run enat_jax.train with it once," \
        "by itself" >&2
      exit 2
    fi
  done
}

# start_again CODE: whether the same command is to be started once more.
start_again() { [[ "$1" == 75 || "$1" == 76 ]]; }
