"""AdaLoRA adapters as plain LoRA: the update is that of AdaLoRA's own forward, and damage is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from sparselora.__main__ import main
from sparselora.errors import InputError
from sparselora.models.adalora import open_as_lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(17, 24), nn.Linear(24, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def trained(folder: Path, *, alpha: int = 5, is_masked: bool = True, target_r: int = 2) -> PeftModel:
    """An AdaLoRA trained in float64 until its masks are final, saved by PEFT, and as PEFT loads it."""
    config = AdaLoraConfig(
        init_r=6, target_r=target_r, lora_alpha=alpha, tinit=1, tfinal=3, deltaT=1, total_step=12,
        target_modules=["up", "down"],
    )  # fmt: skip
    model = get_peft_model(net(), config).double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        x = torch.randn(16, 17, dtype=torch.float64, generator=generator)
        loss = (model(x) - x[:, :11].sin()).square().mean()
        loss.backward()
        optimizer.step()
        if is_masked:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(net(), folder).double()


@pytest.mark.parametrize("settings", [{}, {"alpha": 0}, {"is_masked": False}, {"target_r": 1}], ids=str)
def test_the_reduced_adapter_computes_what_adalora_does_in_float64(tmp_path: Path, settings: dict) -> None:
    source = trained(tmp_path / "adalora", **settings)
    arguments = ["reduce", "--adapter", str(tmp_path / "adalora"), "--energy", "1", "--out_dir", str(tmp_path / "lora")]
    assert main(arguments) == 0
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora").double()
    assert isinstance(plain.peft_config["default"], LoraConfig)
    assert not isinstance(plain.peft_config["default"], AdaLoraConfig)
    x = torch.randn(9, 17, dtype=torch.float64)
    torch.testing.assert_close(plain(x), source(x), rtol=1e-12, atol=1e-12)
    assert (plain(x) - net()(x)).abs().max() > 1e-3  # the control: the adapter does something
    stored = [len(t) for name, t in load_file(tmp_path / "adalora" / WEIGHTS).items() if name.endswith("lora_A")]
    assert plain.peft_config["default"].r == max(stored)
    if settings.get("is_masked", True):
        assert min(stored) < 6  # the masks did their part


def test_a_file_saved_before_its_masks_were_applied_is_read_by_its_masks(tmp_path: Path) -> None:
    trained(tmp_path, is_masked=False)
    config = json.loads((tmp_path / CONFIG).read_text())
    mask = [True, False, True, False, False, True]
    config["rank_pattern"] = {"up.lora_E": mask}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    tensors = load_file(tmp_path / WEIGHTS)
    A, E, B = (tensors[f"base_model.model.up.lora_{part}"] for part in "AEB")
    new_A, new_B, scaling = open_as_lora(tmp_path).factors("up")
    wanted = 5 / (6 + 1e-5) * B[:, mask] @ (A * E)[mask]
    torch.testing.assert_close(scaling * new_B @ new_A, wanted)
    assert len(open_as_lora(tmp_path).factors("down")[0]) == 6


def test_a_module_without_a_triplet_left_is_a_zero_update(tmp_path: Path) -> None:
    trained(tmp_path, is_masked=False)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["rank_pattern"] = {"up.lora_E": [False] * 6}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    A, B, _ = open_as_lora(tmp_path).factors("up")
    assert (tuple(A.shape), tuple(B.shape)) == ((1, 17), (24, 1))
    assert not A.any()
    assert main(["reduce", "--adapter", str(tmp_path), "--rank", "2", "--out_dir", str(tmp_path.parent / "out")]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, tensors: tensors.pop("base_model.model.up.lora_E"), "up has no lora_E"),
        (lambda config, tensors: config.update(rank_pattern={"up.lora_E": [True] * 5}), "keeps 5 of 5"),
        (lambda config, tensors: config.update(rank_pattern={"up.lora_E": [3]}), "must be lists of true and false"),
        (lambda config, tensors: config.update(init_r="x"), "init_r must be a number"),
        (
            lambda config, tensors: tensors.update({"base_model.model.up.lora_B": torch.zeros(24, 5)}),
            "do not fit together",
        ),
        (
            lambda config, tensors: tensors.update({"base_model.model.e.lora_embedding_A": torch.zeros(2, 5)}),
            "only linear layers",
        ),
        (lambda config, tensors: tensors.clear(), "holds no lora_A, lora_E"),
        (
            lambda config, tensors: tensors.update(
                {"base_model.model.up.lora_A": torch.full((6, 17), float("nan"), dtype=torch.float64)}
            ),
            "holds NaN",
        ),
    ],
)
def test_damage_is_refused_in_one_line(tmp_path: Path, change, message: str) -> None:
    trained(tmp_path, is_masked=False)
    config, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    change(config, tensors)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=message):
        open_as_lora(tmp_path)
