"""`sensitivity`: losses equal to direct masking, the schedule that brute force finds, and the command's records."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sparselora.__main__ import main
from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.choices import FFNChoice
from sparselora.contextual.flops import Shape, Workload
from sparselora.contextual.layer_schedule import (
    SparseMacs,
    allocate,
    choose_schedule,
    predicted_increase,
    uniform_schedule,
)
from sparselora.contextual.layer_sensitivity import (
    Cell,
    Losses,
    cells,
    evaluate,
    increase,
    sensitivity,
    sparse_losses,
    with_layers,
)
from sparselora.contextual.structure import find_blocks
from sparselora.errors import InputError
from sparselora.evaluation.row_batches import disjoint_rows
from sparselora.evaluation.sensitivity_request import OUTPUTS
from sparselora.numerics.channels import keep_count
from tests.helpers.contextual_models import exact_loss, masked, ragged, tiny
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

# --- losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_dense_losses_are_the_models_own(name):
    model, batch = tiny(name).eval(), ragged(name)
    found = evaluate(model, [batch, batch])
    assert found.sums / found.counts == pytest.approx([exact_loss(model, batch).item()] * 2, rel=1e-12)
    assert not model.training


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("layer", [0, 1])
def test_one_layer_skipped_equals_hooks_that_skip_it(name, layer):
    model, batch = tiny(name), ragged(name)
    config = with_layers(SparsityConfig(mode="skip"), [Cell(layer, "ffn", 0.5)])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = sparse_losses(model, [batch], config)
    assert model.training
    model.eval()
    with masked(model, batch, {(layer, "ffn"): FFNChoice()}), torch.no_grad():
        direct = float(exact_loss(model, batch))
    dense = exact_loss(model, batch).item()
    assert found.mean == pytest.approx(direct, rel=1e-9)
    assert abs(dense - direct) > 1e-4  # else the test would see nothing
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_oracle_losses_equal_masking_the_channels_that_contribute_least():
    model, batch = tiny("llama"), ragged("llama")
    model.eval()
    structure, hidden = find_blocks(model), {}
    ffn = structure.blocks[1].ffn
    hook = structure.module(ffn.down).register_forward_pre_hook(lambda _, x: hidden.update(h=x[0]))
    with torch.no_grad():
        model(**{name: value for name, value in batch.items() if name != "labels"})
    hook.remove()
    following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    context = (batch["attention_mask"] == 1) & (following == -100)
    down = structure.module(ffn.down)
    weight = down.base_layer.weight + down.get_delta_weight("default") if hasattr(down, "base_layer") else down.weight
    norms = hidden["h"][context].norm(dim=0) * weight.norm(dim=0)
    kept = norms.topk(keep_count(40, 0.25)).indices.sort().values
    with masked(model, batch, {(1, "ffn"): FFNChoice(kept)}), torch.no_grad():
        direct = float(exact_loss(model, batch))
    config = with_layers(SparsityConfig(mode="oracle"), [Cell(1, "ffn", 0.75)])
    assert sparse_losses(model, [batch], config).mean == pytest.approx(direct, rel=1e-9)


def test_rows_of_the_table_are_differences_of_one_layer_to_dense():
    model, batch = tiny("llama"), ragged("llama")
    config = SparsityConfig(mode="oracle")
    measured = cells(3, {"ffn": [0.9, 0.5], "attention": [0.5]}, config)
    assert [(c.layer, c.part, c.sparsity) for c in measured[:2]] == [(0, "ffn", 0.5), (0, "ffn", 0.9)]
    reference = evaluate(model, [batch])
    rows = sensitivity(lambda c: sparse_losses(model, [batch], c), reference, config, measured)
    assert len(rows) == 3 * 2 + 3
    for row in rows:
        assert row["loss"] - reference.mean == pytest.approx(row["loss_increase"], abs=1e-12)
        assert math.isnan(row["standard_error"])  # one batch has no spread
    # The last layer's FFN of context tokens is read by no label: exactly no change.
    assert [row["loss_increase"] for row in rows if row["layer"] == 2 and row["part"] == "ffn"] == pytest.approx([0, 0])


def test_the_standard_error_is_that_of_a_paired_mean():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=400)
    difference = 0.3 + 0.1 * rng.normal(size=400)
    found = increase(Losses(reference + difference, np.ones(400)), Losses(reference, np.ones(400)))
    assert found.loss_increase == pytest.approx(difference.mean())
    assert found.standard_error == pytest.approx(difference.std(ddof=1) / 20)
    # A loss that rises by the same amount at every label has no error, however unequal the batches.
    counts = rng.integers(1, 50, 30).astype(float)
    shifted = increase(Losses(5 + 0.2 * counts, counts), Losses(np.full(30, 5.0), counts))
    assert shifted.loss_increase == pytest.approx(0.2)
    assert shifted.standard_error == pytest.approx(0, abs=1e-12)


def test_modes_that_replace_layers_are_measured_once():
    levels = {"ffn": [0.5, 0.99], "attention": [0.25]}
    assert cells(2, levels, SparsityConfig(mode="surrogate")) == [
        Cell(0, "ffn", 0.99), Cell(1, "ffn", 0.99), Cell(0, "attention", 0.25), Cell(1, "attention", 0.25),
    ]  # fmt: skip
    model, batch = tiny("llama"), ragged("llama")
    config = SparsityConfig(mode="surrogate", surrogate_rank=2)
    one, two = (
        sparse_losses(model, [batch], with_layers(config, [Cell(0, "ffn", s)]), calibration=[batch]).mean
        for s in (0.5, 0.99)
    )
    assert one == two


# --- choosing -----------------------------------------------------------------------------------------------------


def _brute(items, required):
    best = math.inf
    for picked in itertools.product(*(range(len(options)) for options in items)):
        saved = sum(options[i][0] for options, i in zip(items, picked))
        if saved >= required * (1 - 1e-9):
            best = min(best, sum(options[i][1] for options, i in zip(items, picked)))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_the_allocation_costs_what_brute_force_costs_and_saves_enough(seed):
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(rng.integers(1, 7)):
        saved = np.sort(rng.integers(0, 12, rng.integers(1, 4)))
        cost = rng.random(len(saved)) * rng.choice([0.0, 1.0, 10.0])
        items.append([(0.0, 0.0), *zip(saved.astype(float), cost)])
    most = sum(max(saved for saved, _ in options) for options in items)
    if most == 0:
        return
    required = float(rng.uniform(0.05, 1.0)) * most
    picked = allocate(items, required)
    assert sum(options[i][0] for options, i in zip(items, picked)) >= required * (1 - 1e-9)
    assert sum(options[i][1] for options, i in zip(items, picked)) == pytest.approx(_brute(items, required))


def test_greedy_by_ratio_would_not_always_find_the_best():
    items = [[(0.0, 0.0), (6.0, 5.0)], [(0.0, 0.0), (5.0, 4.5)], [(0.0, 0.0), (5.0, 4.5)]]
    assert allocate(items, 10.0) == [0, 1, 1]  # by ratio the first item would be taken, at a cost of 9.5


def test_many_layers_stay_fast_and_near_the_linear_bound():
    rng = np.random.default_rng(1)
    items = [[(0.0, 0.0), *((s * w, c * s**3) for s in (0.5, 0.75, 0.9, 0.99))]
             for w, c in zip(rng.uniform(0.5, 2, 128), rng.random(128))]  # fmt: skip
    required = 0.6 * sum(options[-1][0] for options in items)
    picked = allocate(items, required)
    assert sum(options[i][0] for options, i in zip(items, picked)) >= required * (1 - 1e-9)
    cost = sum(options[i][1] for options, i in zip(items, picked))
    bound = max(  # Lagrangian dual: no allocation costs less
        price * required + sum(min(c - price * s for s, c in options) for options in items)
        for price in np.geomspace(1e-3, 10, 4000)
    )
    assert bound <= cost <= bound * 1.002


def test_what_cannot_be_saved_is_an_error():
    with pytest.raises(InputError, match="at most"):
        allocate([[(0.0, 0.0), (1.0, 1.0)]], 1.5)


LLAMA = Shape("llama", layers=4, width=8, ffn_width=40, gated=True, q_width=8, kv_width=4, head_macs=80, decoder=True)


def _rows(config, costs, levels):
    return [
        {"layer": c.layer, "part": c.part, "sparsity": c.sparsity, "loss_increase": costs[c.layer] * c.sparsity}
        for c in cells(4, levels, config)
    ]


@pytest.mark.parametrize("mode", ["svd", "surrogate"])
@pytest.mark.parametrize("dense_output", [True, False])
@pytest.mark.parametrize("budget", [0.35, 0.6, 0.85])
def test_schedules_keep_the_budget_and_prefer_layers_that_cost_less(mode, dense_output, budget):
    config = SparsityConfig(mode=mode, surrogate_rank=1, dense_output_tokens=dense_output, svd_rank=4)
    macs = SparseMacs(LLAMA, Workload(8, 64, 16))
    levels = [0.25, 0.5, 0.75, 0.99]
    rows = _rows(config, [3.0, 0.1, 0.2, 0.05], {"ffn": levels, "attention": levels})
    chosen = choose_schedule(config, rows, macs, budget)
    uniform = uniform_schedule(config, macs, budget, ["ffn", "attention"])
    for schedule in (chosen, uniform):
        assert macs.remaining(schedule) <= budget
        assert schedule.svd_rank == 4
        assert schedule.mode == mode
    assert chosen.ratio(0) <= chosen.ratio(1)
    if dense_output:  # what no label depends on cannot be saved
        assert chosen.ratio(3) == 0
    assert predicted_increase(chosen, rows) <= predicted_increase(uniform, rows) + 1e-12
    if mode == "svd":  # the least that keeps it
        lower = uniform.ratio(0) - 0.05
        less = with_layers(uniform, [Cell(i, part, lower) for i in range(4) for part in ("ffn", "attention")])
        assert macs.remaining(less) > budget


def test_savings_of_layers_add_up():
    config, macs = SparsityConfig(mode="svd"), SparseMacs(LLAMA, Workload(8, 64, 16))
    some = [Cell(0, "ffn", 0.5), Cell(2, "ffn", 0.9), Cell(2, "attention", 0.5)]
    dense = macs.total(SparsityConfig(mode="dense"))
    assert dense - macs.total(with_layers(config, some)) == pytest.approx(sum(macs.saved(config, c) for c in some))
    assert macs.saved(config, some[0]) == pytest.approx(3 * 8 * 20)


def test_an_impossible_budget_says_what_could_be_had():
    config, macs = SparsityConfig(mode="svd"), SparseMacs(LLAMA, Workload(8, 64, 16))
    with pytest.raises(InputError, match=r"budget 0\.05 cannot be had: the highest levels everywhere leave 0\."):
        choose_schedule(config, _rows(config, [1, 1, 1, 1], {"ffn": [0.5]}), macs, 0.05)
    with pytest.raises(InputError, match="cannot be had"):
        uniform_schedule(config, macs, 0.01, ["ffn"])


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("sensitivity")
    make_tiny_llama(folder / "llama", layers=3)
    write_instructions(folder / "train.jsonl", 60)
    return folder, [
        "sensitivity", str(folder / "llama"), "--task", "causal_lm", "--dataset", str(folder / "train.jsonl"),
        "--train_bsz", "4", "--samples", "12", "--held_out", "8", "--device", "cpu", "--sparsity.svd_rank", "4",
        "--sparsity.calibration_samples", "16", "--sparsity.surrogate_rank", "4", "--cache_dir", str(folder / "cache"),
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["svd", "static", "surrogate", "skip"])
def test_the_command_writes_a_schedule_that_train_can_use(given, mode, capsys):
    folder, arguments = given
    out = folder / mode
    assert main([*arguments, "--sparsity.mode", mode, "--budget", "0.7", "--out_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "chosen minus uniform" in printed
    assert all((out / name).is_file() for name in OUTPUTS)
    table, check = pd.read_csv(out / "sensitivity.csv"), pd.read_csv(out / "check.csv")
    assert len(table) == {"svd": 21, "static": 21, "surrogate": 6, "skip": 3}[mode]
    assert list(check["schedule"]) == ["dense", "uniform", "chosen"]
    assert (check["remaining"][1:] <= 0.7).all()
    chosen = SparsityConfig.from_yaml(out / "chosen.yaml")
    allocation = pd.read_csv(out / "allocation.csv")
    assert chosen.mode == mode
    assert [chosen.ratio(r.layer, r.part) for r in allocation.itertuples()] == allocation["chosen"].tolist()
    assert SparsityConfig.from_dict(chosen.to_dict()) == chosen
    assert not chosen.sparse_eval
    # The same again is skipped; another budget in the same folder is refused.
    assert main([*arguments, "--sparsity.mode", mode, "--budget", "0.7", "--out_dir", str(out)]) == 0
    assert "already finished" in capsys.readouterr().out
    assert main([*arguments, "--sparsity.mode", mode, "--budget", "0.8", "--out_dir", str(out)]) == 2


def test_measurements_are_lines_of_a_grid(given, tmp_path, capsys):
    arguments = given[1]
    path = tmp_path / "modes.jsonl"
    lines = [{"name": "ffn", "ffn_levels": [0.9], "attention_levels": []}, {"sparsity.mode": "skip", "seed": 1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    defaults = ["--defaults", "--model", *arguments[1:], "--budget", "0.7"]
    grid = ["grid", str(path), "--command", "sensitivity", "--run_root", str(tmp_path / "runs")]
    assert main([*grid, *defaults]) == 0
    alone = tmp_path / "alone"
    flags = ["--budget", "0.7", "--ffn_levels", "0.9", "--attention_levels"]
    assert main([*arguments, "--out_dir", str(alone), *flags]) == 0
    for table in alone.glob("*.csv"):
        assert table.read_bytes() == (tmp_path / "runs" / "ffn" / table.name).read_bytes()
    assert set(pd.read_csv(alone / "sensitivity.csv")["part"]) == {"ffn"}
    capsys.readouterr()
    assert main([*grid, "--dry_run", *defaults]) == 0
    assert "2 runs, 2 finished, 0 to run" in capsys.readouterr().out


def test_progress_counts_the_cells(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sparselora.runs.progress.LOG_EVERY_S", 0.0)
    flags = ["--budget", "0.7", "--ffn_levels", "0.9", "--attention_levels"]
    assert main([*given[1], "--out_dir", str(tmp_path / "out"), *flags]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sensitivity: cell ")]
    assert [line.partition(",")[0] for line in lines] == [f"sensitivity: cell {i} of 3" for i in (1, 2, 3)]


def test_rows_are_disjoint_and_the_first_subsets_do_not_depend_on_the_last():
    subsets, others = disjoint_rows(20, [5, 4, 9], seed=3), disjoint_rows(20, [5, 4, 0], seed=3)
    assert [len(rows) for rows in subsets] == [5, 4, 9]
    assert len(set(np.concatenate(subsets).tolist())) == 18
    assert all(np.array_equal(a, b) for a, b in zip(subsets[:2], others[:2]))
    assert not np.array_equal(subsets[0], disjoint_rows(20, [5], seed=4)[0])


def test_train_takes_the_schedule(given, capsys):
    folder, arguments = given
    out = folder / "for_train"
    assert main([*arguments, "--attention_levels", "--out_dir", str(out)]) == 0
    common = [*arguments[2:8], "--device", "cpu", "--cache_dir", str(folder / "cache"), "--max_steps", "2"]
    done = main(["train", "--model", str(folder / "llama"), *common, "--sparsity", str(out / "chosen.yaml"),
                 "--out_dir", str(folder / "trained")])  # fmt: skip
    assert done == 0
    layers = pd.read_csv(folder / "trained" / "layers.csv")
    assert layers["ffn_sparsity"].tolist() == pd.read_csv(out / "allocation.csv")["chosen"].tolist()


@pytest.mark.parametrize("damage", ["truncated", "pickled"])
def test_damaged_adapters_are_one_line(given, damage, capsys, tmp_path):
    folder, arguments = given
    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.unlink()
        torch.save({"weights": Path}, tmp_path / "a" / "adapter_model.bin")
    assert main([*arguments, "--adapter", str(tmp_path / "a"), "--out_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: adapter_model\.(safetensors|bin) in .* is truncated", error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--budget", "1"], "--budget must be above 0 and below 1"),
        (["--ffn_levels", "1.0"], "a level must be above 0 and below 1, got 1"),
        (["--ffn_levels", "--attention_levels"], "no levels given"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--samples", "60"], "rows are needed"),
        (["--sparsity.mode", "dense"], "mode dense leaves nothing out"),
        (["--adapter", "nowhere"], "does not exist"),
        (["--model", "other"], "two models given"),
        (["--budget", "0.01"], "budget 0.01 cannot be had"),
        (["--sparsity.svd_rank", "99"], "rank"),
        (["--device", "nosuch"], "unknown device"),
    ],
)
def test_bad_input_is_one_line(given, extra, message, capsys, tmp_path):
    assert main([*given[1], "--out_dir", str(tmp_path / "out"), *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_classifier_without_training_is_refused(tiny_bert, tmp_path, capsys):
    rows = "".join(f'{{"sentence": "w{i % 7} w{i % 5}", "label": {i % 2}}}\n' for i in range(60))
    (tmp_path / "a.jsonl").write_text(rows)
    code = main(["sensitivity", str(tiny_bert), "--dataset", str(tmp_path / "a.jsonl"), "--device", "cpu", "--samples",
                 "20", "--held_out", "8", "--sparsity.svd_rank", "4", "--out_dir", str(tmp_path / "out")])  # fmt: skip
    error = capsys.readouterr().err
    assert code == 2
    assert "no better than guessing" in error
    assert not (tmp_path / "out").exists()


def test_a_trained_classifier_is_measured_with_its_adapter(tiny_bert, tmp_path, capsys):
    words = ("w1", "w45")
    rows = "".join(f'{{"sentence": "{words[i % 2]} w9", "label": {i % 2}}}\n' for i in range(80))
    (tmp_path / "a.jsonl").write_text(rows)
    common = ["--model", str(tiny_bert), "--dataset", str(tmp_path / "a.jsonl"), "--device", "cpu"]
    steps = ["--max_steps", "30", "--lr", "2e-2", "--lora_r", "2"]
    assert main(["train", *common, *steps, "--out_dir", str(tmp_path / "t")]) == 0
    measured = ["--samples", "24", "--held_out", "16", "--budget", "0.8", "--sparsity.mode", "random"]
    adapter = ["--adapter", str(tmp_path / "t" / "adapter")]
    assert main(["sensitivity", *common, *measured, *adapter, "--out_dir", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "sensitivity.csv")
    assert set(table["part"]) == {"ffn", "attention"}
    assert (table["dense_loss"] < 0.5).all()
    assert pd.read_csv(tmp_path / "out" / "check.csv")["remaining"].max() == 1


def test_a_difference_is_said_as_it_was_tested():
    from sparselora.contextual.layer_sensitivity import Increase
    from sparselora.evaluation.sensitivity_run import difference_text

    nan = float("nan")
    texts = [difference_text(Increase(3.0, gap, error)) for gap, error in
             ((-0.2, 0.05), (0.2, 0.05), (0.2, 0.15), (0.0, 0.0), (0.2, nan))]  # fmt: skip
    assert [text.rpartition(": ")[2] for text in texts[:2]] == ["better", "worse"]
    assert all(text.endswith("not distinguishable") for text in texts[2:4])
    assert texts[4] == (
        "chosen minus uniform: +0.2000 on one batch, which has no standard error: not tested; raise held_out"
    )
