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
from sparselora.models.adapter_files import AdapterFile, write_adapter
from sparselora.models.adapter_names import PREFIX
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
from sparselora.spectral.sensitivity import Sensitivity, from_frame, to_frame

Factors = dict[str, tuple[Tensor, Tensor]]
"""Module → (lora_A, lora_B) in the adapter's stored types."""

ROWS, MODES, DRAWS, BOOTSTRAP, GENERAL_BOOTSTRAP, HALVES = range(6)
"""Streams of random numbers: calibration rows, modes that draw, draws of the null, resampling of the held-out rows and
of general text, halves of the calibration rows."""

DIRECTIONS = "edited.csv"
"""The table with a row per singular direction."""

_SAME_SIGMA = 1e-6


def generator(seed: int, stream: int, *child: int) -> np.random.Generator:
    """Return the generator of one stream, or of one child of it; all of them are independent."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, *child)))


def name_in_model(module: str) -> str:
    """Return the name in a loaded PEFT model of a module of the adapter's file."""
    return PREFIX + module


# --- before the edit ----------------------------------------------------------------------------------------------


def decompositions(
    adapter: AdapterFile, modules: Sequence[str], progress: Callable[[], object] = lambda: None
) -> dict[str, AdapterSVD]:
    """Return the decomposition of each of ``modules``; ``progress`` is called after each."""
    svds = {}
    for module in modules:
        svds[module] = adapter_svd(*adapter.factors(module))
        progress()
    return svds


def read_statistics(path: Path, svds: Mapping[str, AdapterSVD]) -> dict[str, Sensitivity]:
    """Return the statistics in a ``sensitivity.csv`` of an earlier edit, for each module of ``svds``; the file may hold
    others too.

    Raises:
        InputError: no such file, or no such table in it; a module is missing, of another rank or of other singular
            values: it was measured on another adapter.
    """
    try:
        frame = pd.read_csv(path, float_precision="round_trip")
    except (OSError, ValueError) as error:
        raise InputError(f"--sensitivity {path} cannot be read ({' '.join(str(error).split())[:120]})") from None
    by_module = {statistics.module: statistics for statistics in from_frame(frame)}
    selected = {}
    for module, svd in svds.items():
        if module not in by_module:
            raise InputError(
                f"--sensitivity {path} holds nothing on {module}; it was measured on other modules or another adapter: "
                "leave it out to calibrate again"
            )
        statistics = by_module[module]
        sigma = svd.sigma.cpu()
        if statistics.sigma.shape != sigma.shape or (statistics.sigma - sigma).abs().max() > _SAME_SIGMA * sigma.max():
            raise InputError(
                f"--sensitivity {path} has other singular values for {module} than the adapter; it was measured on "
                "another adapter: leave it out to calibrate again"
            )
        values = (getattr(statistics, name) for name in ("mean", "mean_abs", "fisher"))
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise InputError(f"--sensitivity {path} has missing or infinite values for {module}; calibrate again")
        selected[module] = replace(statistics, sigma=sigma.double())
    return selected


# --- the edit -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleEdit:
    """One module before and after.

    Attributes:
        module: name in the adapter's file.
        svd: of its update.
        sensitivity: reaction of the loss to each singular value, from the calibration.
        result: new singular values, and the role of each direction.
    """

    module: str
    svd: AdapterSVD
    sensitivity: Sensitivity
    result: EditResult

    @property
    def sigma(self) -> np.ndarray:
        """Singular values before the edit, ``(r,)``."""
        return self.svd.sigma.cpu().numpy()

    @property
    def change(self) -> np.ndarray:
        """Δσ ``(r,)``."""
        return self.result.sigma - self.sigma

    def predicted(self) -> PredictedChange:
        """Return the predicted ΔL of this module's change alone."""
        statistics = self.sensitivity
        return predicted_change(self.sigma, self.result.sigma, statistics.mean.numpy(), statistics.fisher.numpy())


