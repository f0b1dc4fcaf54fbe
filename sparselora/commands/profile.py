"""Measure, before any training, where a causal language model may be sparse on your data, and by which mode.

Forward passes alone, on held-out rows: the rise of the answer loss with one layer sparse at a time, in every mode and
at every level, with standard errors; whether the task reads its prompt at all; a verdict per layer, and a schedule for
`train --sparsity`. The first thing to run on a new model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sparselora.cli import Parser, add_run_arguments, check_seed, output_folder, run_in_folder, source_name
from sparselora.config.flags import add_setting_flags
from sparselora.config.sparsity import SparsityConfig
from sparselora.config.train import TrainConfig, read_sparsity
from sparselora.errors import InputError
from sparselora.evaluation.profile_request import OUTPUTS, SETTINGS, ProfileRequest
from sparselora.models.model_files import find_model
from sparselora.runs.folder import RunFolder
from sparselora.runs.process import importing
from sparselora.runs.request import RunRequest

EXAMPLES = """\
  sparselora profile --model smollm2 --dataset rows.jsonl --template $'Question: {prompt}\\nAnswer: '
  sparselora profile --model ./llama --dataset train.jsonl --eval_file test.jsonl --rows 128 --dtype bf16"""

_LEVELS = {"ffn": (0.5, 0.9, 0.99), "attention": (0.5, 0.9)}
"""With 32 rows the least that tells modes and layers apart: on GSM8K and SmolLM2, in bf16 on two cores, 20 to
25 minutes. Recorded profiles have five levels a part and 128 rows and more, from a GPU."""
_SPARSITY = ("svd_rank", "map_rank", "calibration_rows")


def add_arguments(parser: Parser) -> None:
    add_setting_flags(parser.add_argument_group("model and data"), SETTINGS)
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--rows", type=int, default=32, metavar="N", help="held-out rows to measure on; as many check the schedules"
    )
    group.add_argument("--calibration_rows", type=int, default=256, metavar="N", help="training rows that calibrate")
    for part, levels in _LEVELS.items():
        group.add_argument(
            f"--{part}_levels", type=float, nargs="*", default=list(levels), metavar="S",
            help=f"sparsities of {'the FFN' if part == 'ffn' else part} to measure; no value: none",
        )  # fmt: skip
    group.add_argument("--svd_rank", type=int, default=8, metavar="N", help="rank of the estimates of mode svd")
    group.add_argument("--map_rank", type=int, default=64, metavar="N", help="rank of the affine map (mode surrogate)")
    group.add_argument(
        "--tolerance", type=float, default=1.0, metavar="PERCENT",
        help="rise of the loss that the schedule may cost as a whole, in %% of the dense loss",
    )  # fmt: skip
    group.add_argument("--schedule", metavar="FILE", help="YAML of sparsity settings to measure as a whole, too")
    group.add_argument("--cache_dir", metavar="DIR", help="folder that keeps estimators and calibration between runs")
    add_run_arguments(parser, "profile_results/<model>")


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run."""
    checked = _checked(args)
    arguments = {
        **{name: getattr(args, name) for name in SETTINGS if name != "chat_template"},
        "device": args.device.partition(":")[0], "rows": args.rows,
        "ffn_levels": list(checked.ffn_levels), "attention_levels": list(checked.attention_levels),
        **{name: getattr(args, name) for name in _SPARSITY},
        "tolerance": args.tolerance, "schedule": args.schedule, "seed": args.seed,
    }  # fmt: skip
    if args.chat_template is not None:  # a profile from before there was one is known again
        arguments["chat_template"] = checked.config.chat_template
    folder = output_folder(args, "profile_results", source_name(args.model))
    return RunRequest(
        "profile",
        folder,
        arguments,
        OUTPUTS,
        settings=arguments | {"out_dir": folder},
        inputs=("model", "dataset", "eval_file", "schedule"),
        seed=args.seed,
        overwrite=args.overwrite,
    )


def run(args: argparse.Namespace) -> None:
    checked = _checked(args)

    def body(folder: RunFolder) -> None:
        # Imported late: torch takes seconds to load, and a finished run or a bad flag should return at once.
        with importing():
            from sparselora.evaluation.profile_run import run_profile

        print(run_profile(checked, folder))
        print(f"wrote {folder.folder}: train --sparsity {folder.folder / 'schedule.yaml'} uses the schedule")

    run_in_folder(request(args), body, dry_run=args.dry_run, check=lambda: find_model(args.model))


def _checked(args: argparse.Namespace) -> ProfileRequest:
    for name in ("model", "dataset"):
        if getattr(args, name) is None:
            raise InputError(f"no {name} given; name one by --{name}")
    check_seed(args.seed)
    for name in ("rows", "calibration_rows"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.rows == 1:
        raise InputError("--rows must be at least 2: one row has no standard error, and no other row's prompt")
    if not args.tolerance > 0:
        raise InputError(f"--tolerance must be above 0, got {args.tolerance:g}")
    ffn_levels, attention_levels = _levels(args.ffn_levels), _levels(args.attention_levels)
    if not ffn_levels and not attention_levels:
        raise InputError("no levels given; give --ffn_levels or --attention_levels some numbers")
    config = TrainConfig(
        task="causal_lm", seed=args.seed, **{name: getattr(args, name) for name in SETTINGS}
    )  # fmt: skip
    base = SparsityConfig(
        svd_rank=args.svd_rank, surrogate_rank=args.map_rank, calibration_samples=args.calibration_rows, seed=args.seed
    )
    schedule = None if args.schedule is None else read_sparsity(args.schedule)
    return ProfileRequest(
        config, base, ffn_levels, attention_levels, args.rows, args.tolerance, schedule, args.cache_dir
    )


def _levels(values: Sequence[float]) -> tuple[float, ...]:
    for value in values:
        if not 0 < value < 1:
            raise InputError(f"a level must be above 0 and below 1, got {value:g}")
    return tuple(sorted(set(values)))
