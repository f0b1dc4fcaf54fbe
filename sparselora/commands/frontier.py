"""Find the shortcut that pays on your model and data: try all in a budget of time, against dense for the same time.

Candidates are cheaper steps (fp8, no backward pass for the context, sparse FFNs), smaller adapters, and dense training
on less data, which each of them has to beat. Their steps are timed in turn on real rows; short pilot runs, with the
same seed and data order, give their held-out loss; those that do best against dense for the same time go on to longer
ones. A search that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sparselora.cli import Parser, add_run_arguments, check_seed, output_folder, run_in_folder, source_name
from sparselora.config.flags import COMMON_DATA, add_config_flags, resolve_config
from sparselora.config.train import TrainConfig
from sparselora.config.yaml_text import read_yaml
from sparselora.contextual.flops import ENCODERS
from sparselora.errors import InputError
from sparselora.frontier.request import SEARCH_OUTPUTS, VERDICT_OUTPUTS, FrontierRequest, parse_budget, parse_tolerance
from sparselora.models.model_files import find_model, read_model_config
from sparselora.runs.folder import RunFolder
from sparselora.runs.grid_run import parse_gpus
from sparselora.runs.process import importing, process_count
from sparselora.runs.request import RunRequest

EXAMPLES = """\
  sparselora frontier --model smollm2 --dataset rows.jsonl --tolerance 1% --budget 20min
  sparselora frontier configs/llama_dense.yaml --model ./llama --dataset rows.jsonl --tolerance 0.5% --budget 1h"""

INPUTS = ("model", "dataset", "eval_file", "profile")
"""The arguments that name files or folders."""
_UNTRIED = (
    "packing", "adapter_on_context", "squeeze", "squeeze_ratio", "squeeze_budget", "squeeze_multiple",
    "squeeze_warmup_ratio", "save_steps", "eval_steps", "logging_steps", "report_to", "generations", "push_to_hub",
    "hub_model_id",
)  # fmt: skip
"""Settings without a flag here: of what is written on the way, or of training that no candidate is compared in."""
_DEFAULT_SEEDS = 3, 6
"""Least and most seeds without --seeds: by six, a paired test finds a difference of twice its spread between seeds; by
three, of 6.6 times (docs/frontier.md)."""
_OWN = ("tolerance", "budget", "seeds", "jobs", "profile")


def add_arguments(parser: Parser) -> None:
    add_config_flags(parser, without=_UNTRIED, sections=())
    # Unlike train, this takes the kind of the model where none is given.
    task = next(action for action in parser._actions if action.dest == "task")
    task.help = "kind of model and data (default: causal_lm for a decoder, else classification)"
    search = parser.add_argument_group("search")
    search.add_argument(
        "--tolerance", default="1%", metavar="PERCENT", help="rise of the held-out loss that is accepted, such as 0.5%%"
    )
    search.add_argument(
        "--budget", default="20min", metavar="TIME", help="wall clock of the search, such as 90s or 1h30min"
    )
    search.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="seeds of the longest pilot runs, from --seed on (default: 6, as few as 3 in a small budget)",
    )
    search.add_argument("--gpus", metavar="0,1,…", help="GPUs, each for --jobs pilot runs at a time that see it alone")
    search.add_argument("--jobs", type=int, default=1, metavar="N", help="pilot runs at a time")
    search.add_argument("--profile", metavar="DIR", help="finished run of profile, which narrows the candidates")
    add_run_arguments(parser, "frontier_results/<model>", seed=False)
    parser.shorten_help(
        (*COMMON_DATA, "text_fields", "template", "lora_r", "lora_alpha", "target_modules", "epochs", "max_steps",
         "grad_accum", "lr", "eval_samples", "seed", *_OWN)
    )  # fmt: skip


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run, as a grid asks for it."""
    return _run_request(args, read_request(args))


