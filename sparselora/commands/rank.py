"""The least rank that each matrix needs: of a model's weights, of an adapter's updates, or of simulated matrices.

A rank is enough when its best approximation leaves a relative error ‖W − Ŵ‖_F / ‖W‖_F below the target (error), holds
the target share of the squared norm (energy), or stands before the widest gap, as a ratio of neighbouring singular
values, among ranks whose factors are smaller than the matrix (gap). All ranks come from singular values alone; an
adapter's update B A is never formed.

The rank of a frozen weight says how far factors could replace that weight. It is no measure of the rank that LoRA needs
on it: that is the rank of a trained update, --adapter, which also writes arguments of peft.LoraConfig.

--model with --dataset suggests LoRA ranks before there is an adapter: from the gradients of a fresh LoRA on training
rows, judged on other rows against one rank and random ranks of as many parameters. Where one rank is as good, it says
so.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselora.cli import add_run_arguments, output_folder, result_arguments, run_in_folder, source_name
from sparselora.config.flags import add_setting_flags
from sparselora.config.train import TASKS, TrainConfig
from sparselora.errors import InputError
from sparselora.models.model_files import find_model
from sparselora.models.weights import describe_unmeasured, list_tensors
from sparselora.numerics import reconstruction as rec
from sparselora.numerics.matrices import family_parameters
from sparselora.runs.folder import RunFolder
from sparselora.runs.request import RunRequest

if TYPE_CHECKING:
    import pandas as pd

    from sparselora.inspection.data_ranks import DataRankRequest, DataRanks
    from sparselora.inspection.rank import RankRequest, RankResults, Rule
    from sparselora.inspection.simulation import SimulatedRanks, SimulationRequest

INPUTS = ("model", "adapter", "dataset")
"""The arguments that name files or folders."""
_DATA = (
    "text_fields", "label_field", "prompt_field", "completion_field", "template", "chat_template", "max_length",
    "train_bsz", "device", "dtype",
)  # fmt: skip
_ONLY_DATA = ("dataset", "task", "lora_r", "samples", *_DATA)
"""Settings of ranks from data."""
SIMULATED: dict[str, int | float] = {"n": 512, "m": 512, "true_rank": 64, "noise": 0.01}
"""Defaults of --simulated."""


# --- arguments ----------------------------------------------------------------------------------------------------

EXAMPLES = """\
  sparselora rank --model minilm --target_error 0.1 0.3
  sparselora rank --adapter runs/train/adapter --criterion energy
  sparselora rank --model minilm --dataset docstrings --lora_r 8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("what to rank (one of)").add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="hub name, local folder with safetensors, GGUF file, minilm or smollm2")
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
    simulated = parser.add_argument_group("simulated matrices")
    simulated.add_argument("--n", type=int, help="rows (default: 512)")
    simulated.add_argument("--m", type=int, help="columns (default: 512)")
    simulated.add_argument("--true_rank", type=int, help="rank of the low-rank matrix's signal (default: 64)")
    simulated.add_argument("--noise", type=float, help="its noise relative to the signal (default: 0.01)")
    _add_data_arguments(parser)
    add_run_arguments(parser, "rank_results/<what>")


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ranks from data (with --model)")
    group.add_argument(
        "--dataset", "--data", metavar="D", help="training rows: local table, hub name, glue/<task> or docstrings"
    )
    group.add_argument(
        "--task", default="auto", choices=("auto", *TASKS), help="auto: classification for GLUE and docstrings"
    )
    add_setting_flags(group, ("lora_r",))
    group.add_argument("--samples", type=int, default=64, metavar="N", help="rows to take gradients of")
    add_setting_flags(group, _DATA)


def rules(args: argparse.Namespace) -> dict[str, Rule]:
    """Return name → rule for every target of the criterion, checked; the names become column names.

    Raises:
        InputError: a target out of range, or given for another criterion.
    """
    from sparselora.inspection.rank import rank_rules

    for name in ("error", "energy"):
        if getattr(args, f"target_{name}") is not None and args.criterion != name:
            raise InputError(f"--target_{name} belongs to --criterion {name}, got --criterion {args.criterion}")
    if args.criterion == "gap":
        return rank_rules("gap")
    if args.criterion == "energy":
        targets, example = args.target_energy or [0.9, 0.95, 0.99], "0.99 keeps 99 % of the energy"
    else:
        targets, example = args.target_error or [0.01, 0.05, 0.1, 0.3], "0.1 leaves 10 % of the norm"
    for target in targets:
        if not 0 < target < 1:
            raise InputError(f"--target_{args.criterion} must be between 0 and 1, got {target}; {example}")
    return rank_rules(args.criterion, targets)


