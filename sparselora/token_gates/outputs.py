"""Tables and files of what per-token gates did in a run, and the best fixed subset of channels in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from peft import PeftModel

from sparselora.config.token_gates import SETTINGS, TENSORS
from sparselora.models import lora
from sparselora.models.prompt_template import Template
from sparselora.runs.files import write_csv
from sparselora.token_gates.gates import (
    TokenGates,
    active_adapter_flops_per_token,
    gate_flops_per_token,
    gate_parameters,
    save_token_gates,
)

Array = NDArray[np.floating]

_MEASURES = (
    "gate_basis", "gate_budget", "active_rank", "gate_params", "gate_flops_per_token", "adapter_flops_per_token",
    "static_loss", "static_accuracy",
)  # fmt: skip

UNGATED_SUMMARY: Mapping[str, Any] = {"gate_policy": "none", **dict.fromkeys(_MEASURES, float("nan"))}
"""What `finish_token_gates` returns, for a run without gates."""


def token_gate_summary(gates: TokenGates) -> dict[str, Any]:
    """Columns of a run's summary: settings, what was measured since the counts were reset, and costs.

    ``active_rank`` is the mean over modules of the channels that were active for a token, ``gate_params`` and
    ``gate_flops_per_token`` are the decisions', ``adapter_flops_per_token`` the active channels' (1 MAC is 2 FLOPs).

    Raises:
        InputError: no token was counted; so do the functions below.
    """
    ranks = gates.active_rank()
    return {
        "gate_policy": gates.config.policy,
        "gate_basis": gates.config.basis,
        "gate_budget": gates.config.budget,
        "active_rank": float(np.mean(list(ranks.values()))),
        "gate_params": gate_parameters(gates),
        "gate_flops_per_token": gate_flops_per_token(gates),
        "adapter_flops_per_token": active_adapter_flops_per_token(gates, ranks),
    }


def channel_table(frequency: Mapping[str, Array], energy: Mapping[str, Array]) -> pd.DataFrame:
    """A row a rank channel: ``module``, ``channel``, ``frequency``, the share of the tokens it was active for, and
    ``energy``, ‖B_k‖‖A_k‖.

    Args:
        frequency, energy: of `TokenGates.frequency` and `energies`, ``(r,)`` by module.
    """
    return pd.concat(
        [
            pd.DataFrame({"module": name, "channel": range(len(share)), "frequency": share, "energy": energy[name]})
            for name, share in frequency.items()
        ],
        ignore_index=True,
    )


def energies(gates: TokenGates) -> dict[str, Array]:
    """‖B_k‖‖A_k‖ of each channel ``(r,)``, by module."""
    return {gate.name: np.sqrt(gate.energies()) for gate in gates}


def sum_counts(gates: TokenGates, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Sum over processes what each has counted by ``total``, which each must call.

    Rows that a sampler has repeated to even out the processes' shares are counted again.
    """
    for gate in gates:
        gate.active, gate.tokens = total(gate.active), total(gate.tokens)


def make_static(model: PeftModel, gates: TokenGates) -> None:
    """Leave the channels of `TokenGates.static_subset` alone: gates and other channels are gone, plain LoRA is left."""
    subset = gates.static_subset()
    gates.remove()
    lora.prune(model, subset)


def finish_token_gates(
    model: PeftModel,
    gates: TokenGates,
    *,
    base_model: str,
    template: Template | None = None,
    evaluate: Callable[[], Mapping[str, float]],
    path: Callable[[str], Path] | None,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda count: count,
) -> dict[str, Any]:
    """Write what the gates are and did, then put their fixed subset in their place, evaluate and write that.

    Written are ``token_gate.csv`` (`channel_table`), the gates next to the adapter in ``adapter/``, and
    ``adapter_static/``. The model is left with the subset.

    Args:
        base_model, template: as `sparselora.models.lora.export_adapter` takes them.
        evaluate: gives ``loss`` and ``accuracy`` of the model as it is, on the rows that the gates have counted.
        path: from an output's name to where it goes; None writes nothing.
        total: sums a count over processes, of which each must call this function.
    Returns:
        `token_gate_summary`, ``static_loss`` and ``static_accuracy``.
    """
    sum_counts(gates, total)
    summary = token_gate_summary(gates)
    if path is not None:
        write_csv(path("token_gate.csv"), channel_table(gates.frequency(), energies(gates)))
        save_token_gates(model, _folder_of(path, "adapter", SETTINGS, TENSORS))
    make_static(model, gates)
    static = evaluate()
    if path is not None:
        folder = _folder_of(path, "adapter_static", "adapter_config.json", "adapter_model.safetensors")
        lora.export_adapter(model, folder, base_model, template=template)
    return summary | {"static_loss": static["loss"], "static_accuracy": static["accuracy"]}


def _folder_of(path: Callable[[str], Path], folder: str, *names: str) -> Path:
    """Return the place of ``folder``, after naming each output in it to ``path``."""
    files = [path(f"{folder}/{name}") for name in names]
    return files[0].parent
