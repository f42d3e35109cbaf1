#!/usr/bin/env bash
# From nothing to pictures: a tokenizer and a small ENAT, trained on 1,797 real handwritten digits.
#
#   bash launch/quickstart.sh                    everything goes to runs/quickstart
#   bash launch/quickstart.sh DIR                or to DIR
#   bash launch/quickstart.sh --compare [DIR]    afterwards also trains the paper's two baselines
#                                                at the same sampling cost, some minutes more
#
# Stop it whenever you like: the same command goes on where it was, and ends at once when all is
# there. Times are those of 2 CPU cores. ENAT_JAX_VENV and PYTHON: see launch/environment.sh.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
begin_quickstart "$caller" runs/quickstart "$@"

train() {
  local name=$1 config=$2
  shift 2
  stage "$@" enat_jax.train --config "configs/$config.py" --workdir "$dir/$name" \
    --config.data.tokens="$dir/tokens" --config.data.held_out_tokens="$dir/tokens_held_out" \
    --config.data.tokenizer="$dir/tokenizer/model"
}

stage "[2/6] Training the tokenizer, images to 64 tokens and back: half a minute." \
  "$dir/tokenizer/model/tokenizer.json" \
  enat_jax.train --config configs/digits_vqgan.py --workdir "$dir/tokenizer"
stage "[3/6] Tokens of the training digits, each in 20 versions: some seconds." \
  "$dir/tokens/metadata.json" \
  enat_jax.tokenize_images --model "$dir/tokenizer/model" --source digits --split train \
  --copies 20 --out "$dir/tokens"
stage "      Tokens of the held-out digits: some seconds." \
  "$dir/tokens_held_out/metadata.json" \
  enat_jax.tokenize_images --model "$dir/tokenizer/model" --source digits --split test \
  --copies 1 --out "$dir/tokens_held_out"
train enat digits "[4/6] Training ENAT to predict masked tokens: two minutes." \
  "$dir/enat/model/model.json"
stage "[5/6] Drawing ten digits of each class: some seconds." "$dir/samples/grid.png" \
  enat_jax.sample --model "$dir/enat/model" --labels all --num 10 --out "$dir/samples"

evaluation=$dir/evaluation
models=()
if [[ -n "$compare" ]]; then
  evaluation=$dir/comparison
  for name in nat disentangled; do
    train "$name" "digits_$name" "      Training the $name baseline: two minutes." \
      "$dir/$name/model/model.json"
    models+=(--compare "$name=$dir/$name/model")
  done
fi
stage "[6/6] Measuring against held-out digits: some seconds." \
  "$evaluation/evaluation.md" \
  enat_jax.evaluate_digits --model "$dir/enat/model" --tokens "$dir/tokens" \
  --heldout-tokens "$dir/tokens_held_out" --num 500 --out "$evaluation" \
  ${models[@]+"${models[@]}"}

echo
cat "$evaluation/evaluation.md"
echo
echo "Pictures: $dir/samples/grid.png   Model: $dir/enat/model"
echo "Done in $((SECONDS - begun)) s, installation aside."
