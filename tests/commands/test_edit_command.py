"""`edit`: from an adapter and a file of rows to an edited adapter and a report, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparselora.__main__ import main
from sparselora.spectral.request import ANSWERS, REPORT, WRITTEN
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

TARGETS = ["q_proj", "o_proj", "down_proj"]
IDENTITY = ("--amp_factor", "1", "--sup_factor", "1", "--mid_factor", "1")


class Edit:
    """Calls the command on a tiny Llama, a random adapter of it and a file of instructions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_tiny_llama(folder / "llama")
        self.adapter = self.save_adapter("adapter")
        self.rows, self.dev = (write_instructions(folder / f"{n}.jsonl", r, r) for n, r in (("rows", 60), ("dev", 24)))

    def save_adapter(self, name: str, dtype: torch.dtype = torch.float32, **options) -> Path:
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(self.model)
        settings = {"r": 8, "lora_alpha": 4, "target_modules": TARGETS, "init_lora_weights": False} | options
        adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
        for key, weight in adapted.named_parameters():
            if "lora_" in key:
                weight.data = weight.data.to(dtype)
        adapted.save_pretrained(self.folder / name)
        return self.folder / name

    def __call__(self, out: str, *more: str, adapter: Path | None = None) -> int:
        data = ["--dataset", str(self.rows), "--eval_file", str(self.dev), "--calib_samples", "6", "--device", "cpu"]
        source = ["--model", str(self.model), "--adapter", str(adapter or self.adapter)]
        return main(["edit", *source, *data, "--out_dir", str(self.folder / out), *more])

    def table(self, out: str, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / out / f"{name}.csv", float_precision="round_trip")

    def meta(self, out: str) -> dict:
        return json.loads((self.folder / out / "spectral_edit_meta.json").read_text())

    def logits(self, adapter: Path) -> torch.Tensor:
        """By plain PEFT."""
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.model), adapter).eval()
        with torch.no_grad():
            return model(input_ids=torch.arange(3, 33)[None]).logits


@pytest.fixture(scope="module")
def edit(tmp_path_factory: pytest.TempPathFactory) -> Edit:
    call = Edit(tmp_path_factory.mktemp("edit"))
    assert call("plain") == 0
    return call


@pytest.fixture(scope="module")
def reported(edit: Edit) -> Edit:
    assert edit("reported", "--report", "--draws", "20") == 0
    return edit


# --- the edited adapter -------------------------------------------------------------------------------------------


def test_it_leaves_what_it_says(edit):
    folder = edit.folder / "plain"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {".lock"}
    assert found == set(WRITTEN)
    for name in ("run.json", "spectral_edit_meta.json"):
        assert str(edit.folder) not in (folder / name).read_text()
    before, after = (load_file(path / "adapter_model.safetensors") for path in (edit.adapter, folder))
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.split(".lora_")[0].rpartition(".")[2] for key in changed} == {"o_proj", "down_proj"}
    config = [json.loads((path / "adapter_config.json").read_text()) for path in (edit.adapter, folder)]
    assert config[0] == config[1]


