"""The novelty gate: run backward only for batches whose head gradient is new.

sketch   the head gradient of a batch from its forward pass, as one short vector; the subspace of past ones
gate     how new a batch is, and whether it is accepted at a target rate
trainer  a transformers Trainer that skips the backward passes of batches that are not
"""

from sparselora.config.novelty import POLICIES, GateConfig
from sparselora.novelty.gate import HeadGradientGate
from sparselora.novelty.sketch import CountSketch, FrequentDirections, SketchSum, TensorSketch, align_causal
from sparselora.novelty.trainer import SLoRATrainer

__all__ = [
    "POLICIES",
    "CountSketch",
    "FrequentDirections",
    "GateConfig",
    "HeadGradientGate",
    "SLoRATrainer",
    "SketchSum",
    "TensorSketch",
    "align_causal",
]
