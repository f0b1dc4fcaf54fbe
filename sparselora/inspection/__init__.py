"""Phases A and B: what approximations of a matrix lose, on matrices we control and on the weights of a model.

trials           Phase A, whole: trials, their tables and figures
matrix_errors    errors of approximations of random matrices whose structure is known
trial_tables     tables over trials
model            Phase B, whole: all layers of a model
layer            everything that is measured of one layer's weight
predictors       errors of columns and rows that cheap predictors choose
experiment       all predictors on one layer
tables           tables over layers
rank             the least rank that each weight of a model, or update of an adapter, needs
simulation       the same for two simulated matrices, with times
data_ranks       LoRA ranks from the gradients of a fresh adapter
rank_flags       criterion and simulated matrices as flags
rank_text        all of these ranks as lines of text

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "adapter_ranks": "inspection.rank",
        "inspect_layer": "inspection.layer",
        "inspect_model": "inspection.model",
        "model_ranks": "inspection.rank",
        "run_trials": "inspection.trials",
    },
)
