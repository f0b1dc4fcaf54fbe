"""Phase C: warm up a LoRA, prune its rank channels by importance, or gate them by token, train on.

Each call is one cell of a sweep: a folder of its own in --out_dir, and one row of --out_dir/results.csv. Loop over
--method, --keep_ratio and --seed in the shell, or run a grid; a finished cell is skipped. Then `compare` reads the
table.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselora.cli import add_run_arguments, result_arguments, run_in_folder
from sparselora.config.train import TASKS
from sparselora.errors import InputError, shown
from sparselora.models.model_files import find_model
from sparselora.numerics.channels import GATE_METHODS, PRUNE_METHODS, keep_count
from sparselora.pruning.cell import Cell
from sparselora.pruning.gate_flags import add_token_gate_flags, token_gate_config, without_idle_flags
from sparselora.pruning.outputs import RESULT_COLUMNS, cell_files, completed, refuse_foreign_arguments
from sparselora.runs.files import read_rows, upsert_row
from sparselora.runs.folder import RunFolder, refuse_inputs_inside
from sparselora.runs.former_names import FORMER_NAMES, accept_former_names
from sparselora.runs.process import importing, process_count, process_rank
from sparselora.runs.provenance import fingerprint, input_paths, model_stem
from sparselora.runs.request import RunRequest

if TYPE_CHECKING:
    from sparselora.pruning.study import GateOutcome, Outcome


COMMAND = "prune_finetune_lora"
SHARED_OUTPUTS = ("results.csv", "run_args.json")
"""Files of a sweep, next to the folders of its cells."""
INPUTS = ("model", "dataset", "eval_file")
"""The arguments that name files or folders."""


_TEXT_FLAGS = {"text_fields": None, "label_field": "label"}
"""Flags of the task classification alone → their defaults."""
_PROMPT_FLAGS = {"prompt_field": "prompt", "completion_field": "completion", "template": None}
"""Flags of the task causal_lm alone → their defaults."""

EXAMPLES = """\
  sparselora prune --model minilm --dataset docstrings --method svd --keep_ratio 0.25
  sparselora prune --model ./bert --dataset reviews.csv --text_fields text --seed 1
  sparselora prune --task causal_lm --model ./llama --dataset rows.jsonl --method squeeze --keep_ratio 0.25"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("model and data")
    data.add_argument(
        "--task",
        choices=TASKS,
        default=TASKS[0],
        help="classes of texts, or completions of prompts by a language model",
    )
    data.add_argument(
        "--model", default="distilbert-base-uncased", help="hub name, local folder, GGUF file, or 'minilm' (from pip)"
    )
    data.add_argument(
        "--dataset", default="glue/sst2", help="glue/<task>, 'docstrings', or a csv, tsv, json, jsonl, parquet file"
    )
    data.add_argument("--text_fields", nargs="+", metavar="COLUMN", help="one or two text columns of a local file")
    data.add_argument("--label_field", default="label", metavar="COLUMN", help="label column of a local file")
    data.add_argument("--prompt_field", default="prompt", metavar="COLUMN", help="prompt column (causal_lm)")
    data.add_argument(
        "--completion_field", default="completion", metavar="COLUMN", help="completion column (causal_lm)"
    )
    data.add_argument("--template", metavar="TEXT", help="text around a prompt, with {prompt} in it (causal_lm)")
    data.add_argument(
        "--eval_file", metavar="FILE", help="evaluation rows of a local file (else every fifth row is held out)"
    )
    data.add_argument("--train_samples", type=int, default=200, help="training sentences, drawn by seed; 0 takes all")
    data.add_argument(
        "--eval_samples", type=int, default=200, help="evaluation sentences, the same for every seed; 0 takes all"
    )
    data.add_argument("--max_length", type=int, default=128, help="tokens a sentence is cut to")

    lora = parser.add_argument_group("LoRA and pruning")
    lora.add_argument(
        "--target_modules", nargs="+", metavar="NAME", help="modules to adapt (default: the attention projections)"
    )
    lora.add_argument("--lora_r", type=int, default=8, help="rank of the warm-up")
    lora.add_argument("--lora_alpha", type=int, default=16, help="alpha; the update is scaled by alpha / r")
    lora.add_argument("--lora_dropout", type=float, default=0.0, help="dropout on the adapter's input")
    lora.add_argument(
        "--method",
        choices=(*PRUNE_METHODS, *GATE_METHODS),
        default="channel_energy",
        help="how channels are ranked and removed, or (…_gate) chosen for each token; no_prune is the control",
    )
    lora.add_argument(
        "--keep_ratio", type=float, default=0.5, help="fraction of the rank channels that stays, or that a token uses"
    )
    lora.add_argument(
        "--scope", choices=("module", "global"), default="module", help="spend the budget per module or over the model"
    )
    lora.add_argument(
        "--mask", action="store_true", help="mask channels in place of removing them: the reference, no faster"
    )

    add_token_gate_flags(parser)

    training = parser.add_argument_group("training")
    training.add_argument("--warmup_epochs", type=float, default=1.0, help="epochs before pruning")
    training.add_argument("--post_epochs", type=float, default=1.0, help="epochs after pruning")
    training.add_argument("--train_bsz", type=int, default=16, help="training batch size per process")
    training.add_argument("--eval_bsz", type=int, default=32, help="evaluation batch size per process")
    training.add_argument(
        "--lr", type=float, default=2e-4, help="peak learning rate; it falls linearly to 0 over both phases"
    )
    training.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    training.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 on CUDA, fp32 on the CPU"
    )
    add_run_arguments(parser, out_dir="lora_runs")
    accept_former_names(parser, FORMER_NAMES[COMMAND])


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a cell."""
    return _request(args, read_cell(args))


def read_cell(args: argparse.Namespace) -> Cell:
    """Check the flags and freeze them."""
    check_arguments(args)
    return Cell.from_arguments(vars(args), token_gate_config(vars(args)))


def _request(args: argparse.Namespace, cell: Cell) -> RunRequest:
    arguments = cell_arguments(args, cell)
    return RunRequest(
        COMMAND,
        Path(args.out_dir) / cell_name(arguments),
        arguments,
        cell_files(cell),
        settings=vars(args),
        inputs=INPUTS,
        shared_outputs=SHARED_OUTPUTS,
        seed=args.seed,
        overwrite=args.overwrite,
    )


def run(args: argparse.Namespace) -> None:
    cell = read_cell(args)
    requested = _request(args, cell)
    out_dir = Path(args.out_dir)

    def finished_cells() -> list[str]:
        return read_rows(out_dir / "results.csv", RESULT_COLUMNS)["run_id"].tolist()

    def check() -> None:
        find_model(cell.model)  # before its files are read for the record
        refuse_inputs_inside(out_dir, input_paths(requested.arguments, INPUTS))
        refuse_foreign_arguments(out_dir, finished_cells())

    def restore_row(folder: RunFolder) -> None:
        row = folder.noted("result")
        if row and row["run_id"] not in finished_cells():
            upsert_row(out_dir / "results.csv", completed(row))  # the table was lost, the cell was not

    def body(folder: RunFolder) -> None:
        # Imported late: torch takes seconds to load, and a finished cell or a bad flag should return at once.
        with importing():
            from sparselora.pruning.run import run_cell

        outcome = run_cell(cell, folder, out_dir, say=print)
        if outcome is not None:
            print_outcome(outcome, folder.folder)

    run_in_folder(
        requested, body, dry_run=args.dry_run, check=check, on_finished=restore_row, is_main=process_rank() == 0
    )


def check_arguments(args: argparse.Namespace) -> None:
    keep_count(1, args.keep_ratio)  # raises on a bad ratio
    for name in ("lora_r", "lora_alpha", "train_bsz", "eval_bsz", "max_length"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    for name in ("warmup_epochs", "post_epochs"):
        if not 0 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} must be 0 or more, got {getattr(args, name)}")
    if args.warmup_epochs + args.post_epochs == 0:
        raise InputError("--warmup_epochs and --post_epochs are both 0: there is nothing to train")
    if not 0 < args.lr < math.inf:
        raise InputError(f"--lr must be above 0, got {args.lr}")
    if not 0 <= args.lora_dropout < 1:
        raise InputError(f"--lora_dropout must be in [0, 1), got {args.lora_dropout}")
    if args.mask and args.method in ("svd", "squeeze"):
        raise InputError(
            f"--mask goes with methods that keep channels; {args.method} rotates them, so there is nothing to mask"
        )
    _check_task(args)


def _check_task(args: argparse.Namespace) -> None:
    """Raise for flags of the other task, which would change nothing."""
    other_task, names = ("classification", _TEXT_FLAGS) if args.task == "causal_lm" else ("causal_lm", _PROMPT_FLAGS)
    for name, default in names.items():
        if getattr(args, name) != default:
            raise InputError(f"--{name} is for --task {other_task}, got --task {args.task}; leave it out")
    if args.template is not None and "{prompt}" not in args.template:
        raise InputError(f"--template must have {{prompt}} in it, got {shown(args.template)}")


def cell_arguments(args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """Return the arguments that decide the cell's result, by which it is known."""
    arguments = without_idle_flags(result_arguments(args), cell.gate)
    # A cell is known by what matters to it: one of a classifier by the flags from before there were language models.
    idle = _TEXT_FLAGS if cell.is_causal else {"task": None, **_PROMPT_FLAGS}
    arguments = {name: value for name, value in arguments.items() if name not in idle}
    arguments["device"] = args.device.partition(":")[0]  # which of several GPUs it was does not matter
    arguments |= {"keep_ratio": cell.keep_ratio, "scope": cell.scope, "mask": cell.mask}
    if process_count() > 1:  # under `accelerate launch` the batch is that much larger: another cell
        arguments["processes"] = process_count()
    return arguments


