"""Per-token gates of LoRA rank channels: attach them to a PEFT model, train, save and load them.

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "TokenGateCallback": "token_gates.gates",
        "TokenGateConfig": "config.token_gates",
        "TokenGates": "token_gates.gates",
        "attach_token_gates": "token_gates.gates",
        "find_token_gates": "token_gates.gates",
        "load_token_gates": "token_gates.gates",
        "save_token_gates": "token_gates.gates",
    },
)
