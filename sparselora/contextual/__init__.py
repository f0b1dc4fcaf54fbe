"""Contextual sparsity (SparseLoRA, arXiv 2506.16500): a training step that computes what its context tokens need.

layout        which tokens of a batch are context, which carry the loss, and where attention keeps them
structure     the FFN and attention blocks of a model, found by structure
estimator     cheap channel scores from SVD factors of frozen weights; selection
surrogate     calibrated stand-ins: affine maps, static channels, mean compensation
cache         factors and statistics on disk
linears       frozen linear maps with LoRA, whole or restricted to channels, as autograd functions
plan          what each layer computes for its context tokens in this step
modules       patched blocks of any transformer; decoder: the whole pass of a Llama-like one on packed tokens
schedule      `sparsify`, its handle, and the Trainer callback
"""
