"""The least rank that each matrix needs: of a model's weights, of an adapter's updates, or of simulated matrices.

A rank is enough when its best approximation leaves a relative error ‖W − Ŵ‖_F / ‖W‖_F below the target (error), holds
the target share of the squared norm (energy), or stands before the widest gap, as a ratio of neighbouring singular
values, among ranks whose factors are smaller than the matrix (gap). All ranks come from singular values alone; an
adapter's update B A is never formed.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from sparselora.cli import add_run_arguments, print_plan, result_arguments
from sparselora.errors import InputError, suggest
from sparselora.inspection.tables import unmeasured_table
from sparselora.models.module_names import LoadedNames, loaded_names
from sparselora.models.weights import (
    UnmeasuredTensor,
    describe_unmeasured,
    list_tensors,
    load_matrix,
    model_folder,
    read_config,
    refuse_damaged,
)
from sparselora.numerics import reconstruction as rec
from sparselora.numerics.matrices import family_parameters, gaussian, lowrank
from sparselora.numerics.spectra import blas_threads, spectrum, stable_rank
from sparselora.runs.folder import RunFolder, write_csv, write_json

Array = NDArray[np.floating]
Rule = Callable[[Array, tuple[int, int]], int]
"""(singular values, shape of the matrix) → rank."""

SIMULATED: dict[str, int | float] = {"n": 512, "m": 512, "true_rank": 64, "noise": 0.01}
"""What --simulated draws unless told otherwise."""

_TIMED_RUNS = 5


# --- arguments ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("what to rank (one of)").add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="hub name, local folder with safetensors, or minilm")
    source.add_argument("--adapter", metavar="DIR", help="folder of a PEFT LoRA adapter: its updates scaling·B·A")
    source.add_argument(
        "--simulated", action="store_true", help="a low-rank and a full-rank random matrix side by side"
    )
    rule = parser.add_argument_group("criterion")
    rule.add_argument("--criterion", choices=("error", "energy", "gap"), default="error", help="when a rank is enough")
    rule.add_argument(
        "--target_error", type=float, nargs="+", metavar="E",
        help="relative errors to stay below (default: 0.01 0.05 0.1 0.3)",
    )  # fmt: skip
    rule.add_argument(
        "--target_energy", type=float, nargs="+", metavar="X",
        help="shares of the energy to hold; 0.99 is the error 0.1 (default: 0.9 0.95 0.99)",
    )  # fmt: skip
    rule.add_argument(
        "--target_modules", nargs="+", metavar="NAME", help="only modules whose name ends in one of these; else all"
    )
    made = parser.add_argument_group("simulated matrices")
    made.add_argument("--n", type=int, help="rows (default: 512)")
    made.add_argument("--m", type=int, help="columns (default: 512)")
    made.add_argument("--true_rank", type=int, help="rank of the low-rank matrix's signal (default: 64)")
    made.add_argument("--noise", type=float, help="its noise relative to the signal (default: 0.01)")
    add_run_arguments(parser, "rank_results")


def rules(args: argparse.Namespace) -> dict[str, Rule]:
    """Name → rule for every target of the chosen criterion, checked; the names become column names.

    Raises:
        InputError: a target out of range, or given for another criterion.
    """
    for name in ("error", "energy"):
        if getattr(args, f"target_{name}") is not None and args.criterion != name:
            raise InputError(f"--target_{name} belongs to --criterion {name}, got --criterion {args.criterion}")
    if args.criterion == "gap":
        return {"gap": _gap}
    if args.criterion == "energy":
        targets, most = args.target_energy or [0.9, 0.95, 0.99], "0.99 keeps 99 % of the energy"
        find: Callable[[Array, float], int] = rec.energy_rank
    else:
        targets, most = args.target_error or [0.01, 0.05, 0.1, 0.3], "0.1 leaves 10 % of the norm"
        find = rec.optimal_rank
    for target in targets:
        if not 0 < target < 1:
            raise InputError(f"--target_{args.criterion} must be between 0 and 1, got {target}; {most}")
    return {f"{args.criterion}_{target:g}": partial(_apply, find, target) for target in targets}


def _apply(find: Callable[[Array, float], int], target: float, s: Array, shape: tuple[int, int]) -> int:
    return find(s, target)


def _gap(s: Array, shape: tuple[int, int]) -> int:
    return rec.gap_rank(s, rec.largest_saving_rank(*shape))


# --- ranks --------------------------------------------------------------------------------------------------------


def describe(name: str, shape: tuple[int, int], s: Array, chosen: dict[str, Rule]) -> dict[str, object]:
    """One row of the table: what the spectrum ``s`` of a matrix of ``shape`` needs by each rule.

    ``stored_*`` is the factors' size over the matrix's; where it is 1 or more (``saves_*`` false) factors at that rank
    are no smaller than the matrix.
    """
    n, m = shape
    row: dict[str, object] = {
        "name": name, "kind": kind_of(name), "d_out": n, "d_in": m,
        "largest_saving_rank": rec.largest_saving_rank(n, m),
        "fro_norm": float(np.sqrt(np.sum(s**2))), "spectral_norm": float(s[0]), "stable_rank": stable_rank(s),
    }  # fmt: skip
    for label, rule in chosen.items():
        rank = rule(s, shape)
        row[f"rank_{label}"] = rank
        row[f"stored_{label}"] = rec.factor_params(n, m, rank) / (n * m)
        row[f"saves_{label}"] = rec.factor_params(n, m, rank) < n * m
        if label == "gap":
            row["gap_ratio"] = float(s[rank - 1] / s[rank]) if 0 < rank < len(s) and s[rank] > 0 else float("nan")
    return row


def kind_of(name: str) -> str:
    """The layer's type: its name after the last layer number, ``encoder.layer.3.output.dense`` → ``output.dense``."""
    return re.sub(r"^.*\.\d+\.", "", name)


