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
from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sparselora.cli import (
    add_run_arguments,
    output_folder,
    refuse_flags,
    result_arguments,
    run_in_folder,
    source_name,
)
from sparselora.config.flags import add_setting_flags
from sparselora.config.train import TASKS, TrainConfig
from sparselora.errors import InputError
from sparselora.inspection.rank_flags import (
    SIMULATED,
    add_rule_flags,
    add_simulation_flags,
    read_rules,
    read_simulation,
)
from sparselora.models.model_files import find_model
from sparselora.models.weights import list_tensors
from sparselora.runs.folder import RunFolder
from sparselora.runs.request import RunRequest

if TYPE_CHECKING:
    from sparselora.inspection.data_ranks import DataRankRequest
    from sparselora.inspection.rank import RankRequest
    from sparselora.inspection.simulation import SimulationRequest

INPUTS = ("model", "adapter", "dataset")
"""The arguments that name files or folders."""
_DATA = (
    "text_fields", "label_field", "prompt_field", "completion_field", "template", "chat_template", "max_length",
    "train_bsz", "device", "dtype",
)  # fmt: skip
_ONLY_DATA = ("dataset", "task", "lora_r", "samples", *_DATA)
"""Settings of ranks from data."""
_WITHOUT_DATA = "is for ranks from data; leave it out, or give --model with --dataset"


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
    add_rule_flags(parser)
    add_simulation_flags(parser)
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


def rank_request(args: argparse.Namespace) -> RankRequest | SimulationRequest:
    """Check the arguments and freeze them.

    Raises:
        InputError: flags that do not go with what is ranked, or out of range.
    """
    from sparselora.inspection.rank import RankRequest

    refuse_flags(args, _ONLY_DATA, _add_data_arguments, _WITHOUT_DATA)
    rules = read_rules(args)
    if args.simulated:
        return read_simulation(args, rules)
    for name in SIMULATED:
        if getattr(args, name) is not None:
            raise InputError(f"--{name} belongs to --simulated; drop one of the two")
    targets = None if args.target_modules is None else tuple(args.target_modules)
    return RankRequest(args.model, args.adapter, rules, targets)


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
    resolved = {"task": ranking.config.task, "device": args.device.partition(":")[0],
                "chat_template": ranking.config.chat_template}  # fmt: skip
    return _run_request(args, (args.model, args.dataset), OUTPUTS, unused, resolved, INPUTS)


def _request(args: argparse.Namespace, ranking: RankRequest | SimulationRequest) -> RunRequest:
    simulation = getattr(ranking, "simulation", None)
    sizes: dict[str, Any] = {} if simulation is None else {name: getattr(simulation, name) for name in SIMULATED}
    source = "simulated" if args.simulated else args.model or args.adapter
    # A ranking without data is known by what it was known by before there were ranks from data.
    return _run_request(args, (source,), ranking.outputs, _ONLY_DATA, sizes, INPUTS[:2])


def _run_request(
    args: argparse.Namespace, sources: Iterable[str | None], outputs: tuple[str, ...], unused: Container[str],
    resolved: dict[str, Any], inputs: tuple[str, ...],
) -> RunRequest:  # fmt: skip
    used = argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in unused})
    return RunRequest(
        "rank",
        output_folder(args, "rank_results", *map(source_name, sources)),
        result_arguments(used) | resolved,
        outputs,
        settings=vars(used) | resolved,
        inputs=inputs,
        seed=args.seed,
        overwrite=args.overwrite,
    )


def name_parts(values: Mapping[str, Any]) -> tuple[list[str], frozenset[str]]:
    """Return how the name of a run in a grid begins: the source; and the flags to leave out behind."""
    source = source_name(values["model"] or values["adapter"])
    return ["simulated" if source is None else source], frozenset({"simulated", *INPUTS})


def run(args: argparse.Namespace) -> None:
    from sparselora.inspection.rank import RankRequest, rank_matrices
    from sparselora.inspection.rank_text import simulated_lines, source_lines
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
            _print(source_lines(args.criterion, ranking, rank_matrices(ranking, folder), folder.folder))
        else:
            _print(simulated_lines(args.criterion, ranking, simulate_ranks(ranking, folder)))
            print(f"tables and figure: {folder.folder}")

    run_in_folder(_request(args, ranking), body, dry_run=args.dry_run, check=check, preview=preview)


def _suggest(args: argparse.Namespace, folder: RunFolder) -> None:
    from sparselora.inspection.data_ranks import suggest_ranks
    from sparselora.inspection.rank_text import suggestion_lines

    _print(suggestion_lines(suggest_ranks(data_request(args), folder)))
    print(f"{folder.folder / 'rank_pattern_data.json'} holds the suggestion as arguments of peft.LoraConfig")


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)
