"""The records in results/: small, with words for their provenance, and tables that rebuild from them byte for byte."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from sparselora.__main__ import main
from sparselora.compare.packed import is_packed, pack, provenance
from tests.helpers.made_up_runs import write_gated_runs
from tests.helpers.paths import ROOT

RESULTS = ROOT / "results"


def _tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".csv", ".md")}


def _script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, RESULTS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_records_are_few_and_small() -> None:
    files = [path for path in RESULTS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    sizes = [path.stat().st_size for path in files]
    assert len(files) <= 150
    assert sum(sizes) <= 6_000_000
    assert max(sizes) <= 1_000_000


def test_records_say_what_their_commit_is() -> None:
    packed = [path.parent for path in RESULTS.rglob("runs.csv") if is_packed(path.parent)]
    assert len(packed) == 6
    for path in [*(folder / "runs.csv" for folder in packed), RESULTS / "provenance.csv"]:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        commits = [None if commit in ("", "null") else commit for commit in table["commit"]]
        assert table["provenance"].tolist() == [provenance(commit) for commit in commits]
    assert all((RESULTS / name).is_dir() for name in table["result"])


def test_tables_of_the_pruning_sweep_rebuild_from_the_packed_one(tmp_path: Path, capsys) -> None:
    assert main(["compare", str(RESULTS / "pruning" / "runs"), "--out_dir", str(tmp_path / "compare")]) == 0
    assert _tables(tmp_path / "compare") == _tables(RESULTS / "pruning" / "compare")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arms", "sets", "model"),
    [
        ("encoder", ("sst2", "mnli"), "minilm"),
        ("decoder", ("gsm8k", "commonsense", "mawps"), str(ROOT / "shared" / "models" / "storyllama-20m")),
    ],
)
def test_tables_of_the_contextual_studies_rebuild(arms: str, sets: tuple[str, ...], model: str, tmp_path: Path) -> None:
    if "/" in model and not Path(model).exists():
        pytest.skip("no storyllama-20m, whose shape the shares of MACs need")
    study = RESULTS / "contextual"
    command = [sys.executable, str(study / "study.py"), *(str(study / "runs" / name) for name in sets)]
    subprocess.run([*command, "--model", model, "--out_dir", tmp_path], check=True, stdout=subprocess.DEVNULL)
    rebuilt, committed = _tables(tmp_path), _tables(study / arms)
    assert {name: rebuilt[name] for name in committed} == committed


def test_tables_of_the_token_gates_rebuild(tmp_path: Path, monkeypatch, capsys) -> None:
    for name, tables in (("encoder", ("means", "paired")), ("decoder", ("runs", "losses", "paired"))):
        folder = RESULTS / "token_gate" / name
        argv = ["table", str(folder / "runs.csv"), "--out_dir", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", argv)
        _script(f"token_gate/{name}_table.py").main()
        assert _tables(tmp_path / name) == {f"{table}.csv": (folder / f"{table}.csv").read_bytes() for table in tables}


def test_novelty_is_compared_with_random_within_each_data_set(tmp_path: Path, capsys) -> None:
    arms = {"accept_all": ("accept_all", 0.0), "half": ("none", 0.3), "random_0.3": ("random", 0.2)}
    write_gated_runs(tmp_path / "easy", arms | {"novelty_0.3": ("bernoulli", 0.1)})
    write_gated_runs(tmp_path / "hard", arms | {"novelty_0.3": ("bernoulli", 0.4)})
    pack(tmp_path / "hard", tmp_path / "packed" / "hard")
    rates = _script("novelty/rates.py")
    for name, hard in (("folders", tmp_path / "hard"), ("packed_too", tmp_path / "packed" / "hard")):
        assert rates.main([str(tmp_path / "easy"), str(hard), "--out_dir", str(tmp_path / name)]) == 0
    assert _tables(tmp_path / "folders") == _tables(tmp_path / "packed_too")
    study = pd.read_csv(tmp_path / "folders" / "study.csv")
    rows = study[study["question"] == "Better than random at rate 0.3?"].set_index("dataset")
    assert rows["final_loss_difference"].to_dict() == pytest.approx({"easy": -0.1, "hard": 0.2}, abs=1e-3)
    assert rows["answer"].to_dict() == {"easy": "better", "hard": "worse"}
    control = study[study["first"] == "half"]
    assert control["answer"].tolist() == ["worse", "worse"]
    runs = pd.read_csv(tmp_path / "folders" / "runs.csv")
    assert runs.groupby(["dataset", "arm"]).size().to_dict() == {(d, a): 2 for d in ("easy", "hard") for a in
                                                               (*arms, "novelty_0.3")}  # fmt: skip
