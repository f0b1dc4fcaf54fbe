"""The edit of a whole adapter: its modules decomposed, their singular values changed, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from sparselora.errors import InputError
from sparselora.models.adapter import AdapterFile
from sparselora.models.adapter_files import PREFIX
from sparselora.models.lora import lora_layers, weights
from sparselora.spectral.factors import AdapterSVD, adapter_svd, refactor
from sparselora.spectral.modes import (
    ROLES,
    ZERO,
    EditOptions,
    EditResult,
    PredictedChange,
    edit_spectrum,
    energy_matched_random,
    predicted_change,
)
from sparselora.spectral.sensitivity import Sensitivity, from_frame

Factors = dict[str, tuple[Tensor, Tensor]]
"""Module → (lora_A, lora_B) in the adapter's stored types."""

ROWS, MODES, DRAWS, BOOTSTRAP = range(4)
"""Streams of random numbers: calibration rows, modes that draw, the null's draws, resampling."""

_SAME_SIGMA = 1e-6


def generator(seed: int, stream: int, *child: int) -> np.random.Generator:
    """The generator of one stream, and of one child of it; all of them independent."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, *child)))


def name_in_model(module: str) -> str:
    """How a loaded PEFT model calls a module of the adapter's file."""
    return PREFIX + module


@dataclass(frozen=True)
class ModuleEdit:
    """One module before and after: its decomposition, what the calibration says of it, and the new values."""

    module: str
    svd: AdapterSVD
    found: Sensitivity
    result: EditResult

    @property
    def sigma(self) -> np.ndarray:
        """``(r,)`` before the edit."""
        return self.svd.sigma.cpu().numpy()

    @property
    def change(self) -> np.ndarray:
        return self.result.sigma - self.sigma

    def predicted(self) -> PredictedChange:
        return predicted_change(self.sigma, self.result.sigma, self.found.mean.numpy(), self.found.fisher.numpy())


# --- before the edit ----------------------------------------------------------------------------------------------


def decompositions(
    adapter: AdapterFile, modules: Sequence[str], progress: Callable[[], object] = lambda: None
) -> dict[str, AdapterSVD]:
    """The decomposition of each of ``modules``."""
    found = {}
    for module in modules:
        found[module] = adapter_svd(*adapter.factors(module))
        progress()
    return found


def read_statistics(path: Path, svds: Mapping[str, AdapterSVD]) -> dict[str, Sensitivity]:
    """The statistics in a ``sensitivity.csv`` of an earlier edit, for each module of ``svds``; it may hold others too.

    Raises:
        InputError: no such file, or no such table in it; a module is missing, of another rank or of other singular
            values: it was measured on another adapter.
    """
    try:
        frame = pd.read_csv(path, float_precision="round_trip")
    except (OSError, ValueError) as error:
        raise InputError(f"--sensitivity {path} cannot be read ({' '.join(str(error).split())[:120]})") from None
    known = {found.module: found for found in from_frame(frame)}
    chosen = {}
    for module, svd in svds.items():
        if module not in known:
            raise InputError(
                f"--sensitivity {path} holds nothing on {module}; it was measured on other modules or another adapter: "
                "leave it out to calibrate anew"
            )
        found = known[module]
        sigma = svd.sigma.cpu()
        if found.sigma.shape != sigma.shape or (found.sigma - sigma).abs().max() > _SAME_SIGMA * sigma.max():
            raise InputError(
                f"--sensitivity {path} has other singular values for {module} than the adapter; it was measured on "
                "another adapter: leave it out to calibrate anew"
            )
        values = (getattr(found, name) for name in ("mean", "mean_abs", "fisher"))
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise InputError(f"--sensitivity {path} has missing or infinite values for {module}; calibrate anew")
        chosen[module] = replace(found, sigma=sigma.double())
    return chosen


# --- edits --------------------------------------------------------------------------------------------------------


def edit_modules(
    svds: Mapping[str, AdapterSVD], found: Mapping[str, Sensitivity], mode: str, options: EditOptions, seed: int
) -> list[ModuleEdit]:
    """Every module's edit by ``mode``; one that draws does so from a stream of its own for each module.

    Raises:
        InputError: as `edit_spectrum` does, with the module's name.
    """
    edits = []
    for number, (module, svd) in enumerate(svds.items()):
        each = found[module]
        statistics = (each.mean.numpy(), each.mean_abs.numpy(), each.fisher.numpy())
        rng = generator(seed, MODES, number)
        try:
            result = edit_spectrum(mode, svd.sigma.cpu().numpy(), *statistics, options, rng)
        except InputError as error:
            raise InputError(f"{module}: {error}") from None
        edits.append(ModuleEdit(module, svd, each, result))
    return edits


