"""The profile: each cell equals a masked model, a restart equals a whole pass, and verdicts hold on planted layers."""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from sparselora.__main__ import main
from sparselora.config.sparsity import SparsityConfig
from sparselora.config.train import TrainConfig, read_sparsity
from sparselora.contextual import estimator
from sparselora.contextual.cache import Cache
from sparselora.contextual.handle import sparsify
from sparselora.contextual.layer_sensitivity import Cell, with_layers
from sparselora.contextual.modes import Oracle
from sparselora.contextual.plan import LayerPlan
from sparselora.contextual.statistics import Calibration
from sparselora.contextual.structure import find_blocks
from sparselora.errors import InputError
from sparselora.evaluation import layer_passes, layer_profile
from sparselora.evaluation.layer_passes import LayerPasses, RowBatch
from sparselora.evaluation.layer_probe import energy_share
from sparselora.evaluation.layer_profile import LayerProfiler, Rows, layer_cells
from sparselora.evaluation.layer_verdict import PROFILED, cells_within, layer_verdicts
from sparselora.evaluation.sparse_blocks import SparseBlocks, prove_blocks
from sparselora.evaluation.whole_schedules import ScheduleLosses, fitted_schedule
from tests.helpers.contextual_models import masked, ragged, tiny
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

CPU = torch.device("cpu")
LEVELS = {"ffn": (0.5, 0.9), "attention": (0.6,)}


def row_losses(model, batch) -> np.ndarray:
    """The loss of each row by the model's own logits, position by position."""
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.double()
    sums = []
    for row in range(len(logits)):
        total = 0.0
        for t in range(logits.shape[1] - 1):
            label = int(batch["labels"][row, t + 1])
            if label != -100 and batch["attention_mask"][row, t]:
                total -= float(logits[row, t].log_softmax(dim=0)[label])
        sums.append(total)
    return np.array(sums)


def calibrated(structure, base, batch, folder, parts=("ffn", "attention")):
    every = base.replace(mode="surrogate", **{f"{part}_sparsity": 0.5 for part in parts})
    plans = [LayerPlan(structure, block, every) for block in structure.blocks]
    return Calibration(structure, plans, [batch], Cache(folder)).moments()


def profiler_of(model, batch, base, levels, folder, calibration=None):
    structure = find_blocks(model.eval())
    passes = LayerPasses(structure)
    rows = Rows.of(passes, [RowBatch.build(batch, CPU)])
    parts = [part for part, values in levels.items() if values]
    moments = calibrated(structure, base, batch if calibration is None else calibration, folder, parts)
    return LayerProfiler(passes, rows, base, levels, moments, folder)


@contextmanager
def _entered(entered, state):
    assert len(entered) == state  # the one before was left, and the block was called in it
    yield
    entered.append(state)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "qwen3"])