def run(args: argparse.Namespace) -> None:
    search = read_request(args)
    asked_run = _run_request(args, search)
    model = str(search.config.model)

    def preview() -> None:
        from sparselora.frontier.search import preview_lines

        print("\n".join(preview_lines(search, asked_run.folder)))

    def body(folder: RunFolder) -> None:
        # Imported late: torch takes seconds to load, and a finished run or a bad flag should return at once. What it
        # imports may look for GPUs, after which this process could no longer be bound to the one it times steps on.
        if search.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = search.gpus[0]
        with importing():
            from sparselora.frontier.search import run_search

        print(run_search(search, folder))
        print(f"wrote {folder.folder}")

    run_in_folder(asked_run, body, dry_run=args.dry_run, preview=preview, check=lambda: find_model(model))


def _run_request(args: argparse.Namespace, search: FrontierRequest) -> RunRequest:
    folder = output_folder(args, "frontier_results", source_name(search.config.model))
    settings = search.config.to_dict() | {
        "tolerance": search.tolerance, "budget_s": search.budget, "seeds": list(search.seeds),
        "least_seeds": search.least_seeds,
        "profile": search.profile,
    }  # fmt: skip
    return RunRequest(
        "frontier",
        folder,
        settings | {"device": search.config.device.partition(":")[0]},
        (*SEARCH_OUTPUTS, *VERDICT_OUTPUTS),
        settings=settings | {"gpus": list(search.gpus), "jobs": search.jobs, "out_dir": folder},
        inputs=INPUTS,
        seed=search.config.seed,
        overwrite=args.overwrite,
    )


def read_request(args: argparse.Namespace) -> FrontierRequest:
    """Check the flags and freeze them.

    Raises:
        InputError: a flag that is missing or out of range, or settings that the search sets itself.
    """
    tolerance, budget = parse_tolerance(args.tolerance), parse_budget(args.budget)
    config = resolve_config(args)
    for name in ("model", "dataset"):
        if getattr(config, name) is None:
            raise InputError(f"no {name} given; set it in the configuration or by --{name}")
    if args.task is None and (args.config is None or "task" not in read_yaml(args.config)):
        is_decoder = read_model_config(str(config.model)).get("model_type") not in ENCODERS
        config = config.replace(task="causal_lm" if is_decoder else "classification")
    _refuse_untried(config)
    least_seeds, count = _DEFAULT_SEEDS if args.seeds is None else (args.seeds, args.seeds)
    if not 1 <= count <= 100:
        raise InputError(f"--seeds must be a number from 1 to 100, got {count}")
    check_seed(config.seed + count - 1)
    if process_count() > 1:
        raise InputError(
            "frontier starts its processes itself, and several were started; start it without accelerate launch, with "
            "--gpus and --jobs"
        )
    gpus = tuple(parse_gpus(args.gpus))
    if gpus and config.device not in ("auto", "cuda"):
        raise InputError(f"--gpus cannot go with device {config.device}; leave --device out")
    if not 1 <= args.jobs <= 64:
        raise InputError(f"--jobs must be a number from 1 to 64, got {args.jobs}")
    profile = None if args.profile is None else Path(args.profile).as_posix()
    seeds = tuple(range(config.seed, config.seed + count))
    return FrontierRequest(config, tolerance, budget, seeds, least_seeds, profile, gpus, args.jobs)


def _refuse_untried(config: TrainConfig) -> None:
    """Raise for settings of a configuration file that a search sets itself, or compares nothing in."""
    for name in ("sparsity", "novelty", "token_gate", "squeeze"):
        if getattr(config, name) is not None:
            raise InputError(f"{name} is set, and frontier starts from dense training; set {name} to null")
    if config.packing:
        raise InputError(
            "packing is not timed by the search; use group_by_length, or pack in the training that follows"
        )
    if config.streaming:
        raise InputError("streaming is for the training that follows; leave it out, and give a part of the file")
    if not config.adapter_on_context:
        raise InputError("adapter_on_context false is set, and frontier does not try activated LoRAs; leave it out")
