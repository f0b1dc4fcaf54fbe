"""Training of adapters: the one Trainer, its measurements and checkpoints, and the pipeline of `train`.

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "FineTuner": "training.trainer",
        "StepMeter": "training.meter",
        "prepare": "training.run",
        "run_training": "training.run",
        "steady_steps": "training.meter",
    },
)