@pytest.mark.parametrize("left", [False, True])
def test_a_pass_that_begins_at_a_layer_equals_the_whole_pass(name, left):
    model, batch = tiny(name).eval(), ragged(name, left)
    passes, rows = LayerPasses(find_blocks(model)), RowBatch.build(batch, CPU)
    whole = passes.row_losses(rows)
    assert whole == pytest.approx(row_losses(model, batch), rel=1e-12)
    hidden = [passes.dense(rows, layer)[1] for layer in range(3)]
    for layer in range(3):
        entered: list[int] = []
        states = (_entered(entered, i) for i in range(2))
        output, again = passes.block_outputs(rows, layer, hidden[layer], states)
        assert entered == [0, 1]
        assert torch.equal(output, again)
        if layer < 2:
            assert torch.equal(output, hidden[layer + 1])
        assert np.array_equal(passes.losses_after(rows, layer, [output])[0].numpy(), whole)  # bit for bit
        several = passes.losses_after(rows, layer, [output, 1.5 * hidden[layer], output]).numpy()
        assert several[[0, 2]] == pytest.approx(np.stack([whole, whole]), rel=1e-12)
        assert not np.allclose(several[1], whole, rtol=1e-3)  # the control: another output, another loss
    assert row_losses(model, batch) == pytest.approx(whole, rel=1e-12)  # the model is as it was


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_cell_equals_the_masked_model(name, tmp_path):
    model, batch = tiny(name).eval(), ragged(name)
    base = SparsityConfig(svd_rank=3, surrogate_rank=4, calibration_samples=3)
    profiler = profiler_of(model, batch, base, LEVELS, tmp_path)
    dense = row_losses(model, batch)
    for layer in (0, 2):
        tables, _ = profiler.measure(layer, profiler.inputs(layer))
        measured = {(r["part"], r["mode"], r["sparsity"]): r for r in tables["cells"]}
        assert len(measured) == 1 + 1 + 4 * 2 + 4 + 1
        for mode, sparsity, config in layer_cells(base, LEVELS, layer):
            part = "ffn" if config.ratio(layer, "ffn") else "attention"
            settings = config.replace(sparse_eval=True)
            handle = sparsify(model, settings, calibration=[batch], cache_dir=tmp_path)
            direct = row_losses_with_labels(model, batch)
            choices = handle.choices()
            handle.remove()
            if part == "ffn" or choices[layer, part].maps is None:
                with masked(model, batch, choices):
                    direct = row_losses(model, batch)
            row = measured[part, mode, sparsity]
            counts = profiler.rows.dense.counts
            assert row["loss"] == pytest.approx(direct.sum() / counts.sum(), rel=1e-9)
            assert row["standard_error"] == pytest.approx(ratio_error(direct - dense, counts), rel=1e-6, abs=1e-12)


def row_losses_with_labels(model, batch) -> np.ndarray:
    """`row_losses` of a sparse model, which needs the labels to know its context."""
    with torch.no_grad():
        logits = model(**batch).logits.double()
    kept = [(r, t) for r in range(len(logits)) for t in range(logits.shape[1] - 1) if batch["labels"][r, t + 1] != -100]
    sums = np.zeros(len(logits))
    for r, t in kept:
        sums[r] -= float(logits[r, t].log_softmax(dim=0)[batch["labels"][r, t + 1]])
    return sums


def ratio_error(differences, counts) -> float:
    """The standard error of Σd / Σn over rows, by a loop."""
    n, mean = len(counts), sum(differences) / sum(counts)
    total = 0.0
    for d, c in zip(differences, counts):
        total += (d - mean * c) ** 2
    return float(np.sqrt(total * n / (n - 1)) / sum(counts))


def test_a_whole_schedule_equals_the_sparse_model(tmp_path):
    model, batch = tiny("llama").eval(), ragged("llama")
    base = SparsityConfig(svd_rank=3, surrogate_rank=4)
    profiler = profiler_of(model, batch, base, LEVELS, tmp_path)
    cells = [Cell(0, "ffn", 0.5), Cell(1, "ffn", 0.9), Cell(1, "attention", 0.6)]
    for mode in ("static", "svd", "random_fixed", "surrogate"):
        config = with_layers(base.replace(mode=mode), cells)
        ours = schedule_losses(profiler.passes, profiler.rows, config, profiler.moments, tmp_path)
        handle = sparsify(model, config.replace(sparse_eval=True), calibration=[batch], cache_dir=tmp_path)
        direct = row_losses_with_labels(model, batch)
        handle.remove()
        assert ours == pytest.approx(direct, rel=1e-9)
    assert row_losses(model, batch) == pytest.approx(profiler.rows.dense.sums, rel=1e-12)


def schedule_losses(passes, rows, config, moments, folder):
    with ScheduleLosses(passes, moments, folder) as losses:
        return losses.measure(rows, config)