def rank_request(args: argparse.Namespace) -> RankRequest | SimulationRequest:
    """Check the arguments and freeze them.

    Raises:
        InputError: flags that do not go with what is ranked, or out of range.
    """
    from sparselora.inspection.rank import RankRequest
    from sparselora.inspection.simulation import Simulation, SimulationRequest

    _refuse_data_flags(args)
    checked_rules = rules(args)
    if not args.simulated:
        for name in SIMULATED:
            if getattr(args, name) is not None:
                raise InputError(f"--{name} belongs to --simulated; drop one of the two")
        targets = None if args.target_modules is None else tuple(args.target_modules)
        return RankRequest(args.model, args.adapter, checked_rules, targets)
    if args.target_modules:
        raise InputError("--target_modules needs --model or --adapter; simulated matrices have no modules")
    values = {name: default if getattr(args, name) is None else getattr(args, name)
              for name, default in SIMULATED.items()}  # fmt: skip
    n, m, true_rank, noise = int(values["n"]), int(values["m"]), int(values["true_rank"]), values["noise"]
    if min(n, m) < 1:
        raise InputError(f"--n and --m must be at least 1, got {n} and {m}")
    family_parameters("lowrank", n, m, {"true_rank": true_rank, "noise": noise})
    simulation = Simulation(n, m, true_rank, noise, args.seed)
    return SimulationRequest(simulation, checked_rules, (args.target_error or [0.1])[0])


def data_request(args: argparse.Namespace) -> DataRankRequest:
    """Check the arguments of ranks from data and freeze them.

    Raises:
        InputError: flags that do not go with them, or out of range.
    """
    from sparselora.inspection.data_ranks import BLOCKS, DataRankRequest

    if args.model is None:
        raise InputError("--dataset goes with --model: ranks from data are of a fresh adapter; drop the other")
    for name in ("target_error", "target_energy", *SIMULATED):
        if getattr(args, name) is not None:
            raise InputError(f"--{name} does not go with --dataset, whose ranks have a budget (--lora_r); drop one")
    if args.criterion != "error":
        raise InputError(f"--criterion {args.criterion} does not go with --dataset; drop one of the two")
    if args.samples < BLOCKS:
        raise InputError(f"--samples must be at least {BLOCKS}, got {args.samples}: halves of the rows are compared")
    find_model(args.model)
    is_text = args.dataset.startswith("glue/") or args.dataset == "docstrings"
    values = {name: getattr(args, name) for name in (*_ONLY_DATA, "model", "target_modules", "seed")}
    del values["samples"]
    values |= {"task": ("classification" if is_text else "causal_lm") if args.task == "auto" else args.task}
    return DataRankRequest(TrainConfig.from_dict(values), args.samples)


