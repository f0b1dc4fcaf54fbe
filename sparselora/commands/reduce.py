"""A smaller adapter: each module's update cut to a lower rank, in factor space, with the least error there is.

The rank is the same for every module (--rank, at most what it has) or the least that holds a share of the squared norm
of its update (--energy). The scale is folded into the factors, and channels of zeros fill them up to the largest rank,
so that alpha == r in every module: PEFT, vLLM and llama.cpp all load the same update. What is no linear LoRA module is
carried through. An AdaLoRA adapter becomes a plain LoRA: --energy 1 keeps its whole update, at the least rank.

--eval measures first: the held-out loss of every lower rank on the rows of --dataset, by the plain SVD and weighted by
the inputs of training rows, with random subspaces as the control. It writes the adapter of the least rank whose loss is
equivalent to that of the whole adapter within --margin, and none if no rank is.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sparselora.cli import add_run_arguments, check_seed, refuse_flags, result_arguments, row_count, run_in_folder
from sparselora.config.fields import options
from sparselora.config.flags import add_setting_flags
from sparselora.config.train import TASKS, TrainConfig
from sparselora.errors import InputError, shown
from sparselora.models.adapter_config import read_peft_config
from sparselora.models.model_files import find_model
from sparselora.models.prompt_template import template_outputs
from sparselora.runs.files import write_csv
from sparselora.runs.folder import RunFolder
from sparselora.runs.former_names import FORMER_NAMES, accept_former_names
from sparselora.runs.process import importing
from sparselora.runs.request import RunRequest

if TYPE_CHECKING:
    from sparselora.spectral.rank_curve import RankCurveRequest
    from sparselora.spectral.reduce import ReducedAdapter

_OUTPUTS = ("adapter_config.json", "adapter_model.safetensors", "reduce.csv")
_CURVE_OUTPUTS = ("losses_by_rank.csv", "losses_by_rank.png", "losses_by_row.csv")
_DATA = ("text_fields", "label_field", "prompt_field", "completion_field", "template", "chat_template", "max_length")
_ONLY_EVAL = (
    "ranks", "energies", "margin", "calib_samples", "model", "device", "dtype", "dataset", "task", "eval_file",
    "eval_samples", "eval_bsz", "seed", *_DATA,
)  # fmt: skip
"""Settings of --eval."""
EXAMPLES = """\
  sparselora reduce --adapter runs/train/adapter --energy 0.95
  sparselora reduce --adapter runs/train/adapter --rank 4 --out_dir adapter_r4
  sparselora reduce --adapter runs/train/adapter --eval --model minilm --dataset docstrings"""
INPUTS = ("adapter", "model", "dataset", "eval_file")
"""The arguments that name files or folders."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("adapter")
    source.add_argument("--adapter", required=True, metavar="DIR", help="folder of a PEFT LoRA or AdaLoRA adapter")
    size = parser.add_argument_group("how small (one of)").add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, metavar="N", help="rank of every module; one that has less keeps what it has")
    size.add_argument(
        "--energy", type=float, metavar="X", help="least rank of each module that holds this share of ‖ΔW‖², as 0.95"
    )
    size.add_argument("--eval", action="store_true", help="least rank whose held-out loss is equivalent")
    _add_eval_arguments(parser)
    add_run_arguments(parser, "reduced_lora", seed=False)
    accept_former_names(parser, FORMER_NAMES["reduce"])


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --eval")
    levels = group.add_mutually_exclusive_group()
    levels.add_argument(
        "--ranks", type=int, nargs="+", metavar="N", help="ranks to evaluate, below the adapter's (default: its halves)"
    )
    levels.add_argument(
        "--energies", type=float, nargs="+", metavar="X", help="shares of ‖ΔW‖² in place of ranks, as 0.99 0.9 0.5"
    )
    group.add_argument("--margin", default="1%", metavar="X%", help="share of the loss that counts as no difference")
    group.add_argument(
        "--calib_samples", type=int, metavar="N",
        help="training rows whose inputs weight the truncation; 0: plain SVD alone (default: 64, or all there are)",
    )  # fmt: skip
    group.add_argument("--model", metavar="M", help="base model (default: the one that the adapter names)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    group.add_argument(
        "--dtype", default="auto", choices=options(TrainConfig)["dtype"].choices,
        help="of base weights and computation",
    )  # fmt: skip
    group.add_argument("--dataset", metavar="D", help="local table, hub name, gsm8k, glue/<task> or docstrings")
    group.add_argument(
        "--task", default="auto", choices=("auto", *TASKS), help="auto: as the adapter says, else by the data"
    )
    group.add_argument("--eval_file", metavar="FILE", help="held-out rows (default: every fifth row)")
    group.add_argument("--eval_samples", type=row_count, default=0, metavar="N", help="held-out rows; 0: all")
    group.add_argument("--eval_bsz", type=int, default=8, metavar="N", help="rows in a batch (affects memory only)")
    group.add_argument("--seed", type=int, default=0, help="seed of the calibration rows and the control")
    add_setting_flags(group, _DATA)


