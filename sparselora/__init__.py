"""Sparsity in LoRA fine-tuning: the library under the phase scripts and ``python -m sparselora``.

Map, from the bottom up (nothing imports a line below its own):

    errors, files, process, cli                                    the standard library
    channels, reconstruction, matrices, spectra, stats, costs      numpy, scipy: scores, errors, spectra, tests, counts
    records, workers                                               run folders and tables; a map over processes
    settings, gate_config, token_gate_config                       strict YAML; the settings of both kinds of gates
    config, flags, token_gate_flags                                the settings of a run, and all of them as flags
    predictors, layer_tables, sweep, run_tables                    what Phase B measures; what sweeps and runs compare
    figures                                                        matplotlib, one module a command
    weights, adapters, model_configs                               files of models and PEFT, one tensor at a time
    flops                                                          what a dense and a sparse step multiply
    lora, models, data, training                                   torch, peft, transformers, datasets
    kernels, contextual                                            torch, triton: steps that compute what they need
    pruning, prune_cells                                           Phase C: one run, and what it leaves behind
    token_gate_outputs                                             what per-token gates did in a run of `train`
    novelty, gate_tables, gate_report                              the novelty gate, its Trainer, and what it skipped
    spectral                                                       adapters decomposed, edited, evaluated
    instructions, batches, run_data, step_meter, finetuning        data, loop and records of `train`
    bench                                                          `bench`: step times, what pays, estimates checked
    commands, the three phase scripts, benchmarks

Importing the package loads none of these; a public name is imported when it is first asked for.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "keep_count": "channels",
    "top_channels": "channels",
    "optimal_rank": "reconstruction",
    "relative_tail": "reconstruction",
    "factored_svd": "reconstruction",
    "compare_paired": "stats",
    "prune": "lora",
    "export_adapter": "lora",
    "SparsityConfig": "config",
    "TrainConfig": "config",
    "get_layer_sparsity_ratio": "config",
    "sparsify": "contextual.schedule",
    "SVDSparsityEstimator": "contextual.estimator",
    "FFNEstimator": "contextual.estimator",
    "build_ffn_estimators": "contextual.estimator",
    "select_ffn_channels": "contextual.selection",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"sparselora.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'sparselora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