def choose(names: list[str], targets: list[str] | None) -> list[str]:
    """The names that end in one of ``targets`` (whole dotted parts), all if there are no targets.

    Raises:
        InputError: a target that no name ends in; the message lists the endings there are.
    """
    if not targets:
        return names
    ends = {target: [name for name in names if name == target or name.endswith(f".{target}")] for target in targets}
    for target, found in ends.items():
        if not found:
            kinds = sorted({kind_of(name) for name in names})
            raise InputError(
                f"--target_modules {target} matches nothing{suggest(target, kinds)}; there are: {', '.join(kinds[:30])}"
            )
    return [name for name in names if any(name in found for found in ends.values())]


Configs = dict[str, dict[str, object]]
"""Rule name → keyword arguments of peft.LoraConfig; no entry for a rule by which no module needs a rank."""

Compute = Callable[[], tuple[pd.DataFrame, Configs]]


@dataclass(frozen=True)
class RankPlan:
    """What is going to be ranked.

    Attributes:
        compute: takes the spectra; gives the table and LoRA configurations.
        unmeasured: the tensors of a model that are no matrices.
        remarks: lines for the end of the report.
    """

    compute: Compute
    unmeasured: Sequence[UnmeasuredTensor] = ()
    remarks: Sequence[str] = ()