def one_row_each(batch: dict[str, torch.Tensor]) -> list[RowBatch]:
    """Batches of one row of ``batch`` each, without its padding."""
    parts = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(len(batch["input_ids"]))]
    lengths = [int(part["attention_mask"].sum()) for part in parts]
    return [
        RowBatch.build({name: x[:, :length] for name, x in part.items()}, CPU) for part, length in zip(parts, lengths)
    ]


@pytest.mark.parametrize("layer", [0, 2])
def test_the_cells_of_fixed_choices_are_measured_in_larger_batches(layer, tmp_path):
    model, batch = tiny("llama").eval(), ragged("llama")
    base = SparsityConfig(svd_rank=3, surrogate_rank=4)
    together = profiler_of(model, batch, base, LEVELS, tmp_path)
    rows = Rows.of(together.passes, one_row_each(batch))
    assert [b.layout.batch for b in rows.joined] == [3]
    apart = LayerProfiler(together.passes, rows, base, LEVELS, together.moments, tmp_path)
    tables, outputs = apart.measure(layer, apart.inputs(layer))
    expected, _ = together.measure(layer, together.inputs(layer))
    chosen_by_batch = []
    for ours, theirs in zip(tables["cells"], expected["cells"], strict=True):
        is_equal = ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        is_equal &= ours["standard_error"] == pytest.approx(theirs["standard_error"], rel=1e-6)
        if ours["mode"] in ("svd", "oracle"):
            chosen_by_batch.append(is_equal)
        else:
            assert is_equal
    assert not all(chosen_by_batch)  # the control: a batch of one row makes other choices than that of all three
    alone = [together.passes.dense(b, layer + 1)[1] for b in rows.batches] if layer < 2 else outputs
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(outputs, alone, strict=True))


def test_whole_schedules_are_measured_in_larger_batches_each_part_by_its_own_choices(tmp_path, monkeypatch):
    model, batch = tiny("llama").eval(), ragged("llama")
    base = SparsityConfig(svd_rank=3, surrogate_rank=4)
    profiler = profiler_of(model, batch, base, LEVELS, tmp_path)
    passes = profiler.passes
    batches = one_row_each(batch)
    rows = Rows.of(passes, batches)
    (joined,) = rows.joined
    assert joined.layout.length == max(b.layout.length for b in batches) > min(b.layout.length for b in batches)
    assert torch.equal(joined.labels, batch["labels"][:, : joined.layout.length])
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda *args: calls.append(len(args[-1])))
    for mode in PROFILED:
        cells = [Cell(0, "ffn", 0.5), Cell(1, "ffn", 0.9)]
        if mode != "skip":
            cells += [Cell(1, "attention", 0.5), Cell(2, "attention", 0.6)]
        config = with_layers(base.replace(mode=mode), cells)
        calls.clear()
        losses = schedule_losses(passes, rows, config, profiler.moments, tmp_path)
        assert calls == [3]
        alone = [schedule_losses(passes, Rows.of(passes, [b]), config, profiler.moments, tmp_path) for b in batches]
        assert losses == pytest.approx(np.concatenate(alone), rel=1e-9)
        # The control: the oracle's and the estimates' choices are others where they see all rows.
        together = schedule_losses(passes, profiler.rows, config, profiler.moments, tmp_path)
        assert (losses == pytest.approx(together, rel=1e-9)) == (mode not in ("oracle", "svd"))
    monkeypatch.setattr(layer_passes, "_TOKENS", {"cpu": 2 * joined.layout.length})
    assert [b.layout.batch for b in passes.joined(batches)] == [2, 1]


def test_blocks_are_proved_before_anything_is_measured(monkeypatch):
    model, batch = tiny("llama").eval(), ragged("llama")
    dense = row_losses(model, batch)
    structure = find_blocks(model)
    prove_blocks(structure, ["ffn", "attention"])  # the control
    assert np.array_equal(row_losses(model, batch), dense)  # the model is as it was
    original = LayerPlan.ffn
    monkeypatch.setattr(LayerPlan, "ffn", lambda self, *args: 1.01 * original(self, *args))
    with pytest.raises(InputError, match="other logits"):
        prove_blocks(structure, ["ffn"])
    assert np.array_equal(row_losses(model, batch), dense)


