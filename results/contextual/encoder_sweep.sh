#!/usr/bin/env bash
# The encoder study behind results/contextual: the shipped configurations on one classification set, JOBS runs at a time.
# A finished run is skipped, so an interrupted sweep goes on where it was: just call it again.
#
#   TRAIN=sst2_sentences_train.jsonl EVAL=sst2_dev.jsonl RUNS=runs/sst2 bash results/contextual/encoder_sweep.sh
#   TRAIN=mnli_train_10k.jsonl.gz EVAL=mnli_dev_matched.jsonl.gz RUNS=runs/mnli bash results/contextual/encoder_sweep.sh
#   python results/contextual/study.py runs/sst2 runs/mnli --model minilm --out_dir results/contextual/encoder
#
# EXTRA holds further flags of train.
set -uo pipefail
: "${TRAIN:?training texts with labels}" "${EVAL:?evaluation texts, likewise}"
: "${MODEL:=minilm}" "${RUNS:=runs}" "${JOBS:=1}" "${SEEDS:=0 1 2}" "${EPOCHS:=3}" "${LR:=1e-3}" "${EXTRA:=}"
: "${PYTHON:=python}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
configs="$(dirname "$0")/../../configs"
mkdir -p "$RUNS/logs"

cells() {
  for seed in $SEEDS; do
    echo "dense_s$seed sst2_dense --seed $seed"
    echo "conservative_s$seed sst2_sparse_lora_svd_conservative --seed $seed"
    echo "optimised_s$seed sst2_sparse_lora_svd --seed $seed"
    echo "fallback_s$seed sst2_sparse_lora_svd_fallback --seed $seed"
    for mode in random static surrogate; do # at the sparsities of the optimised one; the map replaces every FFN
      echo "${mode}_s$seed sst2_sparse_lora_svd --sparsity.mode $mode --seed $seed"
    done
  done
}

one() { # name, configuration, flags
  local name=$1 config=$2
  shift 2
  # shellcheck disable=SC2086
  "$PYTHON" -m sparselora train "$configs/$config.yaml" --model "$MODEL" --dataset "$TRAIN" --eval_file "$EVAL" \
    --epochs "$EPOCHS" --lr "$LR" --out_dir "$RUNS/$name" "$@" $EXTRA >"$RUNS/logs/$name.log" 2>&1 \
    && echo "done $name" || echo "FAILED $name: $(tail -n 1 "$RUNS/logs/$name.log")" | tee -a "$RUNS/logs/failed"
}

: >"$RUNS/logs/failed"
cells | {
  while read -r -a cell; do
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done
    one "${cell[@]}" </dev/null &
  done
  wait
}
[ ! -s "$RUNS/logs/failed" ]