def test_plain_peft_loads_an_adapter_with_the_edited_spectrum(edit):
    directions = edit.table("plain", "edited")
    loaded = load_file(edit.folder / "plain" / "adapter_model.safetensors")
    for module, part in directions.groupby("module"):
        A, B = (loaded[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        sigma = torch.linalg.svdvals(0.5 * B @ A)[:8].numpy()
        assert sigma == pytest.approx(np.sort(part["sigma_after"])[::-1], rel=1e-5)
        factor = (part["sigma_after"] / part["sigma_before"]).to_numpy()
        wanted = part["role"].map({"core": 1.25, "mid": 1.0, "noise": 0.8}).to_numpy()
        assert factor == pytest.approx(wanted)
        assert part["role"].value_counts().to_dict() == {"mid": 4, "core": 2, "noise": 2}
        ranks = part["mean_abs"].rank(ascending=False)
        assert (ranks[part["role"] == "core"] <= 2).all()
        assert (ranks[part["role"] == "noise"] >= 7).all()
    assert (edit.logits(edit.folder / "plain") - edit.logits(edit.adapter)).abs().max() > 1e-3


@pytest.mark.usefixtures("blank_figures")
def test_factors_of_one_leave_the_function_unchanged(edit):
    assert edit("identity", *IDENTITY) == 0
    assert torch.equal(edit.logits(edit.folder / "identity"), edit.logits(edit.adapter))
    # An energy that is restored goes through the whole round trip.
    assert edit("restored", *IDENTITY, "--preserve_energy", "l2", "--target_modules", "all") == 0
    assert (edit.logits(edit.folder / "restored") - edit.logits(edit.adapter)).abs().max() < 1e-6


@pytest.mark.usefixtures("blank_figures")
def test_bf16_adapters_stay_bf16(edit):
    adapter = edit.save_adapter("bf16", torch.bfloat16)
    assert edit("bf16_edited", adapter=adapter) == 0
    stored = load_file(edit.folder / "bf16_edited" / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}


def test_the_meta_file_says_what_was_done(edit):
    meta, directions = edit.meta("plain"), edit.table("plain", "edited")
    assert len(meta["modules"]) == 4
    assert len(meta["not_chosen"]) == 2
    assert len(meta["calibration"]["rows"]) == 6
    assert meta["options"]["amp_factor"] == 1.25
    assert {"torch", "peft", "sparselora"} <= set(meta["versions"])
    for module, part in directions.groupby("module"):
        row = meta["modules"][module]
        assert (row["r"], row["core"], row["mid"], row["noise"]) == (8, 2, 4, 2)
        for when in ("before", "after"):
            assert row[f"sum_{when}"] == pytest.approx(part[f"sigma_{when}"].sum())
            assert row[f"l2_{when}"] == pytest.approx(np.linalg.norm(part[f"sigma_{when}"]))
        change = part["sigma_after"] - part["sigma_before"]
        assert row["predicted_first"] == pytest.approx((part["mean"] * change).sum())
        assert row["predicted_second"] == pytest.approx((part["mean"] * change + part["fisher"] * change**2 / 2).sum())
    assert meta["total"]["predicted_first"] == pytest.approx(
        sum(row["predicted_first"] for row in meta["modules"].values())
    )


@pytest.mark.usefixtures("blank_figures")
def test_trained_weights_beside_lora_are_carried_and_listed(edit):
    adapter = edit.save_adapter("with_head", modules_to_save=["lm_head"])
    assert edit("head_edited", adapter=adapter) == 0
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, edit.folder / "head_edited"))
    (head,) = edit.meta("head_edited")["carried"]
    assert torch.equal(before[head], after[head])