def test_a_model_that_works_between_its_blocks_is_refused():
    model, batch = tiny("llama").eval(), ragged("llama")
    structure, inside = find_blocks(model), []
    module = structure.module(structure.blocks[1].name)
    body: Any = model.get_base_model().model
    hooks = [
        body.register_forward_pre_hook(lambda *args: inside.append(1)),
        module.register_forward_pre_hook(lambda _, x: (x[0] * (1.5 if inside else 1.0), *x[1:])),
        body.register_forward_hook(lambda *args: inside.clear()),
    ]
    with pytest.raises(InputError, match="called one after the other"):
        prove_blocks(structure, ["ffn"])
    hooks[1].remove()
    prove_blocks(structure, ["ffn"])  # the control: the other hooks change nothing
    assert not inside
    assert len(batch["labels"]) > 1


class _ReadBacks(TorchDispatchMode):
    """Counts reads of a value from the device, for which the host has to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name.removeprefix("aten::") in ("_local_scalar_dense", "nonzero", "equal")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "qwen3"])
def test_passes_that_begin_at_a_layer_never_wait_for_the_device(name):
    model, batch = tiny(name).eval(), ragged(name)
    passes, rows = LayerPasses(find_blocks(model)), RowBatch.build(batch, CPU)
    _, hidden = passes.dense(rows, 1)

    def restarted() -> np.ndarray:
        outputs = passes.block_outputs(rows, 1, hidden, [nullcontext(), nullcontext()])
        return passes.losses_after(rows, 1, outputs).numpy()

    with _ReadBacks() as first:
        losses = restarted()
    assert first.count > 0  # the control: a batch's first pass asks whether its mask has padding
    with _ReadBacks() as later:
        assert np.array_equal(restarted(), losses)
    assert later.count == 0


def test_what_cells_of_a_layer_share_is_computed_once(tmp_path, monkeypatch):
    model, batch = tiny("llama").eval(), ragged("llama")
    base = SparsityConfig(svd_rank=3, surrogate_rank=4)
    together = profiler_of(model, batch, base, LEVELS, tmp_path)
    rows = Rows.of(together.passes, one_row_each(batch))
    profiler = LayerProfiler(together.passes, rows, base, LEVELS, together.moments, tmp_path)
    inputs = profiler.inputs(1)
    structure, block = profiler.structure, profiler.structure.blocks[1]
    calls: list[str] = []
    hook = structure.module(block.attention.v).register_forward_hook(lambda *args: calls.append("attention"))
    for part in ("ffn", "attention"):
        name = f"{part}_scores"
        original = getattr(Oracle, name)
        monkeypatch.setattr(
            Oracle, name, lambda self, *args, f=original, name=name: calls.append(name) or f(self, *args)
        )
    builders = [(estimator, name) for name in ("build_ffn_estimators", "build_attention_estimators")]
    for module, name in builders:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=original, name=name: calls.append(name) or f(*args))
    expected, _ = profiler.measure(1, inputs)
    hook.remove()
    attention_cells = {True: 0, False: 0}  # by whether choices are fixed
    for mode, _, config in layer_cells(base, LEVELS, 1):
        attention_cells[mode not in ("svd", "oracle")] += config.ratio(1, "attention") > 0
    # Of three batches, joined where choices are fixed: once for all FFN cells, once a cell, and once for the probe.
    assert calls.count("attention") == (1 + attention_cells[True]) + 3 * (1 + attention_cells[False] + 1)
    assert calls.count("ffn_scores") == calls.count("attention_scores") == 3
    assert calls.count("build_ffn_estimators") == calls.count("build_attention_estimators") == 1
    assert len(LEVELS["ffn"]) == 2

    # The control: with nothing shared, the same numbers by more calls.
    n_calls = len(calls)
    monkeypatch.setattr(layer_profile, "SameInput", lambda: None)
    hook = structure.module(block.attention.v).register_forward_hook(lambda *args: calls.append("attention"))
    apart, _ = profiler.measure(1, inputs)
    hook.remove()
    assert len(calls) > 2 * n_calls
    for ours, theirs in zip(expected["cells"], apart["cells"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-12)


def test_a_block_may_change_what_its_attention_returns_in_place(tmp_path):
    model, batch = tiny("llama").eval(), ragged("llama")
    base = SparsityConfig(svd_rank=3, surrogate_rank=4)
    profiler = profiler_of(model, batch, base, LEVELS, tmp_path)
    attention = profiler.structure.module(profiler.structure.blocks[1].attention.o.rpartition(".")[0])
    inputs, tables = profiler.inputs(1), []
    for change in (lambda x: x.mul_(2), lambda x: x * 2, lambda x: x):
        hook = attention.register_forward_hook(lambda _, args, y, change=change: (change(y[0]), *y[1:]))
        tables.append([row["loss"] for row in profiler.measure(1, inputs)[0]["cells"]])
        hook.remove()
    assert tables[0] == pytest.approx(tables[1], rel=1e-12)
    assert tables[0] != pytest.approx(tables[2], rel=1e-6)  # the control


def test_estimators_serve_every_sparsity_of_their_rank(tmp_path):
    structure = find_blocks(tiny("llama").eval())
    blocks = SparseBlocks(structure, [1], SparsityConfig(mode="dense"))
    estimators = []
    for rank, sparsity in ((3, 0.5), (3, 0.9), (2, 0.9)):
        config = with_layers(SparsityConfig(mode="svd", svd_rank=rank), [Cell(1, "ffn", sparsity)])
        blocks.set_mode(config, {}, tmp_path)
        estimators.append(blocks.plans[0].mode.ffn_estimator)
    blocks.remove()
    assert estimators[0] is estimators[1]
    assert estimators[2].rank == 2


def test_a_layer_that_a_pass_does_not_reach_does_not_count_as_sparse():
    model, batch = tiny("llama").eval(), ragged("llama")
    rows, passes = RowBatch.build(batch, CPU), LayerPasses(find_blocks(model))
    blocks = SparseBlocks(passes.structure, [1], SparsityConfig(mode="skip", ffn_sparsity=0.5))
    blocks.set_mode(SparsityConfig(mode="skip", ffn_sparsity=0.5), {}, None)
    with blocks.within(rows, all_tokens=False):
        passes.row_losses(rows)  # the control
    with pytest.raises(InputError, match="ran dense"), blocks.within(rows, all_tokens=False):
        pass
    blocks.remove()


def test_calibration_reports_each_step_and_none_from_the_cache(tmp_path):
    model, batch = tiny("llama").eval(), ragged("llama")
    structure = find_blocks(model)
    every = SparsityConfig(mode="surrogate", surrogate_rank=4, ffn_sparsity=0.5, attention_sparsity=0.5)
    plans = [LayerPlan(structure, block, every) for block in structure.blocks]
    steps = []
    for _ in range(2):
        calibration = Calibration(structure, plans, [batch, batch], Cache(tmp_path))
        calibration.moments(lambda: steps.append(1))
        assert calibration.steps == len(steps) == 2 + len(structure.blocks)


def test_calibration_asks_for_the_logits_of_one_token_and_measures_the_same(tmp_path, monkeypatch):
    """The oracle is a forward that knows no such argument, so that every logit is computed."""
    model, batch = tiny("llama").eval(), ragged("llama")
    lengths: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    base = SparsityConfig(mode="surrogate", surrogate_rank=4, surrogate_channels=8)
    moments = calibrated(find_blocks(model), base, batch, tmp_path / "one")
    assert set(lengths) == {1}
    lengths.clear()
    causal = find_blocks(model).model
    own = causal.forward
    monkeypatch.setattr(causal, "forward", lambda **inputs: own(**inputs))
    whole = calibrated(find_blocks(model), base, batch, tmp_path / "whole")
    assert set(lengths) == {batch["input_ids"].shape[1]} != {1}
    assert moments.keys() == whole.keys()
    assert all(torch.equal(moments[name], whole[name]) for name in whole)


def test_energy_shares_equal_numpys(tmp_path):
    model, batch = tiny("llama").eval(), ragged("llama")
    profiler = profiler_of(model, batch, SparsityConfig(surrogate_rank=40), LEVELS, tmp_path)
    structure, seen = profiler.structure, {}
    ffn = structure.blocks[1].ffn
    hook = structure.module(ffn.down).register_forward_pre_hook(lambda _, x: seen.update(h=x[0]))
    row_losses(model, batch)
    hook.remove()
    following = np.pad(batch["labels"].numpy()[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    context = (batch["attention_mask"].numpy() == 1) & (following == -100)
    h = seen["h"].detach().numpy()[context]
    down = structure.module(ffn.down).base_layer.weight.numpy()
    energy = np.sort(np.square(h).sum(axis=0) * np.square(down).sum(axis=0))[::-1]
    tables, _ = profiler.measure(1, profiler.inputs(1))
    for row in tables["energy"]:
        if row["channels"] == "ffn":
            count = max(1, round(row["best"] * 40))
            assert row["energy"] == pytest.approx(energy[:count].sum() / energy.sum(), rel=1e-9)
    assert energy_share(torch.ones(100), 0.25) == pytest.approx(0.25)
    assert np.isnan(energy_share(torch.zeros(4), 0.5))
    explained = {row["map"]: row["explained"] for row in tables["explained"]}
    assert set(explained) == {"ffn", "q", "k", "v", "o"}
    assert all(value <= 1 + 1e-9 for value in explained.values())


# --- planted layers -----------------------------------------------------------------------------------------------


def planted() -> LlamaForCausalLM:
    """Layer 0 as it came, an FFN of zeros in layer 1, five live channels of 500 in layer 2."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=500, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attn_implementation="sdpa", initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight.zero_()
    dead = torch.ones(500, dtype=torch.bool)
    dead[[3, 77, 200, 311, 499]] = False
    model.model.layers[2].mlp.up_proj.weight[dead] = 0
    return model