def cell_name(cell: dict[str, Any]) -> str:
    model, dataset = (model_stem(cell[name]) for name in ("model", "dataset"))
    run_id = fingerprint(COMMAND, cell, INPUTS)
    return f"{model}_{dataset}_{cell['method']}_k{cell['keep_ratio']:g}_r{cell['lora_r']}_s{cell['seed']}_{run_id}"


def print_outcome(outcome: Outcome, folder: Path) -> None:
    print(f"  {'':<12}accuracy    loss   LoRA parameters")
    rows = (
        ("before", outcome.before, outcome.adapter_params[0]),
        ("right after", outcome.right_after, outcome.adapter_params[1]),
        ("after", outcome.after, outcome.adapter_params[1]),
    )
    for name, evaluation, params in rows:
        print(f"  {name:<12}{evaluation.accuracy:8.4f}{evaluation.loss:8.4f}{params:>18,}")
    if outcome.gate is not None:
        print_gate(outcome.gate, outcome.active_r)
    print(f"  head next to it: {outcome.head_params:,} parameters; files in {folder}")


def print_gate(gate: GateOutcome, active_r: float) -> None:
    static, ranks = gate.static_evaluation, gate.active_rank.values()
    print(f"  {'static':<12}{static.accuracy:8.4f}{static.loss:8.4f}   the channels used most, for every token")
    print(f"  active channels of a token: {active_r:.3f} ({min(ranks):.3f} to {max(ranks):.3f} over modules)")
    print(f"  gates: {gate.parameters:,} parameters, {gate.flops_per_token:,} FLOPs a token")
