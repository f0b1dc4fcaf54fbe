"""An edit and its controls, each put into the loaded model in turn and evaluated on the same items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from sparselora.models.adapter_files import AdapterFile
from sparselora.spectral.descent import Descent, SteppedAdapter
from sparselora.spectral.edit import AdapterEdit, Factors, in_place
from sparselora.spectral.modes import EditOptions
from sparselora.spectral.request import sgd_name

SIGNED = "gd"
"""The mode that follows the sign of the gradient: what an edit by magnitude is compared with."""

ORACLE = "oracle"
"""Kind of the signed mode by the gradient of the evaluation rows themselves: no rival, an upper bound."""

SGD = "sgd"
"""Kind of the adapter after SGD steps on the calibration rows: the rival that has the same information."""


@dataclass(frozen=True)
class Variant:
    """One state of the adapter that is evaluated.

    Attributes:
        name: label in the tables.
        kind: its part in the comparison, see `sparselora.spectral.verdict`.
        edit: what changes the adapter; None where nothing does.
    """

    name: str
    kind: str
    edit: AdapterEdit | SteppedAdapter | None = None

    def facts(self) -> dict[str, Any]:
        """Return the size of the change and its predicted ΔL; NaN for what is no edit."""
        if self.edit is None:
            change, first, second = (float("nan"),) * 3
        else:
            predicted = self.edit.predicted()
            change, first, second = self.edit.change_l2, predicted.first, predicted.second
        facts = {"variant": self.name, "kind": self.kind, "change_l2": change}
        return facts | {"predicted_first": first, "predicted_second": second}


def all_variants(edit: AdapterEdit, mode: str, options: EditOptions, seed: int, draws: int) -> list[Variant]:
    """Return no adapter, the adapter as it is and after a round trip, the edit, the signed mode, and the draws of the
    null.

    An adapter that also trained other weights (a classifier's head) is evaluated with these alone, too, unless it has
    LoRA on embeddings or convolutions: without its linear factors it would not be the model without LoRA.

    Raises:
        InputError: a draw that cannot be matched in energy.
    """
    variants = [Variant("no adapter", "base")]
    if "trained in full" in edit.adapter.carried.values() and not edit.adapter.fixed:
        variants.append(Variant("no LoRA", "no_lora"))
    variants.append(Variant("unedited", "unedited", edit.unchanged()))
    variants.append(Variant("round trip", "round_trip", edit.unchanged()))
    variants.append(Variant(mode, "edit", edit))
    if mode != SIGNED:
        variants.append(Variant(SIGNED, "signed", edit.with_mode(SIGNED, options, seed)))
    return variants + [Variant(f"draw {i}", "draw", edit.random_draw(seed, i)) for i in range(draws)]


def sgd_variants(descent: Descent) -> list[Variant]:
    """Return the adapter after each number of SGD steps."""
    return [Variant(sgd_name(stepped.steps), SGD, stepped) for stepped in descent.stepped]


def evaluate_variants(
    model: Any,
    adapter: AdapterFile,
    variants: Sequence[Variant],
    losses: Callable[[], pd.DataFrame],
) -> pd.DataFrame:
    """Return the tables of ``losses()`` with the model in the state of each variant, one below the other, by
    ``variant``."""
    tables = []
    for variant in variants:
        with _applied(model, adapter, variant):
            table = losses()
        table.insert(0, "variant", variant.name)
        tables.append(table)
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
    assert variant.edit is not None
    return variant.edit.factors(round_trip=variant.kind == "round_trip")