def test_verdicts_on_planted_layers(tmp_path):
    base = SparsityConfig(svd_rank=3, surrogate_rank=4)
    profiler = profiler_of(planted(), ragged("llama"), base, {"ffn": (0.5, 0.99), "attention": ()}, tmp_path)
    tables = [profiler.measure(layer, profiler.inputs(layer))[0] for layer in range(4)]
    cells, contrasts = (pd.DataFrame([row for t in tables for row in t[name]]) for name in ("cells", "contrasts"))
    prompts = pd.DataFrame([{"prompt": "shuffled", "loss_increase": 1.0, "standard_error": 0.01}])
    verdicts = layer_verdicts(cells, contrasts, profiler.rows.dense.mean, 1e-6, prompts).set_index("layer")
    assert verdicts.loc[1, "verdict"].startswith("nothing to choose here")
    assert verdicts.loc[1, "skip_percent"] == 0
    assert not verdicts.loc[1, "skip_passes"]
    assert verdicts.loc[2, "verdict"].startswith("static at 99 % costs 0.00")
    assert verdicts.loc[2, "sparsity"] == 0.99
    assert abs(verdicts.loc[2, "skip_percent"]) > 0.01  # the five channels matter: there is something to choose
    assert verdicts.loc[0, "verdict"].startswith("keep dense")
    assert verdicts.loc[3, "verdict"].startswith("nothing to choose")  # no label depends on the last layer's context
    free = cells_within(cells, profiler.rows.dense.mean, 1e-6)
    assert [(c.layer, c.sparsity) for c in free] == [(1, 0.99), (2, 0.99), (3, 0.99)]
    assert verdicts["sparsity"].tolist() == [0.0, 0.99, 0.99, 0.99]