def test_lora_of_an_embedding_is_carried_where_the_chosen_modules_are_linear(edit, capsys):
    options = {"target_modules": ["embed_tokens", "q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    adapter = edit.save_adapter("embedding", **options)
    chosen = ("--target_modules", "down_proj", "--report", "--draws", "1")
    assert edit("embedding_edited", *chosen, adapter=adapter) == 0
    printed = capsys.readouterr().out
    for kind, count in (("LoRA of an embedding", 2), ("trained in full", 1), ("weight of the base model", 1)):
        assert f"carried through untouched: {count} tensors ({kind})" in printed
        assert list(edit.meta("embedding_edited")["carried"].values()).count(kind) == count
    before, after = (
        load_file(path / "adapter_model.safetensors") for path in (adapter, edit.folder / "embedding_edited")
    )
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all("down_proj.lora_" in key for key in changed)
    assert (edit.logits(edit.folder / "embedding_edited") - edit.logits(adapter)).abs().max() > 1e-5
    # Linear modules of zero are not the model without LoRA.
    kinds = edit.table("embedding_edited", "report")["kind"].tolist()
    assert "base" in kinds
    assert "no_lora" not in kinds


def test_a_chosen_module_with_a_bias_on_lora_B_is_refused_in_one_line(edit, capsys):
    assert edit("biased_edited", adapter=edit.save_adapter("biased", lora_bias=True)) == 2
    error = capsys.readouterr().err
    assert "has a bias on lora_B" in error
    assert error.count("\n") == 1
    assert not (edit.folder / "biased_edited").exists()


@pytest.mark.usefixtures("blank_figures")
def test_layers_and_modules_are_chosen(edit):
    assert edit("chosen", "--target_modules", "q_proj", "down_proj", "--layer_min", "1", "--layer_max", "1") == 0
    assert set(edit.meta("chosen")["modules"]) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("mode", ["gd", "smooth_abs", "z_score", "fisher", "random_index"])
def test_every_mode_edits(edit, mode):
    assert edit(f"mode_{mode}", "--mode", mode, "--sensitivity", str(edit.folder / "plain" / "sensitivity.csv")) == 0
    directions = edit.table(f"mode_{mode}", "edited")
    assert (directions["sigma_after"] != directions["sigma_before"]).any()


# --- runs ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_table_and_writes_nothing(edit, capsys):
    assert edit("dry", "--dry_run") == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.strip().startswith("model.layers.1.mlp.down_proj")]
    assert "2/4/2/0" in line
    assert "→" in line
    assert "mode: abs_select" in printed
    assert str(Path("dry", "spectral_edit_meta.json")) in printed
    assert not (edit.folder / "dry").exists()


def test_a_finished_run_is_skipped_and_another_refused(edit, capsys):
    stamp = (edit.folder / "plain" / "adapter_model.safetensors").stat().st_mtime_ns
    assert edit("plain") == 0
    assert "already finished" in capsys.readouterr().out
    assert (edit.folder / "plain" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert edit("plain", "--amp_factor", "2") == 2
    assert "holds a finished run with other arguments" in capsys.readouterr().err


@pytest.mark.usefixtures("blank_figures")
def test_an_edit_from_saved_statistics_is_the_first_one_again(edit):
    """Without a base model and without data."""
    flags = ["--adapter", str(edit.adapter), "--sensitivity", str(edit.folder / "plain" / "sensitivity.csv")]
    assert main(["edit", *flags, "--out_dir", str(edit.folder / "again")]) == 0
    for name in ("adapter_model.safetensors", "edited.csv", "sensitivity.csv"):
        assert (edit.folder / "again" / name).read_bytes() == (edit.folder / "plain" / name).read_bytes()


@pytest.mark.usefixtures("blank_figures")
def test_the_seed_changes_the_calibration_rows_and_the_batch_size_nothing(edit):
    for out, more in (("s1", ("--seed", "1")), ("b6", ("--calib_bsz", "6"))):
        assert edit(out, *more) == 0
    rows = {out: edit.meta(out)["calibration"]["rows"] for out in ("plain", "s1", "b6")}
    assert rows["plain"] == rows["b6"] != rows["s1"]
    found = {out: edit.table(out, "sensitivity")["mean_abs"].to_numpy() for out in rows}
    assert found["b6"] == pytest.approx(found["plain"], rel=1e-3)
    assert np.abs(found["s1"] / found["plain"] - 1).max() > 0.05


@pytest.mark.usefixtures("blank_figures")
def test_random_index_is_reproducible_and_its_seed_draws_anew(edit):
    statistics = ("--mode", "random_index", "--sensitivity", str(edit.folder / "plain" / "sensitivity.csv"))
    roles = []
    for out, seed in (("r0", "0"), ("r0b", "0"), ("r1", "1")):
        assert edit(out, *statistics, "--seed", seed) == 0
        roles.append(edit.table(out, "edited").groupby("module")["role"].apply(list))
    assert roles[0].equals(roles[1])
    assert not roles[0].equals(roles[2])
    assert len({tuple(role) for role in roles[0]}) > 1  # not the same draw in every module


# --- the report ---------------------------------------------------------------------------------------------------


def test_the_progress_of_a_report_counts_the_rows_of_every_variant(edit, capsys, monkeypatch):
    """24 held-out rows and 6 calibration rows, of six variants: four controls, the edit, one draw."""
    monkeypatch.setattr("sparselora.runs.progress.LOG_EVERY_S", 0.0)
    assert edit("counted", "--report", "--draws", "1") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("report: row ")]
    assert lines[0].startswith("report: row 8 of 180, ")
    assert lines[-1].startswith("report: row 180 of 180, ")


def test_the_report_has_every_control_and_a_verdict(reported, capsys):
    folder = reported.folder / "reported"
    assert all((folder / name).is_file() for name in REPORT)
    table = reported.table("reported", "report")
    kinds = table["kind"].value_counts().to_dict()
    assert kinds == {"draw": 20, "base": 1, "unedited": 1, "round_trip": 1, "edit": 1, "signed": 1}
    assert table["variant"].is_unique
    by_kind = table.drop_duplicates("kind").set_index("kind")
    assert by_kind.loc["unedited", "loss_change"] == 0
    assert abs(by_kind.loc["round_trip", "loss_change"]) < 1e-6
    edit_norm, draws = by_kind.loc["edit", "change_l2"], table[table["kind"] == "draw"]
    assert draws["change_l2"].to_numpy() == pytest.approx(edit_norm)
    assert draws["loss"].nunique() == 20
    assert table["n"].unique().tolist() == [24]
    text = (folder / "report.md").read_text()
    assert "than its random-index null" in text or "not distinguishable from its random-index null" in text
    assert "Positive control" in text


def test_the_items_hold_no_texts_and_agree_with_the_table(reported):
    items = reported.table("reported", "report_items")
    assert list(items) == ["variant", "row", "loss", "tokens"]
    table = reported.table("reported", "report").set_index("variant")
    for name, part in items.groupby("variant"):
        assert part["row"].tolist() == list(range(24))
        assert table.loc[name, "loss"] == pytest.approx(part["loss"].sum() / part["tokens"].sum())


def test_what_was_measured_in_place_is_what_the_written_adapter_does(reported):
    """`eval` on the files, against the report's rows."""
    table = reported.table("reported", "report").drop_duplicates("kind").set_index("kind")
    for kind, adapter in (("edit", reported.folder / "reported"), ("unedited", reported.adapter), ("base", None)):
        out = reported.folder / f"eval_{kind}"
        more = [] if adapter is None else ["--adapter", str(adapter)]
        flags = ["--dataset", str(reported.rows), "--eval_file", str(reported.dev), "--task", "causal_lm"]
        run = ["--device", "cpu", "--out_dir", str(out)]
        assert main(["eval", "--model", str(reported.model), *flags, *run, *more]) == 0
        metrics = json.loads((out / "metrics_causal_lm.json").read_text())
        assert metrics["loss"] == pytest.approx(table.loc[kind, "loss"], rel=1e-6)


@pytest.mark.usefixtures("blank_figures")
def test_predictions_hold_on_the_calibration_rows(edit):
    """Small steps: the loss there changes as the gradient says."""
    assert edit("small", "--amp_factor", "1.01", "--sup_factor", "0.99", "--report", "--draws", "20") == 0
    table = edit.table("small", "report")
    edited = table[table["kind"].isin(["edit", "draw"])]
    assert np.corrcoef(edited["predicted_first"], edited["calibration_change"])[0, 1] > 0.99
    slope = np.polyfit(edited["predicted_first"], edited["calibration_change"], 1)[0]
    assert slope == pytest.approx(1, abs=0.1)


def test_a_classifier_is_reported_with_its_head_alone(trained_classifier, tiny_bert, word_files, tmp_path):
    data = ["--dataset", str(word_files[0]), "--eval_file", str(word_files[1]), "--device", "cpu"]
    source = ["--model", str(tiny_bert), "--adapter", str(trained_classifier / "adapter"), *data]
    flags = ["--target_modules", "all", "--calib_samples", "8", "--report", "--out_dir", str(tmp_path / "e")]
    assert main(["edit", *source, *flags]) == 0  # the task is the adapter's
    table = pd.read_csv(tmp_path / "e" / "report.csv").set_index("kind")
    assert {"no_lora", "base", "edit", "signed", "draw"} <= set(table.index)
    predictions = pd.read_csv(trained_classifier / "predictions.csv")
    assert table.loc["unedited", "accuracy"] == (predictions["label"] == predictions["predicted"]).mean()
    assert table.loc["unedited", "loss"] == pytest.approx(predictions["loss"].mean(), rel=1e-5)
    items = pd.read_csv(tmp_path / "e" / "report_items.csv")
    assert list(items) == ["variant", "row", "loss", "label", "predicted", "correct"]
    assert "McNemar" in (tmp_path / "e" / "report.md").read_text()
    carried = json.loads((tmp_path / "e" / "spectral_edit_meta.json").read_text())["carried"]
    assert "trained in full" in carried.values()


@pytest.mark.usefixtures("blank_figures")
def test_gsm8k_is_asked_with_the_edited_adapter(edit, monkeypatch):
    from sparselora.evaluation import losses as evaluate
    from tests.helpers.byte_llama import save_adapter, save_answering

    model = save_answering(edit.folder / "answering", "#### 7", steps=1)  # what it would answer is not asked
    adapter = save_adapter(edit.folder / "answering_adapter")
    rows = [{"question": f"{i} and {i + 1}?", "answer": f"#### {7 if i % 2 else 3}"} for i in range(20)]
    path = edit.folder / "gsm8k_rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    held = {}
    monkeypatch.setattr(
        evaluate, "transformers_generator",
        lambda model, *_, **__: lambda prompts: held.update(model=model, prompts=prompts) or ["7"] * len(prompts),
    )  # fmt: skip
    flags = ["--dataset", str(path), "--eval_gsm8k", "--fewshot", "1", "--max_new_tokens", "9"]
    source = ["edit", "--model", str(model), "--adapter", str(adapter), "--device", "cpu"]
    out = edit.folder / "asked"
    assert main([*source, *flags, "--calib_samples", "4", "--target_modules", "all", "--out_dir", str(out)]) == 0
    assert all((out / name).is_file() for name in ANSWERS)
    metrics = json.loads((out / "metrics_gsm8k.json").read_text())
    assert (metrics["n"], metrics["correct"], metrics["fewshot"]) == (4, 2, 1)
    assert all(prompt.count("Question:") == 2 for prompt in held["prompts"])
    assert isinstance(held["model"], PeftModel)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("blank_figures")
def test_the_output_folder_harms_nothing(edit, capsys):
    (edit.folder / "full").mkdir()
    (edit.folder / "full" / "mine.txt").write_text("mine")
    for out, said in (
        (edit.adapter.name, "equal to the adapter's folder"),
        ("adapter/inside", "inside the adapter's folder"),
        ("", "or above it"),
        ("full", "not empty"),
        ("llama", "is --model itself"),
        ("llama/inside", "inside or above it"),
    ):
        for more in ((),) if out == "full" else ((), ("--overwrite",)):
            assert edit(out, *more) == 2
            error = capsys.readouterr().err
            assert said in error
            assert error.count("\n") == 1
    assert not (edit.folder / "run.json").exists()
    assert edit("full", "--overwrite") == 0
    assert (edit.folder / "full" / "mine.txt").read_text() == "mine"


def test_bad_input_is_one_line_and_leaves_nothing(edit, capsys):
    statistics = edit.table("plain", "sensitivity")
    for name, frame in {
        "other": statistics.assign(sigma=statistics["sigma"] * 1.1),
        "fewer": statistics[statistics["module"] != statistics["module"].iloc[0]],
        "missing": statistics.drop(columns="fisher"),
        "unknown": statistics.assign(mean_abs=np.nan),
        "shorter": statistics[statistics["index"] < 4],
        "silent": statistics.assign(mean_abs=0.0),
    }.items():
        frame.to_csv(edit.folder / f"{name}.csv", index=False)
    broken = edit.save_adapter("broken")
    (broken / "adapter_model.safetensors").write_bytes(b"x" * 50)
    wider = edit.save_adapter("wider", r=4)
    dora = edit.save_adapter("dora", use_dora=True)

    def saved(name: str) -> tuple[str, str]:
        return "--sensitivity", str(edit.folder / f"{name}.csv")

    for more, said in (
        (("--calib_samples", "0"), "--calib_samples must be 1 or more"),
        (("--calib_samples", "61"), "more than the 60 training rows"),
        (("--seed", "-1"), "--seed must be"),
        (("--core_frac", "0.7", "--noise_frac", "0.7"), "at most 1"),
        (("--amp_factor", "-1"), "amp_factor must be"),
        (("--text_fields", "a"), "--text_fields is for task classification"),
        (("--target_modules", "v_proj"), "matches nothing"),
        (("--layer_min", "7"), "is in layers 7"),
        (("--dataset", str(edit.folder / "none.jsonl")), "no file"),
        (("--model", str(edit.folder / "none")), "does not exist"),
        (("--adapter", str(edit.folder / "none")), "does not exist"),
        (("--adapter", str(broken)), "broken"),
        (("--adapter", str(dora)), "DoRA"),
        (("--device", "cuda:99"), "is not there"),
        (saved("nothing"), "cannot be read"),
        (saved("other"), "other singular values"),
        (saved("fewer"), "holds nothing on"),
        (saved("missing"), "no column fisher"),
        (saved("unknown"), "missing or infinite values"),
        (saved("shorter"), "other singular values"),
        (saved("silent"), "all zero"),
        ((*saved("../edit_plain"), "--adapter", str(wider)), "cannot be read"),
        (
            ("--sensitivity", str(edit.folder / "plain" / "sensitivity.csv"), "--adapter", str(wider)),
            "other singular",
        ),
        (("--eval_gsm8k",), "could not be loaded from the hub"),
        (("--eval_gsm8k", "--task", "classification"), "needs a language model"),
    ):
        assert edit("bad", *more) == 2, more
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not (edit.folder / "bad").exists()
    for missing in ("--model", "--dataset"):
        given = {"--model": str(edit.model), "--dataset": str(edit.rows)}
        given.pop(missing)
        flags = [word for pair in given.items() for word in pair]
        assert main(["edit", "--adapter", str(edit.adapter), *flags, "--out_dir", str(edit.folder / "bad")]) == 2
        assert f"no {missing} given" in capsys.readouterr().err
    inside = ("--sensitivity", str(edit.folder / "plain" / "sensitivity.csv"), "--overwrite")
    assert edit("plain", *inside) == 2
    assert "holds the input sensitivity" in capsys.readouterr().err


def test_a_zero_adapter_is_written_as_it_was(edit, capsys):
    adapter = edit.save_adapter("zero", init_lora_weights=True)
    assert edit("zero_edited", adapter=adapter) == 0
    assert "nothing to edit" in capsys.readouterr().out
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, edit.folder / "zero_edited"))
    assert all(torch.equal(before[key], after[key]) for key in before)


