from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from sparselora.__main__ import main
from sparselora.bench import payoff
from sparselora.bench.estimator_check import check_estimators, summarise
from sparselora.bench.timing import (
    StepTimes,
    TimedModel,
    adapt,
    build_model,
    random_batch,
    shared_copy,
    step_table,
    time_variants,
)
from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.flops import Lora, Shape, Workload
from sparselora.contextual.graphs import GraphedLoss
from sparselora.contextual.structure import find_blocks
from sparselora.errors import InputError
from sparselora.models.architectures import SHAPES
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions
from tests.test_pages import check_columns

ROOT = Path(__file__).resolve().parents[2]
LLAMA3 = Shape.from_config(SHAPES["llama3-8b"])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("bench") / "tiny_llama")


def yaml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "sparsity.yaml"
    path.write_text(text)
    return str(path)


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main(["bench", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


# --- payoff -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([0.8, 0.9, 1.1], 0.7),  # half-way between 0.5 and 0.9
        ([1.2, 1.3, 1.4], 0.25),
        ([0.7, 0.8, 0.9], None),
        ([1.1, 0.9, 1.1], 0.7),  # a lucky first point does not count
        ([0.5, 1.0, 1.5], 0.5),
        ([1.2, 1.1, 0.9], None),
    ],
)
def test_break_even_is_where_it_pays_from_there_on(ratios, expected):
    found = payoff.break_even([0.25, 0.5, 0.9], ratios)
    assert found == (expected if expected is None else pytest.approx(expected))
    text = payoff.break_even_text("sparsity", [0.25, 0.5, 0.9], ratios)
    assert "0.25, 0.5, 0.9" in text
    assert ("does not break even" in text) == (expected is None)


def test_the_verdict_says_plainly_when_it_is_not_worth_it():
    slower, faster, noise = ([10.0] * 9, [14.0] * 9), ([10.0] * 9, [8.0] * 9), ([10.0] * 8, [9, 11] * 4)
    texts = [payoff.verdict(dense, sparse, "dense") for dense, sparse in (slower, faster, noise)]
    assert texts[0].startswith("not worth it here")
    assert "slower" in texts[0]
    assert texts[1].startswith("worth it here")
    assert texts[2].startswith("not worth it here")
    assert "noise" in texts[2]
    assert "0.71×" in texts[0]


def test_rounds_that_disagree_with_the_medians_give_no_verdict():
    """Ratios of 1.25, 2.25 and 1.5, medians 10 and 8: three rounds in which the machine did other things too."""
    text = payoff.verdict([10.0, 9.0, 12.0], [8.0, 4.0, 8.0], "dense")
    assert text.startswith("no verdict: the rounds disagree, 1.50× dense")
    assert "but 1.25× by the medians of the steps" in text
    assert payoff.verdict([10.0, 9.0, 12.0], [8.0, 6.0, 9.0], "dense").startswith("worth it here")  # the control


def test_a_part_below_zero_is_noise_and_no_part():
    parts = payoff.Parts(rest=90.0, channels=11.0, gather=19.0, choice=10.0)
    assert "10.0 choosing (7.7% of the step)" in parts.text(130.0)
    assert "noise" not in parts.text(130.0)
    text = payoff.Parts(rest=90.0, channels=11.0, gather=19.0, choice=-1453.0).text(130.0)
    assert "-1453" not in text
    assert "-36" not in text
    assert "; choosing: less than the noise of these rounds" in text
    text = payoff.Parts(rest=90.0, channels=11.0, gather=-1.0, choice=-2.0).text(130.0)
    assert "products and choosing: less than the noise" in text


def test_ratios_are_taken_within_a_round():
    # Both variants slow down together: the medians' ratio would not notice, nor may the spread.
    dense = np.array([10.0, 20.0, 30.0, 40.0])
    spread = payoff.ratio(dense, dense / 2)
    assert (spread.low, spread.median, spread.high) == (2, 2, 2)


