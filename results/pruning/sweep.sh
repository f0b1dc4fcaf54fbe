#!/usr/bin/env bash
# The sweep behind results/pruning: methods x keep ratios x seeds on SST-2 sentences, JOBS cells at a time.
# A finished cell is skipped, so an interrupted sweep goes on where it was: just call it again.
#
#   TRAIN=sst2_sentences_train.jsonl EVAL=sst2_dev.jsonl bash results/pruning/sweep.sh
#   python -m sparselora compare lora_runs/results.csv
set -euo pipefail
: "${TRAIN:?training sentences: a jsonl with the columns sentence and label}"
: "${EVAL:?evaluation sentences, likewise}"
: "${MODEL:=minilm}" "${RUNS:=lora_runs}" "${JOBS:=1}" "${SEEDS:=0 1 2 3 4}" "${PYTHON:=python}"

cells() {
  for seed in $SEEDS; do
    echo "--method no_prune --seed $seed"
    echo "--method random --keep_ratio 0.125 --seed $seed" # the positive control: one random channel of eight
    for method in channel_energy magnitude_B gradient svd random; do
      for keep in 0.25 0.5 0.75; do echo "--method $method --keep_ratio $keep --seed $seed"; done
    done
  done
}

cells | xargs -P "$JOBS" -L 1 "$PYTHON" prune_finetune_lora.py --model "$MODEL" --dataset "$TRAIN" --eval_file "$EVAL" \
  --train_samples 0 --eval_samples 0 --lora_r 8 --lora_alpha 16 --lr 1e-3 --train_bsz 32 --eval_bsz 128 \
  --warmup_epochs 2 --post_epochs 1 --out_dir "$RUNS"