@dataclass(frozen=True)
class AdapterEdit:
    """New singular values for modules of an adapter: the factors they give, their tables, and the adapter written.

    Attributes:
        adapter: as it is stored; the edit does not change it.
        modules: the modules that are edited, in the adapter's order. Others keep their factors.
    """

    adapter: AdapterFile
    modules: tuple[ModuleEdit, ...]

    @classmethod
    def by_mode(
        cls,
        adapter: AdapterFile,
        svds: Mapping[str, AdapterSVD],
        sensitivities: Mapping[str, Sensitivity],
        mode: str,
        options: EditOptions,
        seed: int,
    ) -> AdapterEdit:
        """Edit the modules of ``svds`` by ``mode``; one that draws has a stream of random numbers for each module.

        Raises:
            InputError: as `edit_spectrum` does, with the module's name.
        """
        modules = []
        for number, (module, svd) in enumerate(svds.items()):
            sensitivity = sensitivities[module]
            statistics = (sensitivity.mean.numpy(), sensitivity.mean_abs.numpy(), sensitivity.fisher.numpy())
            rng = generator(seed, MODES, number)
            with _naming(module):
                result = edit_spectrum(
                    mode, svd.sigma.cpu().numpy(), *statistics, options, rng, is_intruder=svd.intruder_flags
                )
            modules.append(ModuleEdit(module, svd, sensitivity, result))
        return cls(adapter, tuple(modules))

    def with_mode(self, mode: str, options: EditOptions, seed: int) -> AdapterEdit:
        """Return the edit of the same modules, with the same statistics, by another mode."""
        svds = {edit.module: edit.svd for edit in self.modules}
        return self.by_mode(
            self.adapter, svds, {edit.module: edit.sensitivity for edit in self.modules}, mode, options, seed
        )

    def unchanged(self) -> AdapterEdit:
        """Return the same modules with the singular values that they have."""
        modules = (
            replace(edit, result=EditResult(edit.sigma.copy(), edit.result.role.copy(), 0.0)) for edit in self.modules
        )
        return replace(self, modules=tuple(modules))

    def random_draw(self, seed: int, draw: int) -> AdapterEdit:
        """Return the null number ``draw`` of this edit: its factors in random places, with its ‖Δσ‖₂ in each module.

        Raises:
            InputError: a module whose energy no placement matches.
        """
        modules = []
        for number, edit in enumerate(self.modules):
            with _naming(edit.module):
                result = energy_matched_random(edit.sigma, edit.result, generator(seed, DRAWS, draw, number))
            modules.append(replace(edit, result=result))
        return replace(self, modules=tuple(modules))

    # --- the adapter after the edit -------------------------------------------------------------------------------

    def factors(self, *, round_trip: bool = False) -> Factors:
        """Return the new factors of the edited modules; see `refactor` for ``round_trip``."""
        factors = {}
        for edit in self.modules:
            A, B, scaling = self.adapter.factors(edit.module)
            sigma = torch.from_numpy(edit.result.sigma)
            factors[edit.module] = refactor(edit.svd, sigma, A, B, scaling, round_trip=round_trip)
        return factors

    def write(self, folder: Path) -> None:
        """Write the edited adapter into ``folder``, as PEFT does; everything that is not edited as it was."""
        write_adapter(folder, self.adapter, self.factors())

    # --- what it changes ------------------------------------------------------------------------------------------

    def predicted(self) -> PredictedChange:
        """Return the predicted ΔL of all modules together; interactions between them are left out."""
        predictions = [edit.predicted() for edit in self.modules]
        return PredictedChange(sum(p.first for p in predictions), sum(p.second for p in predictions))

    @property
    def change_l2(self) -> float:
        """‖Δσ‖₂ over all modules."""
        return float(np.sqrt(sum(edit.result.change_l2**2 for edit in self.modules)))

    @property
    def is_zero(self) -> bool:
        """Every update is zero: there is no direction to edit."""
        return all(edit.result.count(ZERO) == edit.svd.rank for edit in self.modules)

    def module_table(self) -> pd.DataFrame:
        """Return one row per module: rank, number of directions by role, sum and norms of sigma before and after, and
        the predicted ΔL in nats per label."""
        rows = []
        for edit in self.modules:
            predicted = edit.predicted()
            row: dict[str, object] = {"module": edit.module, "d_out": len(edit.svd.U), "d_in": len(edit.svd.V)}
            row["r"] = edit.svd.rank
            row |= {role: edit.result.count(role) for role in ROLES}
            for when, sigma in (("before", edit.sigma), ("after", edit.result.sigma)):
                row |= {f"sum_{when}": sigma.sum(), f"l2_{when}": np.linalg.norm(sigma), f"max_{when}": sigma.max()}
            row |= {"change_l2": edit.result.change_l2, "predicted_first": predicted.first}
            rows.append(row | {"predicted_second": predicted.second})
        return pd.DataFrame(rows)

    def direction_table(self) -> pd.DataFrame:
        """Return one row per direction: its value before and after, its role, and its statistics."""
        parts = []
        for edit in self.modules:
            statistics = edit.sensitivity
            parts.append(pd.DataFrame({
                "module": edit.module, "index": range(edit.svd.rank), "sigma_before": edit.sigma,
                "sigma_after": edit.result.sigma, "role": edit.result.role, "mean": statistics.mean.numpy(),
                "mean_abs": statistics.mean_abs.numpy(), "fisher": statistics.fisher.numpy(),
            }))  # fmt: skip
        return pd.concat(parts, ignore_index=True)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the tables of the edit by file name."""
        sensitivity = to_frame([edit.sensitivity for edit in self.modules])
        return {"sensitivity.csv": sensitivity, DIRECTIONS: self.direction_table()}

    def overview(self) -> str:
        """Return the modules with the change of each, its sum, and what is left alone, in lines for a terminal."""
        rows, predicted, adapter = self.module_table().to_dict("records"), self.predicted(), self.adapter
        columns: dict[str, list[Any]] = {
            "module": [row["module"] for row in rows],
            "r": [row["r"] for row in rows],
            "core/mid/noise/zero": ["/".join(str(row[role]) for role in ROLES) for row in rows],
            "Σσ": [_arrow(row, "sum") for row in rows],
            "‖σ‖₂": [_arrow(row, "l2") for row in rows],
            "predicted ΔL (nats a label)": [f"{row['predicted_second']:+.3g}" for row in rows],
        }
        lines = [
            pd.DataFrame(columns).to_string(index=False),
            f"{adapter.name}: {len(rows)} of {len(adapter.modules)} modules, predicted ΔL {predicted.first:+.4g} "
            f"(first order), {predicted.second:+.4g} (second order) nats a label",
        ]
        if self.is_zero:
            lines.append("every one of them is a zero update: there is nothing to edit")
        for reason, count in pd.Series(list(adapter.carried.values()), dtype=str).value_counts().items():
            lines.append(f"carried through untouched: {count} tensors ({reason})")
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """Return the change of the adapter as a whole and by module, and what was left alone, in plain types."""
        predicted, edited = self.predicted(), {edit.module for edit in self.modules}
        return {
            "total": {
                "modules": len(self.modules),
                "all_zero": self.is_zero,
                "change_l2": self.change_l2,
                "predicted_first": predicted.first,
                "predicted_second": predicted.second,
                "unit": "nats a label",
            },
            "modules": {str(row.pop("module")): row for row in self.module_table().to_dict("records")},
            "not_chosen": [module for module in self.adapter.modules if module not in edited],
            "carried": self.adapter.carried,
        }


def _arrow(row: Mapping[Any, Any], name: str) -> str:
    return f"{row[f'{name}_before']:.4g} → {row[f'{name}_after']:.4g}"


@contextmanager
def _naming(module: str) -> Iterator[None]:
    """Put the module's name before the text of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{module}: {error}") from None


@contextmanager
def in_place(
    model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], adapter: str = "default"
) -> Iterator[None]:
    """Give the loaded PEFT ``model`` other ``factors`` (modules as the adapter's file names them); afterwards it is as
    before, bit for bit."""
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