def test_amdahl():
    assert payoff.ceiling(0) == 1
    assert payoff.ceiling(0.5) == 2
    assert math.isinf(payoff.ceiling(1))


def test_touchable_and_kept_multiplications_account_for_the_sparse_step():
    from sparselora.contextual.flops import token_costs, total

    work, lora = Workload(8, 512, 128), Lora(32)
    for settings in (
        {"ffn_sparsity": 0.9},
        {"ffn_sparsity": 0.5, "attention_sparsity": 0.25},
        {"layer_sparsity": {"layer.3": 0.5}},
    ):
        config = SparsityConfig(mode="random", **settings)
        touched = payoff.touchable_flops(LLAMA3, config, work, lora)
        kept = payoff.kept_share(LLAMA3, config, work, lora)
        dense = total(token_costs(LLAMA3, SparsityConfig(mode="dense"), work, lora), training=True)
        sparse = total(token_costs(LLAMA3, config, work, lora), training=True)
        assert sparse / dense == pytest.approx(1 - touched + touched * kept)
        assert 0 < touched < 1
    assert kept == pytest.approx(0.5, abs=1e-3)
    assert payoff.touchable_flops(LLAMA3, SparsityConfig(mode="dense"), work, lora) == 0


def test_with_sparsity_changes_only_what_was_sparse():
    config = SparsityConfig(layer_sparsity={"layer.1-3": 0.9, "layer.2.attention": 0.5}, svd_rank=3)
    swept = payoff.with_sparsity(config, 5, 0.25)
    assert [swept.ratio(i) for i in range(5)] == [0, 0.25, 0.25, 0.25, 0]
    assert [swept.ratio(i, "attention") for i in range(5)] == [0, 0, 0.25, 0, 0]
    assert (swept.mode, swept.svd_rank) == ("svd", 3)
    assert payoff.touches_attention(config, 5)
    assert payoff.without_the_work(config, 5).mode == "random"
    assert payoff.without_the_work(SparsityConfig(ffn_sparsity=0.5), 5).mode == "skip"


def test_the_parts_of_a_step_add_up():
    parts = payoff.Parts.of(dense=200, sparse=130, unchosen=120, floor=90, share=0.1)
    assert parts == payoff.Parts(rest=90, channels=pytest.approx(11), gather=pytest.approx(19), choice=10)
    assert parts.rest + parts.channels + parts.gather + parts.choice == pytest.approx(130)


# --- timing -------------------------------------------------------------------------------------------------------