def plan_model(args: argparse.Namespace, chosen: dict[str, Rule]) -> RankPlan:
    """Check the model and the choice of modules; the plan then streams its matrices, one at a time.

    It gives the table, and a LoRA configuration with alpha == r for the modules inside numbered layers, by the names
    that they have in the loaded model.
    """
    tensors = list_tensors(args.model)
    infos = {info.name.removesuffix(".weight"): info for info in tensors.matrices}
    names = choose(list(infos), args.target_modules)
    folder = model_folder(args.model)
    stored_shapes = {name: info.shape[::-1] if info.transposed else info.shape for name, info in infos.items()}
    loaded = loaded_names(folder, read_config(folder).get("model_type", ""), stored_shapes)
    left_out = {name: reason for name, reason in loaded.left_out.items() if name in names}
    if not args.target_modules:
        left_out |= {name: "outside the numbered layers" for name in names if not re.search(r"\.\d+\.", name)}
    inside = [name for name in names if name not in left_out]
    everywhere = [*loaded.modules.values(), *loaded.left_out]
    keys = dict(zip(inside, module_keys([loaded.modules[name] for name in inside], everywhere)))
    base: dict[str, object] = {"fan_in_fan_out": True} if any(infos[name].transposed for name in inside) else {}
    if not args.dry_run:
        for name in tqdm(names, desc="checking", delay=2, file=sys.stderr):
            refuse_damaged(infos[name])

    def compute() -> tuple[pd.DataFrame, Configs]:
        rows = []
        for name in tqdm(names, desc="matrices", delay=2, file=sys.stderr):
            with blas_threads(min(infos[name].shape)):
                s = spectrum(load_matrix(infos[name])).s
            row = describe(name, infos[name].shape, s, chosen)
            rows.append({**row, "lora_target": keys.get(name, ""), "left_out": left_out.get(name, "")})
        table = pd.DataFrame(rows)
        configs = {}
        for label, ranks in _by_rule(table, chosen):
            pattern = {keys[name]: (rank, float(rank)) for name, rank in ranks.items() if name in keys}
            if any(rank for rank, _ in pattern.values()):
                configs[label] = lora_config(pattern, base)
        return table, configs

    return RankPlan(compute, tensors.unmeasured, [*_describe_left_out(left_out), *_describe_unknown(loaded, inside)])


def _describe_left_out(left_out: Mapping[str, str]) -> Iterator[str]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in left_out.items():
        reasons[reason].append(name)
    for reason, names in reasons.items():
        more = ", ..." if len(names) > 3 else ""
        yield f"no LoRA target, {len(names)} × {reason}: {', '.join(names[:3])}{more}"


def _describe_unknown(loaded: LoadedNames, inside: Sequence[str]) -> Iterator[str]:
    if loaded.unknown and inside:
        yield (
            f"LoRA targets have the names of the files, which may not be those of the modules: {loaded.unknown}; "
            "compare with model.named_modules()"
        )


def plan_adapter(args: argparse.Namespace, chosen: dict[str, Rule]) -> RankPlan:
    """Read the adapter; the plan gives the table of its updates and LoRA configurations.

    alpha follows the rank there, so that alpha/r (alpha/√r for rsLoRA) stays what the adapter was trained with.
    """
    from sparselora.models.adapter_files import read_adapter

    adapter = read_adapter(args.adapter)
    config, modules = adapter.config, {name: adapter.matrices(name) for name in adapter.entries}
    names = choose(list(modules), args.target_modules)
    base = {key: config[key] for key in ("task_type", "fan_in_fan_out", "use_rslora") if config.get(key)}

    def compute() -> tuple[pd.DataFrame, Configs]:
        rows = []
        for name in names:
            factor = modules[name]
            s = abs(factor.scaling) * rec.factored_svd(factor.B, factor.A)[1]
            row = describe(name, factor.shape, s, chosen)
            rows.append({**row, "lora_r": factor.A.shape[0], "scaling": factor.scaling})
        table = pd.DataFrame(rows)
        configs = {}
        for label, ranks in _by_rule(table, chosen):
            pattern = {}
            for name, rank in ranks.items():
                alpha = modules[name].scaling * (math.sqrt(rank) if config.get("use_rslora") else rank)
                pattern[name] = (rank, alpha)
            if any(rank for rank, _ in pattern.values()):
                configs[label] = lora_config(pattern, base)
        return table, configs

    return RankPlan(compute)


def _by_rule(table: pd.DataFrame, chosen: dict[str, Rule]) -> Iterator[tuple[str, dict[str, int]]]:
    """Each rule's name, and the rank it gives every matrix."""
    for label in chosen:
        yield label, {str(name): int(rank) for name, rank in zip(table["name"], table[f"rank_{label}"])}


