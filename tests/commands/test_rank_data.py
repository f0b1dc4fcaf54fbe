"""`rank --dataset`: gradients against full autograd, captured energy against numpy, verdicts on planted gradients."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparselora.__main__ import main
from sparselora.config.train import TrainConfig
from sparselora.data.instructions import DEFAULT_TEMPLATE, encode_instructions
from sparselora.inspection.data_ranks import BLOCKS, captured, judge, spend
from sparselora.spectral.factors import adapter_svd
from sparselora.spectral.gradient_energy import ModuleGradients, measure_gradients
from sparselora.spectral.squeeze import budget_ranks
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("rank_data")
    return make_tiny_llama(folder / "llama"), write_instructions(folder / "rows.jsonl", 40)


def call(inputs: tuple[Path, Path], out: Path, *more: str) -> int:
    model, rows = inputs
    data = ["--dataset", str(rows), "--prompt_field", "question", "--completion_field", "answer", "--device", "cpu"]
    return main(["rank", "--model", str(model), *data, "--lora_r", "4", "--out_dir", str(out), *more])


def gram(blocks: list[np.ndarray]) -> np.ndarray:
    return np.array([[first.T @ second for second in blocks] for first in blocks])


def test_gradients_are_those_of_the_weight_itself(inputs):
    model_folder, rows = inputs
    config = TrainConfig.from_dict({
        "model": str(model_folder), "dataset": str(rows), "task": "causal_lm", "prompt_field": "question",
        "completion_field": "answer", "lora_r": 16, "lora_alpha": 16.0, "target_modules": ["q_proj"], "train_bsz": 1,
        "device": "cpu",
    })  # fmt: skip
    _, gradients = measure_gradients(config, 32, 2)
    # With as many orthonormal directions as inputs, G Aᵀ has the singular values of G; all training rows are taken.
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    frame = pd.read_json(rows, lines=True).rename(columns={"question": "prompt", "answer": "completion"})
    held_out = set(range(40)) - set(_training_rows(config))
    frame = frame.drop(index=sorted(held_out))
    examples = encode_instructions(frame, AutoTokenizer.from_pretrained(model_folder), 512, DEFAULT_TEMPLATE).examples
    assert len(examples) == 32
    for example in examples:
        ids, labels = (torch.tensor(example[key])[None] for key in ("input_ids", "labels"))
        model(input_ids=ids, labels=labels).loss.backward()
    for i in range(2):
        module = gradients[f"model.layers.{i}.self_attn.q_proj"]
        G = model.get_submodule(f"model.layers.{i}.self_attn.q_proj").weight.grad
        whole = module.gram.sum(axis=(0, 1))
        assert np.linalg.eigvalsh(whole)[::-1] == pytest.approx(np.linalg.svd(G.numpy())[1] ** 2, rel=1e-3, abs=1e-9)
        assert (module.d_out, module.d_in) == (32, 32)


def _training_rows(config: TrainConfig) -> list[int]:
    from sparselora.data.load import load_data

    return sorted(load_data(config).train["row"].tolist())


def test_captured_energy_is_that_of_projections_by_numpy():
    rng = np.random.default_rng(0)
    blocks = [rng.standard_normal((11, 5)) for _ in range(4)]
    fitted, judged = np.array([1.0, 1, 0, 0]), np.array([0.0, 0, 1, 1])
    shares = captured(gram(blocks), fitted, judged)
    U = np.linalg.svd(blocks[0] + blocks[1])[0]
    other = blocks[2] + blocks[3]
    for k in range(6):
        assert shares[k] == pytest.approx(np.linalg.norm(U[:, :k].T @ other) ** 2)
    assert shares[-1] == pytest.approx(np.linalg.norm(other) ** 2)
    assert shares[5] < 0.9 * shares[-1]  # the control: five of eleven directions do not hold all
    assert not captured(gram([np.zeros((3, 2))] * 2), np.array([1.0, 0]), np.array([0.0, 1])).any()


def test_ranks_are_spent_as_a_squeeze_spends_them():
    rng = np.random.default_rng(1)
    factors = {name: (torch.tensor(rng.standard_normal((6, m))), torch.tensor(rng.standard_normal((d, 6))) * scale)
               for name, d, m, scale in (("a", 20, 12, 1), ("b", 9, 30, 3), ("c", 14, 8, 0.3))}  # fmt: skip
    svds = {name: adapter_svd(A, B, 1.0) for name, (A, B) in factors.items()}
    sizes = {name: len(svd.U) + len(svd.V) for name, svd in svds.items()}
    energies = {name: svd.sigma.numpy() ** 2 for name, svd in svds.items()}
    ranks = spend(energies, sizes, dict.fromkeys(sizes, 6), 3 * sum(sizes.values()))
    assert ranks == budget_ranks(svds, 3, 1)
    assert len(set(ranks.values())) > 1


def planted(scales: list[float], signal: float, seed: int = 0) -> dict[str, ModuleGradients]:
    """Gradients of common directions, as strong as ``scales`` say, with noise of their own in each block."""
    rng = np.random.default_rng(seed)
    modules = {}
    for i, scale in enumerate(scales):
        common = rng.standard_normal((16, 8)) * signal
        blocks = [scale * (common + rng.standard_normal((16, 8))) for _ in range(BLOCKS)]
        modules[f"layers.{i}.q"] = ModuleGradients(16, 12, gram(blocks))
    return modules


def test_uniform_is_as_good_for_noise_and_not_for_planted_differences():
    noise = judge(planted([1.0] * 8, 0.0), 4, 64, 0)
    assert "uniform is as good" in noise.sentences[-1]
    uneven = judge(planted([8.0, 8.0, *[0.2] * 6], 2.0), 4, 64, 0)
    assert "only training shows" in uneven.sentences[-1]
    assert (uneven.table["rank"].iloc[:2] == 8).all()
    gain = uneven.captured["data"] - uneven.captured["uniform"]
    assert (gain > 0).mean() > 0.95
    assert uneven.captured["random"].median() < uneven.captured["data"].median()
    for results in (noise, uneven):
        spent = (results.table["rank"] * (results.table["d_out"] + results.table["d_in"])).sum()
        assert spent <= 4 * 8 * 28


def test_the_run_leaves_a_pattern_that_peft_takes(inputs, tmp_path, capsys):
    assert call(inputs, tmp_path / "out", "--target_modules", "all-linear", "--samples", "16") == 0
    out = capsys.readouterr().out
    assert "uniform is as good" in out or "only training shows" in out
    names = {path.name for path in (tmp_path / "out").iterdir()} - {".lock"}
    assert names == {"run.json", "data_ranks.csv", "captured_energy.csv", "rank_pattern_data.json", "data_ranks.png"}
    settings = json.loads((tmp_path / "out" / "rank_pattern_data.json").read_text())
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(inputs[0]), LoraConfig(**settings))
    table = pd.read_csv(tmp_path / "out" / "data_ranks.csv").set_index("name")
    for name, row in table.iterrows():
        layer = model.get_submodule(f"base_model.model.{name}")
        assert layer.r["default"] == row["rank"]
        assert layer.scaling["default"] == 8.0  # that of `train` with this rank: alpha is 32 by default
    assert len(table) == 14
    assert (table["rank_low"] <= table["rank_high"]).all()
    first = (tmp_path / "out" / "data_ranks.csv").read_bytes()
    assert call(inputs, tmp_path / "again", "--target_modules", "all-linear", "--samples", "16") == 0
    assert (tmp_path / "again" / "data_ranks.csv").read_bytes() == first


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "7"], "--samples must be at least 8"),
        (["--samples", "999"], "more than the 32 training rows"),
        (["--criterion", "gap"], "--criterion gap does not go with --dataset"),
        (["--target_error", "0.1"], "--target_error does not go with --dataset"),
        (["--completion_field", "no"], "no field 'no'"),
        (["--target_modules", "nothing", "--samples", "16"], "nothing"),
        (["--lora_r", "17", "--samples", "16"], "lora_r must be between 1 and 16"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(inputs, tmp_path, capsys, more, message):
    assert call(inputs, tmp_path / "bad", *more) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "bad" / "run.json").exists()


def test_settings_of_data_are_refused_without_it(inputs, tmp_path, capsys):
    assert main(["rank", "--model", str(inputs[0]), "--lora_r", "2", "--out_dir", str(tmp_path / "bad")]) == 2
    assert "--lora_r is for ranks from data" in capsys.readouterr().err
    assert main(["rank", "--adapter", "x", "--dataset", "y", "--out_dir", str(tmp_path / "bad")]) == 2
    assert "--dataset goes with --model" in capsys.readouterr().err
