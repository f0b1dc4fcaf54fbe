"""SGD steps on an adapter's factors: against a plain autograd loop in float64, row by row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from sparselora.evaluation.adapted_model import load_adapted_model
from sparselora.models.adapter_files import open_adapter
from sparselora.models.labels import IGNORED
from sparselora.spectral.descent import PASSES, RELATIVE_STEPS, descend
from sparselora.spectral.request import SGD_STEPS
from tests.helpers.tiny_llama import make_tiny_llama

ROWS = 7
SIDES = ("lora_A", "lora_B")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("descent")
    make_tiny_llama(root / "llama")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(root / "llama")
    settings = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.5, "target_modules": ["q_proj", "down_proj"]}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    get_peft_model(base, config).save_pretrained(root / "adapter")
    return root


def make_examples() -> list[dict[str, list[int]]]:
    """Rows of other lengths and label counts; one has no label, and the first label of a row predicts nothing."""
    rng = np.random.default_rng(3)
    examples = []
    for row in range(ROWS):
        ids = rng.integers(3, 43, 6 + 2 * row).tolist()
        n_labels = 0 if row == 2 else 2 + row
        examples.append({"input_ids": ids, "labels": [IGNORED] * (len(ids) - n_labels) + ids[len(ids) - n_labels :]})
    return examples


def stepped(folder: Path, batch_size: int = 3, seed: int = 0, double: bool = True):
    config = TrainConfig.from_dict({"model": str(folder / "llama"), "task": "causal_lm", "device": "cpu"})
    adapted = load_adapted_model(config, str(folder / "adapter"), 0)
    if double:
        adapted = replace(adapted, model=adapted.model.double())
    adapter = open_adapter(str(folder / "adapter"))
    modules = [module for module in adapter.modules if "layers.1" in module]
    before = {name: value.clone() for name, value in adapted.model.state_dict().items()}
    rows: list[int] = []
    descent = descend(adapted, adapter, modules, make_examples(), batch_size, np.random.default_rng(seed), rows.append)
    assert all(torch.equal(before[name], value) for name, value in adapted.model.state_dict().items())
    assert sum(rows) == PASSES * ROWS
    return descent


class Loop:
    """The same by plain PEFT and autograd: whole rows one by one, no shared gradients."""

    def __init__(self, folder: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder / "llama")
        self.model = PeftModel.from_pretrained(base, folder / "adapter").double().eval()
        self.factors = {
            name: value for name, value in self.model.named_parameters() if "lora_" in name and "layers.1" in name
        }
        for value in self.factors.values():
            value.requires_grad_(True)
        self.start = {name: value.detach().clone() for name, value in self.factors.items()}

    def loss(self, rows: list[dict[str, list[int]]]) -> torch.Tensor:
        total, count = torch.zeros(()).double(), 0
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            log_p = self.model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
            for position in (labels != IGNORED).nonzero().flatten().tolist():
                total, count = total - log_p[position, labels[position]], count + 1
        return total / count

    def step(self, size: float, rows: list[dict[str, list[int]]]) -> None:
        gradients = torch.autograd.grad(self.loss(rows), list(self.factors.values()))
        with torch.no_grad():
            for value, gradient in zip(self.factors.values(), gradients):
                value -= size * gradient

    def restart(self) -> None:
        with torch.no_grad():
            for name, value in self.factors.items():
                value.copy_(self.start[name])

    def first_size(self, relative: float, rows: list[dict[str, list[int]]]) -> float:
        self.restart()
        gradients = torch.autograd.grad(self.loss(rows), list(self.factors.values()))
        length = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        return float(relative * torch.cat([value.flatten() for value in self.start.values()]).norm() / length)


def test_sizes_losses_and_factors_are_those_of_a_plain_loop(folder):
    descent, loop, examples = stepped(folder), Loop(folder), make_examples()
    order = np.random.default_rng(0).permutation(ROWS)
    halves = [[examples[i] for i in sorted(half)] for half in (order[:4], order[4:])]
    for relative in RELATIVE_STEPS:
        size, losses = loop.first_size(relative, examples), dict.fromkeys(SGD_STEPS, 0.0)
        for train, held_out in (halves, halves[::-1]):
            loop.restart()
            for step in range(1, max(SGD_STEPS) + 1):
                loop.step(size, train)
                if step in losses:
                    losses[step] += loop.loss(held_out).item() / 2
        part = descent.table[descent.table["relative_step"] == relative].set_index("steps")
        assert part["step_size"].to_numpy() == pytest.approx(size, rel=1e-6)
        assert part["validation_loss"].to_dict() == pytest.approx(losses, rel=1e-6)
    chosen_rows = descent.table[descent.table["is_chosen"] == 1].set_index("steps")
    least = descent.table.groupby("steps")["validation_loss"].min()
    assert chosen_rows["validation_loss"].to_dict() == least.to_dict()
    assert [adapter.steps for adapter in descent.stepped] == list(SGD_STEPS)
    for adapter in descent.stepped:
        loop.restart()
        for _ in range(adapter.steps):
            loop.step(chosen_rows.loc[adapter.steps, "step_size"], examples)
        change = 0.0
        assert len(adapter.new_factors) == 2
        for module, pair in adapter.new_factors.items():
            keys = [f"base_model.model.{module}.{side}.default.weight" for side in SIDES]
            for key, factor in zip(keys, pair):
                assert factor.dtype == torch.float32
                moved = loop.factors[key].detach() - loop.start[key]
                error = (factor.double() - loop.factors[key].detach()).norm()
                assert error < 1e-7 * loop.factors[key].norm()  # the rounding to the stored type
                assert moved.norm() > 100 * error, "the control: what has not moved would be found out"
            A, B = (loop.factors[key].detach() for key in keys)
            A0, B0 = (loop.start[key] for key in keys)
            change += float((2 * (B @ A - B0 @ A0)).square().sum())
        assert adapter.change_l2 == pytest.approx(np.sqrt(change), rel=1e-5)


def test_batches_make_no_difference_but_the_rows_do(folder):
    tables = [stepped(folder, batch_size=size).table for size in (1, ROWS)]
    np.testing.assert_allclose(*(table["validation_loss"] for table in tables), rtol=1e-6)
    other = stepped(folder, seed=1).table
    assert (other["validation_loss"] - tables[0]["validation_loss"]).abs().max() > 1e-3
    np.testing.assert_allclose(other["step_size"], tables[0]["step_size"], rtol=1e-6)
    single = stepped(folder, double=False).table
    np.testing.assert_allclose(single["validation_loss"], tables[0]["validation_loss"], rtol=1e-4)


def test_rows_that_cannot_be_validated_are_refused(folder, monkeypatch):
    examples = make_examples()
    monkeypatch.setitem(globals(), "make_examples", lambda: examples[:1])
    with pytest.raises(InputError, match="calib_samples be 2 or more"):
        stepped(folder)
    monkeypatch.setitem(globals(), "make_examples", lambda: [examples[2], examples[3]])
    with pytest.raises(InputError, match="have no label to predict"):
        stepped(folder)
