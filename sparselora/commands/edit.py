"""Edit the spectrum of a finished LoRA adapter: rescale each module's singular values by how the loss reacts to them.

A few training rows say how the loss reacts (--calib_samples); --sensitivity takes what an earlier edit of the same
adapter has measured, and needs neither a model nor data then. The edited adapter is one that plain PEFT loads; what is
not edited is carried through untouched. --report evaluates the edit on held-out rows with its controls: no adapter,
the adapter as it is, the round trip alone, the signed mode, and random draws with the same factors and energy.

--grid runs one edit for each line of a file, a JSON object of these flags and perhaps a name; the other flags are
defaults of all lines. What is finished is skipped, so the same call restarts a grid; `compare RUN_ROOT` collects it.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import fields
from pathlib import Path

from sparselora.cli import LineParser, Parser, add_run_arguments, check_seed, result_arguments, row_count, run_in_folder
from sparselora.config.fields import options
from sparselora.config.flags import add_setting_flags
from sparselora.config.train import TASKS, TrainConfig
from sparselora.errors import InputError
from sparselora.models.adapter_files import AdapterFile, open_adapter, refuse_overlap
from sparselora.models.adapter_layers import select_modules
from sparselora.models.model_files import find_model
from sparselora.runs.folder import RunFolder
from sparselora.runs.former_names import FORMER_NAMES, accept_former_names
from sparselora.runs.process import complain, importing
from sparselora.runs.request import RunRequest
from sparselora.spectral.flags import add_edit_flags, read_edit_options
from sparselora.spectral.request import GSM8K, INPUTS, EditRequest, edit_task, name_parts, questions_source, reads_hub

EXAMPLES = """\
  sparselora edit --adapter runs/train/adapter --model minilm --dataset docstrings --target_modules all --report
  sparselora edit --adapter runs/train/adapter --sensitivity edited_lora/sensitivity.csv --mode gd"""
ALL = "all"
OUT_DIR = "edited_lora"
GRID_FLAGS = ("grid", "run_root", "gpus", "prefetch")

_DATA = ("text_fields", "label_field", "prompt_field", "completion_field", "template", "chat_template", "max_length")
_AT_LEAST = {"calib_samples": 1, "calib_bsz": 1, "eval_bsz": 1, "draws": 1, "fewshot": 0,
             "max_new_tokens": 1}  # fmt: skip
_COMMON = (
    "adapter", "model", "device", "dtype", "mode", "core_frac", "noise_frac", "amp_factor", "sup_factor",
    "target_modules", "dataset", "task", "calib_samples", "sensitivity", "prompt_field", "completion_field", "report",
    "draws", "eval_file", "eval_samples", "grid", "run_root", "gpus", "out_dir", "seed", "dry_run",
    "overwrite",
)  # fmt: skip
"""Settings that the short help shows."""
_ONLY_FOR = {"text_fields": "classification", "template": "causal_lm", "chat_template": "causal_lm"}


def add_arguments(parser: Parser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--adapter", metavar="DIR", help="folder of a PEFT LoRA adapter (needed)")
    model.add_argument(
        "--model", metavar="M", help="its base model: local folder, GGUF file, hub name, minilm or smollm2"
    )
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    model.add_argument(
        "--dtype", default="auto", choices=options(TrainConfig)["dtype"].choices,
        help="of base weights and computation",
    )  # fmt: skip
    add_edit_flags(parser)
    _add_data_arguments(parser)
    _add_evaluation_arguments(parser)
    _add_grid_arguments(parser)
    add_run_arguments(parser, OUT_DIR)
    accept_former_names(parser, FORMER_NAMES["edit"])
    parser.shorten_help(_COMMON)


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("calibration")
    data.add_argument("--dataset", metavar="D", help="local table, hub name, glue/<task>, docstrings")
    data.add_argument(
        "--task", default="auto", choices=("auto", *TASKS), help="auto: as the adapter says, else by the data"
    )
    data.add_argument("--calib_samples", type=int, default=32, metavar="N", help="training rows, drawn by seed")
    data.add_argument("--calib_bsz", type=int, default=2, metavar="N", help="rows in a batch (affects memory only)")
    data.add_argument(
        "--sensitivity",
        metavar="FILE",
        help="sensitivity.csv of an earlier edit, in place of calibration",
    )
    add_setting_flags(data, _DATA)


def _add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--report", action="store_true", help="evaluate the edit and its controls")
    group.add_argument("--draws", type=int, default=20, metavar="N", help="random draws; a verdict needs 20")
    group.add_argument(
        "--oracle", action="store_true",
        help="with --report: an upper bound, gd by the gradient of the evaluation rows themselves",
    )  # fmt: skip
    group.add_argument(
        "--sgd", action="store_true",
        help="with --report: 1, 2 and 5 SGD steps on lora_A and lora_B with the same calibration rows, as a rival",
    )  # fmt: skip
    group.add_argument(
        "--general_dataset", metavar="D",
        help="with --report: text that is not of the task (file with a column text, or docstrings): what is forgotten?",
    )  # fmt: skip
    group.add_argument(
        "--general_samples", type=row_count, default=256, metavar="N", help="rows of general text; 0: all"
    )
    group.add_argument("--eval_gsm8k", action="store_true", help="GSM8K exact match of the edited adapter")
    group.add_argument("--fewshot", type=int, default=5, metavar="N", help="worked examples before each question")
    group.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="longest answer, in tokens")
    group.add_argument("--eval_file", metavar="FILE", help="held-out rows (default: every fifth row)")
    group.add_argument("--eval_samples", type=row_count, default=0, metavar="N", help="held-out rows; 0: all")
    group.add_argument("--eval_bsz", type=int, default=8, metavar="N", help="rows in a batch (affects memory only)")


def _add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("grid")
    group.add_argument("--grid", type=Path, metavar="FILE", help="JSONL of flags: run all unfinished edits")
    group.add_argument("--run_root", type=Path, metavar="DIR", help="folder of a grid's runs")
    group.add_argument("--gpus", metavar="0,1,…", help="GPUs of a grid, one run at a time on each")
    group.add_argument("--prefetch", action="store_true", help="fetch a grid's adapters and base models first")


# --- the request --------------------------------------------------------------------------------------------------


def read_request(args: argparse.Namespace) -> EditRequest:
    """Check the flags and freeze them.

    Raises:
        InputError: a flag that is missing, out of range, or does not go with the others.
    """
    if args.adapter is None:
        raise InputError("no --adapter given; name the folder of the adapter to edit")
    for name, least in _AT_LEAST.items():
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be {least} or more, got {getattr(args, name)}")
    check_seed(args.seed)
    options = read_edit_options(args)
    task = edit_task(args.adapter, args.dataset) if args.task == "auto" else str(args.task)
    for name, only in _ONLY_FOR.items():
        if getattr(args, name) is not None and task != only:
            raise InputError(f"--{name} is for task {only}, this is {task}; leave it out, or give --task {only}")
    if args.eval_gsm8k and task != "causal_lm":
        raise InputError("--eval_gsm8k needs a language model, this is a classifier; use --report")
    if args.oracle and not args.report:
        raise InputError("--oracle is a line of the report; give --report, or leave it out")
    if args.sgd and (not args.report or args.sensitivity is not None):
        raise InputError(
            "--sgd is a line of the report, by steps on the calibration rows; "
            + ("leave --sensitivity out, or --sgd" if args.report else "give --report, or leave it out")
        )
    if args.sgd and args.calib_samples < 2:
        raise InputError(
            "--sgd validates its step size on half of the calibration rows; give --calib_samples 2 or more"
        )
    if args.general_dataset is not None and (task != "causal_lm" or not args.report):
        raise InputError(
            "--general_dataset is for the --report of a language model"
            + (", this is a classifier; leave it out" if task != "causal_lm" else "; give --report, or leave it out")
        )
    values = {field.name: getattr(args, field.name) for field in fields(EditRequest) if hasattr(args, field.name)}
    values |= {
        "config": _config(args, task),
        "options": options,
        "target_modules": None if args.target_modules == [ALL] else tuple(args.target_modules),
        "sensitivity": None if args.sensitivity is None else Path(args.sensitivity),
        "gsm8k": questions_source(args.dataset) if args.eval_gsm8k else None,
    }
    request = EditRequest(**values)
    for name, is_needed in (("model", request.needs_model), ("dataset", request.needs_rows)):
        if is_needed and getattr(args, name) is None:
            raise InputError(f"no --{name} given; name it (only an edit with --sensitivity FILE alone needs none)")
    _refuse_places(args)
    return request


def _config(args: argparse.Namespace, task: str) -> TrainConfig:
    values = {name: getattr(args, name) for name in (*_DATA, "eval_file", "dtype", "device", "seed")}
    dataset = GSM8K if args.dataset == "gsm8k" else args.dataset
    values |= {"model": args.model, "task": task, "dataset": dataset, "eval_samples": args.eval_samples}
    return TrainConfig.from_dict(values)


def _refuse_places(args: argparse.Namespace) -> None:
    """Raise InputError where the output folder would harm what is read."""
    out = Path(args.out_dir).resolve()
    if args.model is not None:
        find_model(args.model)
    if args.model is not None and Path(args.model).is_dir():
        base = Path(args.model).resolve()
        if out == base or base in out.parents or out in base.parents:
            raise InputError(f"--out_dir {args.out_dir} is --model itself, inside or above it; use another folder")
    refuse_overlap(args.out_dir, args.adapter)


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run, as a grid asks for it."""
    edit = read_request(args)
    select_modules(_opened(args.adapter), edit.target_modules, edit.layer_min, edit.layer_max)
    return _run_request(args, edit)


