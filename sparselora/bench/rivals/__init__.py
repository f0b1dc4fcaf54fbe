"""Other dense LoRA trainers, each timed in a process of its own on the batches that our steps are timed on.

The process (`child`) reads a `Job` as JSON from its stdin and answers with a line of JSON for every result on its
stdout, so that nothing that a trainer patches, prints or breaks reaches this one (`processes`). A trainer is one
module here, named as on the command line, with a function ``prepare``; `RIVALS` is the registry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rival:
    """A dense trainer to compare with.

    Attributes:
        help: its step in one line.
        modules: packages without which it is skipped, by their import names.
        distributions: packages whose versions are recorded, as far as they are installed.
        has_packed: takes rows without padding, one after the other, in one row with ``position_ids``.
    """

    help: str
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    has_packed: bool = True


RIVALS = {
    "unsloth": Rival("Unsloth's model and adapter, its own kernels", ("unsloth",), ("unsloth", "unsloth_zoo"), False),
    "trl": Rival("TRL's fused output layer, with Liger's layers where installed", ("trl",), ("trl", "liger-kernel")),
    "axolotl": Rival(
        "axolotl's LoRA kernels, TRL's fused output layer where installed", ("axolotl",), ("axolotl", "trl")
    ),
    "liger": Rival(
        "Liger's kernels, as the Trainer of transformers applies them", ("liger_kernel",), ("liger-kernel",)
    ),
    "peft": Rival("PEFT; on a GPU every layer compiled", ("peft",), ("peft",)),
}
"""Rival by its name on the command line."""
