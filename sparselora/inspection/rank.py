"""The least rank that each matrix needs, of a model's weights, of an adapter's updates, or of simulated matrices.

All ranks come from singular values alone; an adapter's update B A is never formed.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparselora.errors import InputError, suggest
from sparselora.models.adapter_files import read_adapter
from sparselora.models.model_files import model_folder, read_config
from sparselora.models.module_names import LoadedNames, loaded_names
from sparselora.models.weights import UnmeasuredTensor, list_tensors, load_matrix, refuse_damaged
from sparselora.numerics import reconstruction as rec
from sparselora.numerics.matrices import gaussian, lowrank
from sparselora.numerics.spectra import blas_threads, spectrum, stable_rank
from sparselora.runs.progress import Progress

Array = NDArray[np.floating]
Rule = Callable[[Array, tuple[int, int]], int]
"""(singular values, shape of the matrix) → rank."""

TIMED_RUNS = 5

CRITERIA = ("error", "energy", "gap")


def rank_rules(criterion: str, targets: Sequence[float] = ()) -> dict[str, Rule]:
    """Return name → rule for every target of a criterion (one of `CRITERIA`; ``gap`` has none); the names become
    column names."""
    if criterion == "gap":
        return {"gap": _gap}
    find: Callable[[Array, float], int] = rec.energy_rank if criterion == "energy" else rec.optimal_rank
    return {f"{criterion}_{target:g}": partial(_apply, find, target) for target in targets}


def _apply(find: Callable[[Array, float], int], target: float, s: Array, shape: tuple[int, int]) -> int:
    return find(s, target)


def _gap(s: Array, shape: tuple[int, int]) -> int:
    return rec.gap_rank(s, rec.largest_saving_rank(*shape))


def describe(name: str, shape: tuple[int, int], s: Array, rules: Mapping[str, Rule]) -> dict[str, object]:
    """Return one row of the table: the rank that the spectrum ``s`` of a matrix of ``shape`` needs by each rule.

    ``stored_*`` is the factors' size over the matrix's; where it is 1 or more (``saves_*`` false) factors at that rank
    are no smaller than the matrix.
    """
    n, m = shape
    row: dict[str, object] = {
        "name": name, "kind": kind_of(name), "d_out": n, "d_in": m,
        "largest_saving_rank": rec.largest_saving_rank(n, m),
        "fro_norm": float(np.sqrt(np.sum(s**2))), "spectral_norm": float(s[0]), "stable_rank": stable_rank(s),
    }  # fmt: skip
    for label, rule in rules.items():
        rank = rule(s, shape)
        row[f"rank_{label}"] = rank
        row[f"stored_{label}"] = rec.factor_params(n, m, rank) / (n * m)
        row[f"saves_{label}"] = rec.factor_params(n, m, rank) < n * m
        if label == "gap":
            row["gap_ratio"] = float(s[rank - 1] / s[rank]) if 0 < rank < len(s) and s[rank] > 0 else float("nan")
    return row


def kind_of(name: str) -> str:
    """Return the layer's type, its name after the last layer number: ``layer.3.output.dense`` → ``output.dense``."""
    return re.sub(r"^.*\.\d+\.", "", name)


def select_names(names: list[str], targets: Sequence[str] | None) -> list[str]:
    """Return the names that end in one of ``targets`` (whole dotted parts), all if there are no targets.

    Raises:
        InputError: a target that no name ends in; the message lists the endings there are.
    """
    if not targets:
        return names
    ends = {target: [name for name in names if name == target or name.endswith(f".{target}")] for target in targets}
    for target, matches in ends.items():
        if not matches:
            kinds = sorted({kind_of(name) for name in names})
            raise InputError(
                f"target_modules {target} matches nothing{suggest(target, kinds)}; there are: {', '.join(kinds[:30])}"
            )
    return [name for name in names if any(name in matches for matches in ends.values())]


Configs = dict[str, dict[str, object]]
"""Rule name → keyword arguments of peft.LoraConfig; no entry for a rule by which no module needs a rank."""


@dataclass(frozen=True)
class RankTask:
    """Matrices that are ready to be ranked: everything that can be wrong with the input has been found.

    Attributes:
        compute: takes the spectra; gives the table, and for an adapter LoRA configurations.
        unmeasured: the tensors of a model that are no matrices.
        remarks: lines for the end of the report.
    """

    compute: Callable[[], tuple[pd.DataFrame, Configs]]
    unmeasured: Sequence[UnmeasuredTensor] = ()
    remarks: Sequence[str] = ()


