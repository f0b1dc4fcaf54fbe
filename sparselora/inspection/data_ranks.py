"""LoRA ranks by module from the gradients of a user's rows, against one rank and random ranks of as many parameters.

Ranks are spent where a direction holds the most gradient energy for a parameter. The suggestion is made from one half
of the rows and judged on the other, over random halves: how much of the energy of *their* gradient lies along the
directions that it pays for, and how much the ranks themselves change. It is about the start of training; whether such
ranks train better, only training shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparselora.config.train import TrainConfig
from sparselora.inspection.rank import kind_of, lora_config
from sparselora.models.model_files import model_facts, model_label
from sparselora.numerics.stats import rank_correlation
from sparselora.runs.files import write_csv, write_json
from sparselora.runs.folder import RunFolder

if TYPE_CHECKING:
    from sparselora.spectral.gradient_energy import ModuleGradients

Array = NDArray[np.float64]
OUTPUTS = ("data_ranks.csv", "captured_energy.csv", "rank_pattern_data.json", "data_ranks.png")
BLOCKS = 8
"""Blocks of rows, half of which suggest and half of which judge: 70 ways to choose."""
_SPLITS = 100
_STREAM = 20
MARGIN = 0.01
"""Share of the gradient energy that counts as no difference from uniform ranks."""
_STABLE = 0.5
"""Least rank correlation between the suggestions of two halves of the rows, by the median."""


@dataclass(frozen=True)
class DataRankRequest:
    """Ranks from data: ``config`` has the model, the data, the modules and the uniform rank; ``samples`` rows."""

    config: TrainConfig
    samples: int


@dataclass(frozen=True)
class DataRanks:
    """The suggested ranks by module, the captured energy by split, and the result in sentences."""

    table: pd.DataFrame
    captured: pd.DataFrame
    sentences: list[str]


def suggest_ranks(request: DataRankRequest, folder: RunFolder) -> DataRanks:
    """Measure gradients, suggest and judge, and write tables, figure and the arguments of peft.LoraConfig.

    Raises:
        InputError: as `sparselora.spectral.gradient_energy.measure_gradients`, before anything is written.
    """
    from sparselora.report.rank import data_ranks
    from sparselora.spectral.gradient_energy import measure_gradients

    config, rank = request.config, request.config.lora_r
    name, gradients = measure_gradients(config, request.samples, BLOCKS)
    with folder:
        folder.note(**model_facts(config.model))
        results = judge(gradients, rank, request.samples, config.seed)
        write_csv(folder.path("data_ranks.csv"), results.table)
        write_csv(folder.path("captured_energy.csv"), results.captured)
        scale = config.lora_alpha / rank
        pattern = {row["name"]: (int(row["rank"]), scale * int(row["rank"])) for _, row in results.table.iterrows()}
        base: dict[str, object] = {"task_type": "CAUSAL_LM" if config.task == "causal_lm" else "SEQ_CLS"}
        write_json(folder.path("rank_pattern_data.json"), lora_config(pattern, base))
        title = f"{model_label(str(config.model))} on {name}, {request.samples} rows"
        data_ranks(folder.path("data_ranks.png"), title, results.table, results.captured, rank)
    return results


def judge(gradients: Mapping[str, ModuleGradients], rank: int, samples: int, seed: int) -> DataRanks:
    """Suggest ranks from all rows, and judge suggestions from halves of them on the other halves."""
    sizes = {name: module.d_out + module.d_in for name, module in gradients.items()}
    limits = {name: min(module.gram.shape[2], module.d_out, module.d_in) for name, module in gradients.items()}
    uniform = {name: min(rank, limit) for name, limit in limits.items()}
    budget = sum(sizes[name] * count for name, count in uniform.items())
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM,)))
    splits, suggested, correlations = [], [], []
    for split in range(_SPLITS):
        half = np.zeros(BLOCKS)
        half[rng.permutation(BLOCKS)[: BLOCKS // 2]] = 1
        energies = {name: _energies(module.gram, half) for name, module in gradients.items()}
        others = {name: _energies(module.gram, 1 - half) for name, module in gradients.items()}
        first, second = (spend(part, sizes, limits, budget) for part in (energies, others))
        by_chance = spend({name: rng.random(len(e)) for name, e in energies.items()}, sizes, limits, budget, rng)
        shares = {name: captured(module.gram, half, 1 - half) for name, module in gradients.items()}
        whole = sum(part[-1] for part in shares.values())
        row: dict[str, Any] = {"split": split}
        for label, ranks in (("data", first), ("uniform", uniform), ("random", by_chance)):
            row[label] = sum(float(shares[name][count]) for name, count in ranks.items()) / whole
        splits.append(row)
        suggested.append(first)
        correlations.append(rank_correlation([*first.values()], [*second.values()]))
    everything = np.ones(BLOCKS)
    energies = {name: _energies(module.gram, everything) for name, module in gradients.items()}
    ranks = spend(energies, sizes, limits, budget)
    total = sum(float(part.sum()) for part in energies.values())
    spread = pd.DataFrame(suggested)
    table = pd.DataFrame({
        "name": list(ranks), "kind": [kind_of(name) for name in ranks],
        "d_out": [gradients[name].d_out for name in ranks], "d_in": [gradients[name].d_in for name in ranks],
        "rank": list(ranks.values()), "rank_low": [float(spread[name].quantile(0.05)) for name in ranks],
        "rank_high": [float(spread[name].quantile(0.95)) for name in ranks], "uniform_rank": list(uniform.values()),
        "energy_share": [float(energies[name].sum()) / total if total else 0.0 for name in ranks],
    })  # fmt: skip
    shares_by_split = pd.DataFrame(splits)
    finite = [value for value in correlations if not np.isnan(value)]
    return DataRanks(table, shares_by_split, _sentences(shares_by_split, finite, rank, samples))


def _combined(gram: Array, first: Array, second: Array) -> Array:
    """Return (Σ_i f_i Y_i)ᵀ (Σ_j s_j Y_j) ``(r, r)``."""
    return np.asarray(np.einsum("i,j,ijst->st", first, second, gram))


def _energies(gram: Array, weights: Array) -> Array:
    """Return the squared singular values of Σ_i w_i Y_i, descending ``(r,)``."""
    return np.linalg.eigvalsh(_combined(gram, weights, weights))[::-1].clip(min=0)


def captured(gram: Array, fitted: Array, judged: Array) -> Array:
    """Return the energy of the judged rows' gradient along the first k left singular vectors of the fitted rows', for
    k = 0 … r ``(r + 1,)``, and all of it at the end ``(r + 2,)``."""
    values, vectors = np.linalg.eigh(_combined(gram, fitted, fitted))
    values, vectors = values[::-1], vectors[:, ::-1]
    live = values > values[0] * 1e-12 if values[0] > 0 else np.zeros(len(values), bool)
    projected = vectors.T @ _combined(gram, fitted, judged)  # Σ Uᵀ Y
    rows = np.where(live, (projected**2).sum(axis=1) / np.where(live, values, 1.0), 0.0)
    whole = float(np.trace(_combined(gram, judged, judged)))
    return np.concatenate([[0.0], np.cumsum(rows), [whole]])


def spend(
    energies: Mapping[str, Array],
    sizes: Mapping[str, int],
    limits: Mapping[str, int],
    budget: int,
    rng: np.random.Generator | None = None,
) -> dict[str, int]:
    """Return ranks of at most ``budget`` parameters: every module one, then the directions of the most energy for a
    parameter; with ``rng``, any directions."""
    ranks = dict.fromkeys(energies, 1)
    left = budget - sum(sizes.values())
    offers = [(float(energies[name][i]) / sizes[name], name) for name in energies for i in range(1, limits[name])]
    if rng is not None:
        offers = [offers[i] for i in rng.permutation(len(offers))]
    else:
        offers.sort(key=lambda offer: -offer[0])
    for _, name in offers:
        if sizes[name] <= left:
            ranks[name] += 1
            left -= sizes[name]
    return ranks


def _sentences(shares: pd.DataFrame, correlations: list[float], rank: int, samples: int) -> list[str]:
    gain = shares["data"] - shares["uniform"]
    low, middle, high = (float(gain.quantile(q)) for q in (0.05, 0.5, 0.95))
    stability = float(np.median(correlations)) if correlations else 0.0
    medians = {name: float(shares[name].median()) for name in ("data", "uniform", "random")}
    sentences = [
        "gradient energy of rows that suggested nothing, along the directions paid for (median): "
        + ", ".join(f"{value:.1%} by {name} ranks" for name, value in medians.items()),
        f"data ranks minus rank {rank} everywhere: {middle:+.1%} [{low:+.1%}, {high:+.1%}] (5–95 % of {len(shares)} "
        f"random halves of {samples} rows); rank correlation between the suggestions of two halves {stability:.2f}",
    ]
    if stability < _STABLE:
        verdict = f"uniform is as good: the suggestion changes with the rows; take rank {rank} everywhere"
    elif low <= MARGIN:
        verdict = f"uniform is as good: the gain is not shown to be above {MARGIN:.0%}; take rank {rank} everywhere"
    else:
        verdict = "data ranks hold more of the gradient at the start; whether they train better, only training shows"
    return [*sentences, verdict]
