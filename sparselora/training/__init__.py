"""Training of adapters: the one Trainer, its measurements and checkpoints, and the pipeline of `train`."""
