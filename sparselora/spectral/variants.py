"""An edit and what it must be held against, each put into the loaded model in turn and evaluated on the same items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from sparselora.models.adapter import AdapterFile
from sparselora.spectral.edit import (
    Factors,
    ModuleEdit,
    edit_modules,
    in_place,
    new_factors,
    random_draw,
    total_change,
    total_prediction,
    unchanged,
)
from sparselora.spectral.modes import EditOptions

SIGNED = "gd"
"""The mode that follows the sign of the gradient: what an edit by magnitude is compared with."""


@dataclass(frozen=True)
class Variant:
    """A name, what it is for (``kind``, see `sparselora.spectral.verdict`), and its edits; None where it is no edit."""

    name: str
    kind: str
    edits: list[ModuleEdit] | None = None

    def facts(self) -> dict[str, Any]:
        """The size of the change and its predicted ΔL; NaN for what is no edit."""
        if self.edits is None:
            change, first, second = (float("nan"),) * 3
        else:
            predicted = total_prediction(self.edits)
            change, first, second = total_change(self.edits), predicted.first, predicted.second
        facts = {"variant": self.name, "kind": self.kind, "change_l2": change}
        return facts | {"predicted_first": first, "predicted_second": second}


def all_variants(
    adapter: AdapterFile, edits: Sequence[ModuleEdit], mode: str, options: EditOptions, seed: int, draws: int
) -> list[Variant]:
    """No adapter, the adapter as it is and after a round trip, the edit, the signed mode, and the draws of the null.

    An adapter that also trained other weights (a classifier's head) is evaluated with these alone, too.

    Raises:
        InputError: a draw that cannot be matched in energy.
    """
    found = [Variant("no adapter", "base")]
    if "trained in full" in adapter.carried.values():
        found.append(Variant("no LoRA", "no_lora"))
    found.append(Variant("unedited", "unedited", unchanged(edits)))
    found.append(Variant("round trip", "round_trip", unchanged(edits)))
    found.append(Variant(mode, "edit", list(edits)))
    if mode != SIGNED:
        svds, statistics = ({edit.module: getattr(edit, name) for edit in edits} for name in ("svd", "found"))
        found.append(Variant(SIGNED, "signed", edit_modules(svds, statistics, SIGNED, options, seed)))
    return found + [Variant(f"draw {i}", "draw", random_draw(edits, seed, i)) for i in range(draws)]


def evaluate_variants(
    model: Any,
    adapter: AdapterFile,
    variants: Sequence[Variant],
    losses: Callable[[], pd.DataFrame],
    progress: Callable[[], object] = lambda: None,
) -> pd.DataFrame:
    """The tables of ``losses()`` with the model as each variant has it, one below the other, by ``variant``."""
    tables = []
    for variant in variants:
        with _applied(model, adapter, variant):
            table = losses()
        table.insert(0, "variant", variant.name)
        tables.append(table)
        progress()
    return pd.concat(tables, ignore_index=True)


def _applied(model: Any, adapter: AdapterFile, variant: Variant) -> AbstractContextManager[None]:
    if variant.kind == "base":
        disabled: AbstractContextManager[None] = model.disable_adapter()
        return disabled
    return in_place(model, _factors(adapter, variant))


def _factors(adapter: AdapterFile, variant: Variant) -> Factors:
    if variant.kind == "no_lora":
        pairs = {module: adapter.factors(module)[:2] for module in adapter.modules}
        return {module: (A, torch.zeros_like(B)) for module, (A, B) in pairs.items()}
    assert variant.edits is not None
    return new_factors(adapter, variant.edits, round_trip=variant.kind == "round_trip")
