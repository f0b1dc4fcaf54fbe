"""Sparsity in LoRA fine-tuning: the library under the phase scripts and ``python -m sparselora``.

Map, from the bottom up (no folder imports one below it):

    namesake        another package of the same import name
    errors          InputError: bad input, on one line
    numerics        numpy, scipy: scores, reconstruction errors, spectra, statistics
    runs            run folders and their records, tables, grids, workers, signals
    config          strict settings of a run, and their flags
    cli             argument parser and exit status of every command
    models          files of models and adapters; models and LoRA in PyTorch
    data            rows of text and instructions as token ids and batches
    report          figures and Markdown
    kernels         Triton operations, each with its plain-torch reference
    contextual      training steps that compute only the channels their tokens need
    token_gates     LoRA rank channels chosen token by token
    novelty         backward passes for batches that bring a new gradient direction
    evaluation      held-out losses, generation, GSM8K
    spectral        adapters decomposed and edited
    training        the training loop of `train`
    inspection      Phases A and B: what approximations of a matrix lose
    pruning         Phase C: prune rank channels, train on
    compare         comparison of runs
    bench           `bench`: step times, FLOPs, estimates
    frontier        `frontier`: which shortcut of the training step pays
    commands        one module per sub-command

Importing the package loads none of these; a public name is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

__version__ = "0.1.0"

_PUBLIC = {
    "keep_count": "numerics.channels",
    "top_channels": "numerics.channels",
    "optimal_rank": "numerics.reconstruction",
    "relative_tail": "numerics.reconstruction",
    "factored_svd": "numerics.reconstruction",
    "compare_paired": "numerics.stats",
    "prune": "models.lora",
    "export_adapter": "models.lora",
    "SparsityConfig": "config.sparsity",
    "TrainConfig": "config.train",
    "get_layer_sparsity_ratio": "config.sparsity",
    "sparsify": "contextual.handle",
    "SVDSparsityEstimator": "contextual.estimator",
    "FFNEstimator": "contextual.estimator",
    "build_ffn_estimators": "contextual.estimator",
    "select_ffn_channels": "contextual.selection",
}


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """``__all__``, ``__getattr__`` and ``__dir__`` of a package whose public names are imported when first used.

    Args:
        package: its ``__name__``.
        modules: public name → dotted name, below ``sparselora``, of the module that defines it.
    """

    def get(name: str) -> object:
        if name in modules:
            return getattr(importlib.import_module(f"sparselora.{modules[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return [*modules], get, lambda: sorted(modules)


_names, __getattr__, _ = lazy_names(__name__, _PUBLIC)
__all__ = ["__version__", *_names]


def __dir__() -> list[str]:
    return sorted(__all__)