def model_ranks(
    model: str, rules: Mapping[str, Rule], target_modules: Sequence[str] | None = None, *, is_checked: bool = True
) -> RankTask:
    """Check the model and the choice of modules; the task then streams its matrices, one at a time.

    The table has the names of the modules in the loaded model. There is no LoRA configuration: the rank of a frozen
    weight is no measure of the rank that its update needs.

    Args:
        is_checked: read every matrix once now, so that damage is found before anything is written.
    Raises:
        InputError: what `list_tensors` and `refuse_damaged` refuse; targets that no name ends in.
    """
    tensors = list_tensors(model)
    infos = {info.name.removesuffix(".weight"): info for info in tensors.matrices}
    names = select_names(list(infos), target_modules)
    if tensors.named_as_loaded:
        loaded = LoadedNames({name: name for name in infos}, {})
    else:
        folder = model_folder(model)
        stored_shapes = {name: info.shape[::-1] if info.transposed else info.shape for name, info in infos.items()}
        loaded = loaded_names(folder, read_config(folder).get("model_type", ""), stored_shapes)
    left_out = {name: reason for name, reason in loaded.left_out.items() if name in names}
    if not target_modules:
        left_out |= {name: "outside the numbered layers" for name in names if not re.search(r"\.\d+\.", name)}
    inside = [name for name in names if name not in left_out]
    everywhere = [*loaded.modules.values(), *loaded.left_out]
    keys = dict(zip(inside, module_keys([loaded.modules[name] for name in inside], everywhere)))
    if is_checked:
        with Progress(len(names), "matrix", "checking") as progress:
            for name in names:
                refuse_damaged(infos[name])
                progress.update()

    def compute() -> tuple[pd.DataFrame, Configs]:
        rows = []
        with Progress(len(names), "matrix", "spectra") as progress:
            for name in names:
                with blas_threads(min(infos[name].shape)):
                    s = spectrum(load_matrix(infos[name])).s
                row = describe(name, infos[name].shape, s, rules)
                rows.append({**row, "lora_target": keys.get(name, ""), "left_out": left_out.get(name, "")})
                progress.update()
        return pd.DataFrame(rows), {}

    return RankTask(compute, tensors.unmeasured, [*_describe_left_out(left_out), *_describe_unknown(loaded, inside)])


def _describe_left_out(left_out: Mapping[str, str]) -> Iterator[str]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in left_out.items():
        reasons[reason].append(name)
    for reason, names in reasons.items():
        ellipsis = ", ..." if len(names) > 3 else ""
        yield f"no LoRA target, {len(names)} × {reason}: {', '.join(names[:3])}{ellipsis}"


def _describe_unknown(loaded: LoadedNames, inside: Sequence[str]) -> Iterator[str]:
    if loaded.unknown and inside:
        yield (
            f"LoRA targets have the names of the files, which may not be those of the modules: {loaded.unknown}; "
            "compare with model.named_modules()"
        )


def adapter_ranks(folder: Path, rules: Mapping[str, Rule], target_modules: Sequence[str] | None = None) -> RankTask:
    """Read the adapter; the task gives the table of its updates and LoRA configurations.

    alpha follows the rank there, so that alpha/r (alpha/√r for rsLoRA) stays what the adapter was trained with.

    Raises:
        InputError: what `read_adapter` and `AdapterFile.matrices` refuse; targets that no name ends in.
    """
    adapter = read_adapter(folder)
    config, modules = adapter.config, {name: adapter.matrices(name) for name in adapter.entries}
    names = select_names(list(modules), target_modules)
    base = {key: config[key] for key in ("task_type", "fan_in_fan_out", "use_rslora") if config.get(key)}

    def compute() -> tuple[pd.DataFrame, Configs]:
        rows = []
        for name in names:
            factors = modules[name]
            s = abs(factors.scaling) * rec.factored_svd(factors.B, factors.A)[1]
            row = describe(name, factors.shape, s, rules)
            rows.append({**row, "lora_r": factors.A.shape[0], "scaling": factors.scaling})
        table = pd.DataFrame(rows)
        configs = {}
        for label in rules:
            pattern = {}
            for name, rank in zip(table["name"], table[f"rank_{label}"].astype(int).tolist()):
                alpha = modules[name].scaling * (math.sqrt(rank) if config.get("use_rslora") else rank)
                pattern[name] = (rank, alpha)
            if any(rank for rank, _ in pattern.values()):
                configs[label] = lora_config(pattern, base)
        return table, configs

    return RankTask(compute)


