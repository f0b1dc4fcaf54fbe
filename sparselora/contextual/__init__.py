"""Contextual sparsity (SparseLoRA, arXiv 2506.16500): a training step that computes what its context tokens need.

layout        which tokens of a batch are context, which carry the loss, and where attention keeps them
structure     the FFN and attention blocks of a model, found by structure
cache         factors and statistics on disk
selection     from scores to the channels that stay, and how good a choice was
estimator     cheap channel scores from SVD factors of frozen weights
surrogate     calibrated stand-ins: affine maps, static channels, mean compensation
frozen        a model's frozen linear layers with their LoRA: whole, fused, or restricted to channels
linears       those maps on parts of a batch, as autograd functions
graphs        a packed pass replayed as one CUDA graph
plan          what each layer computes for its context tokens in this step
calibration   activations measured on a few hundred samples, and the fixed choices that follow
modules       patched blocks of any transformer; decoder: the whole pass of a Llama-like one on packed tokens
gate_scores   what a per-token gate of rank channels sees of a token, which it selects, and the gradient of that
module_gate   the gate of one LoRA layer; token_gate: those of a model, their schedule, costs and files
schedule      `sparsify`, its handle, and the Trainer callback
sensitivity   what one sparse layer costs in loss, and layer sparsities for a FLOP budget
"""
