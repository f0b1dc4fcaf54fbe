# make demo: all three phases on real input.   make test: lint, types, tests.   Both make their own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo_results
CELL = $(BIN)/python prune_finetune_lora.py --model minilm --dataset docstrings --train_samples 480 --eval_samples 300 \
  --lr 3e-3 --keep_ratio 0.25 --out_dir $(OUT)/lora_runs

.PHONY: demo test lint clean

demo: export HF_HUB_OFFLINE = 1
demo: $(VENV)/.demo
	$(BIN)/python toy_experiment.py --matrix planted --outdir $(OUT)/toy
	$(BIN)/python inspect_svd_predictors.py --model minilm --run_experiment --out_dir $(OUT)/predictors
	$(CELL) --method channel_energy
	$(CELL) --method svd
	$(CELL) --method random
	$(CELL) --method no_prune
	$(BIN)/python -m sparselora compare $(OUT)/lora_runs --out_dir $(OUT)/compare --overwrite

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[demo$(if $(filter dev,$*),$(comma)dev)]'
	touch $@

comma := ,

clean:
	rm -rf $(OUT) $(VENV)
