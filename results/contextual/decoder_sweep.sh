#!/usr/bin/env bash
# The decoder study behind results/contextual: arms x seeds on one instruction set, JOBS runs at a time.
# A finished run is skipped, so an interrupted sweep goes on where it was: just call it again.
#
#   MODEL=storyllama-20m TRAIN=gsm8k_train.jsonl.gz EVAL=gsm8k_test.jsonl RUNS=runs/gsm8k \
#     bash results/contextual/decoder_sweep.sh
#   ARMS=main MODEL=… TRAIN=commonsense_train_17754.jsonl.gz EVAL=arc_easy_test.jsonl RUNS=runs/commonsense bash …
#   python results/contextual/study.py runs/gsm8k runs/commonsense runs/mawps --model storyllama-20m \
#     --out_dir results/contextual/decoder
#
# Without EVAL every fifth row is held out. ROWS training rows (0: all), EPOCHS passes. ARMS is main (all modes at the
# base setting), factors (one thing changed at a time), refresh (the map fitted anew every 20 steps), or several such as
# "main factors". EXTRA holds further flags of train, SHARED those of train and sensitivity both (--device cpu,
# --prompt_field question --completion_field equation).
set -uo pipefail
: "${MODEL:?folder of a small Llama}" "${TRAIN:?instruction data, json or jsonl, .gz too}"
: "${EVAL:=}" "${RUNS:=runs}" "${JOBS:=1}" "${SEEDS:=0 1 2}" "${FACTOR_SEEDS:=$SEEDS}" "${ARMS:=main factors}"
: "${ROWS:=4000}" "${EPOCHS:=1}" "${BUDGET:=0.31}" "${SAMPLES:=128}" "${WARMUP_STEPS:=50}" "${PYTHON:=python}"
: "${EXTRA:=}" "${SHARED:=}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
base="$(dirname "$0")/decoder.yaml"
mkdir -p "$RUNS/logs/schedule"

main_arms() {
  echo "dense --sparsity.mode dense"
  for mode in random svd oracle static; do echo "${mode}_99 --sparsity.mode $mode"; done
  echo "skip --sparsity.mode skip"
  echo "surrogate_r64 --sparsity.mode surrogate"
  echo "skip_mean --sparsity.mode skip --sparsity.compensate mean"
  for mode in svd static; do echo "${mode}_99_mean --sparsity.mode $mode --sparsity.compensate mean"; done
}

factor_arms() {
  for percent in 50 75 90; do # sparsity
    for mode in svd random static; do
      echo "${mode}_$percent --sparsity.mode $mode --sparsity.layer_sparsity layer.1-6=0.$percent"
    done
  done
  echo "oracle_90 --sparsity.mode oracle --sparsity.layer_sparsity layer.1-6=0.90"
  for mode in svd random oracle; do # output tokens sparse too
    echo "${mode}_90_out --sparsity.mode $mode --sparsity.layer_sparsity layer.1-6=0.90 --no-sparsity.dense_output_tokens"
  done
  for rank in 2 32; do echo "svd_99_rank$rank --sparsity.svd_rank $rank"; done
  for rank in 8 16; do echo "surrogate_r$rank --sparsity.mode surrogate --sparsity.surrogate_rank $rank"; done
  for percent in 00 20; do # where sparse steps begin
    echo "svd_99_start$percent --sparsity.sparse_warmup_ratio 0.$percent"
    echo "surrogate_r64_start$percent --sparsity.mode surrogate --sparsity.sparse_warmup_ratio 0.$percent"
  done
}

refresh_arms() {
  echo "surrogate_r64_refresh --sparsity.mode surrogate --sparsity.surrogate_refresh_steps 20"
}

schedule_arms() { # one budget, about that of the base setting: the same sparsity everywhere, or by sensitivity
  for name in uniform chosen; do echo "schedule_$name --sparsity $RUNS/schedule/sensitivity/$name.yaml"; done
}

with_seeds() { # arms on stdin; seeds as arguments
  while read -r name flags; do for seed in "$@"; do echo "${name}_s$seed $flags --seed $seed"; done; done
}

data=(--model "$MODEL" --dataset "$TRAIN" --train_samples "$ROWS")
[ -n "$EVAL" ] && data+=(--eval_file "$EVAL")

one() { # name, flags
  local name=$1
  shift
  # shellcheck disable=SC2086
  "$PYTHON" -m sparselora train "$base" "${data[@]}" --epochs "$EPOCHS" --out_dir "$RUNS/$name" "$@" \
    $EXTRA $SHARED >"$RUNS/logs/$name.log" 2>&1 && echo "done $name" || failed "$name"
}

failed() {
  echo "FAILED $1: $(tail -n 1 "$RUNS/logs/$1.log")" | tee -a "$RUNS/logs/failed"
  return 1
}

sweep() { # cells on stdin, one a line
  while read -r -a cell; do
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done
    one "${cell[@]}" </dev/null &
  done
  wait
}

schedules() { # where the loss is sensitive: asked of the model after a few dense steps, for the raw one does not fit
  one schedule/warmup --sparsity.mode dense --max_steps "$WARMUP_STEPS" --seed 1000 || return
  local flags=(--ffn_levels 0.5 0.75 0.9 0.95 0.99 --attention_levels --samples "$SAMPLES" --held_out "$SAMPLES")
  # shellcheck disable=SC2086
  "$PYTHON" -m sparselora sensitivity "$base" "${data[@]}" "${flags[@]}" --budget "$BUDGET" --seed 1000 \
    --adapter "$RUNS/schedule/warmup/adapter" --out_dir "$RUNS/schedule/sensitivity" $SHARED \
    >"$RUNS/logs/schedule/sensitivity.log" 2>&1 && echo "done schedule/sensitivity" || failed schedule/sensitivity
}

factors() { case " $ARMS " in *" factors "*) true ;; *) false ;; esac }

: >"$RUNS/logs/failed"
if factors; then schedules & fi
searching=${!:-}
{
  case " $ARMS " in *" main "*) main_arms | with_seeds $SEEDS ;; esac
  case " $ARMS " in *" refresh "*) refresh_arms | with_seeds $SEEDS ;; esac
  if factors; then factor_arms | with_seeds $FACTOR_SEEDS; fi
} | sweep
if factors; then
  wait "$searching"
  schedule_arms | with_seeds $FACTOR_SEEDS | sweep
fi
[ ! -s "$RUNS/logs/failed" ]
