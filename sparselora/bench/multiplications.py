"""Multiplications of two configurations per token, by component and layer, without a model and without torch."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sparselora.bench.request import FlopsRequest
from sparselora.contextual.flops import compare_costs, comparison_table, format_comparison, layer_costs, token_costs
from sparselora.runs.files import write_csv
from sparselora.runs.folder import RunFolder


def count_multiplications(request: FlopsRequest, folder: RunFolder) -> str:
    """Count, write tables and figure into ``folder``, and return the comparison as text.

    Raises:
        InputError: a configuration that does not fit the model, before anything is written.
    """
    from sparselora.report.contextual import flops

    setup = request.setup
    before, after = (
        token_costs(setup.shape, config, setup.work, setup.lora) for config in (request.before, request.after)
    )
    rows = compare_costs(before, after)
    with folder:
        table = pd.DataFrame(comparison_table(rows, request.unit))
        write_csv(folder.path("flops.csv"), table)
        write_csv(folder.path("flops_per_layer.csv"), per_layer(request))
        flops(folder.path("flops.png"), table, list(request.labels), request.unit, setup.title)
    return (
        f"{format_comparison(rows, request.unit)}\n"
        "One MAC is 2 FLOPs. training: forward and backward; a frozen weight counts twice its forward, adapters and "
        "attention scores three times, an estimate once.\nNot counted: norms, softmax, embeddings, the optimizer."
    )


def per_layer(request: FlopsRequest) -> pd.DataFrame:
    """Return forward counts of every layer and component for a context and for an output token."""
    setup, unit = request.setup, request.unit
    times, rows = (1 if unit == "MACs" else 2), []
    for layer in range(setup.shape.layers):
        before, after = (
            layer_costs(setup.shape, config, setup.work, layer, setup.lora, exact=config is not None)
            for config in (request.before, request.after)
        )
        for component in before[0]:
            row: dict[str, Any] = {"layer": layer, "component": component}
            for tokens, i in (("context", 0), ("output", 1)):
                row[f"{tokens}_{unit}_before"] = times * before[i][component]
                row[f"{tokens}_{unit}_after"] = times * after[i][component]
            rows.append(row)
    return pd.DataFrame(rows)
