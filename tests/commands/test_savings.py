from __future__ import annotations

import json
import re

import pandas as pd
import pytest

from sparselora.__main__ import main
from sparselora.commands.savings import _bytes


def _savings(tmp_path, *argv: str) -> tuple[int, pd.DataFrame | None]:
    status = main(["savings", *argv, "--out_dir", str(tmp_path / "out")])
    table = tmp_path / "out" / "savings.csv"
    return status, pd.read_csv(table) if table.exists() else None


@pytest.fixture
def no_figure(monkeypatch):
    """For tests that look at numbers and texts only: drawing takes longer than all the rest."""
    monkeypatch.setattr("sparselora.report.savings.savings_chart", lambda *args: None)


@pytest.mark.usefixtures("no_figure")
def test_llama_7b_at_rank_16(tmp_path, capsys):
    status, table = _savings(tmp_path, "--shape", "llama-7b", "--lora_r", "16", "--target_modules", "q", "v")
    assert status == 0
    out = capsys.readouterr().out
    assert "8,388,608" in out
    assert "6,738,415,616" in out
    assert "2,147,483,648" in out
    row = table.iloc[0]
    assert row["lora_params"] == 8_388_608
    assert row["adapter_bytes"] == row["lora_gradient_bytes"] == 4 * 8_388_608
    assert row["lora_optimizer_bytes"] == 8 * 8_388_608
    assert row["full_optimizer_bytes"] == 8 * 6_738_415_616
    assert row["saved_bytes"] == 12 * 6_738_415_616 - 16 * 8_388_608


@pytest.mark.usefixtures("no_figure")
def test_both_definitions_of_full_are_said_and_the_chosen_one_is_counted(tmp_path, capsys):
    _, whole = _savings(tmp_path / "a", "--shape", "llama-7b", "--full", "model")
    first = capsys.readouterr().out
    _, attention = _savings(tmp_path / "b", "--shape", "llama-7b", "--full", "attention")
    second = capsys.readouterr().out
    for out, chosen in ((first, "model"), (second, "attention")):
        lines = [line for line in out.splitlines() if line.startswith("--full ")]
        assert len(lines) == 2
        assert [line.split()[1].rstrip(":") for line in lines if line.endswith("(counted above)")] == [chosen]
    assert set(whole["full_params"]) == {6_738_415_616}
    assert set(attention["full_params"]) == {2_147_483_648}
    assert set(whole["lora_params"]) == set(attention["lora_params"])


@pytest.mark.usefixtures("no_figure")
def test_bytes_scale_what_is_held(tmp_path):
    _, four = _savings(tmp_path / "a", "--lora_r", "8")
    _, two = _savings(tmp_path / "b", "--lora_r", "8", "--bytes_per_param", "2")
    _, mixed = _savings(tmp_path / "c", "--lora_r", "8", "--bytes_per_param", "2", "--optimizer_bytes", "12")
    assert two["saved_bytes"][0] * 2 == four["saved_bytes"][0]
    assert mixed["full_gradient_bytes"][0] == two["full_gradient_bytes"][0]
    assert mixed["lora_optimizer_bytes"][0] == 12 * mixed["lora_params"][0]


def test_a_real_configuration_and_its_charts(tmp_path, minilm):
    status, table = _savings(tmp_path, "--model", "minilm", "--target_modules", "q", "fc2", "--lora_r", "8", "4")
    assert status == 0
    assert table["rank"].tolist() == [8, 4]
    assert table["lora_params"].tolist() == [6 * r * (384 + 384 + 384 + 1536) for r in (8, 4)]
    chart = pd.read_csv(tmp_path / "out" / f"savings_{table['model'][0]}.csv")
    assert chart["rank"].tolist() == [4, 8, 16, 32, 64, 128, 256]
    assert list(chart.columns) == list(table.columns)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "success"
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name != ".lock") == sorted(
        [*record["outputs"], "run.json"]
    )


