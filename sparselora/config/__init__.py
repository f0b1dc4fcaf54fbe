"""Settings of a run: strict models, YAML, and the flags made from them."""

LARGEST_SEED = 2**32 - 1
"""Largest seed that random, numpy and torch all take."""
