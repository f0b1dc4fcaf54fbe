"""The novelty gate: run backward only for batches whose head gradient is new.

sketch   the head gradient of a batch from its forward pass, as one short vector; the subspace of past ones
gate     how new a batch is, and whether it is accepted at a target rate
manipulation  were the accepted batches newer than the rejected ones?
trainer  a transformers Trainer that skips the backward passes of batches that are not

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CountSketch": "novelty.sketch",
        "FrequentDirections": "novelty.sketch",
        "GateConfig": "config.novelty",
        "HeadGradientGate": "novelty.gate",
        "SLoRATrainer": "novelty.trainer",
        "SketchSum": "novelty.sketch",
        "TensorSketch": "novelty.sketch",
        "align_causal": "novelty.sketch",
    },
)