@functools.cache
def _opened(folder: str) -> AdapterFile:
    """Return an adapter; one that many lines of a grid name is read once."""
    return open_adapter(folder)


def _run_request(args: argparse.Namespace, edit: EditRequest) -> RunRequest:
    # The grid that a run belongs to is no part of its identity.
    # Nor is a chat template that is not there: an edit from before there was one is known again.
    others = {*GRID_FLAGS, *(("chat_template",) if args.chat_template is None else ())}
    # The same of settings of what is not in use.
    if not edit.needs_base:
        others |= {"intruder_k", "intruder_cosine"}
    others |= {name for name in ("oracle", "sgd") if not getattr(args, name)}
    if args.general_dataset is None:
        others |= {"general_dataset", "general_samples"}
    own_flags = argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in others})
    resolved = {"task": edit.config.task, "device": args.device.partition(":")[0]}
    if args.chat_template is not None:
        resolved["chat_template"] = str(edit.config.chat_template)
    return RunRequest(
        "edit",
        Path(args.out_dir),
        result_arguments(own_flags) | resolved,
        edit.outputs,
        settings=vars(own_flags),
        inputs=INPUTS,
        seed=args.seed,
        overwrite=args.overwrite,
    )


# --- the run ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    if args.grid is not None:
        run_grid(args)
        return
    for name in GRID_FLAGS[1:]:
        if getattr(args, name):
            raise InputError(f"--{name} is for a grid; leave it out, or give --grid FILE")
    edit = read_request(args)

    def preview() -> None:
        from sparselora.spectral.run import plan_edit

        print(plan_edit(edit).overview)

    def body(folder: RunFolder) -> None:
        # Imported late: torch takes seconds to load, and a finished run or a bad flag should return at once.
        with importing():
            from sparselora.spectral.run import plan_edit

        plan = plan_edit(edit)
        print(plan.overview)
        for sentence in plan.write(folder):
            print(sentence)
        print(f"wrote {args.out_dir}")

    run_in_folder(_run_request(args, edit), body, dry_run=args.dry_run, preview=preview)


# --- a grid -------------------------------------------------------------------------------------------------------


def run_grid(args: argparse.Namespace) -> None:
    """Run the edits of ``--grid`` that are not finished: `grid --command edit` with the other flags as its defaults."""
    from sparselora.runs.grid import GridCommand
    from sparselora.runs.grid_run import parse_gpus, report_failures
    from sparselora.runs.grid_run import run_grid as run_lines

    if args.run_root is None:
        raise InputError("--grid needs --run_root DIR, the folder for its runs")
    if args.out_dir != OUT_DIR:
        raise InputError("--out_dir is for one edit; the folders of a grid are in --run_root")
    parser = LineParser(prog="edit")
    add_arguments(parser)
    failures = run_lines(
        args.grid,
        GridCommand("edit", parser, request, name_parts, reads_hub, INPUTS),
        args.run_root,
        vars(args),
        lambda text: print(text, flush=True),
        gpus=parse_gpus(args.gpus),
        prefetch=args.prefetch,
        dry_run=args.dry_run,
        overwrite=args.overwrite,
    )
    report_failures(failures, args.run_root, complain)
