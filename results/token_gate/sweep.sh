#!/usr/bin/env bash
# The encoder study behind results/token_gate: per-token gates beside static choice and random gates at the same budget,
# on one data set. A finished cell is skipped, so an interrupted sweep goes on where it was: just call it again.
#
#   TRAIN=sst2_sentences_train.jsonl EVAL=sst2_dev.jsonl ARMS="main singular ablations" RUNS=runs/gate_sst2 bash results/token_gate/sweep.sh
#   TRAIN=mnli_train_10k.jsonl.gz EVAL=mnli_dev_matched.jsonl.gz WARMUP=1 RUNS=runs/gate_mnli bash results/token_gate/sweep.sh
#   python -m sparselora compare runs/gate_sst2/results.csv
#
# ARMS: main (methods at one and two of eight channels, no pruning, random channels as the control that must show, and a
# LoRA that has no more channels from the start), ablations (what the gate sees and how it is trained, at a quarter of
# the channels; other budgets, warm-ups and ranks), singular (singular directions, chosen once and by token). ROWS:
# training rows (0: all). WARMUP: epochs before the choice. With --list the cells are printed and not run.
set -euo pipefail
: "${TRAIN:?training rows, csv, tsv, json, jsonl or parquet, .gz too}" "${EVAL:?evaluation rows, likewise}"
: "${MODEL:=minilm}" "${RUNS:=lora_runs}" "${JOBS:=1}" "${SEEDS:=0 1 2}" "${ARMS:=main singular}" "${WARMUP:=2}" "${ROWS:=0}" "${PYTHON:=python}"

main_arms() {
  echo "--method no_prune"
  for r in 1 2; do echo "--method no_prune --lora_r $r --lora_alpha $((2 * r))"; done
  for keep in 0.125 0.25; do
    for method in random channel_energy random_gate energy_gate token_gate; do echo "--method $method --keep_ratio $keep"; done
  done
}

ablations_arms() {
  local quarter="--method token_gate --keep_ratio 0.25" method
  for features in statistics both; do echo "$quarter --gate_features $features"; done
  echo "$quarter --gate_estimator relaxed"
  echo "$quarter --gate_select threshold"
  for supervision in energy gradient; do echo "$quarter --gate_supervision $supervision"; done
  echo "$quarter --gate_anneal 0.5"
  for method in channel_energy random_gate energy_gate token_gate; do
    for keep in 0.5 0.75; do echo "--method $method --keep_ratio $keep"; done
  done
  for method in no_prune channel_energy token_gate; do
    for warmup in 0.25 1; do echo "--method $method --keep_ratio 0.25 --warmup_epochs $warmup"; done
    for r in 4 16 32; do echo "--method $method --keep_ratio 0.25 --lora_r $r --lora_alpha $((2 * r))"; done
  done
}

singular_arms() {
  for keep in 0.125 0.25; do
    echo "--method svd --keep_ratio $keep"
    for method in energy_gate token_gate; do echo "--method $method --keep_ratio $keep --gate_basis singular"; done
  done
}

cells() {
  local seed arms flags
  for seed in $SEEDS; do # seed by seed, so that a sweep that is cut short has whole seeds
    for arms in $ARMS; do "${arms}_arms"; done | while read -r flags; do echo "$flags --seed $seed"; done
  done
}

[ "${1:-}" = --list ] && cells && exit
# A later flag wins, so the ablations may change what all share.
cells | xargs -P "$JOBS" -L 1 "$PYTHON" prune_finetune_lora.py --model "$MODEL" --dataset "$TRAIN" --eval_file "$EVAL" \
  --train_samples "$ROWS" --eval_samples 0 --lora_r 8 --lora_alpha 16 --lr 1e-3 --train_bsz 32 --eval_bsz 128 \
  --warmup_epochs "$WARMUP" --post_epochs 1 --out_dir "$RUNS"
