"""Adapters whose tensors have other names than PEFT's: what is read, written and loaded is what was trained."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from sparselora.__main__ import main
from sparselora.errors import InputError
from sparselora.evaluation.losses import with_adapter
from sparselora.models.adapter_files import open_adapter
from sparselora.models.adapter_names import PREFIX
from tests.helpers.adapters import read_factors

WEIGHTS = "adapter_model.safetensors"


class Net(nn.Module):
    """Two layers in a list, an embedding, and a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(6, 6)}) for _ in range(2)])
        self.head = nn.Linear(6, 3)
        self.config = {"model_type": "net"}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = torch.tanh(layer["q_proj"](x))
        return self.head(x)


IDS = torch.arange(11)[None]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A saved adapter with LoRA on linear layers and an embedding, and a whole head."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "emb"], modules_to_save=["head"])
    model = get_peft_model(Net(), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(tmp_path / "trained"))
    return tmp_path / "trained"


def logits(folder: Path) -> torch.Tensor:
    """By plain PEFT, which must take every tensor of the file."""
    model = PeftModel.from_pretrained(Net(), str(folder))
    loaded = model.load_adapter(str(folder), "default")
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    with torch.no_grad():
        return model.eval()(IDS)


def renamed(source: Path, folder: Path, rename: Callable[[str], str], **config: Any) -> Path:
    shutil.copytree(source, folder)
    save_file({rename(name): value for name, value in load_file(source / WEIGHTS).items()}, folder / WEIGHTS)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def inside(wrapper: str) -> Callable[[str], str]:
    return lambda name: name.replace("q_proj.", f"q_proj.{wrapper}").replace("emb.", f"{wrapper}emb.")


def with_name(name: str) -> str:
    name = re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", name)
    return re.sub(r"(lora_embedding_[AB])$", r"\1.default", name).replace("head.", "head.modules_to_save.default.")


WRAPPERS = ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."]
RENAMED: Mapping[str, Callable[[str], str]] = {
    **{f"{wrapper} first": lambda name, w=wrapper: w + name for wrapper in WRAPPERS},
    **{f"{wrapper} after the prefix": lambda name, w=wrapper: name.replace(PREFIX, PREFIX + w) for wrapper in WRAPPERS},
    **{f"{wrapper} inside": inside(wrapper) for wrapper in WRAPPERS},
    "two wrappers": lambda name: f"module._orig_mod.{inside('_fsdp_wrapped_module.')(name)}",
    "wrapper within the prefix": lambda name: name.replace(PREFIX, "base_model._orig_mod.model."),
    "prefix twice": lambda name: PREFIX + name,
    "prefix thrice, wrapped": lambda name: f"{PREFIX}module.{PREFIX}{name}",
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "no prefix, wrapped": lambda name: f"_orig_mod.{name.removeprefix(PREFIX)}",
    "adapter's name": with_name,
    "adapter's name, wrapped": lambda name: f"module.{with_name(name)}",
}


@pytest.mark.parametrize("how", RENAMED)
def test_other_names_are_read_and_written_as_peft_loads_them(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    expected = logits(trained)
    source = renamed(trained, tmp_path / "renamed", RENAMED[how])
    with warnings.catch_warnings():  # the control: PEFT alone loads another function, or fails
        warnings.simplefilter("ignore")
        try:
            alone = PeftModel.from_pretrained(Net(), str(source)).eval()(IDS)
        except KeyError:
            alone = torch.zeros_like(expected)
    assert (alone - expected).abs().max() > 1e-3

    for read in (lambda: read_factors(source)[1], lambda: open_adapter(source)):
        with pytest.warns(UserWarning, match="by which PEFT loads nothing") as told:
            read()
        assert len(told) == 1
    with pytest.warns(UserWarning, match="by which PEFT loads nothing"):
        assert main(["reduce", "--adapter", str(source), "--rank", "3", "--out_dir", str(tmp_path / "out")]) == 0
    assert {key.removeprefix(PREFIX) for key in load_file(tmp_path / "out" / WEIGHTS)} == {
        key.removeprefix(PREFIX) for key in load_file(trained / WEIGHTS)
    }
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="by which PEFT loads nothing"):
        adapted = with_adapter(Net(), str(source))
    torch.testing.assert_close(adapted.eval()(IDS), expected)
    if how != "two wrappers":  # drawing its figure takes longer than all the rest
        return
    with pytest.warns(UserWarning, match="renamed"):
        assert main(["rank", "--adapter", str(source), "--out_dir", str(tmp_path / "rank")]) == 0
    assert "layers.0.q_proj" in (tmp_path / "rank" / "ranks.csv").read_text()


def test_names_of_peft_are_read_without_a_word(trained: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = open_adapter(trained)
        read_factors(trained)
    assert set(adapter.tensors) == set(load_file(trained / WEIGHTS))
    # A module that is called so is no wrapper: the configuration names it.
    source = renamed(
        trained, tmp_path / "m", lambda name: name.replace("q_proj.", "module."), target_modules=["module"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(open_adapter(source).modules) == {"layers.0.module", "layers.1.module"}


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: f"student.{name}", r"prefix 'student\.'"),
        (lambda name: f"module.policy.{name}", r"prefix 'policy\.'"),
        (lambda name: name.replace(PREFIX, f"{PREFIX}inner.{PREFIX}"), r"prefix 'inner\.'"),
        (lambda name: name.replace(PREFIX, "base_model."), r"prefix 'base_model\.'"),
        (lambda name: name.replace("head.", "head.original_module."), "untrained copy"),
    ],
)
def test_other_prefixes_are_refused_by_name(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rename: Callable[[str], str], message: str
) -> None:
    source = renamed(trained, tmp_path / "renamed", rename)
    for command in (["reduce", "--rank", "2", "--adapter"], ["rank", "--adapter"]):
        assert main([*command, str(source), "--out_dir", str(tmp_path / "out")]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=message):
        with_adapter(Net(), str(source))


def test_one_tensor_under_two_names_is_refused(trained: Path, tmp_path: Path) -> None:
    state = load_file(trained / WEIGHTS)
    name = f"{PREFIX}layers.0.q_proj.lora_A.weight"
    for twin in (f"module.{name}", name.removeprefix(PREFIX), name.replace("_A.", "_A.other.")):
        source = renamed(trained, tmp_path / "twins", lambda key: key)
        save_file({**state, twin: state[name].clone()}, source / WEIGHTS)
        for read in (read_factors, open_adapter):
            with pytest.raises(InputError, match="twice"):
                read(source)
        shutil.rmtree(source)


@pytest.mark.parametrize("shape", [(0,), (0, 6), (3, 0)])
def test_empty_tensors_name_their_cause(trained: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    source = renamed(trained, tmp_path / "empty", lambda name: name)
    state = load_file(trained / WEIGHTS)
    save_file({key: torch.empty(shape) if "lora_" in key else value for key, value in state.items()}, source / WEIGHTS)
    for read in (read_factors, open_adapter, lambda folder: with_adapter(Net(), str(folder))):
        with pytest.raises(InputError, match=r"empty tensors.*ZeRO-3 without gathering"):
            read(source)