# --- the run ------------------------------------------------------------------------------------------------------


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run."""
    return _data_run_request(args, data_request(args)) if args.dataset else _request(args, rank_request(args))


def _data_run_request(args: argparse.Namespace, ranking: DataRankRequest) -> RunRequest:
    from sparselora.inspection.data_ranks import OUTPUTS

    unused = {"adapter", "simulated", "criterion", "target_error", "target_energy", *SIMULATED}
    used = argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in unused})
    resolved = {"task": ranking.config.task, "device": args.device.partition(":")[0],
                "chat_template": ranking.config.chat_template}  # fmt: skip
    return RunRequest(
        "rank",
        output_folder(args, "rank_results", source_name(args.model), source_name(args.dataset)),
        result_arguments(used) | resolved,
        OUTPUTS,
        settings=vars(used) | resolved,
        inputs=INPUTS,
        seed=args.seed,
        overwrite=args.overwrite,
    )


def _refuse_data_flags(args: argparse.Namespace) -> None:
    defaults = argparse.ArgumentParser()
    _add_data_arguments(defaults)
    for name in _ONLY_DATA:
        if getattr(args, name) != defaults.get_default(name):
            raise InputError(f"--{name} is for ranks from data; leave it out, or give --model with --dataset")


def _request(args: argparse.Namespace, ranking: RankRequest | SimulationRequest) -> RunRequest:
    simulation = getattr(ranking, "simulation", None)
    sizes = {} if simulation is None else {name: getattr(simulation, name) for name in SIMULATED}
    # A ranking without data is known by what it was known by before there were ranks from data.
    used = argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in _ONLY_DATA})
    return RunRequest(
        "rank",
        output_folder(args, "rank_results", "simulated" if args.simulated else source_name(args.model or args.adapter)),
        result_arguments(used) | sizes,
        ranking.outputs,
        settings=vars(used) | sizes,
        inputs=INPUTS[:2],
        seed=args.seed,
        overwrite=args.overwrite,
    )


def name_parts(values: Mapping[str, Any]) -> tuple[list[str], frozenset[str]]:
    """Return how the name of a run in a grid begins: the source; and the flags to leave out behind."""
    source = source_name(values["model"] or values["adapter"])
    return ["simulated" if source is None else source], frozenset({"simulated", *INPUTS})


def run(args: argparse.Namespace) -> None:
    from sparselora.inspection.rank import RankRequest, rank_matrices
    from sparselora.inspection.simulation import simulate_ranks

    if args.dataset:
        run_in_folder(request(args), lambda folder: _suggest(args, folder), dry_run=args.dry_run)
        return
    ranking = rank_request(args)

    def preview() -> None:
        if isinstance(ranking, RankRequest):
            ranking.task(is_checked=False)

    def check() -> None:
        if args.model is not None:
            list_tensors(args.model)  # a folder that holds no model is not read whole for the record

    def body(folder: RunFolder) -> None:
        if isinstance(ranking, RankRequest):
            print_source(args.criterion, ranking, rank_matrices(ranking, folder), folder.folder)
        else:
            print_simulated(args.criterion, ranking, simulate_ranks(ranking, folder))
            print(f"tables and figure: {folder.folder}")

    run_in_folder(_request(args, ranking), body, dry_run=args.dry_run, check=check, preview=preview)


def _suggest(args: argparse.Namespace, folder: RunFolder) -> None:
    from sparselora.inspection.data_ranks import suggest_ranks

    results = suggest_ranks(data_request(args), folder)
    print_suggestion(results)
    print(f"{folder.folder / 'rank_pattern_data.json'} holds the suggestion as arguments of peft.LoraConfig")


def print_suggestion(results: DataRanks) -> None:
    """Print the suggested ranks by layer type, and the judgement."""
    print(f"{len(results.table)} modules; suggested rank: median (least–most), and share of the gradient energy")
    for kind, part in results.table.groupby("kind", sort=False):
        ranks = part["rank"]
        print(f"  {kind:<24} {ranks.median():>6g} ({ranks.min()}–{ranks.max()}) {part['energy_share'].sum():>8.1%}")
    for sentence in results.sentences:
        print(sentence)


def print_source(criterion: str, ranking: RankRequest, results: RankResults, folder: Path) -> None:
    """Print the ranks of a model's weights or of an adapter's updates."""
    table, configs, labels = results.table, results.configs, list(ranking.rules)
    measured = "updates ΔW" if ranking.model is None else "weights"
    print(f"{ranking.source}: {len(table)} {measured}; least rank by {criterion}: median (least–most)")
    if criterion == "gap":
        print("×: ratio of the singular values before and after the gap, median; near 1 is no gap")
    else:
        print("*: factors of the median rank are no smaller than the matrix")
    print_ranks(table, labels)
    if results.unmeasured:
        print(f"not measured (listed in not_measured.csv): {describe_unmeasured(results.unmeasured)}")
    for remark in results.remarks:
        print(remark)
    if ranking.model is not None:
        print("these are ranks of frozen weights: how far factors could replace them, not the rank that LoRA needs;")
        print("that is the rank of a trained update: rank --adapter DIR")
        return
    missing = [label for label in labels if label not in configs]
    if missing:
        reason = "no update needs a rank" if table["fro_norm"].any() else "every update is zero"
        print(f"no rank_pattern_{', rank_pattern_'.join(missing)}: {reason}")
    if configs:
        print(f"each rank_pattern_*.json in {folder} holds these ranks as arguments of peft.LoraConfig")


def print_ranks(table: pd.DataFrame, labels: list[str]) -> None:
    """Print one line per layer type and shape."""
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


def print_simulated(criterion: str, ranking: SimulationRequest, results: SimulatedRanks) -> None:
    """Print the ranks of the simulated matrices, and the times of both ways to find them."""
    table, labels, simulation = results.table, list(ranking.rules), ranking.simulation
    size = f"{simulation.n}×{simulation.m}"
    print(f"{size} matrices; least rank by {criterion}, and the factors' size against the matrix")
    width = max(map(len, results.spectra))
    print(f"  {'':{width}}" + "".join(f"{label.replace('_', ' '):>18}" for label in labels))
    for _, row in table.iterrows():
        cells = (f"{row[f'rank_{label}']} ({row[f'stored_{label}']:.0%})" for label in labels)
        print(f"  {row['name']:{width}}" + "".join(f"{cell:>18}" for cell in cells))
    if not all(table[f"saves_{label}"].all() for label in labels):
        print("100 % or more: as factors at that rank the matrix is no smaller")
    runs = results.times["runs"].iloc[0]
    print(f"from matrix to rank at error {ranking.target:g}, median of {runs} alternating runs:")
    for name, part in results.times.groupby("matrix", sort=False):
        values, formed = part["median_ms"]
        print(
            f"  {name:{width}}  values only {values:.1f} ms, "
            f"SVD and reconstruction {formed:.1f} ms: {formed / values:.1f}×"
        )