@pytest.mark.parametrize(("tolerance", "halvings"), [(1e-6, 0), (2.0, 1), (3.0, 2), (1e4, 0)])
def test_the_chosen_schedule_costs_at_most_the_tolerance_as_a_whole(tolerance, halvings, tmp_path):
    base = SparsityConfig(svd_rank=3, surrogate_rank=4)
    profiler = profiler_of(planted(), ragged("llama"), base, {"ffn": (0.5, 0.99), "attention": (0.5, 0.9)}, tmp_path)
    cells = pd.DataFrame(
        [row for layer in range(4) for row in profiler.measure(layer, profiler.inputs(layer))[0]["cells"]]
    )
    rows, dense = profiler.rows, profiler.rows.dense.mean
    request: Any = SimpleNamespace(tolerance=tolerance, base=base, cache_dir=tmp_path)

    def whole(limit):
        config = with_layers(base.replace(mode="static"), cells_within(cells, dense, limit))
        cost = rows.percents(rows.increase(schedule_losses(profiler.passes, rows, config, profiler.moments, tmp_path)))
        return cost["percent"] + 2 * cost["percent_error"]

    chosen, limit = fitted_schedule(request, profiler.passes, rows, cells, profiler.moments)
    limits = [tolerance / 2**k for k in range(8)]
    assert limit == next((tried for tried in limits if whole(tried) <= tolerance), 0.0)  # a plain loop over all of them
    assert chosen == cells_within(cells, dense, limit)
    assert limit == tolerance / 2**halvings  # where it was halved, layers within the tolerance cost more together


