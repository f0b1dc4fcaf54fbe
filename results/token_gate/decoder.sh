#!/usr/bin/env bash
# The decoder study behind results/token_gate: `train` with per-token gates and their controls on instruction data.
# A finished run is skipped: call it again to go on.
#
#   MODEL=storyllama-20m TRAIN=mawps_train_valid.jsonl FIELDS="question equation" RUNS=runs/gate_mawps bash results/token_gate/decoder.sh
#   python -m sparselora compare runs/gate_mawps --baseline runs/gate_mawps/none_r16_s0
#
# Gates choose from the channels or, the adapter turned to them, from singular directions: static is then truncation.
# FIELDS names the prompt and the completion, ROWS the training rows (0: all), EVAL held-out data (without: every fifth
# row). One channel of sixteen, the same for all tokens, is the control that must show; plain LoRA of the rank that is
# active is the smallest rival. With --list the runs are printed and not made.
set -uo pipefail
: "${MODEL:?base model}" "${TRAIN:?training data}" "${RUNS:?folder}"
: "${EVAL:=}" "${FIELDS:=prompt completion}" "${ROWS:=0}" "${EPOCHS:=3}" "${SEEDS:=0 1 2}" "${JOBS:=1}" "${PYTHON:=python}"
read -r prompt completion <<<"$FIELDS"

arms() {
  local seed r policy basis choice budget
  for seed in $SEEDS; do
    for r in 16 1 4; do
      echo "none_r${r}_s$seed --token_gate none --lora_r $r --lora_alpha $((2 * r)) --seed $seed"
    done
    for budget in 0.0625 0.25; do
      for choice in channels:{static,random,energy,learned} singular:{static,energy,learned}; do
        basis=${choice%:*} policy=${choice#*:}
        echo "${basis}_${policy}_${budget}_s$seed --token_gate.policy $policy --token_gate.basis $basis --token_gate.budget $budget --token_gate.warmup_ratio 0.33 --seed $seed"
      done
    done
  done
}

one() { # name, flags
  local name=$1
  shift
  # shellcheck disable=SC2086
  "$PYTHON" -m sparselora train "$here/../novelty/decoder.yaml" --slora none --model "$MODEL" --dataset "$TRAIN" ${EVAL:+--eval_file "$EVAL"} \
    --target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj --prompt_field "$prompt" --completion_field "$completion" \
    --train_samples "$ROWS" --epochs "$EPOCHS" --out_dir "$RUNS/$name" "$@"
}

[ "${1:-}" = --list ] && arms && exit
here="$(dirname "$0")"
export -f one
export PYTHON MODEL TRAIN EVAL RUNS ROWS EPOCHS here prompt completion
arms | xargs -P "$JOBS" -L 1 bash -c 'one "$@"' _
