#!/usr/bin/env bash
# The ablations of configs/cifar10_ablation.py: trains every model with every seed, searches for its
# sampler's settings with the same budget for each, measures, and writes the tables and plots.
#
#   bash launch/ablation.sh --images cifar10_train.zip [options] [DIR]    everything goes to
#                                                                          runs/ablation, or to DIR
#   --tokenizer MODEL     a trained tokenizer (default: one of configs/cifar10_vqgan.py is trained)
#   --features FEATURES   as for `python -m enat_jax.evaluate` (default: random:0, which needs no
#                         files; ours are lite0:FILE)
#   --models "A B"        of the config (default: all of the small size and four of the
#                         larger one; NAME_long wants a GPU), and NAME_project_once after NAME:
#                         its weights, f once for each token in sampling
#   --seeds "0 1 2"       of training; settings are searched for with the first one, which is also the
#                         only one of NAME_large and NAME_long
#   --steps "4 8 12"      of sampling
#   --num N               images of a measurement (default 5000)
#
# It takes a night and more on 2 CPU cores. Stop it whenever you like: the same command goes on where
# it was, and says how long what is left takes, once it has seen one of each kind. What there is can
# be turned into tables at any time: python -m enat_jax.analyze ablation --runs DIR --out DIR/report
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

mistake() {
  echo "error: $1; the first lines of launch/${0##*/} say what there is" >&2
  exit 2
}

models="enat disentangled_7_1 nat disentangled_4_4 enat_without_f
  enat_project_once enat_reveals_4 enat_reveals_4_project_once
  nat_without_visible_from_visible nat_without_visible_from_masked
  nat_without_masked_from_visible nat_without_masked_from_masked
  enat_large disentangled_7_1_large nat_large disentangled_4_4_large"
