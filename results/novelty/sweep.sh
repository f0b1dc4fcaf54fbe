#!/usr/bin/env bash
# The study of the novelty gate behind results/novelty: policies x rates x seeds on one data set, JOBS runs at a time.
# A finished run is skipped, so an interrupted sweep goes on where it was: just call it again.
#
#   MODEL=storyllama-20m TRAIN=gsm8k_train.jsonl.gz EVAL=gsm8k_test.jsonl RUNS=runs/gsm8k bash results/novelty/sweep.sh
#   BASE=encoder TRAIN=sst2_sentences_train.jsonl EVAL=sst2_dev.jsonl RUNS=runs/sst2 RATES=0.3 bash results/novelty/sweep.sh
#   python results/novelty/rates.py runs/gsm8k --out_dir results/novelty/gsm8k
#   python -m sparselora compare runs/gsm8k --baseline runs/gsm8k/accept_all_s0
#
# BASE is decoder or encoder (the YAML beside this script), or a YAML file. Without EVAL every fifth row is held out.
# ROWS training rows (0: all), EPOCHS passes (else as the YAML says), EVAL_STEPS between evaluations (likewise).
# ARMS is main (the POLICIES at all RATES, beside accept_all and, as positive control, half the steps of it without a
# gate), sharp (novelty at 0.3 with a bar so steep that nothing but novelty decides), factors (one setting changed at a
# time), or several; sharp and factors are compared with novelty at 0.3, which main must hold too.
# EXTRA holds further flags of train (--device cpu, --prompt_field question --completion_field equation), but no
# --max_steps or --epochs, of which half could not know.
set -uo pipefail
: "${TRAIN:?training data, json, jsonl, csv or parquet, .gz too}"
: "${BASE:=decoder}" "${MODEL:=}" "${EVAL:=}" "${RUNS:=runs}" "${JOBS:=1}" "${SEEDS:=0 1 2}" "${RATES:=0.2 0.3 0.5}"
: "${ARMS:=main}" "${POLICIES:=novelty random loss_floor novelty+loss_floor}" "${ROWS:=}" "${EPOCHS:=}" "${EVAL_STEPS:=}" "${EXTRA:=}" "${PYTHON:=python}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
here="$(dirname "$0")"
base="$BASE"
[ -f "$base" ] || base="$here/$BASE.yaml"
[ -f "$base" ] || { echo "sweep.sh: error: BASE must be decoder, encoder or a YAML file, got $BASE" >&2; exit 2; }
: "${EPOCHS:=$(sed -n 's/^epochs: *\([0-9.]*\).*/\1/p' "$base")}"
half=$(awk "BEGIN {print ${EPOCHS:-1} / 2}")
# 4,000 rows for the decoder, as in results/contextual; all for the encoder.
[ "$BASE" = decoder ] && : "${ROWS:=4000}"
for arms in $ARMS; do
  case $arms in main | sharp | factors) ;; *) echo "sweep.sh: error: ARMS must be of main, sharp, factors, got $arms" >&2; exit 2 ;; esac
done
mkdir -p "$RUNS/logs"

main_arms() {
  echo "accept_all --novelty.policy accept_all"
  echo "half --novelty none --epochs $half" # a later --epochs wins
  for rate in $RATES; do
    for policy in $POLICIES; do
      echo "${policy/+loss/}_$rate --novelty.policy $policy --novelty.target_accept_rate $rate"
    done
  done
}

sharp_arms() {
  echo "novelty_0.3_beta300 --novelty.target_novelty_scaler 300"
}

factor_arms() {
  for beta in 3 30; do echo "novelty_0.3_beta$beta --novelty.target_novelty_scaler $beta"; done
  for k in 16 64; do echo "novelty_0.3_k$k --novelty.k $k"; done
  for every in 1 64; do echo "novelty_0.3_reorth$every --novelty.reorth_every $every"; done
  for percent in 02 30; do echo "novelty_0.3_burnin$percent --novelty.burn_in 0.$percent"; done
}

with_seeds() { # arms on stdin; seed by seed, so that a sweep that is cut short has whole seeds
  local arms seed name flags
  arms=$(cat)
  for seed in $SEEDS; do
    while read -r name flags; do echo "${name}_s$seed $flags --seed $seed"; done <<<"$arms"
  done
}

data=(--dataset "$TRAIN" --epochs "$EPOCHS")
[ -n "$MODEL" ] && data+=(--model "$MODEL")
[ -n "$EVAL" ] && data+=(--eval_file "$EVAL")
[ -n "$ROWS" ] && data+=(--train_samples "$ROWS")
[ -n "$EVAL_STEPS" ] && data+=(--eval_steps "$EVAL_STEPS")

one() { # name, flags
  local name=$1
  shift
  # shellcheck disable=SC2086
  "$PYTHON" -m sparselora train "$base" "${data[@]}" $EXTRA --out_dir "$RUNS/$name" "$@" >"$RUNS/logs/$name.log" 2>&1 \
    && echo "done $name" || echo "FAILED $name: $(tail -n 1 "$RUNS/logs/$name.log")" | tee -a "$RUNS/logs/failed"
}

: >"$RUNS/logs/failed"
{
  for arms in $ARMS; do "${arms}_arms"; done
} | with_seeds | {
  while read -r -a cell; do
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done
    one "${cell[@]}" </dev/null &
  done
  wait
}
[ ! -s "$RUNS/logs/failed" ]