def module_keys(names: Sequence[str], everywhere: Sequence[str] = ()) -> list[str]:
    """Names as PEFT finds them with any task head: without a base-model prefix (``bert.``) that all numbered ones have.

    PEFT takes a key for every module whose name is the key or ends in a dot and the key; where a shortened name would
    also fit another one of ``everywhere``, the names stay whole.
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
    """Keyword arguments of peft.LoraConfig that give each module its rank and alpha; modules of rank 0 get none.

    At least one rank is above 0: without a target there is nothing to configure.
    """
    kept = {name: (rank, alpha) for name, (rank, alpha) in pattern.items() if rank > 0}
    # PEFT takes the first key that fits, so that a longer name must stand before an ending of it.
    order = sorted(kept, key=lambda name: -name.count("."))
    common = Counter(kept.values()).most_common(1)[0][0]
    return {
        "r": common[0],
        "lora_alpha": common[1],
        "target_modules": list(kept),
        "rank_pattern": {name: kept[name][0] for name in order},
        "alpha_pattern": {name: kept[name][1] for name in order},
        **base,
    }


# --- simulated matrices -------------------------------------------------------------------------------------------


def simulate(args: argparse.Namespace) -> dict[str, Array]:
    """One matrix of each family, from child streams of the seed."""
    streams = np.random.SeedSequence(args.seed).spawn(2)
    return {
        f"rank {args.true_rank} + noise {args.noise:g}": lowrank(
            np.random.default_rng(streams[0]), args.n, args.m, args.true_rank, args.noise
        ),
        "full-rank random": gaussian(np.random.default_rng(streams[1]), args.n, args.m),
    }


def by_reconstruction(W: Array, target: float) -> int:
    """The least rank below a relative error by forming approximations: what `reconstruction.optimal_rank` spares.

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
    """Milliseconds from matrix to rank, by values only and by reconstruction, alternating."""
    methods: dict[str, Callable[[Array], int]] = {
        "values only": lambda W: rec.optimal_rank(spectrum(W).s, target),
        "reconstruction": lambda W: by_reconstruction(W, target),
    }
    rows = []
    for family, W in matrices.items():
        ms: dict[str, list[float]] = {name: [] for name in methods}
        ranks = {}
        for _ in range(_TIMED_RUNS):
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


# --- main ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    chosen = rules(args)
    check_source(args)
    patterns = [f"rank_pattern_{label}.json" for label in chosen]
    outputs = [f"simulated{end}" for end in (".csv", "_times.csv", "_ranks.csv", "_ranks.png")]
    if not args.simulated:
        outputs = ["ranks.csv", *patterns, "ranks.png", *(["not_measured.csv"] if args.model is not None else [])]
    if args.dry_run:
        if not args.simulated:
            plan_source(args, chosen)
        print_plan(args, ["run.json", *outputs])
        return
    if args.model is not None:
        list_tensors(args.model)  # what is no model is not read whole for the record
    folder = RunFolder(
        args.out_dir, "rank", result_arguments(args), inputs=("model", "adapter"), outputs=outputs, seed=args.seed,
        overwrite=args.overwrite,
    )  # fmt: skip
    if folder.is_finished():
        print(folder.finished_message())
        return
    if args.simulated:
        run_simulated(args, chosen, folder)
    else:
        run_source(args, chosen, folder)


def check_source(args: argparse.Namespace) -> None:
    """Fill in the simulated matrices' sizes; raises InputError for flags that do not go with what is ranked."""
    if not args.simulated:
        for name in SIMULATED:
            if getattr(args, name) is not None:
                raise InputError(f"--{name} belongs to --simulated; drop one of the two")
        return
    if args.target_modules:
        raise InputError("--target_modules needs --model or --adapter; simulated matrices have no modules")
    for name, default in SIMULATED.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if min(args.n, args.m) < 1:
        raise InputError(f"--n and --m must be at least 1, got {args.n} and {args.m}")
    family_parameters("lowrank", args.n, args.m, {"true_rank": args.true_rank, "noise": args.noise})


def plan_source(args: argparse.Namespace, chosen: dict[str, Rule]) -> RankPlan:
    return plan_model(args, chosen) if args.adapter is None else plan_adapter(args, chosen)


