#!/usr/bin/env bash
# The study behind results/spectral on one data set: adapters of three seeds, each edited in every mode with three
# calibration seeds and evaluated beside its controls. Finished runs are skipped: call it again to go on.
#
#   KIND=decoder MODEL=storyllama-20m TRAIN=mawps_train_valid.jsonl FIELDS="question equation" RUNS=runs/mawps \
#     bash results/spectral/study.sh
#   KIND=encoder MODEL=minilm TRAIN=sst2_sentences_train.jsonl EVAL=sst2_dev.jsonl RUNS=runs/sst2 bash results/spectral/study.sh
#
# EVAL is the held-out data (without: every fifth row of TRAIN). FIELDS names the prompt and the completion of a decoder's data, ROWS the training rows (0: all), EVAL_ROWS the held-out
# rows (-1: all), GPUS the GPUs of the grid (0,1,…; without: one run at a time). RUNS/grid.jsonl is the grid,
# RUNS/edits its runs, RUNS/compare the tables and figures.
set -euo pipefail
: "${KIND:?decoder or encoder}" "${MODEL:?base model}" "${TRAIN:?training data}" "${RUNS:?folder}"
: "${EVAL:=}" "${FIELDS:=prompt completion}" "${ROWS:=0}" "${EVAL_ROWS:=-1}" "${EPOCHS:=3}" "${GPUS:=}" "${PYTHON:=python}"
here="$(dirname "$0")"
read -r prompt completion <<<"$FIELDS"
fields=()
if [ "$KIND" = decoder ]; then
  fields=(--prompt_field "$prompt" --completion_field "$completion")
  training=("$here/../novelty/decoder.yaml" --target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj)
else
  training=("$here/../novelty/encoder.yaml")
fi

adapters=()
for seed in 0 1 2; do
  "$PYTHON" -m sparselora train "${training[@]}" --slora none --model "$MODEL" --dataset "$TRAIN" ${EVAL:+--eval_file "$EVAL"} "${fields[@]}" \
    --train_samples "$ROWS" --epochs "$EPOCHS" --dtype fp32 --seed "$seed" --out_dir "$RUNS/trained_s$seed"
  adapters+=("$RUNS/trained_s$seed/adapter")
done

grid() { # modes and the values of their options
  "$PYTHON" "$here/make_grid.py" --adapter "${adapters[@]}" --model "$MODEL" --dataset "$TRAIN" ${EVAL:+--eval_file "$EVAL"} \
    --eval_samples "$EVAL_ROWS" --target_modules all --seeds 0 1 2 --report --modes "$@"
}
{
  grid abs_select smooth_abs z_score fisher random_index
  grid abs_select --amp_factor 1.05 --sup_factor 0.95
  grid abs_select --preserve_energy l2
  grid gd --eta 0.002 0.02 0.2
} >"$RUNS/grid.jsonl"
"$PYTHON" -m sparselora edit --grid "$RUNS/grid.jsonl" --run_root "$RUNS/edits" "${fields[@]}" --dtype fp32 ${GPUS:+--gpus "$GPUS"}
"$PYTHON" -m sparselora compare "$RUNS/edits" --out_dir "$RUNS/compare"
