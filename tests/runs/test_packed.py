"""Packed studies: nothing is lost by packing, and `compare` reads them like the folders."""

from __future__ import annotations

import gzip
from pathlib import Path

import pandas as pd
import pytest

from sparselora.__main__ import main
from sparselora.errors import InputError
from sparselora.runs.packed import is_packed, pack, provenance, unpack, unpacked
from tests.helpers.made_up_runs import write_gated_runs, write_run

ODD = {
    "float": 0.1 + 0.2, "tiny": 5e-324, "large": 1e300, "whole": 2.0, "int": 2, "nothing": None, "true": True,
    "text": "a, \"b\"\nc", "number_text": "1e3", "null_text": "null", "empty": "", "quoted": '"', "list": [1, "x"],
    "nested": {"deep": {"a": None, "b": [0.1]}, "empty": {}}, "dotted": {"layer.1-6": 0.99}, "slash": {"a/b": [None]},
    "not_a_number": float("nan"), "unicode": "μ √",
}  # fmt: skip


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_value_and_every_table_reads_back_as_it_was(tmp_path: Path) -> None:
    source = tmp_path / "runs"
    rows = 'row,label,loss\nx,1,0.30000000000000004\n"y,z",0,1e-17\n'
    write_run(source / "a", 0, ODD, summary="loss,text\n0.1,\n", predictions=rows, eval="step,loss\n1,\n2,3.50\n")
    write_run(source / "b", 1, {"lr": 1e-3}, summary="loss,other\n2,nan\n", predictions=rows.replace("1e-17", ""))
    write_run(source / "c", 2, {"lr": 1}, eval="step,loss,gate\n1,007,x\n")
    pack(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "back")
    assert _contents(tmp_path / "back") == _contents(source)


def test_other_evaluation_rows_stand_below_one_another(tmp_path: Path) -> None:
    source = tmp_path / "runs"
    write_run(source / "a", 0, {}, predictions="row,loss\n0,1\n1,2\n")
    write_run(source / "b", 1, {}, predictions="row,loss\n1,2\n0,1\n")
    pack(source, tmp_path / "packed")
    with gzip.open(tmp_path / "packed" / "predictions.csv.gz", "rt") as stream:
        assert stream.readline() == "run,row,loss\n"
    unpack(tmp_path / "packed", tmp_path / "back")
    assert _contents(tmp_path / "back") == _contents(source)


def test_same_evaluation_rows_stand_there_once(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_run(tmp_path / "runs" / name, seed, {}, predictions=f"row,tokens,loss\n0,5,{seed}\n1,6,7\n")
    pack(tmp_path / "runs", tmp_path / "packed")
    with gzip.open(tmp_path / "packed" / "predictions.csv.gz", "rt") as stream:
        assert stream.read() == "row,tokens,a/loss,b/loss\n0,5,0,1\n1,6,7,7\n"


def test_packing_twice_gives_the_same_bytes_and_drops_tables_that_are_gone(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_run(tmp_path / "runs" / name, seed, ODD, predictions="row,loss\n0,1\n1,2\n", eval="step\n1\n2\n")
    pack(tmp_path / "runs", tmp_path / "packed")
    before = _contents(tmp_path / "packed")
    assert set(before) == {"runs.csv", "predictions.csv.gz", "eval.csv.gz"}
    assert before["eval.csv.gz"][4:8] == bytes(4), "no time in the file"
    pack(tmp_path / "runs", tmp_path / "packed")
    assert _contents(tmp_path / "packed") == before
    for name in "ab":
        (tmp_path / "runs" / name / "eval.csv").unlink()
    pack(tmp_path / "runs", tmp_path / "packed")
    assert set(_contents(tmp_path / "packed")) == {"runs.csv", "predictions.csv.gz"}


def test_provenance_is_in_words() -> None:
    assert provenance("0123456789ab") == "commit 0123456789ab"
    assert "is not in that commit" in provenance("0123456789ab+")
    assert "not recorded" in provenance(None)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def gated(tmp_path: Path) -> Path:
    """Two seeds without a gate and two with one, whose evaluations lie in tables of several rows."""
    write_gated_runs(tmp_path / "runs", {"dense": ("none", 0.0), "gated": ("bernoulli", 0.1)})
    return tmp_path / "runs"


def _tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".csv", ".md")}


