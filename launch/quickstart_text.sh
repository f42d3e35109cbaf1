#!/usr/bin/env bash
# From nothing to pictures that are told in words: a tokenizer and a small ENAT of texts, trained on
# scenes of real handwritten digits such as "a three left of a seven".
#
#   bash launch/quickstart_text.sh                    everything goes to runs/scenes
#   bash launch/quickstart_text.sh DIR                or to DIR
#   bash launch/quickstart_text.sh --compare [DIR]    afterwards also trains two controls: a model
#                                                     that sees a bag of words, and one whose
#                                                     captions are those of other scenes
#
# Stop it whenever you like: the same command goes on where it was, and ends at once when all is
# there. Times are those of 2 CPU cores. ENAT_JAX_VENV and PYTHON: see launch/environment.sh.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
begin_quickstart "$caller" runs/scenes "$@"

# tokenize TITLE NAME SPLIT NUM COPIES: scenes of a split, and their captions.
tokenize() {
  stage "$1" "$dir/$2/metadata.json" \
    enat_jax.tokenize_images --model "$dir/tokenizer/model" --source scenes --split "$3" \
    --set num="$4" --copies "$5" --out "$dir/$2"
  stage "      Their captions: some seconds." "$dir/$2/captions/metadata.json" \
    enat_jax.tokenize_captions --tokens "$dir/$2" --captions scenes --vocabulary scenes \
    --out "$dir/$2/captions"
}

# train NAME CAPTIONS TITLE SETTINGS...
train() {
  local name=$1 captions=$2 title=$3
  shift 3
  stage "$title" "$dir/$name/model/model.json" \
    enat_jax.train --config configs/scenes.py --workdir "$dir/$name" \
    --config.data.tokens="$dir/tokens" --config.data.captions="$captions" \
    --config.data.held_out_tokens="$dir/tokens_held_out" \
    --config.data.held_out_captions="$dir/tokens_held_out/captions" \
    --config.data.tokenizer="$dir/tokenizer/model" "$@"
}

stage "[2/6] Training the tokenizer, scenes to 64 tokens and back: a minute and a half." \
  "$dir/tokenizer/model/tokenizer.json" \
  enat_jax.train --config configs/scenes_vqgan.py --workdir "$dir/tokenizer"
tokenize "[3/6] Tokens of scenes to train on: half a minute." tokens train 6000 4
tokenize "      Tokens of combinations that training never shows: some seconds." \
  tokens_held_out unseen 500 1
train enat "$dir/tokens/captions" "[4/6] Training ENAT on tokens and captions: five minutes."
stage "[5/6] Drawing four texts: some seconds." "$dir/samples/grid.png" \
  enat_jax.sample --model "$dir/enat/model" --num 8 --out "$dir/samples" \
  --prompt "a three left of a seven" --prompt "a seven left of a three" \
  --prompt "a two above a nine" --prompt "an eight"

evaluation=$dir/evaluation
models=()
if [[ -n "$compare" ]]; then
  evaluation=$dir/comparison
  stage "      Captions of other scenes: some seconds." "$dir/shuffled/metadata.json" \
    enat_jax.tokenize_captions --tokens "$dir/tokens" --captions scenes --vocabulary scenes \
    --shuffle --out "$dir/shuffled"
  train bag "$dir/tokens/captions" "      Training the bag of words: five minutes." \
    --config.model.text_positions=false
  train shuffled_captions "$dir/shuffled" "      Training on captions of others: five minutes."
  models=(--compare "bag of words=$dir/bag/model"
    --compare "shuffled captions=$dir/shuffled_captions/model")
fi
stage "[6/6] Measuring what it reads: a minute." "$evaluation/evaluation.md" \
  enat_jax.evaluate_scenes --model "$dir/enat/model" --tokens "$dir/tokens" --num 500 \
  --out "$evaluation" ${models[@]+"${models[@]}"}

echo
cat "$evaluation/evaluation.md"
echo
echo "Pictures: $evaluation/unseen.png, swapped.png   Model: $dir/enat/model"
echo "Done in $((SECONDS - begun)) s, installation aside."