def module_keys(names: Sequence[str], everywhere: Sequence[str] = ()) -> list[str]:
    """Return names as PEFT finds them with any task head: without a base-model prefix (``bert.``) that all have.

    PEFT takes a key for every module whose name is the key or ends in a dot and the key; where a shortened name would
    also fit another name of ``everywhere``, the names stay whole.
    """
    first = {name.split(".")[0] for name in names}
    prefix = f"{next(iter(first))}." if len(first) == 1 else ""
    short = [name.removeprefix(prefix) for name in names]
    if not prefix or not all(re.match(r"[A-Za-z_]\w*\.", name) for name in short):
        return list(names)
    keys = dict(zip(short, names))
    for other in everywhere:
        parts = other.split(".")
        endings = (".".join(parts[i:]) for i in range(len(parts)))
        if any(keys.get(ending, other) != other for ending in endings):
            return list(names)
    return short


def lora_config(pattern: Mapping[str, tuple[int, float]], base: dict[str, object]) -> dict[str, object]:
    """Return the arguments of peft.LoraConfig that give each module its rank and alpha; modules of rank 0 get none.

    At least one rank is above 0: without a target there is nothing to configure.
    """
    positive = {name: (rank, alpha) for name, (rank, alpha) in pattern.items() if rank > 0}
    # PEFT takes the first key that fits, so that a longer name must stand before an ending of it.
    order = sorted(positive, key=lambda name: -name.count("."))
    common = Counter(positive.values()).most_common(1)[0][0]
    return {
        "r": common[0],
        "lora_alpha": common[1],
        "target_modules": list(positive),
        "rank_pattern": {name: positive[name][0] for name in order},
        "alpha_pattern": {name: positive[name][1] for name in order},
        **base,
    }


# --- simulated matrices -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Simulation:
    """A low-rank and a full-rank random matrix of ``n × m``: rank of the signal, noise relative to it, seed."""

    n: int
    m: int
    true_rank: int
    noise: float
    seed: int

    def draw(self) -> dict[str, Array]:
        """Return one matrix ``(n, m)`` of each family, from child streams of the seed."""
        streams = np.random.SeedSequence(self.seed).spawn(2)
        return {
            f"rank {self.true_rank} + noise {self.noise:g}": lowrank(
                np.random.default_rng(streams[0]), self.n, self.m, self.true_rank, self.noise
            ),
            "full-rank random": gaussian(np.random.default_rng(streams[1]), self.n, self.m),
        }


def by_reconstruction(W: Array, target: float) -> int:
    """Return the least rank below a relative error by forming approximations, which `optimal_rank` need not.

    A thin SVD, then a bisection over ranks, each formed and subtracted; the strongest form of the usual loop.
    """
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    low, high = 0, len(s)
    while low < high:
        k = (low + high) // 2
        if rec.relative_error(W, (U[:, :k] * s[:k]) @ Vt[:k]) < target:
            high = k
        else:
            low = k + 1
    return low


def time_methods(matrices: dict[str, Array], target: float) -> pd.DataFrame:
    """Return milliseconds from matrix to rank, by values only and by reconstruction, alternating."""
    methods: dict[str, Callable[[Array], int]] = {
        "values only": lambda W: rec.optimal_rank(spectrum(W).s, target),
        "reconstruction": lambda W: by_reconstruction(W, target),
    }
    rows = []
    for family, W in matrices.items():
        ms: dict[str, list[float]] = {name: [] for name in methods}
        ranks = {}
        for _ in range(TIMED_RUNS):
            for name, method in methods.items():
                began = time.perf_counter()
                ranks[name] = method(W)
                ms[name].append((time.perf_counter() - began) * 1e3)
        for name, values in ms.items():
            rows.append({
                "matrix": family, "method": name, "target_error": target, "rank": ranks[name], "runs": len(values),
                "median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values),
            })  # fmt: skip
    return pd.DataFrame(rows)


def simulated_ranks(
    simulation: Simulation, rules: Mapping[str, Rule], target: float
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Array]]:
    """Rank both matrices of a simulation.

    Returns:
        one row per matrix, the times of both methods at the error ``target``, and the singular values by matrix.
    """
    shape, matrices = (simulation.n, simulation.m), simulation.draw()
    with blas_threads(min(shape)):
        values = {name: spectrum(W).s for name, W in matrices.items()}
        times = time_methods(matrices, target)
    return pd.DataFrame([describe(name, shape, s, rules) for name, s in values.items()]), times, values