def test_chart_ranks_stop_where_a_matrix_does(tmp_path):
    (tmp_path / "tiny").mkdir()
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    status, _ = _savings(tmp_path, "--model", str(tmp_path / "tiny"), "--lora_r", "2")
    assert status == 0
    assert pd.read_csv(tmp_path / "out" / "savings_tiny.csv")["rank"].tolist() == [4, 8, 16]
    assert str(tmp_path) not in (tmp_path / "out" / "run.json").read_text()


@pytest.mark.usefixtures("no_figure")
def test_a_fused_matrix_is_pointed_out(tmp_path, capsys):
    _, table = _savings(tmp_path, "--shape", "gpt2", "--lora_r", "8", "--target_modules", "q", "v")
    assert table["lora_params"][0] == 294_912
    assert "attn.c_attn holds q, k, v in one matrix" in capsys.readouterr().out


@pytest.mark.usefixtures("no_figure")
def test_the_second_time_nothing_is_done_and_other_arguments_are_refused(tmp_path, capsys):
    assert _savings(tmp_path, "--lora_r", "8")[0] == 0
    before = (tmp_path / "out" / "savings.csv").read_bytes()
    capsys.readouterr()
    assert _savings(tmp_path, "--lora_r", "8")[0] == 0
    assert "already finished" in capsys.readouterr().out
    assert _savings(tmp_path, "--lora_r", "4")[0] == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "savings.csv").read_bytes() == before
    assert _savings(tmp_path, "--lora_r", "4", "--overwrite")[1]["rank"].tolist() == [4]


def test_same_bytes_twice(tmp_path):
    for name in "ab":
        assert _savings(tmp_path / name, "--shape", "gpt2")[0] == 0
    for path in (tmp_path / "a" / "out").iterdir():
        if path.suffix in {".csv", ".png"}:
            assert path.read_bytes() == (tmp_path / "b" / "out" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--lora_r", "0"], "rank must be at least 1"),
        (["--lora_r", "8", "769"], r"use at most 768"),
        (["--target_modules", "gate"], "bert has: q k v o fc1 fc2"),
        (["--bytes_per_param", "0"], "above 0"),
        (["--bytes_per_param", "2000"], r"in \[0, 1024\], got 2000"),
        (["--optimizer_bytes", "-1"], "number of bytes"),
        (["--model", "EMPTY"], "no config.json"),
        (["--model", "BROKEN"], "cannot be read"),
        (["--model", "LIST"], "must hold a JSON object"),
        (["--model", "STRANGE"], r"unknown architecture 'mamba'.*known: bert,"),
        (["--model", "no-such-org/no-such-model"], "--shape"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch, argv, says):
    for name, text in (("EMPTY", None), ("BROKEN", "{"), ("LIST", "[]"), ("STRANGE", '{"model_type": "mamba"}')):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "config.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    status, table = _savings(tmp_path, *argv)
    out, err = capsys.readouterr()
    assert (status, table, out) == (2, None, "")
    assert err.count("\n") == 1
    assert re.search(says, err)
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing(tmp_path, capsys):
    status, table = _savings(tmp_path, "--shape", "gpt2", "--dry_run")
    assert (status, table) == (0, None)
    assert "savings_gpt2.png" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_bytes_are_written_with_three_digits():
    assert [_bytes(n) for n in (0, 7, 999.4, 999.6, 33_554_432, 80.86e9, 999.9e9, 2.5e15)] == [
        "0 B",
        "7 B",
        "999 B",
        "1 kB",
        "33.6 MB",
        "80.9 GB",
        "1.0 TB",
        "2,500.0 TB",
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**9}, "above the limit of 10,000"),
        ({"num_hidden_layers": 10**26}, "above the limit of 10,000"),
        ({"model_type": ["bert"]}, "must be a text"),
        ({"vocab_size": 10**12}, "at most 1,000,000,000 is counted"),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 8, "mlp_only_layers": [[0]]},
            "a list of",
        ),
        ({"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 8, "mlp_only_layers": 3}, "a list of"),
        ({"hidden_size": True}, "positive whole number"),
    ],
)
def test_configurations_of_no_model_are_refused_at_once(tmp_path, capsys, change, says):
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 48, "intermediate_size": 96,
              "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | change))
    status, table = _savings(tmp_path, "--model", str(tmp_path / "model"))
    assert (status, table) == (2, None)
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
