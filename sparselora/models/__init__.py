"""Files of models and adapters, and the PyTorch and PEFT models loaded from them.

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "attach_lora": "models.attach",
        "attention_projections": "models.target_modules",
        "carry_optimizer_state": "models.lora",
        "export_adapter": "models.lora",
        "load_causal_lm": "models.load",
        "load_classifier": "models.load",
        "lora_layers": "models.lora",
        "mask_channels": "models.lora",
        "prune": "models.lora",
        "score_channels": "models.lora",
        "select_channels": "models.lora",
        "truncate_svd": "models.lora",
    },
)
