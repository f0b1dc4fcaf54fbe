"""An adapter of lower rank: each update cut in factor space with the least error there is, filled up to one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from sparselora.errors import InputError
from sparselora.models.adapter_config import uniform_config
from sparselora.models.adapter_files import AdapterFile, padded, write_adapter
from sparselora.numerics.reconstruction import energy_rank
from sparselora.runs.progress import Progress
from sparselora.spectral.factors import AdapterSVD, adapter_svd, truncated


@dataclass(frozen=True)
class ReducedAdapter:
    """An adapter of lower rank, as PEFT, vLLM and llama.cpp load it: alpha == r in every module.

    Attributes:
        adapter: the adapter that was reduced, which stays as it is.
        table: one row per module: ``retained_energy`` is the share of ‖ΔW‖² kept (1 for a zero update),
            ``relative_error`` is ‖ΔW − ΔW'‖/‖ΔW‖.
        factors: module → (A, B), scale included, filled up to one rank with zeros, in the stored types.
        config: fields of the configuration that change.
        biases: key → bias of lora_B with the scaling in it.
        ranks: module → channels that are no padding; None where every module has them all.
    """

    adapter: AdapterFile
    table: pd.DataFrame
    factors: dict[str, tuple[Tensor, Tensor]]
    config: dict[str, Any]
    biases: dict[str, Tensor]
    ranks: dict[str, int] | None

    def write(self, folder: Path) -> None:
        """Write the adapter into ``folder``."""
        write_adapter(folder, self.adapter, self.factors, self.config, self.biases, self.ranks)

    @property
    def text(self) -> str:
        """The rank of every module, before and after, and the size of the whole."""
        table = self.table
        columns = {
            "module": table["module"],
            "shape": [f"{n}×{m}" for n, m in zip(table["d_out"], table["d_in"])],
            "rank": [f"{r} → {k}" for r, k in zip(table["r"], table["rank"])],
            "retained energy": table["retained_energy"].map("{:.6f}".format),
            "relative error": table["relative_error"].map("{:.4g}".format),
        }
        before, after = int(table["params_before"].sum()), int(table["params_after"].sum())
        largest = float(table["fro_norm"].max())
        energies = (table["fro_norm"] / largest) ** 2 if largest else table["fro_norm"]
        retained = float((energies * table["retained_energy"]).sum() / energies.sum()) if largest else 1.0
        lines = [
            pd.DataFrame(columns).to_string(index=False),
            f"{self.adapter.name}: {len(table)} modules, {before:,} → {after:,} parameters ({after / before:.1%}), "
            f"{retained:.4%} of the energy retained",
        ]
        if self.ranks is not None:
            stored = sum(A.numel() + B.numel() for A, B in self.factors.values())
            lines.append(
                f"the file holds {stored:,} of them: channels of zeros fill every module up to rank "
                f"{self.config['r']}, as loaders differ on modules of several ranks"
            )
        if self.biases:
            lines.append(f"with the scaling folded in: {len(self.biases)} LoRA biases")
        carried = {name: kind for name, kind in self.adapter.carried.items() if name not in self.biases}
        for kind, count in pd.Series(carried, dtype=str).value_counts().items():
            lines.append(f"carried through untouched: {count} tensors ({kind})")
        return "\n".join(lines)


def reduce_adapter(adapter: AdapterFile, rank: int | None, energy: float | None) -> ReducedAdapter:
    """Cut every module to ``rank``, or to the least rank that holds the share ``energy`` of its squared norm.

    Raises:
        InputError: as `cut_adapter`.
    """

    def choose(_module: str, svd: AdapterSVD) -> tuple[AdapterSVD, int]:
        return svd, rank if rank is not None else energy_rank(svd.sigma.cpu().numpy(), energy or 1.0)

    return cut_adapter(adapter, choose)


def cut_adapter(adapter: AdapterFile, choose: Callable[[str, AdapterSVD], tuple[AdapterSVD, int]]) -> ReducedAdapter:
    """Cut every module to the rank that ``choose`` says.

    Modules that are carried (embeddings, convolutions) keep their rank and scaling by name, in the patterns that PEFT
    reads: a larger rank of theirs does not make the others large again.

    Args:
        choose: takes a module's name and the SVD of its update; returns the SVD of what replaces the update, which is
            that itself or a projection of it, and the rank to cut to, at most what the module has.
    Raises:
        InputError: no linear module; factors that do not fit in the stored type.
    """
    if not adapter.modules:
        raise InputError(f"adapter {adapter.name} has LoRA on embeddings and convolutions only; none can be reduced")
    table, factors = _truncated_modules(adapter, choose)
    ranks = {name: len(A) for name, (A, _) in factors.items()}
    largest = max(ranks.values())
    return ReducedAdapter(
        adapter,
        table,
        {name: padded(A, B, largest) for name, (A, B) in factors.items()},
        _config(adapter, ranks, largest),
        _scaled_biases(adapter),
        ranks if set(ranks.values()) != {largest} else None,
    )


def _truncated_modules(
    adapter: AdapterFile, choose: Callable[[str, AdapterSVD], tuple[AdapterSVD, int]]
) -> tuple[pd.DataFrame, dict[str, tuple[Tensor, Tensor]]]:
    rows, factors = [], {}
    with Progress(len(adapter.modules), "module", "reduce") as progress:
        for name in adapter.modules:
            A, B, scaling = adapter.factors(name)
            svd = adapter_svd(A, B, scaling)
            s = svd.sigma.cpu().numpy()
            source, wanted = choose(name, svd)
            k = max(1, min(wanted, source.rank, A.shape[1], B.shape[0]))
            try:
                new_A, new_B = factors[name] = truncated(source, k, A.dtype, B.dtype)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            shares = s / s[0] if s[0] else s  # squares of the values themselves may leave float64
            whole = float((shares**2).sum())
            lost = float((shares[k:] ** 2).sum()) / whole if whole else 0.0
            if source is not svd and whole:  # what a projection leaves is orthogonal to it
                lost = max(0.0, 1 - float(((source.sigma[:k].cpu().numpy() / s[0]) ** 2).sum()) / whole)
            rows.append({
                "module": name, "d_out": B.shape[0], "d_in": A.shape[1], "r": svd.rank, "rank": k,
                "retained_energy": 1 - lost, "relative_error": lost**0.5, "fro_norm": float(s[0]) * whole**0.5,
                "params_before": A.numel() + B.numel(), "params_after": new_A.numel() + new_B.numel(),
            })  # fmt: skip
            progress.update()
    return pd.DataFrame(rows), factors


def _config(adapter: AdapterFile, ranks: dict[str, int], largest: int) -> dict[str, Any]:
    config = uniform_config(adapter.config, largest)
    if adapter.fixed:
        stored = {name: adapter.shapes[entry.key_A][0] for name, entry in adapter.fixed.items()}
        # PEFT takes the first key that a name ends in: every module is named, a longer name before its ending.
        order = sorted([*ranks, *stored], key=lambda name: -name.count("."))
        config["rank_pattern"] = {name: stored.get(name, largest) for name in order}
        config["alpha_pattern"] = {
            name: adapter.fixed[name].scaling * stored[name] if name in stored else largest for name in order
        }
    return config


def _scaled_biases(adapter: AdapterFile) -> dict[str, Tensor]:
    """Return the biases of lora_B, which the layer multiplies by the scaling, with the scaling in them."""
    entries = [entry for entry in adapter.modules.values() if entry.key_bias in adapter.tensors]
    return {
        entry.key_bias: (adapter.tensors[entry.key_bias].double() * entry.scaling).to(adapter.tensors[entry.key_bias])
        for entry in entries
    }
