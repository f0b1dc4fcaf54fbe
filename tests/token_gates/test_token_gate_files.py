"""Token gates on disk: beside a plain adapter, loaded back to the same logits, refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from sparselora.config.token_gates import TokenGateConfig
from sparselora.errors import InputError
from sparselora.models import lora
from sparselora.token_gates.gates import (
    SETTINGS,
    TENSORS,
    attach_token_gates,
    gate_parameters,
    load_token_gates,
    save_token_gates,
)
from tests.helpers.contextual_models import ragged, tiny
from tests.token_gates.test_token_gate import R, assert_same, gated, perturb


def test_peft_does_not_see_the_gates(tmp_path: Path) -> None:
    plain = tiny("bert", r=R)
    model, gates = gated("bert")
    assert lora.adapter_parameters(model) == lora.adapter_parameters(plain)
    for folder, each in (("plain", plain), ("gated", model)):
        each.save_pretrained(tmp_path / folder)
    saved = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plain", "gated")]
    assert_same(saved[1], saved[0])
    assert gate_parameters(gates) > 0


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert", {"features": "both"}),
        ("bert", {"policy": "static"}),
        ("distilbert", {"policy": "energy"}),
        ("llama", {"select": "threshold"}),
    ],
)
def test_saved_gates_give_the_same_logits(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    batch = ragged(name)
    model, gates = gated(name, budget=0.4, **settings)
    if gates.config.policy == "learned":
        perturb(gates)
    model.eval()
    logits = model(**batch).logits
    if gates.config.policy == "static":  # the channels are those of the beginning, not those of today's energy
        for each in lora.lora_layers(model).values():
            lora.weights(each)[1].data *= torch.tensor([1, 9, 0.1, 4, 2])
        logits = model(**batch).logits
    lora.export_adapter(model, tmp_path, "tiny")
    save_token_gates(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {SETTINGS, TENSORS, "adapter_config.json"}
    assert not [*tmp_path.glob("*.tmp")]
    other = PeftModel.from_pretrained(tiny(name, lora=False), tmp_path, autocast_adapter_dtype=False).eval()
    assert not torch.allclose(other(**batch).logits, logits)
    loaded = load_token_gates(other, tmp_path)
    torch.testing.assert_close(other(**batch).logits, logits, rtol=1e-12, atol=1e-12)
    assert loaded.config == gates.config
    assert_same(loaded.state_dict(), gates.state_dict())


def test_gates_of_modules_of_several_ranks_find_their_channels(tmp_path: Path) -> None:
    """The exported adapter is filled with zeros up to one rank, which are no channels to choose from."""
    batch = ragged("bert")
    model = tiny("bert", r=R).eval()
    kept = lora.select_channels(lora.score_channels(model, "channel_energy"), 0.6, "global")
    lora.prune(model, kept)
    ranks = {name: lora.rank(layer) for name, layer in lora.lora_layers(model).items()}
    assert len(set(ranks.values())) > 1
    attach_token_gates(model, TokenGateConfig(policy="energy", budget=0.5))
    logits = model(**batch).logits
    lora.export_adapter(model, tmp_path, "tiny")
    save_token_gates(model, tmp_path)
    other = PeftModel.from_pretrained(tiny("bert", lora=False), tmp_path, autocast_adapter_dtype=False).eval()
    assert {lora.rank(layer) for layer in lora.lora_layers(other).values()} == {max(ranks.values())}
    load_token_gates(other, tmp_path)
    torch.testing.assert_close(other(**batch).logits, logits, rtol=1e-12, atol=1e-12)
    assert {name: lora.rank(layer) for name, layer in lora.lora_layers(other).items()} == ranks


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, gates = gated("bert")
    save_token_gates(model, tmp_path)
    with pytest.raises(InputError, match="has token gates already"):
        load_token_gates(model, tmp_path)
    gates.remove()
    settings, tensors = (tmp_path / SETTINGS).read_text(), (tmp_path / TENSORS).read_bytes()
    values, stored = json.loads(settings), load_file(tmp_path / TENSORS)
    key = next(iter(stored))

    def refused(message: str, other: PeftModel = model) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load_token_gates(other, tmp_path)
        assert "\n" not in str(caught.value)
        assert "token_gates" not in other._modules
        (tmp_path / SETTINGS).write_text(settings)
        (tmp_path / TENSORS).write_bytes(tensors)

    refused("has rank 3 in the model, 5 in token_gate.json", tiny("bert", r=3))
    refused("has rank none in the model, 5 in", tiny("bert", r=R, targets=["query"]))
    (tmp_path / SETTINGS).unlink()
    refused(f"has no {SETTINGS}")
    (tmp_path / TENSORS).unlink()
    refused(f"has no {TENSORS}")
    for text, message in (("{", "cannot be read"), ("[]", "must hold a JSON object"), ("{}", "does not hold config")):
        (tmp_path / SETTINGS).write_text(text)
        refused(message)
    (tmp_path / SETTINGS).write_text(json.dumps(values | {"config": values["config"] | {"budget": 2}}))
    refused(f"{SETTINGS}: budget must be")
    (tmp_path / TENSORS).write_bytes(tensors[:200])
    refused("truncated or corrupt")
    for changed, message in (
        ({k: v for k, v in stored.items() if k != key}, "has shape none, expected"),
        (stored | {key: stored[key][..., :-1].contiguous()}, r"has shape \(.*expected \("),
        (stored | {"another": torch.zeros(1)}, r"another has shape \(1,\), expected none"),
        (stored | {key: stored[key] * torch.nan}, "NaN or infinite"),
    ):
        save_file(changed, tmp_path / TENSORS)
        refused(message)
    load_token_gates(model, tmp_path)


def test_a_damaged_ranking_is_refused(tmp_path: Path) -> None:
    model, gates = gated("bert", policy="static")
    save_token_gates(model, tmp_path)  # gating has not begun: there is no ranking yet, and that is no damage
    gates.remove()
    load_token_gates(model, tmp_path).remove()
    stored = load_file(tmp_path / TENSORS)
    for ranking in ([0, 1, 2, 3, 3], [0, 1, 2, 3, 9]):
        save_file({key: torch.tensor(ranking) for key in stored}, tmp_path / TENSORS)
        with pytest.raises(InputError, match="is no order of its channels"):
            load_token_gates(model, tmp_path)