def table(static, random, oracle, skip, error=0.001):
    rows = [("static", 0.5, static[0]), ("static", 0.99, static[1]), ("random_fixed", 0.99, random),
            ("oracle", 0.99, oracle), ("skip", 1.0, skip)]  # fmt: skip
    cells = pd.DataFrame(
        [{"layer": 0, "part": "ffn", "mode": m, "sparsity": s, "loss_increase": x, "standard_error": error}
         for m, s, x in rows]
    )  # fmt: skip
    contrasts = pd.DataFrame(
        [{"layer": 0, "part": "ffn", "sparsity": 0.99, "difference": oracle - random, "standard_error": error}]
    )
    return cells, contrasts


def verdict(*values, shuffled=1.0, error=0.001, tolerance=1.0):
    prompts = pd.DataFrame([{"prompt": "shuffled", "loss_increase": shuffled, "standard_error": 0.001}])
    return layer_verdicts(*table(*values, error=error), 2.0, tolerance, prompts).iloc[0]


def test_controls_fail_where_they_should():
    good = verdict((0.001, 0.05), 0.2, 0.02, 0.3)
    assert good["skip_passes"]
    assert good["oracle_passes"]
    assert good["shuffled_passes"]
    assert good["sparsity"] == 0.5
    assert good["verdict"].startswith("static at 50 % costs 0.05")
    assert "does not matter" not in good["verdict"]
    assert not verdict((0.001, 0.05), 0.2, 0.02, 0.009)["skip_passes"]  # 9 SE
    no_choice = verdict((0.001, 0.05), 0.2, 0.199, 0.3)
    assert not no_choice["oracle_passes"]
    assert "choosing does not matter" in no_choice["verdict"]
    assert not verdict((0.001, 0.05), 0.2, 0.02, 0.3, shuffled=0.4)["shuffled_passes"]  # 8 times the effect
    assert not verdict((0.001, 0.0), 0.2, 0.02, 0.3, shuffled=0.005)["shuffled_passes"]  # 5 SE