images='' tokenizer='' features=random:0 seeds="0 1 2" steps="4 8 12" num=5000
dir=$PWD/runs/ablation
while [[ $# -gt 0 ]]; do
  case $1 in
    --images | --tokenizer | --features | --models | --seeds | --steps | --num)
      [[ $# -gt 1 ]] || mistake "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    -*) mistake "$1 is unknown" ;;
    *)
      [[ $# -eq 1 ]] || mistake "$2 stands after the directory $1"
      dir=$1
      shift
      ;;
  esac
done
absolute() { if [[ "$1" == /* ]]; then echo "$1"; else echo "$caller/$1"; fi; }
[[ -n "$images" ]] || mistake "--images is missing, the pictures of CIFAR-10"
dir=$(absolute "$dir") images=$(absolute "$images")
[[ -z "$tokenizer" ]] || tokenizer=$(absolute "$tokenizer")
[[ -e "$images" ]] || mistake "there is no $images"
mkdir -p "$dir"
prepare_environment quickstart,search,analyze

# job KIND TITLE RESULT COMMAND...: one piece of work, which writes RESULT last. Either counts it or
# runs it, as $running says.
declare -A left
running=
job() {
  local kind=$1 title=$2 result=$3 begun=$SECONDS
  shift 3
  [[ ! -e "$result" ]] || return 0
  if [[ -z "$running" ]]; then
    left[$kind]=$((${left[$kind]:-0} + 1))
    return 0
  fi
  echo "$title ($(remaining))"
  "$venv/bin/python" -m "$@"
  printf '%s\t%s\n' "$kind" $((SECONDS - begun)) >>"$dir/times.tsv"
  left[$kind]=$((left[$kind] - 1))
}

# What is left, from the mean time of each kind of job so far.
remaining() {
  local kind
  for kind in "${!left[@]}"; do echo "left $kind ${left[$kind]}"; done | cat - "$dir/times.tsv" |
    awk '$1 == "left" { left[$2] = $3; jobs += $3; next } { sum[$1] += $2; n[$1]++ }
      END {
        for (kind in left) if (left[kind]) {
          if (n[kind]) seconds += left[kind] * sum[kind] / n[kind]; else unknown++
        }
        short = seconds < 5400
        time = sprintf(short ? "%.0f minutes" : "%.1f hours", seconds / (short ? 60 : 3600))
        printf "%d jobs left, %s%s", jobs, unknown ? "more than " : "about ", time
      }'
}

plan() {
  local model base once seed step round first=${seeds%% *} tokens held_out here run
  tokens=$dir/tokens held_out=$dir/tokens_held_out
  local data=(--config.data.tokens="$tokens" --config.data.held_out_tokens="$held_out"
    --config.data.tokenizer="$tokenizer")
  if [[ "$tokenizer" == "$dir/tokenizer/model" ]]; then
    job tokenizer "Training the tokenizer" "$tokenizer/tokenizer.json" enat_jax.train \
      --config configs/cifar10_vqgan.py --workdir "$dir/tokenizer" --config.data.source="$images"
  fi
  job tokens "Tokens of the training pictures" "$tokens/metadata.json" enat_jax.tokenize_images \
    --model "$tokenizer" --source "$images" --set held_out=0.02 --split train --out "$tokens"
  job tokens "Tokens of the held-out pictures" "$held_out/metadata.json" enat_jax.tokenize_images \
    --model "$tokenizer" --source "$images" --set held_out=0.02 --split test --out "$held_out"
  job reference "Statistics of the training pictures" "$dir/reference.npz" enat_jax.evaluate \
    --make-reference "$dir/reference.npz" --reference "$images" --size 32 --set held_out=0.02 \
    --split train --features "$features"
  for seed in $seeds; do
    for model in $models; do
      [[ "$model" != *_@(large|long) || "$seed" == "$first" ]] || continue
      here=$dir/$model/seed_$seed run=$dir/$model/seed_$seed/run
      base=${model%_project_once}
      if [[ "$model" != "$base" ]]; then
        job once "f once in $model, seed $seed" "$run/model/model.json" enat_jax.export \
          --model "$dir/$base/seed_$seed/run/model" --project-once --out "$run/model"
      else
        job "train_${model##*_}" "Training $model with seed $seed" "$run/model/model.json" \
          enat_jax.train --config "configs/cifar10_ablation.py:$model" --workdir "$run" \
          --config.seed="$seed" "${data[@]}"
      fi
      job machine "The machine of this training" "$here/machine.json" \
        enat_jax.benchmark machine --dtype float32 --json "$here/machine.json"
      job loss "Held-out loss of $model, seed $seed" "$here/loss.json" enat_jax.analyze loss \
        --model "$run/model" --tokens "$held_out" --num 100000 --out "$here"
    done
    for model in $models; do
      [[ "$model" != *_@(large|long) || "$seed" == "$first" ]] || continue
      [[ "$model" != nat_without_* ]] || continue  # of which the loss is enough
      here=$dir/$model/seed_$seed run=$dir/$model/seed_$seed/run
      for step in $steps; do
        job "search_$step" "Settings of $model for $step steps" "$dir/$model/steps_$step/report.json" \
          enat_jax.search --model "$dir/$model/seed_$first/run/model" --reference "$dir/reference.npz" \
          --features "$features" --num 300 --trials 10 --repeats 2 --steps "$step" \
          --out "$dir/$model/steps_$step"
        job "card_$step" "Measuring $model, seed $seed, $step steps" "$here/steps_$step/card.json" \
          enat_jax.evaluate --model "$run/model" --reference "$dir/reference.npz" --num "$num" \
          --features "$features" --settings "$dir/$model/steps_$step/settings.json" --seed 100 \
          --out "$here/steps_$step"
      done
      if [[ "$model" == enat* ]]; then
        job reuse "What reuse costs $model, seed $seed" "$here/reuse/reuse.json" \
          enat_jax.analyze reuse --model "$run/model" --tokens "$held_out" --num 100000 \
          --reference "$dir/reference.npz" --features "$features" --out "$here/reuse"
      fi
      if [[ "$model" == enat ]]; then
        job similarity "Where the change is in $model, seed $seed" \
          "$here/similarity/similarity.json" enat_jax.analyze similarity --model "$run/model" \
          --out "$here/similarity"
      fi
    done
  done
  # In turns, so that what else the machine does falls on all of them alike.
  for round in 1 2 3; do
    for model in $models; do
      here=$dir/$model/seed_$first base=${model%_project_once} once=()
      [[ "$model" == "$base" ]] || once=(--config.model.project_once=True)
      job speed "Speed of sampling of $model, round $round" "$here/speed_$round.json" \
        enat_jax.benchmark sampler --config "configs/cifar10_ablation.py:$base" --batch 64 \
        --steps 8 --segments 2 --repeats 5 --json "$here/speed_$round.json" "${once[@]}"
    done
  done
}

if [[ -z "$tokenizer" ]]; then tokenizer=$dir/tokenizer/model; fi
touch "$dir/times.tsv"
plan
running=yes
plan
"$venv/bin/python" -m enat_jax.analyze ablation --runs "$dir" --out "$dir/report" \
  --draw 10
