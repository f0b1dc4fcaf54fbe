"""Comparison of runs: sweeps, training runs, gated runs and edits."""
