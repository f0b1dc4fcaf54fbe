"""The training loop of `train`: trainer, per-step measurements."""
