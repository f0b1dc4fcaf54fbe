"""`benchmarks/contextual.py` on the CPU at a tiny size: any subset of its parts writes its table and figures."""

from __future__ import annotations

import importlib.util

import pandas as pd
import pytest
import torch

from sparselora.contextual.flops import Workload
from tests.helpers.paths import ROOT


@pytest.fixture
def script(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("speed_script", ROOT / "benchmarks" / "contextual.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tiny = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(script, "LLAMA_3_8B", script.LLAMA_3_8B | tiny | heads)
    layers = {"layer.1-2": 0.75, "layer.1.attention": 0.5}
    monkeypatch.setattr(script, "SETTINGS", {"math": layers, "commonsense": layers})
    monkeypatch.setattr(script, "VARIANTS", ["peft", "dense", "svd"])
    monkeypatch.setattr(script, "WORK", Workload(2, 16, 4))
    monkeypatch.setenv("SPARSELORA_CACHE", str(tmp_path / "cache"))
    return script


@pytest.mark.parametrize(
    ("parts", "figures"),
    [
        (["commonsense"], set()),
        (["commonsense", "all_linear"], set()),
        (["sparsity", "commonsense"], {"speed_by_sparsity.png", "speed_by_sparsity.csv"}),
    ],
)
def test_any_subset_of_parts_writes_its_tables(script, tmp_path, parts, figures):
    folder = tmp_path / "out"
    folder.mkdir()
    rows = script.run_parts(parts, torch.device("cpu"), 1e12, csv=folder / "speed.csv")
    assert {path.name for path in folder.iterdir()} == {"speed.csv"} | figures
    table = pd.read_csv(folder / "speed.csv")
    assert len(table) == len(rows)
    assert set(table["setting"]) == set(parts)
    assert table["step_ms"].gt(0).all()
    assert ("sparsity" in table) == ("sparsity" in parts)


def test_figures_of_growth_follow_from_the_rows_there_are(script, tmp_path):
    """Of the part on arithmetic, which is too large for a CPU, and of a table without its sizes."""
    sizes = [
        (setting, batch, seq) for setting, batch, seq in (("math", 8, 512), ("growth", 4, 512), ("growth", 4, 1024))
    ]
    rows = [
        {"variant": name, "dense": name == "dense", "setting": setting, "batch": batch, "seq": seq, "device": "cpu"}
        | dict.fromkeys(("step_ms", "step_ms_low", "step_ms_high"), float(batch * seq))
        | dict.fromkeys(("speedup", "speedup_low", "speedup_high"), 1.5)
        for setting, batch, seq in sizes
        for name in ("dense", "svd")
    ]
    script.growth_figures(pd.DataFrame(rows), tmp_path, "speed")
    assert {path.name for path in tmp_path.glob("speed*.png")} == {"speed_by_tokens.png", "speed_by_seq.png"}
