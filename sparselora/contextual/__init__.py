"""Contextual sparsity (SparseLoRA, arXiv 2506.16500): a training step that computes what its context tokens need.

From the bottom up:

layout             context and output tokens of a batch, and their places in attention's buffer
structure          the FFN and attention blocks of a model, found by structure
cache              estimators and statistics on disk
selection          from scores to channels, and the quality of a choice
estimator          cheap channel scores from SVD factors of frozen weights
surrogate          affine maps and channel statistics, fitted to calibration data
choices            the result of choosing: channels, or affine maps
lora_update        the LoRA that joins a frozen linear layer: factors and their gradients
operand            one product with a frozen weight, whole or restricted to channels
frozen             frozen linear layers with their LoRA: whole, or several as one
row_linear         those maps on ranges of rows, as autograd functions
block_linears      the linear layers of one block, and their operands for a choice
step               one pass over a batch
modes              the sparsity modes: what each calibrates, scores, fixes and costs
plan               one layer in a pass: choose by its mode, compute by the choice
statistics         activations measured on a few hundred samples, for the modes that need them
patches            patched blocks of any transformer
lora_casts         copies of the LoRA factors in the dtype of a pass
graphs             a packed pass replayed as one CUDA graph
decoder            the whole pass of a Llama-like decoder on packed tokens
proof              the trial by which a pass of ours is held to the model's own
output_layer       the output layer and the loss at labels only
pass_arguments     the arguments of a training pass, and what they say of its tokens
requirements       the requirements of a configuration on a model
passes             the passes of one converted model, in each way that it can run
trial              the trial that each of them has to pass
loss_output        the output of a pass that has computed the loss without most logits
step_count         the optimizer steps that a training loop announces
trainers           a handle inside somebody else's trainer
handle             `sparsify` and the handle of a sparse model
flops              MACs and FLOPs of a step, counted from the configuration
layer_sensitivity  the loss that one sparse layer costs
layer_schedule     layer sparsities for a FLOP budget

The public names below are imported when they are first used: counting needs no torch.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "FFNEstimator": "contextual.estimator",
        "Handle": "contextual.handle",
        "SVDSparsityEstimator": "contextual.estimator",
        "SparsityCallback": "contextual.trainers",
        "TokenLayout": "contextual.layout",
        "build_ffn_estimators": "contextual.estimator",
        "select_ffn_channels": "contextual.selection",
        "sparsify": "contextual.handle",
    },
)