# --- smoke test ---------------------------------------------------------------------------------------------------


def test_the_smoke_test_passes_and_a_broken_part_fails_it(monkeypatch, capsys):
    assert main(["smoke_test"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * 6 + ["all"]

    from sparselora.spectral import factors

    honest = factors.refactor

    def wrong(svd, sigma, A, B, scaling, **how):
        new_A, new_B = honest(svd, sigma, A, B, scaling, **how)
        return new_A, 1.01 * new_B

    from sparselora.spectral import edit as editing

    monkeypatch.setattr(editing, "refactor", wrong)
    assert main(["smoke_test"]) == 1
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["ok", "ok", "ok", "FAILED", "ok", "FAILED"]
    assert "2 of 6 checks failed" in err


def test_a_check_that_breaks_is_named_and_the_others_run(monkeypatch, capsys):
    from sparselora.spectral import self_check

    def broken(subject):
        raise LookupError("no such\ndirection")

    checks = (self_check.Check("broken", 1.0, broken), self_check.Check("not a number", 1.0, lambda _: float("nan")))
    monkeypatch.setattr(self_check, "CHECKS", (*checks, self_check.Check("exact", 0.0, lambda _: 0.0)))
    assert main(["smoke_test"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "FAILED  broken: LookupError: no such direction"
    assert [line.split()[0] for line in out.splitlines()] == ["FAILED", "FAILED", "ok"]
    assert "2 of 3 checks failed" in err
    assert main(["smoke_test", "--debug"]) == 1
    assert "in broken" in capsys.readouterr().err


# --- damping of intruder dimensions -------------------------------------------------------------------------------


@pytest.mark.usefixtures("blank_figures")
def test_damped_intruders_are_those_of_a_full_svd_and_the_prediction_is_the_slope_of_the_loss(edit):
    damp = ("--mode", "damp_intruders", "--intruder_k", "3", "--intruder_cosine", "0.4", "--target_modules", "all")
    assert edit("damped", *damp, "--sup_factor", "0.9", "--report", "--draws", "1") == 0
    before, after = (load_file(p / "adapter_model.safetensors") for p in (edit.adapter, edit.folder / "damped"))
    base = AutoModelForCausalLM.from_pretrained(edit.model).state_dict()
    intruders = edit.table("damped", "intruders")
    assert 0 < intruders["is_intruder"].sum() < len(intruders)
    for module, part in intruders.groupby("module"):
        key, W0 = f"base_model.model.{module}.lora_", base[f"{module}.weight"].double().numpy()
        A, B, new_B = (f[f"{key}{side}.weight"].double().numpy() for f, side in zip((before, before, after), "ABB"))
        assert torch.equal(before[f"{key}A.weight"], after[f"{key}A.weight"])
        U, sigma, _ = np.linalg.svd(W0 + 0.5 * B @ A)
        cosine = np.abs(np.linalg.svd(W0, full_matrices=False)[0].T @ U[:, :3]).max(axis=0)
        np.testing.assert_allclose(part["cosine"], cosine, atol=1e-6)
        np.testing.assert_allclose(part["sigma"], sigma[:3], rtol=1e-6)
        P = U[:, :3][:, cosine < 0.4]
        np.testing.assert_allclose(new_B, B - 0.1 * P @ (P.T @ B), atol=1e-7)
    row = edit.table("damped", "report").set_index("variant").loc["damp_intruders"]
    assert row["calibration_change"] == pytest.approx(row["predicted_first"], rel=0.1, abs=1e-6)
    assert abs(row["predicted_first"]) > 1e-5


def test_an_adapter_without_an_intruder_is_refused(edit, capsys):
    damp = ("--mode", "damp_intruders", "--intruder_k", "1", "--intruder_cosine", "0.001")
    assert edit("no_intruders", *damp) == 2
    assert "no module has an intruder dimension" in capsys.readouterr().err
    assert not (edit.folder / "no_intruders").exists()
    for flag, value in (("--intruder_k", "0"), ("--intruder_cosine", "1.5")):
        assert edit("no_intruders", *damp, flag, value) == 2
        assert flag[2:] in capsys.readouterr().err


@pytest.mark.usefixtures("blank_figures")
def test_settings_of_intruders_are_recorded_only_where_they_count(edit):
    recorded = json.loads((edit.folder / "plain" / "run.json").read_text())["arguments"]
    assert not [name for name in recorded if name.startswith("intruder")]


# --- forgetting ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("blank_figures")
def test_general_text_is_evaluated_without_and_with_the_adapter_and_after_the_edit(edit):
    texts = ["a b c d e f", "one two", "x y z"]
    path = edit.folder / "general.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    damp = ("--mode", "gd", "--eta", "1", "--target_modules", "all", "--report", "--draws", "1")
    assert edit("general", *damp, "--general_dataset", str(path)) == 0
    items = edit.table("general", "general_items")
    tokenizer = AutoTokenizer.from_pretrained(edit.model)

    def losses(adapter: Path | None) -> list[float]:
        """By transformers' own loss."""
        model = AutoModelForCausalLM.from_pretrained(edit.model).eval()
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter).eval()
        sums = []
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                sums.append(float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1))
        return sums

    for variant, adapter in (("no adapter", None), ("unedited", edit.adapter), ("gd", edit.folder / "general")):
        assert items.loc[items["variant"] == variant, "loss"].to_numpy() == pytest.approx(losses(adapter), rel=1e-4)
    assert losses(edit.folder / "general") != pytest.approx(losses(edit.adapter), rel=1e-4), "the control: an edit"
    table = edit.table("general", "general").set_index("variant")
    mean = items.groupby("variant")["loss"].sum() / items.groupby("variant")["tokens"].sum()
    assert table["loss"].to_dict() == pytest.approx(mean.to_dict())
    assert "## Forgetting: general text, general, 3 rows" in (edit.folder / "general" / "report.md").read_text()


def test_general_text_needs_a_report_of_a_language_model_and_texts(edit, capsys):
    path = edit.folder / "short.jsonl"
    path.write_text(json.dumps({"text": "a"}))
    assert edit("no_general", "--general_dataset", str(path)) == 2
    assert "give --report" in capsys.readouterr().err
    assert edit("no_general", "--report", "--general_dataset", str(edit.folder / "missing.jsonl")) == 2
    assert "missing.jsonl" in capsys.readouterr().err
    assert edit("no_general", "--report", "--general_dataset", str(edit.rows)) == 2
    assert "no column 'text'" in capsys.readouterr().err
    assert not (edit.folder / "no_general").exists()


@pytest.mark.usefixtures("blank_figures")
def test_the_oracle_is_gd_calibrated_on_the_evaluation_rows(edit, capsys):
    gd = ("--mode", "gd", "--target_modules", "all", "--eta", "0.05", "--report", "--draws", "1")
    assert edit("with_oracle", *gd, "--oracle") == 0
    assert "Upper bound, an oracle that uses the evaluation rows' own gradient" in capsys.readouterr().out
    row = edit.table("with_oracle", "report").set_index("kind").loc["oracle"]
    # The edit itself, calibrated on a file that holds the evaluation rows only.
    flags = ["--dataset", str(edit.dev), "--eval_file", str(edit.dev), "--calib_samples", "24"]
    assert edit("by_eval_rows", *gd, *flags) == 0
    same = edit.table("by_eval_rows", "report").set_index("kind").loc["edit"]
    assert row["loss"] == pytest.approx(same["loss"], rel=1e-6)
    assert row["predicted_first"] == pytest.approx(row["loss_change"], rel=0.3)
    assert row["loss_change"] < 0
    assert edit("with_oracle", *gd).real == 2, "the record knows the oracle"
    assert edit("no_report", "--oracle") == 2
    assert "give --report" in capsys.readouterr().err


@pytest.mark.usefixtures("blank_figures")
def test_sgd_on_the_calibration_rows_stands_in_the_report(edit, capsys):
    plain = ("--report", "--draws", "1")
    assert edit("with_sgd", *plain, "--sgd") == 0
    printed = capsys.readouterr().out
    assert "plain SGD on lora_A and lora_B with the same calibration rows" in printed
    table = edit.table("with_sgd", "report")
    rows = table[table["kind"] == "sgd"].set_index("variant")
    assert list(rows.index) == ["SGD, 1 step", "SGD, 2 steps", "SGD, 5 steps"]
    assert (rows["change_l2"] > 0).all()
    sizes = edit.table("with_sgd", "sgd")
    assert sizes.groupby("steps")["is_chosen"].sum().to_dict() == {1: 1, 2: 1, 5: 1}
    # The sentence is the paired difference of the two rows' losses; the edit and its draws are as without SGD.
    gap = table.set_index("kind").loc["edit", "loss"] - rows.loc["SGD, 5 steps", "loss"]
    assert f"{gap:+.5f}" in printed.split("plain SGD")[1]
    assert edit("without_sgd", *plain) == 0
    others = edit.table("without_sgd", "report")
    assert "plain SGD" not in capsys.readouterr().out
    assert not (edit.folder / "without_sgd" / "sgd.csv").exists()
    pd.testing.assert_frame_equal(table[table["kind"] != "sgd"].reset_index(drop=True), others)


def test_sgd_needs_a_report_and_calibration_rows(edit, capsys):
    statistics = ("--sensitivity", str(edit.folder / "plain" / "sensitivity.csv"))
    for flags, words in (
        (("--sgd",), "give --report"),
        (("--sgd", "--report", *statistics), "leave --sensitivity out"),
        (("--sgd", "--report", "--calib_samples", "1"), "--calib_samples 2 or more"),
    ):
        assert edit("no_sgd", *flags) == 2
        assert words in capsys.readouterr().err
    assert not (edit.folder / "no_sgd").exists()
