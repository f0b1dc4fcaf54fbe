"""Models that FSDP2 shards over two processes train as in one: losses and LoRA gradients, in both orders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import accelerate_steps, sharded_steps
from tests.helpers.processes import start, start_two

BOTH = "sparsify first,shard first"
PACKED = {"llama", "llama_mha_tied"}


def run(case: str, folder: Path) -> list[Any]:
    start_two(sharded_steps.__file__, case, str(folder), folder=folder)
    return [json.loads((folder / f"results{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "settings", "orders", "how"),
    [
        ("llama", "dense,static,surrogate,fp8 svd", BOTH, "blocks"),
        ("llama", "svd,oracle,skip,fp8", "shard first", "accelerate"),
        ("llama_mha_tied", "svd", BOTH, "accelerate"),
        ("gemma", "svd", BOTH, "blocks"),
        ("gpt2", "svd", "shard first", "blocks"),
        ("llama", "svd", "sparsify first", "parts"),
        ("llama", "fp8 svd", "sparsify first", "recomputed"),
        ("gemma", "svd", "sparsify first", "recomputed"),
    ],
)
def test_losses_and_gradients_are_those_of_one_process(name, settings, orders, how, tmp_path):
    """In float64: 1e-12. The control is a process's gradient from its own rows alone."""
    for results in run(f"compare:{name}:{settings}:{orders}:{how}", tmp_path):
        assert len(results) == len(settings.split(",")) * len(orders.split(","))
        for case, result in results.items():
            assert result["packed"] == (name in PACKED and how != "parts"), case
            assert (result["choices"] > 0) == (not case.startswith(("dense", "fp8,"))), case
            assert result["loss"] < 1e-12, case
            assert result["gradient"] < 1e-12, case
            assert not result["extra"], case
            assert result["after remove"] < 1e-12, case
            assert result["control"] > 1e-4, case


def test_no_whole_copy_of_the_weights_is_left(tmp_path):
    for results in run("memory:llama", tmp_path):
        for setting, result in results.items():
            assert result["replaced weights that live"] == 0, setting
            assert result["copies between forward and backward"] == 0, setting
            assert result["with one more"] == 1, setting  # the control


def test_a_process_without_labels_takes_part(tmp_path):
    first, second = run("no_labels:llama", tmp_path)
    assert first["loss"] > 1
    assert second["loss"] == 0
    assert max(first["gradient"], second["gradient"]) < 1e-12


def test_a_checkpoint_of_two_processes_goes_on_in_one(tmp_path):
    """The adapter and the optimizer's moments are saved whole; the control begins with new moments."""
    for results in run("resumed:llama", tmp_path):
        assert results["resumed"] < 1e-9
        assert results["without moments"] > 1e-5


def test_what_sharded_weights_do_not_go_with_is_named(tmp_path):
    for messages in run("refused:llama", tmp_path):
        assert "parts of model.layers.0 are sharded by themselves; call fully_shard on whole" in messages["parts"]
        assert "surrogate_refresh_steps is not supported for weights that fully_shard" in messages["refresh"]
        assert "wrapped for activation checkpointing; call sparsify before" in messages["wrapped"]
        assert "q_proj has a hook on its factors" in messages["factors"]
        assert messages["loaded"] == "accepted"
        assert "the weights are loaded in the first process only" in messages["not loaded"]


def trained_by_accelerate(setting: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """Results and saved adapters of one process, and of two that accelerate shards over."""
    one, two = folder / "one", folder / "two"
    one.mkdir()
    two.mkdir()
    alone = start(accelerate_steps.__file__, setting, str(one), "4", log=one / "log")
    with monkeypatch.context() as environment:
        for name, value in accelerate_steps.FSDP2.items():
            environment.setenv(name, value)
        start_two(accelerate_steps.__file__, setting, str(two), "2", folder=two)
    alone.join()
    assert alone.exitcode == 0, (one / "log").read_text()[-2000:]
    folders = (one, two)
    results = [json.loads((part / "results.json").read_text()) for part in folders]
    return results, [load_file(part / "adapter/adapter_model.safetensors") for part in folders]


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_a_trainer_under_accelerate_trains_as_one_process(tmp_path, monkeypatch):
    """`sparsify(trainer)`, then FSDP2: three steps of SGD in float64, and the adapter that rank 0 saves whole."""
    adapters = {}
    for setting in ("static", "fp8 none"):
        folder = tmp_path / setting
        folder.mkdir()
        (one, two), (alone, sharded) = trained_by_accelerate(setting, folder, monkeypatch)
        assert two["sharded"]
        assert not one["sharded"]
        assert two["packed"]
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert largest_difference(alone, sharded) < 1e-12
        adapters[setting] = sharded
    assert largest_difference(*adapters.values()) > 1e-3  # the control


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["dense", "static", "fp8 none"])
def test_two_gpus_under_accelerate_train_as_one(setting, tmp_path, monkeypatch):
    """In float32: the adapter after three steps of SGD within rounding, of numbers of 0.2."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    (one, two), (alone, sharded) = trained_by_accelerate(setting, tmp_path, monkeypatch)
    assert two["sharded"]
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert largest_difference(alone, sharded) < 1e-4
