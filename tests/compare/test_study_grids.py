"""The grids of configs/studies: every line is a run that a command accepts, and every contrast has its arms."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from sparselora.commands.edit import _run_request, read_request
from sparselora.commands.grid import grid_command, parse_defaults
from sparselora.compare.edits import _NOT_CONFIG, _labels
from sparselora.config.contrasts import read_contrasts
from sparselora.config.flags import resolve_config
from sparselora.runs.grid import read_grid
from tests.helpers.paths import ROOT
from tests.helpers.tiny_llama import make_tiny_llama

STUDIES = ROOT / "configs" / "studies"


@pytest.fixture(scope="module")
def grids() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_grids", STUDIES / "grids.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_tuned(folder: Path, names: list[str], best: dict[str, str], step_ms: dict[str, list[float]]) -> None:
    """Runs of a tuning grid: the loss is least at the rate that ``best`` names; the first three steps are slow."""
    for name in names:
        arm, _, rate = name.partition("_lr")
        (folder / name).mkdir(parents=True)
        loss = math.nan if rate == "0.0003" else 1.0 + (rate != best[arm])
        pd.DataFrame([{"eval_loss": loss}]).to_csv(folder / name / "summary.csv", index=False)
        times = [9999.0] * 3 + step_ms.get(arm, [100.0] * 10)
        pd.DataFrame({"step_ms": times}).to_csv(folder / name / "metrics.csv", index=False)


@pytest.mark.parametrize(
    ("study", "timed", "clock", "plain"),
    [("novelty", "ungated_time", "random", "ungated"), ("token_gates", "r16_time", "energy", "r16")],
)
def test_every_line_trains_and_every_contrast_has_its_arms(
    grids: ModuleType, study: str, timed: str, clock: str, plain: str, tmp_path: Path
) -> None:
    grids.main([study, "tune", str(tmp_path)])
    command = grid_command("train")
    shared = ["--model", "m", "--dataset", "d.jsonl", "--eval_file", "e.jsonl", "--device", "cpu"]
    defaults = parse_defaults(command, [str(STUDIES / "base.yaml"), *shared])
    tune = [line.name for line in read_grid(tmp_path / "tune.jsonl", command, defaults)]
    arms = sorted({name.partition("_lr")[0] for name in tune})
    best = {arm: ("0.0009", "0.0027")[i % 2] for i, arm in enumerate(arms)}
    rng = np.random.default_rng(0)
    step_ms = {clock: rng.uniform(50, 150, 40).tolist(), plain: rng.uniform(80, 90, 40).tolist()}
    write_tuned(tmp_path / "tune", tune, best, step_ms)
    grids.main([study, "main", str(tmp_path)])
    more = ["--shuffle_batches"] if study == "novelty" else []
    lines = read_grid(
        tmp_path / "main.jsonl", command, parse_defaults(command, [str(STUDIES / "base.yaml"), *shared, *more])
    )
    settings = {line.name: resolve_config(argparse.Namespace(**line.values)) for line in lines}
    names = {name.rpartition("_s")[0] for name in settings}
    contrasts = read_contrasts(STUDIES / f"{study}.yaml").contrasts
    assert {side for contrast in contrasts for side in (contrast.first, contrast.second)} <= names
    assert len(settings) == 8 * len(names)
    assert len({json.dumps(config.to_dict()) for config in settings.values()}) == len(settings)
    for name, config in settings.items():
        arm = name.rpartition("_s")[0]
        assert config.lr == float(best[grids.STUDIES[study].like[arm]])
    steps = settings[f"{timed}_s0"].max_steps
    time = sum(step_ms[clock]) / (sum(step_ms[plain]) / 40)
    assert steps - 1 < time <= steps
    assert {name for name, config in settings.items() if config.max_steps == steps} == {
        f"{timed}_s{s}" for s in range(8)
    }
    if study == "novelty":
        gate = settings["oracle_s3"].novelty
        assert gate is not None
        assert (gate.policy, gate.target_novelty_scaler) == ("oracle", None)
        assert settings["ungated_updates_s0"].max_steps == 47 + 126
        assert not settings["dedupe_s0"].shuffle_batches
        assert settings["novelty_s0"].shuffle_batches


def test_edits_of_every_adapter_and_their_labels(grids: ModuleType, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    grids.main(["edits", "adapters", "runs"])
    grids.main(["edits", "main", "runs"])
    names = [json.loads(line)["name"] for line in Path("runs/adapters.jsonl").read_text().splitlines()]
    peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]}
    for name in names:
        folder = Path("runs/adapters", name, "adapter")
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(peft))
    make_tiny_llama(tmp_path / "model")
    command = grid_command("edit")
    shared = ["--model", "model", "--dataset", "d.jsonl", "--eval_file", "e.jsonl", "--device", "cpu", "--report"]
    defaults = parse_defaults(command, [*shared, "--target_modules", "all"])
    options, adapters = [], set()
    for group in ("early", "over"):
        lines = read_grid(tmp_path / "runs" / f"{group}.jsonl", command, defaults)
        assert len(lines) == 5 * 5 * 2
        for line in lines:
            args = argparse.Namespace(**{**line.values, "out_dir": f"out/{line.name}", "overwrite": False})
            arguments = _run_request(args, read_request(args)).arguments
            options.append({name: value for name, value in arguments.items() if name not in _NOT_CONFIG})
            adapters.add(str(args.adapter))
    assert adapters == {f"runs/adapters/{name}/adapter" for name in names}
    contrasts = read_contrasts(STUDIES / "edits.yaml").contrasts
    assert {contrast.first for contrast in contrasts} <= set(_labels(options))


def test_a_phase_before_its_runs_is_refused(grids: ModuleType, tmp_path: Path, capsys) -> None:
    for study, phase, message in (("novelty", "main", "run the grid of tuning first"), ("edits", "tune", "adapters")):
        with pytest.raises(SystemExit) as ended:
            grids.main([study, phase, str(tmp_path / "none")])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
