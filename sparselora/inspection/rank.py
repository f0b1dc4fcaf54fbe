"""The least rank that each matrix needs, of a model's weights or of an adapter's updates.

All ranks come from singular values alone; an adapter's update B A is never formed.
"""

from __future__ import annotations

import math
import re
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
from sparselora.models.model_files import model_facts, model_folder, model_label, read_config
from sparselora.models.module_names import LoadedNames, loaded_names
from sparselora.models.weights import UnmeasuredTensor, list_tensors, load_matrix, refuse_damaged
from sparselora.numerics import reconstruction as rec
from sparselora.numerics.spectra import blas_threads, spectrum, stable_rank
from sparselora.runs.files import write_csv, write_json
from sparselora.runs.folder import RunFolder
from sparselora.runs.progress import Progress

Array = NDArray[np.floating]
Rule = Callable[[Array, tuple[int, int]], int]
"""(singular values, shape of the matrix) → rank."""


def rank_rules(criterion: str, targets: Sequence[float] = ()) -> dict[str, Rule]:
    """Return name → rule for every target of a criterion: ``error``, ``energy`` or ``gap``, which has none.

    The names become column names.
    """
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


@dataclass(frozen=True)
class RankRequest:
    """Rank the weights of a model or the updates of an adapter; one of the two is given.

    Attributes:
        model: name or folder of a model.
        adapter: folder of an adapter.
        rules: as `rank_rules` returns them.
        target_modules: ends of the names of the modules that count; None: all.
    """

    model: str | None
    adapter: str | None
    rules: Mapping[str, Rule]
    target_modules: tuple[str, ...] | None

    @property
    def source(self) -> str:
        """Name of the model or of the adapter's folder."""
        return model_label(self.model) if self.model else Path(str(self.adapter)).resolve().name

    @property
    def outputs(self) -> tuple[str, ...]:
        """Files that the run may write."""
        patterns = [f"rank_pattern_{label}.json" for label in self.rules] if self.adapter is not None else []
        return ("ranks.csv", *patterns, "ranks.png", *(["not_measured.csv"] if self.model is not None else []))

    def task(self, *, is_checked: bool = True) -> RankTask:
        """Check the input; as `model_ranks` and `adapter_ranks`."""
        if self.adapter is not None:
            return adapter_ranks(Path(self.adapter), self.rules, self.target_modules)
        assert self.model is not None
        return model_ranks(self.model, self.rules, self.target_modules, is_checked=is_checked)


@dataclass(frozen=True)
class RankResults:
    """The table of ranks, and LoRA configurations of an adapter.

    Attributes:
        unmeasured: the tensors of a model that are no matrices.
        remarks: lines for the end of the report.
    """

    table: pd.DataFrame
    configs: Configs
    unmeasured: Sequence[UnmeasuredTensor]
    remarks: Sequence[str]


def rank_matrices(request: RankRequest, folder: RunFolder) -> RankResults:
    """Rank the matrices, and write tables, configurations and figure into ``folder``.

    Raises:
        InputError: as `RankRequest.task`, before anything is written.
    """
    task = request.task()
    with folder:
        folder.note(**model_facts(request.model))
        table, configs = task.compute()
        write_csv(folder.path("ranks.csv"), table)
        if request.model is not None:
            from sparselora.inspection.tables import unmeasured_table

            write_csv(folder.path("not_measured.csv"), unmeasured_table(task.unmeasured))
        for label, config in configs.items():
            write_json(folder.path(f"rank_pattern_{label}.json"), config)

        from sparselora.report.rank import ranks_by_kind

        ranks_by_kind(folder.path("ranks.png"), request.source, table, list(request.rules))
    return RankResults(table, configs, task.unmeasured, task.remarks)


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
        with Progress(len(names), "module", "spectra") as progress:
            for name in names:
                factors = modules[name]
                s = abs(factors.scaling) * rec.factored_svd(factors.B, factors.A)[1]
                row = describe(name, factors.shape, s, rules)
                rows.append({**row, "lora_r": factors.A.shape[0], "scaling": factors.scaling})
                progress.update()
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
