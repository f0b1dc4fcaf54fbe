"""Models that FSDP2 shards over two processes train as in one: losses and LoRA gradients, in both orders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import sharded_steps
from tests.helpers.processes import start_two

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
