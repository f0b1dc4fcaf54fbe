"""Measurements of ``python -m sparselora bench``.

setup             model, shape, sparsity, adapter and batch from the flags and a configuration
payoff            from step times to ratios, ceilings, overheads and the point of breaking even
timing            whole training steps of several variants, interleaved
estimator_check   how well estimates rank channels on real activations
"""