def tiny_model(causal: bool = True) -> torch.nn.Module:
    shape = {**SHAPES["llama-7b" if causal else "bert-base"], "vocab_size": 50, "hidden_size": 32}
    shape |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2} if causal else {}
    model = build_model(shape, causal=causal, device=CPU, dtype=torch.float32, seed=0)
    return adapt(model, r=2, alpha=4, targets=None, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_variants_share_frozen_weights_and_nothing_else(causal):
    model = tiny_model(causal)
    copied = dict(shared_copy(model).named_parameters())
    trained = 0
    for name, parameter in model.named_parameters():
        assert (copied[name] is parameter) == (not parameter.requires_grad), name
        assert torch.equal(copied[name], parameter)
        trained += parameter.requires_grad
    assert 0 < trained < len(copied)


@pytest.mark.parametrize("causal", [True, False])
def test_a_batch_is_labelled_as_asked(causal):
    work = Workload(3, 16, 4)
    batch = random_batch(50, work, causal=causal, seed=1)
    assert batch["input_ids"].shape == (3, 16)
    if causal:
        assert (batch["labels"] != -100).sum(dim=1).tolist() == [4, 4, 4]
        assert torch.equal(batch["labels"][:, -4:], batch["input_ids"][:, -4:])
    else:
        assert batch["labels"].shape == (3,)
    again = random_batch(50, work, causal=causal, seed=1)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_every_variant_steps_on_the_same_batches_in_turn(monkeypatch):
    calls: list[tuple[str, int]] = []
    clock = itertools.count()

    def variant(name: str, ms: float):
        def step(batch):
            calls.append((name, batch["number"]))
            next(clock)
            return ms, 2 * ms, 0.5

        return SimpleNamespace(
            step=step,
            burst=lambda batches: [step(batch) for batch in batches],
            device=CPU,
            loss=torch.tensor(float(ms)),
            alone_mb=lambda b: step(b)[0],
        )

    batches = [{"number": 0}, {"number": 1}]
    times = time_variants({"a": variant("a", 1), "b": variant("b", 3)}, batches, rounds=4, warmup=1)
    assert calls[:2] == [("a", 0), ("b", 0)]  # warm-up
    timed = [calls[2 + 2 * i : 4 + 2 * i] for i in range(4)]
    for i, pair in enumerate(timed):
        assert {name for name, _ in pair} == {"a", "b"}
        assert {number for _, number in pair} == {i % 2}
    assert [pair[0][0] for pair in timed] == ["a", "b", "a", "b"]  # neither always goes first
    assert times["a"].total == [3.5] * 4
    table = pd.DataFrame(step_table(times, ["a"], tokens=7)).set_index("variant")
    assert table.loc["b", "speedup"] == pytest.approx(3.5 / 9.5)
    assert table.loc["a", "tokens_per_s"] == pytest.approx(2000)
    assert table["dense"].tolist() == [True, False]


def test_memory_of_a_variant_is_what_it_would_need_alone(monkeypatch):
    """100 MB of weights shared, 7 held by others; this one holds 5 (fp8 copies), and its step adds 30 at its peak."""
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    weights = sum(p.nbytes for p in model.parameters()) / 1e6
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", property(lambda _: True), raising=False)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 112_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 142_000_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    for replaced, expected in ((0, 35), (8, 35 - 8e-6)):
        variant = object.__new__(TimedModel)
        variant.model, variant.device, variant.held_bytes = model, torch.device("cuda"), 5_000_000
        variant.handle = SimpleNamespace(replaced_bytes=replaced)
        variant.step = lambda batch: None
        assert variant.alone_mb({}) == pytest.approx(weights + expected, abs=1e-9)


def test_the_weights_that_fp8_replaces_are_those_of_the_blocks():
    """On the CPU the emulation keeps them; with the tensor cores' precision they would leave the device."""
    from sparselora.bench.timing import convert_with

    model = tiny_model()
    emulated = SparsityConfig(mode="dense", frozen_precision="fp8_emulated")
    for config in (SparsityConfig(mode="dense"), emulated):
        variant = TimedModel(model, CPU, bf16=False, convert=convert_with(config))
        assert variant.handle.replaced_bytes == 0
    variant.handle.config = emulated.replace(frozen_precision="fp8")
    blocks = [p for name, p in model.named_parameters() if "_proj" in name and not p.requires_grad]
    assert variant.handle.replaced_bytes == sum(p.nbytes for p in blocks) > 0


def test_the_best_dense_step_is_the_measure():
    times = {name: StepTimes([ms] * 3, [0.0] * 3, [0.0] * 3) for name, ms in (("PEFT", 10), ("dense", 8), ("svd", 4))}
    table = pd.DataFrame(step_table(times, ["PEFT", "dense"], tokens=1)).set_index("variant")
    assert table["speedup"].to_dict() == {"PEFT": 0.8, "dense": 1.0, "svd": 2.0}


def test_a_step_trains_the_adapter_and_closing_restores_the_module():
    from sparselora.bench.timing import convert_with

    model = tiny_model()
    batch = random_batch(50, Workload(2, 16, 4), causal=True, seed=0)
    for convert in (None, convert_with(SparsityConfig(ffn_sparsity=0.5, svd_rank=2))):
        variant = TimedModel(model, CPU, bf16=False, convert=convert)
        before = {n: p.detach().clone() for n, p in variant.model.named_parameters()}
        parts = variant.step(batch)
        assert all(ms > 0 for ms in parts)
        for name, parameter in variant.model.named_parameters():
            assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
        variant.close()


@pytest.mark.parametrize("holds_choices", [True, False])
def test_a_control_that_holds_its_choices_chooses_once(holds_choices):
    from sparselora.bench.timing import convert_with

    config = SparsityConfig(mode="random", ffn_sparsity=0.5, layer_sparsity={"layer.1.attention": 0.5})
    variant = TimedModel(tiny_model(), CPU, bf16=False, convert=convert_with(config), holds_choices=holds_choices)
    batch = random_batch(50, Workload(2, 16, 4), causal=True, seed=0)
    channels = []
    for _ in range(3):
        variant.step(batch)
        channels.append(variant.handle.choices()[0, "ffn"].channels)
    assert len(channels[0]) == 24
    assert torch.equal(channels[0], channels[1]) == holds_choices
    assert torch.equal(channels[1], channels[2]) == holds_choices
    # A graph replays one choice for ever: it may hold a pass whose choices are fixed, and no other of this mode.
    decoder = variant.handle._decoder
    decoder.graphs = SimpleNamespace(parameters=[p for p in variant.model.parameters() if p.requires_grad])
    assert decoder._graphable(variant.handle._latest) == holds_choices


def test_where_the_time_goes_is_not_said_of_steps_that_were_not_timed_alike():
    """Dense 20 ms, sparse 12, its control 11, floor 8: 12 ms are work that sparsity touches, half of it kept."""
    from sparselora.bench.setup import SetupRequest, resolve
    from sparselora.bench.step_times import payoff_lines

    config = SparsityConfig(ffn_sparsity=0.5)
    setup = resolve(SetupRequest(None, "llama-7b", None, "svd", None, None, None, 2, 16, None))
    setup = dataclasses.replace(setup, config=config)
    ms = {"PEFT": 24.0, "dense": 20.0, "svd": 12.0, "random channels": 11.0, "floor": 8.0}
    times = {name: StepTimes([total] * 3, [0.0] * 3, [0.0] * 3) for name, total in ms.items()}
    names = frozenset(ms) - {"PEFT"}
    for graphed in (frozenset(), names):
        lines = "\n".join(payoff_lines(setup, times, {}, graphed))
        assert "60.0% of the dense step's time goes when that work is gone; ceiling 2.50×" in lines
        assert "where 12.0 ms go: 8.0 untouched" in lines
        assert "1.0 choosing (8.3% of the step)" in lines
    lines = "\n".join(payoff_lines(setup, times, {}, names - {"random channels", "floor"}))
    assert "floor, random channels cannot be captured as a CUDA graph" in lines
    assert "choosing" not in lines
    assert "goes when that work" not in lines
    assert "worth it here" in lines


def test_closing_lets_go_of_captured_graphs():
    """As a GPU would have them; whoever still holds the variant must not hold their memory."""
    from sparselora.bench.timing import convert_with

    variant = TimedModel(tiny_model(), CPU, bf16=False, convert=convert_with(SparsityConfig(mode="dense")))
    graphs = GraphedLoss([p for p in variant.model.parameters() if p.requires_grad])
    graphs._graphs["a shape"] = SimpleNamespace()
    variant.handle._decoder.graphs = graphs
    assert graphs._graphs
    variant.close()
    assert not graphs._graphs


# --- estimates ----------------------------------------------------------------------------------------------------


def test_an_estimate_of_full_rank_is_the_oracle_and_a_low_one_is_not():
    model = tiny_model()
    batches = [random_batch(50, Workload(2, 16, 4), causal=True, seed=s) for s in range(3)]
    batches[0]["attention_mask"][0, :5] = 0
    config = SparsityConfig(ffn_sparsity=0.5, layer_sparsity={"layer.1.attention": 0.5})
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    table = summarise(pd.DataFrame(check_estimators(model, batches, config, [1, 16, 32])))
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.training
    assert set(zip(table["part"], table["layer"])) == {("ffn", 0), ("ffn", 1), ("attention qk", 1), ("attention v", 1)}
    assert (table["n"] == 3).all()
    # A projection into the FFN has rank 32, as has q; k and v have 16 rows, so attention has no row for 32.
    assert set(zip(table["part"], table["rank"])) >= {("attention v", 16), ("ffn", 32)}
    assert ("attention v", 32) not in set(zip(table["part"], table["rank"]))
    full = table[
        ((table["rank"] == 32) & (table["part"] == "ffn")) | ((table["rank"] == 16) & (table["part"] == "attention v"))
    ]
    np.testing.assert_allclose(full[["recall", "cosine", "energy"]], 1, atol=1e-5)
    low = table[(table["rank"] == 1)]
    assert (low["recall"] < 0.999).all()


def test_padding_and_output_tokens_have_no_say():
    model = tiny_model()
    batch = random_batch(50, Workload(2, 16, 4), causal=True, seed=0)
    batch["attention_mask"][0, :6] = 0
    config = SparsityConfig(ffn_sparsity=0.5)
    (row, *_) = check_estimators(model, [batch], config, [4])
    assert row["context_tokens"] == (10 - 4) + (16 - 4)


def test_estimates_need_something_sparse():
    model = tiny_model()
    batch = random_batch(50, Workload(1, 8, 2), causal=True, seed=0)
    with pytest.raises(InputError, match="no layer is sparse"):
        check_estimators(model, [batch], SparsityConfig(), [2])
    with pytest.raises(InputError, match="between 1 and 32, got 0, 33"):
        check_estimators(model, [batch], SparsityConfig(ffn_sparsity=0.5), [33, 0])
    batch["labels"] = batch["input_ids"].clone()
    batch["attention_mask"][:, -1] = 0
    with pytest.raises(InputError, match="no context token"):
        check_estimators(model, [batch], SparsityConfig(ffn_sparsity=0.5), [2])
    assert find_blocks(model).causal


# --- the command --------------------------------------------------------------------------------------------------


def test_flops_need_no_model_and_name_their_unit(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "--flops",
        "--shape",
        "llama3-8b",
        "--sparsity",
        ROOT / "configs" / "llama3_8b_math.yaml",
        "--out_dir",
        out,
    ]
    status, text, _ = run(capsys, *arguments)
    assert status == 0
    table = pd.read_csv(out / "flops.csv").set_index("component")
    assert f"{table.loc['total', 'forward_FLOPs_after']:,.0f}" in text
    assert table.loc["FFN", "forward_FLOPs_before"] == 2 * 4096 * 14336 * 3 * (31 + 0.25)
    layers = pd.read_csv(out / "flops_per_layer.csv")
    assert layers["layer"].nunique() == 32
    check_columns(out)
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "success"
    assert {"flops.csv", "flops.png", "flops_per_layer.csv"} <= set(record["outputs"])
    assert run(capsys, *arguments)[1].count("already finished") == 1


def test_flops_against_plain_peft_and_another_configuration(tmp_path, capsys):
    sparse = ROOT / "configs" / "sst2_sparse_lora_svd.yaml"
    for against in ("peft", ROOT / "configs" / "sst2_sparse_lora_svd_conservative.yaml"):
        out = tmp_path / Path(against).stem
        status, text, _ = run(
            capsys, "--flops", "--shape", "distilbert", "--sparsity", sparse, "--against", against, "--unit", "MACs",
            "--seq", 128, "--out_dir", out,
        )  # fmt: skip
        assert status == 0
        assert "FLOPs before" not in text
        table = pd.read_csv(out / "flops.csv").set_index("component")
        assert 0 < table.loc["FFN", "forward_reduction"] < 1
        check_columns(out)
    assert table.loc["estimator", "forward_MACs_before"] > table.loc["estimator", "forward_MACs_after"]


def test_times_of_a_decoder(llama, tmp_path, capsys):
    config = yaml(tmp_path, "svd_rank: 2\nffn_sparsity: 0.5\n")
    out = tmp_path / "out"
    status, text, _ = run(
        capsys, "--model", llama, "--sparsity", config, "--train_bsz", 2, "--seq", 16, "--rounds", 3, "--warmup", 1,
        "--sparsities", 0.25, 0.75, "--seqs", 8, 16, "--device", "cpu", "--lora_r", 2, "--out_dir", out,
    )  # fmt: skip
    assert status == 0
    table = pd.read_csv(out / "steps.csv").set_index("variant")
    assert list(table.index) == ["PEFT", "dense", "svd", "random channels", "floor"]
    dense = table[table["dense"]]
    assert dense.loc[dense["step_ms"].idxmin(), "speedup"] == pytest.approx(1)  # of the other dense step, by chance
    every = pd.read_csv(out / "every_step.csv")
    assert every.groupby("variant").size().eq(3).all()
    for name in ("sparsity", "seq"):
        swept = pd.read_csv(out / f"by_{name}.csv")
        assert swept[name].nunique() == 2
        assert (out / f"by_{name}.png").stat().st_size > 1000
    assert "worth it here" in text or "no verdict" in text
    assert "ceiling" in text
    assert "choosing" in text
    check_columns(out)


def test_progress_is_in_the_log_with_the_time_left(llama, tmp_path, capsys, monkeypatch):
    """With a line for every unit of work in place of one in 30 seconds; without, as here in seconds, there is none."""
    config = yaml(tmp_path, "svd_rank: 2\nffn_sparsity: 0.5\n")
    flags = ["--model", llama, "--sparsity", config, "--train_bsz", 2, "--seq", 8, "--device", "cpu", "--lora_r", 2]
    times = ["--rounds", 2, "--warmup", 0, "--sparsities", 0.25]
    data = write_instructions(tmp_path / "train.jsonl", 20)
    fields = ["--prompt_field", "question", "--completion_field", "answer", "--seq", 32]
    estimates = ["--estimators", "--dataset", data, *fields, "--samples", 4, "--ranks", 2]
    assert "left" not in run(capsys, *flags, *times, "--out_dir", tmp_path / "silent")[2]
    monkeypatch.setattr("sparselora.runs.progress.LOG_EVERY_S", 0.0)
    lines = run(capsys, *flags, *times, "--out_dir", tmp_path / "times")[2].splitlines()
    for last in ("setting up: variant 5 of 5, 0 s left", "steps: step 15 of 15, 0 s left",
                 "sparsity 0.25: step 9 of 9, 0 s left"):  # fmt: skip
        assert last in lines
    lines = run(capsys, *flags, *estimates, "--out_dir", tmp_path / "estimates")[2].splitlines()
    assert "estimates: batch 2 of 2, 0 s left" in lines


def test_times_of_an_encoder_without_a_sparse_layer_to_sweep(tiny_bert, tmp_path, capsys):
    out = tmp_path / "out"
    status, text, _ = run(
        capsys, "--model", tiny_bert, "--sparsity", yaml(tmp_path, "mode: skip\nffn_sparsity: 0.5\n"), "--train_bsz", 2,
        "--seq", 12, "--rounds", 2, "--warmup", 1, "--device", "cpu", "--lora_r", 2, "--out_dir", out,
    )  # fmt: skip
    assert status == 0
    assert pd.read_csv(out / "steps.csv")["variant"].tolist() == ["PEFT", "dense", "skip"]
    assert not (out / "by_sparsity.csv").exists()
    assert "worth it here" in text or "no verdict" in text


def test_estimators_on_real_texts(llama, tmp_path, capsys):
    out = tmp_path / "out"
    data = write_instructions(tmp_path / "train.jsonl", 20)
    status, text, _ = run(
        capsys, "--estimators", "--model", llama, "--dataset", data, "--sparsity", yaml(tmp_path, "ffn_sparsity: 0.5"),
        "--prompt_field", "question", "--completion_field", "answer", "--train_bsz", 4, "--seq", 32, "--samples", 8,
        "--ranks", 2, 32, "--device", "cpu", "--out_dir", out,
    )  # fmt: skip
    assert status == 0
    table = pd.read_csv(out / "estimators.csv")
    assert set(table["n"]) == {2}
    assert table[table["rank"] == 32]["recall"].min() == pytest.approx(1)
    assert (out / "estimators.png").stat().st_size > 1000
    assert "recall" in text
    check_columns(out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--flops"], "no model given"),
        (["--shape", "distilbert", "--flops"], "need --sparsity"),
        (["--shape", "distilbert", "--flops", "--sparsity", "nowhere.yaml"], "nowhere.yaml"),
        (["--shape", "distilbert", "--flops", "--mode", "svd", "--against", "sparse"], "sparse cannot be read"),
        (["--shape", "distilbert", "--mode", "svd", "--labelled", "3"], "--labelled is for decoders"),
        (["--shape", "llama3-8b", "--mode", "svd", "--labelled", "900"], "between 0 and"),
        (["--shape", "distilbert", "--mode", "svd", "--target_modules", "q_proj"], "'q_proj' is none of"),
        (["--shape", "distilbert", "--sparsity", str(ROOT / "configs" / "llama3_8b_math.yaml")], "6 layers"),
        (["--shape", "distilbert", "--mode", "svd", "--estimators"], "real --model"),
        (["--shape", "distilbert", "--mode", "svd", "--rounds", "0", "--seq", "8"], "--rounds"),
        (["--shape", "llama-7b", "--explain", "--rounds", "0", "--seq", "8"], "--rounds"),
        (["--shape", "llama-7b", "--explain", "--combinations"], "--combinations is for times"),
        (["--shape", "llama-7b", "--explain", "--against", "peft"], "--against is for times"),
        (["--shape", "distilbert", "--mode", "svd", "--seq", "513"], "513 tokens is longer than the 512"),
        (["--shape", "gpt2", "--mode", "svd", "--seqs", "2048"], "2048 tokens is longer than the 1024"),
        (["--shape", "llama-7b", "--mode", "svd", "--batches", "0"], "--batches must be at least 1"),
        (
            ["--shape", "llama-7b", "--sparsity", str(ROOT / "configs" / "llama_sparse.yaml"), "--sparsities", "1"],
            "[0, 1)",
        ),
        (["--shape", "distilbert", "--mode", "svd", "--seq", "8", "--device", "nosuch"], "unknown device 'nosuch'"),
        (["--shape", "distilbert", "--mode", "svd", "--seq", "8", "--device", "cuda:99"], "is not there"),
        (["--shape", "distilbert", "--mode", "svd", "--seq", "8", "--seed", "-1"], "--seed must be"),
        (["--shape", "distilbert", "--mode", "svd", "--seq", "8", "--seed", str(2**32)], "--seed must be"),
        (["--model", "/no/such/folder", "--mode", "svd"], "/no/such/folder"),
    ],
)
def test_bad_input_is_one_line_and_status_two(tmp_path, capsys, arguments, words):
    status, _, err = run(capsys, *arguments, "--out_dir", tmp_path / "out")
    assert status == 2
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    status, text, _ = run(capsys, "--shape", "distilbert", "--mode", "svd", "--out_dir", out, "--dry_run")
    assert status == 0
    assert "steps.png" in text
    assert not out.exists()


