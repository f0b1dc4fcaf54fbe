#!/usr/bin/env bash
#SBATCH --job-name=slora
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00
# Baseline, gated run and comparison, over seeds; under SLURM (sbatch configs/novelty_run.sh …) or in a shell.
# A finished run is skipped and an interrupted one goes on, so call it again after a time limit.
#
#   MODEL=storyllama-20m DATASET=train.jsonl bash configs/novelty_run.sh --prompt_field question --completion_field answer
#
# CONFIG is the gated run's configuration, RUNS where runs go, SEEDS their seeds. LAUNCH is what starts python, such as
# "accelerate launch --config_file configs/accelerate_config.yaml -m" in place of "python -m". Further arguments go to
# both runs.
set -euo pipefail
: "${MODEL:?a model folder or hub name}" "${DATASET:?instruction data}"
: "${CONFIG:=configs/novelty_quick.yaml}" "${RUNS:=runs/novelty}" "${SEEDS:=0 1 2}" "${LAUNCH:=python -m}"
folders=()
for seed in $SEEDS; do
  for arm in baseline novelty; do
    gate=(--novelty.enable)
    [ "$arm" = baseline ] && gate=(--no-novelty.enable)
    # shellcheck disable=SC2086
    $LAUNCH sparselora train "$CONFIG" --model "$MODEL" --dataset "$DATASET" --seed "$seed" --save_steps 200 --resume \
      --out_dir "$RUNS/${arm}_s$seed" "${gate[@]}" "$@"
    folders+=("$RUNS/${arm}_s$seed")
  done
done
python -m sparselora compare "${folders[@]}" --out_dir "$RUNS/comparison" --output "$RUNS/comparison.md"