def test_compare_reads_a_packed_study_as_the_folders(gated: Path, tmp_path: Path, capsys) -> None:
    pack(gated, tmp_path / "packed")
    assert main(["compare", str(gated), "--out_dir", str(tmp_path / "of_folders")]) == 0
    assert main(["compare", str(tmp_path / "packed")]) == 0
    assert "gate.csv" in _tables(tmp_path / "packed" / "compare")
    assert _tables(tmp_path / "packed" / "compare") == _tables(tmp_path / "of_folders")
    # Some runs of it, and one of them as the baseline.
    runs = [str(tmp_path / "packed" / name) for name in ("dense_s0", "gated_s0")]
    baseline = ["--baseline", str(tmp_path / "packed" / "gated_s0")]
    assert main(["compare", *runs, *baseline, "--out_dir", str(tmp_path / "some")]) == 0
    table = pd.read_csv(tmp_path / "some" / "comparisons.csv")
    assert (len(table), table["n_seeds"].tolist()) == (1, [1])
    assert "gated" not in table["config"][0]


def test_dry_run_and_errors_name_the_packed_study(gated: Path, tmp_path: Path, capsys) -> None:
    path = gated / "gated_s1" / "predictions.csv"
    path.write_text(path.read_text().replace("row,tokens", "row,words"))
    packed = tmp_path / "packed"
    pack(gated, packed)
    assert main(["compare", str(packed)]) == 2
    error = capsys.readouterr().err
    assert f"{packed / 'gated_s1'}" in error
    assert "sparselora-" not in error
    assert not (packed / "compare").exists()


def test_a_packed_study_that_is_not_whole_is_refused(gated: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    pack(gated, packed)
    whole = _contents(packed)

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match), unpacked([packed]):
            raise AssertionError("it was read")
        for name, data in whole.items():
            (packed / name).write_bytes(data)

    (packed / "predictions.csv.gz").write_bytes(whole["predictions.csv.gz"][:-20])
    refused(r"predictions.csv.gz cannot be read .*; restore it")
    (packed / "predictions.csv.gz").write_bytes(b"row,loss\n")
    refused(r"predictions.csv.gz cannot be read")
    for name in (b"../outside", b"/tmp/outside", b"..", b"", b"a\\b"):
        (packed / "runs.csv").write_bytes(whole["runs.csv"].replace(b"dense_s0", name, 1))
        refused("must be the name of a folder")
    (packed / "runs.csv").write_bytes(whole["runs.csv"].replace(b"dense_s0", b"dense_s1", 1))
    refused("names a run twice")
    (packed / "runs.csv").write_bytes(whole["runs.csv"].replace(b"dense_s0", b"renamed", 1))
    refused("has a run 'dense_s0' that its runs.csv lacks")
    with unpacked([packed]) as (folder,):  # the control
        assert len(list(folder.iterdir())) == 4
    assert not (tmp_path / "outside").exists()


def test_a_field_whose_name_would_be_ambiguous_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", 0, {})
    record = tmp_path / "runs" / "a" / "run.json"
    record.write_text(record.read_text().replace('"seed"', '"summary/loss"'))
    with pytest.raises(InputError, match="field 'summary/loss'"):
        pack(tmp_path / "runs", tmp_path / "packed")


def test_nothing_else_is_packed_or_overwritten(gated: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "runs.csv").write_text("seed,loss\n0,1\n")
    assert not is_packed(tmp_path / "mine")
    with pytest.raises(InputError, match="is no packed study"):
        pack(gated, tmp_path / "mine")
    with pytest.raises(InputError, match="holds no run"):
        pack(tmp_path / "mine", tmp_path / "new")
    assert not (tmp_path / "new").exists()