def run_source(args: argparse.Namespace, chosen: dict[str, Rule], folder: RunFolder) -> None:
    with folder.reserved():
        plan = plan_source(args, chosen)
        source = Path(args.model or args.adapter).resolve().name
        with folder:
            table, configs = plan.compute()
            write_csv(folder.path("ranks.csv"), table)
            if args.model:
                write_csv(folder.path("not_measured.csv"), unmeasured_table(plan.unmeasured))
            for label, config in configs.items():
                write_json(folder.path(f"rank_pattern_{label}.json"), config)

            from sparselora.report.rank import ranks_by_kind

            ranks_by_kind(folder.path("ranks.png"), source, table, list(chosen))
    what = "weights" if args.model else "updates ΔW"
    print(f"{source}: {len(table)} {what}; least rank by {args.criterion}: median (least–most)")
    if args.criterion == "gap":
        print("×: how far the singular value before the gap stands above the one after it, median; near 1 is no gap")
    else:
        print("*: factors of the median rank are no smaller than the matrix")
    print_ranks(table, list(chosen))
    if plan.unmeasured:
        print(f"not measured (listed in not_measured.csv): {describe_unmeasured(plan.unmeasured)}")
    for remark in plan.remarks:
        print(remark)
    missing = [label for label in chosen if label not in configs]
    if missing:
        reason = "no matrix that needs a rank is a LoRA target" if args.model else "no update needs a rank"
        if not table["fro_norm"].any():
            reason = f"every {'matrix' if args.model else 'update'} is zero"
        print(f"no rank_pattern_{', rank_pattern_'.join(missing)}: {reason}")
    if configs:
        print(f"each rank_pattern_*.json in {args.out_dir} holds these ranks as arguments of peft.LoraConfig")


def print_ranks(table: pd.DataFrame, labels: list[str]) -> None:
    """One line per layer type and shape."""
    groups = table.groupby(["kind", "d_out", "d_in"], sort=False)
    width = max(len(kind) for kind, *_ in groups.groups)
    print(f"  {'':{width}} {'n':>4} {'shape':>13}" + "".join(f"{label.replace('_', ' '):>18}" for label in labels))
    for (kind, n, m), part in groups:
        cells = []
        for label in labels:
            ranks = part[f"rank_{label}"]
            middle = int(ranks.median())
            star = "" if rec.factor_params(n, m, middle) < n * m else "*"
            spread = f" ({ranks.min()}–{ranks.max()})" if len(part) > 1 else ""
            ratio = f" ×{part['gap_ratio'].median():.2f}" if label == "gap" else ""
            cells.append(f"{f'{middle}{star}{spread}{ratio}':>18}")
        print(f"  {kind:{width}} {len(part):>4} {f'{n}×{m}':>13}" + "".join(cells))


def run_simulated(args: argparse.Namespace, chosen: dict[str, Rule], folder: RunFolder) -> None:
    targets = args.target_error or [0.1]
    with folder:
        matrices = simulate(args)
        with blas_threads(min(args.n, args.m)):
            spectra = {name: spectrum(W).s for name, W in matrices.items()}
            times = time_methods(matrices, targets[0])
        table = pd.DataFrame([describe(name, (args.n, args.m), s, chosen) for name, s in spectra.items()])
        write_csv(folder.path("simulated.csv"), table.drop(columns="kind"))
        write_csv(folder.path("simulated_times.csv"), times)

        from sparselora.report.rank import simulated_ranks

        folder.path("simulated_ranks.csv")
        simulated_ranks(folder.path("simulated_ranks.png"), args, spectra, table, list(chosen))
    print(f"{args.n}×{args.m} matrices; least rank by {args.criterion}, and the factors' size against the matrix")
    width = max(map(len, spectra))
    print(f"  {'':{width}}" + "".join(f"{label.replace('_', ' '):>18}" for label in chosen))
    for _, row in table.iterrows():
        cells = (f"{row[f'rank_{label}']} ({row[f'stored_{label}']:.0%})" for label in chosen)
        print(f"  {row['name']:{width}}" + "".join(f"{cell:>18}" for cell in cells))
    if not all(table[f"saves_{label}"].all() for label in chosen):
        print("100 % or more: as factors at that rank the matrix is no smaller")
    print(f"from matrix to rank at error {targets[0]:g}, median of {_TIMED_RUNS} alternating runs:")
    for name, part in times.groupby("matrix", sort=False):
        values, formed = part["median_ms"]
        print(
            f"  {name:{width}}  values only {values:.1f} ms, "
            f"SVD and reconstruction {formed:.1f} ms: {formed / values:.1f}×"
        )
    print(f"tables and figure: {args.out_dir}")