def test_counting_loads_no_torch(tmp_path):
    import subprocess
    import sys

    arguments = ["bench", "--flops", "--shape", "distilbert", "--mode", "svd", "--out_dir", str(tmp_path / "out")]
    code = (
        f"import sys\nfrom sparselora.__main__ import main\nassert main({arguments!r}) == 0\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "flags", [["--train_bsz", "1000000000000"], ["--batches", "1000000000000"], ["--seqs", "9" * 12]]
)
def test_a_batch_that_no_index_numbers_is_refused_before_anything(tmp_path, capsys, flags):
    from sparselora.__main__ import main

    assert main(["bench", "--shape", "llama-7b", "--seq", "8", *flags, "--out_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "at most 2,147,483,647" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_all_combinations_are_timed_and_what_cannot_be_done_is_named(llama, tmp_path, capsys):
    """On a CPU without its fp8; the emulation, where the configuration has it, is combined in its place."""
    flags = ["--model", llama, "--train_bsz", 2, "--seq", 16, "--rounds", 1, "--warmup", 1, "--sparsities", "--device",
             "cpu", "--lora_r", 2, "--combinations"]  # fmt: skip
    out = tmp_path / "plain"
    status, text, _ = run(capsys, *flags, "--mode", "static", "--sparsity", yaml(tmp_path, "ffn_sparsity: 0.5\n"),
                          "--out_dir", out)  # fmt: skip
    assert status == 0
    none = "context backward none"
    names = pd.read_csv(out / "steps.csv")["variant"].tolist()
    assert names == ["PEFT", "dense", "static", "floor", f"dense, {none}", f"static, {none}"]
    for name in ("dense, fp8", f"dense, fp8, {none}", "static, fp8", f"static, fp8, {none}"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"left out: {name}: ")]
        assert "frozen_precision fp8 is not possible" in line
    assert set(json.loads((out / "run.json").read_text())["skipped"]) == {
        f"{mode}, fp8{context}" for mode in ("dense", "static") for context in ("", f", {none}")
    }
    out = tmp_path / "emulated"
    settings = "mode: dense\nfrozen_precision: fp8_emulated\ncontext_backward: upper\n"
    status, text, _ = run(capsys, *flags, "--sparsity", yaml(tmp_path, settings), "--out_dir", out)
    assert status == 0
    names = pd.read_csv(out / "steps.csv")["variant"].tolist()
    both, upper = "dense, fp8_emulated, context backward upper", "dense, context backward upper"
    assert names == ["PEFT", "dense", both, "dense, fp8_emulated", upper]
    assert "left out" not in text
    assert f"the step {both}" in text or "no verdict" in text or "noise" in text


def test_a_configuration_that_this_machine_cannot_do_is_refused(llama, tmp_path, capsys):
    """It was asked for, not looked for: with --combinations or without."""
    settings = yaml(tmp_path, "mode: dense\nfrozen_precision: fp8\n")
    flags = ["--model", llama, "--seq", 16, "--device", "cpu", "--sparsity", settings, "--out_dir", tmp_path / "out"]
    for more in ([], ["--combinations"]):
        status, _, err = run(capsys, *flags, *more)
        assert (status, err.count("\n")) == (2, 1)
        assert "frozen_precision fp8 is not possible" in err
        assert not (tmp_path / "out").exists()


def test_sparsity_is_compared_with_the_same_settings_without_it():
    """Dense 20 ms, with both settings 10, sparse as well 8: 2.5 times as fast, of which sparsity gives 1.25."""
    from sparselora.bench.setup import SetupRequest, resolve
    from sparselora.bench.step_times import payoff_lines, variant_configs

    config = SparsityConfig(mode="static", ffn_sparsity=0.5, frozen_precision="fp8", context_backward="none")
    setup = resolve(SetupRequest(None, "llama-7b", None, "static", None, None, None, 2, 16, None))
    setup = dataclasses.replace(setup, config=config)
    names = list(variant_configs(setup))
    assert names == [
        "PEFT",
        "dense",
        "dense, fp8, context backward none",
        "static, fp8, context backward none",
        "floor",
    ]
    times = {name: StepTimes([ms] * 3, [0.0] * 3, [0.0] * 3) for name, ms in zip(names, (24.0, 20.0, 10.0, 8.0, 7.5))}
    lines = "\n".join(payoff_lines(setup, times, {}, frozenset(names)))
    assert "against the same settings without sparsity: 1.25×" in lines
    assert "25.0% of the dense step's time goes" in lines
    assert "2.50× the best dense step (dense)" in lines