def random_draw(edits: Sequence[ModuleEdit], seed: int, draw: int) -> list[ModuleEdit]:
    """The null number ``draw`` of an edit: its factors in random places, module by module with its ‖Δσ‖₂."""
    drawn = []
    for number, edit in enumerate(edits):
        try:
            result = energy_matched_random(edit.sigma, edit.result, generator(seed, DRAWS, draw, number))
        except InputError as error:
            raise InputError(f"{edit.module}: {error}") from None
        drawn.append(replace(edit, result=result))
    return drawn


def unchanged(edits: Sequence[ModuleEdit]) -> list[ModuleEdit]:
    """The same modules with the singular values that they have."""
    return [replace(edit, result=EditResult(edit.sigma.copy(), edit.result.role.copy(), 0.0, 0.0)) for edit in edits]


def new_factors(adapter: AdapterFile, edits: Sequence[ModuleEdit], *, round_trip: bool = False) -> Factors:
    """What ``edits`` make of the adapter's factors; see `refactor` for ``round_trip``."""
    found = {}
    for edit in edits:
        A, B, scaling = adapter.factors(edit.module)
        sigma = torch.from_numpy(edit.result.sigma)
        found[edit.module] = refactor(edit.svd, sigma, A, B, scaling, round_trip=round_trip)
    return found


def total_prediction(edits: Sequence[ModuleEdit]) -> PredictedChange:
    """Of all modules together: interactions between them are left out."""
    each = [edit.predicted() for edit in edits]
    return PredictedChange(sum(p.first for p in each), sum(p.second for p in each))


def total_change(edits: Sequence[ModuleEdit]) -> float:
    """‖Δσ‖₂ over all modules."""
    return float(np.sqrt(sum(edit.result.change_l2**2 for edit in edits)))


@contextmanager
def in_place(
    model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], adapter: str = "default"
) -> Iterator[None]:
    """The loaded PEFT ``model`` with other ``factors`` (modules as the adapter's file names them); afterwards, bit for
    bit, as it was."""
    named = {name_in_model(module): new for module, new in factors.items()}
    layers, saved = lora_layers(model, adapter, named), []
    try:
        with torch.no_grad():
            for name, new in named.items():
                for parameter, value in zip(weights(layers[name], adapter), new):
                    saved.append((parameter, parameter.detach().clone()))
                    parameter.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for parameter, old in saved:
                parameter.copy_(old)


# --- as tables ----------------------------------------------------------------------------------------------------


def module_table(edits: Sequence[ModuleEdit]) -> pd.DataFrame:
    """A row a module: rank, counts of roles, sum and norms of sigma before and after, and the predicted ΔL in nats a
    label."""
    rows = []
    for edit in edits:
        predicted = edit.predicted()
        row: dict[str, object] = {"module": edit.module, "d_out": len(edit.svd.U), "d_in": len(edit.svd.V)}
        row["r"] = edit.svd.rank
        row |= {role: edit.result.count(role) for role in ROLES}
        for when, sigma in (("before", edit.sigma), ("after", edit.result.sigma)):
            row |= {f"sum_{when}": sigma.sum(), f"l2_{when}": np.linalg.norm(sigma), f"max_{when}": sigma.max()}
        row |= {"change_l2": edit.result.change_l2, "predicted_first": predicted.first}
        rows.append(row | {"predicted_second": predicted.second})
    return pd.DataFrame(rows)


def direction_table(edits: Sequence[ModuleEdit]) -> pd.DataFrame:
    """A row a direction: its value before and after, its role, and its statistics."""
    parts = []
    for edit in edits:
        found = edit.found
        parts.append(pd.DataFrame({
            "module": edit.module, "index": range(edit.svd.rank), "sigma_before": edit.sigma,
            "sigma_after": edit.result.sigma, "role": edit.result.role, "mean": found.mean.numpy(),
            "mean_abs": found.mean_abs.numpy(), "fisher": found.fisher.numpy(),
        }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def summary(adapter: AdapterFile, edits: Sequence[ModuleEdit]) -> dict[str, Any]:
    """What was done to the adapter, in all and module by module, and what was left alone; in plain types."""
    predicted, chosen = total_prediction(edits), {edit.module for edit in edits}
    return {
        "total": {
            "modules": len(edits),
            "all_zero": all_zero(edits),
            "change_l2": total_change(edits),
            "predicted_first": predicted.first,
            "predicted_second": predicted.second,
            "unit": "nats a label",
        },
        "modules": {str(row.pop("module")): row for row in module_table(edits).to_dict("records")},
        "not_chosen": [module for module in adapter.modules if module not in chosen],
        "carried": adapter.carried,
    }


def all_zero(edits: Sequence[ModuleEdit]) -> bool:
    """Whether no module has a direction to edit."""
    return all(edit.result.count(ZERO) == edit.svd.rank for edit in edits)
