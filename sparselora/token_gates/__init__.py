"""Per-token gates of LoRA rank channels: attach them to a PEFT model, train, save and load them.

The public names are imported when they are first used.
"""

from __future__ import annotations

import importlib

_PUBLIC = {
    "TokenGateCallback": "token_gates.gates",
    "TokenGateConfig": "config.token_gates",
    "TokenGates": "token_gates.gates",
    "attach_token_gates": "token_gates.gates",
    "find_token_gates": "token_gates.gates",
    "load_token_gates": "token_gates.gates",
    "save_token_gates": "token_gates.gates",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"sparselora.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