# --- the request --------------------------------------------------------------------------------------------------


def read_curve_request(args: argparse.Namespace) -> RankCurveRequest:
    """Check the flags of --eval and freeze them.

    Raises:
        InputError: one that is missing or out of range, a base model that is not at hand.
    """
    for name, least in (("calib_samples", 0), ("eval_bsz", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise InputError(f"--{name} must be {least} or more, got {value}")
    check_seed(args.seed)
    margin = _share(args.margin)
    for rank in args.ranks or ():
        if rank < 1:
            raise InputError(f"--ranks must be at least 1, got {rank}; PEFT has no rank 0")
    for energy in args.energies or ():
        if not 0 < energy < 1:
            raise InputError(f"--energies must be between 0 and 1, got {energy:g}; 0.95 keeps 95 % of the energy")
    if args.dataset is None:
        raise InputError("no --dataset given; name the rows that --eval measures on")
    model = args.model or read_peft_config(Path(args.adapter)).get("base_model_name_or_path")
    if not model:
        raise InputError(f"adapter {Path(args.adapter).name} names no base model; give it by --model")
    find_model(model)

    from sparselora.spectral.rank_curve import RankCurveRequest
    from sparselora.spectral.request import GSM8K, edit_task

    task = edit_task(args.adapter, args.dataset) if args.task == "auto" else str(args.task)
    names = (*_DATA, "eval_file", "eval_samples", "eval_bsz", "dtype", "device", "seed")
    values = {name: getattr(args, name) for name in names}
    values |= {"model": model, "task": task, "dataset": GSM8K if args.dataset == "gsm8k" else args.dataset}
    return RankCurveRequest(
        adapter=args.adapter,
        config=TrainConfig.from_dict(values),
        ranks=None if args.ranks is None else tuple(args.ranks),
        energies=None if args.energies is None else tuple(args.energies),
        margin=margin,
        calib_samples=args.calib_samples,
    )


def _share(text: str) -> float:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%\s*", text)
    if match is None or not 0 < float(match[1]) < 100:
        raise InputError(f"--margin must be a percentage between 0 and 100, as 1%, got {shown(text)}")
    return float(match[1]) / 100


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run."""
    if args.rank is not None and args.rank < 1:
        raise InputError(f"--rank must be at least 1, got {args.rank}; PEFT has no rank 0")
    if args.energy is not None and not 0 < args.energy <= 1:
        raise InputError(f"--energy must be in (0, 1], got {args.energy}; 0.95 keeps 95 % of the energy")
    if not args.eval:
        refuse_flags(args, _ONLY_EVAL, _add_eval_arguments, "is for --eval; leave it out, or give --eval")

    # Imported after the flags are checked: torch takes seconds.
    from sparselora.models.adapter_files import refuse_overlap

    refuse_overlap(args.out_dir, args.adapter)
    # A cut alone is known by what it was known by before there was --eval.
    others = frozenset() if args.eval else {"eval", *_ONLY_EVAL}
    used = argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in others})
    resolved: dict[str, object] = {}
    if args.eval:
        config = read_curve_request(args).config
        resolved = {"model": config.model, "task": config.task, "device": args.device.partition(":")[0]}
        if args.chat_template is not None:
            resolved["chat_template"] = config.chat_template
    return RunRequest(
        "reduce",
        Path(args.out_dir),
        result_arguments(used) | resolved,
        (*_OUTPUTS, *template_outputs(args.adapter), *(_CURVE_OUTPUTS if args.eval else ())),
        settings=vars(used) | resolved,
        inputs=INPUTS if args.eval else INPUTS[:1],
        seed=args.seed if args.eval else None,
        overwrite=args.overwrite,
    )


# --- the run ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    run_request = request(args)
    if args.eval:
        run_in_folder(run_request, lambda folder: _measure(args, folder), dry_run=args.dry_run)
        return

    def reduced() -> ReducedAdapter:
        from sparselora.models.adalora import open_as_lora
        from sparselora.spectral.reduce import reduce_adapter

        return reduce_adapter(open_as_lora(args.adapter), args.rank, args.energy)

    def body(folder: RunFolder) -> None:
        result = reduced()
        with folder:
            result.write(folder.folder)
            write_csv(folder.path("reduce.csv"), result.table)
            folder.note(carried=result.adapter.carried)
        print(result.text)
        print(f"adapter and table: {args.out_dir}")

    run_in_folder(run_request, body, dry_run=args.dry_run, preview=lambda: print(reduced().text))


def _measure(args: argparse.Namespace, folder: RunFolder) -> None:
    with importing():
        from sparselora.spectral.rank_curve import run_rank_curve

    curve = run_rank_curve(read_curve_request(args), folder)
    print(curve.text)
    written = "tables and figure" if curve.choice is None else "adapter, tables and figure"
    print(f"{written}: {args.out_dir}")