def test_few_rows_make_a_schedule_denser_never_bolder():
    assert verdict((0.019, 0.05), 0.2, 0.02, 0.3)["sparsity"] == 0  # 0.95 % ± 0.05 %: not below 1 % with 2 SE
    assert verdict((0.017, 0.05), 0.2, 0.02, 0.3)["sparsity"] == 0.5
    unsure = verdict((0.001, 0.001), 0.001, 0.001, 0.001, error=0.1)
    assert unsure["sparsity"] == 0
    assert "too few rows to tell" in unsure["verdict"]


# --- the command --------------------------------------------------------------------------------------------------


def call(folder: Path, out: Path, *flags: str) -> int:
    model, data = folder / "model", folder / "rows.jsonl"
    if not model.exists():
        make_tiny_llama(model)
        write_instructions(data, 60)
    return main(
        ["profile", "--model", str(model), "--dataset", str(data), "--rows", "4", "--calibration_rows", "6",
         "--ffn_levels", "0.5", "0.9", "--attention_levels", "0.5", "--svd_rank", "2", "--map_rank", "3", "--train_bsz",
         "3", "--device", "cpu", "--out_dir", str(out), "--cache_dir", str(folder / "cache"), *flags]
    )  # fmt: skip


def test_the_command_writes_what_it_says_and_goes_on_where_it_was_stopped(tmp_path, capsys, monkeypatch):
    assert call(tmp_path, tmp_path / "a") == 0
    text, log = capsys.readouterr()
    assert "15 cells in each of 2 layers on 4 rows are the work of 34 dense passes" in log
    assert "Costs " in text
    assert "shuffled prompt" in text
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["status"] == "success"
    assert record["floor_seconds"] > 0
    assert not (tmp_path / "a" / "profile.partial").exists()
    cells = pd.read_csv(tmp_path / "a" / "profile.csv")
    assert set(cells["mode"]) == set(PROFILED)
    assert len(cells) == 2 * (2 + 4 * 2 + 4 + 1)
    schedule = read_sparsity(tmp_path / "a" / "schedule.yaml")
    assert schedule.mode == "static"
    assert schedule.seed is None  # it follows the run that trains with it
    verdicts = pd.read_csv(tmp_path / "a" / "layers.csv")
    for row in verdicts.to_dict("records"):
        assert schedule.ratio(row["layer"], row["part"]) == row["sparsity"]
    TrainConfig(sparsity=schedule)

    original = LayerProfiler.measure

    def stopped(self, layer, inputs):
        if layer == 1:
            raise KeyboardInterrupt
        return original(self, layer, inputs)

    monkeypatch.setattr(LayerProfiler, "measure", stopped)
    assert call(tmp_path, tmp_path / "b") != 0
    assert (tmp_path / "b" / "profile.partial").exists()
    measured = []
    monkeypatch.setattr(
        LayerProfiler, "measure", lambda self, layer, x: measured.append(layer) or original(self, layer, x)
    )
    assert call(tmp_path, tmp_path / "b") == 0
    assert measured == [1]
    for name in ("profile.csv", "layers.csv", "schedules.csv", "schedule.yaml", "prompts.csv"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--rows", "1"], ["--rows", "at least 2"]),
        (["--rows", "500"], ["held-out", "1000"]),
        (["--ffn_levels", "1.0"], ["below 1"]),
        (["--ffn_levels", "--attention_levels"], ["no levels"]),
        (["--tolerance", "0"], ["--tolerance"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, flags, parts):
    assert call(tmp_path, tmp_path / "out", *flags) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(part in message for part in parts)
    assert not (tmp_path / "out").exists()


def test_rows_without_context_are_refused(tmp_path, capsys):
    lines = [json.dumps({"prompt": "w1", "completion": f"w{i} w3"}) for i in range(60)]
    (tmp_path / "bare.jsonl").write_text("\n".join(lines) + "\n")
    assert call(tmp_path, tmp_path / "out", "--dataset", str(tmp_path / "bare.jsonl"), "--template", "{prompt}") == 2
    assert "no context" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_refused_by_name():
    with pytest.raises(InputError, match="no causal language model"):
        LayerPasses(find_blocks(tiny("bert")))
