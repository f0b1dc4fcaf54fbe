"""An adapter merged into its base model: a model folder that needs no adapter, for any engine.

Each weight becomes W + scaling · B A, as PEFT's merge_and_unload computes it, file by file: one file of the base's
weights is in memory at a time. Tokenizer and configuration go along. The template that the adapter was trained with is
recorded with the merged model, and `eval` asks with it; a chat template becomes the one of its tokenizer.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from sparselora.cli import add_run_arguments, result_arguments, run_in_folder
from sparselora.runs.folder import RunFolder
from sparselora.runs.request import RunRequest

if TYPE_CHECKING:
    from sparselora.models.merge import Merge

EXAMPLES = """\
  sparselora merge --model ./llama --adapter runs/train/adapter
  sparselora merge --model ./llama --adapter runs/train/adapter --dtype fp32 --out_dir llama_merged"""
INPUTS = ("model", "adapter")
"""The arguments that name files or folders."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("model and adapter")
    source.add_argument("--model", required=True, metavar="TEXT", help="base model: local folder or hub name")
    source.add_argument("--adapter", required=True, metavar="DIR", help="folder of a PEFT LoRA adapter")
    source.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of the merged weights; auto: as in the base"
    )
    add_run_arguments(parser, "merged_model", seed=False)


def _opened(args: argparse.Namespace) -> Merge:
    # Imported after the flags are checked: torch takes seconds.
    from sparselora.models.adapter_files import refuse_overlap
    from sparselora.models.merge import open_merge

    refuse_overlap(args.out_dir, args.adapter)
    return open_merge(args.model, args.adapter)


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run."""
    return _request(args, _opened(args))


def _request(args: argparse.Namespace, merge: Merge) -> RunRequest:
    return RunRequest(
        "merge",
        Path(args.out_dir),
        result_arguments(args),
        merge.outputs(),
        settings=vars(args),
        inputs=INPUTS,
        overwrite=args.overwrite,
    )


def run(args: argparse.Namespace) -> None:
    merge = _opened(args)

    def body(folder: RunFolder) -> None:
        from sparselora.models.merge import CHAT_TEMPLATE, DTYPES, describe

        with folder:
            merge.write(folder.folder, DTYPES[args.dtype])
            counts = describe(merge)
            folder.note(**counts)
        print(f"{folder.folder}: {counts['merged']} weights of {counts['tensors']} merged")
        out = shlex.quote(str(folder.folder))
        if isinstance(merge.adapter.template, str):
            template = f"--template {shlex.quote(merge.adapter.template)}"
        elif merge.chat_template is not None:
            template = f"--chat_template {shlex.quote(str(folder.folder / CHAT_TEMPLATE))}"
        else:
            return
        print(f"next:\n  sparselora eval --model {out} --task causal_lm {template} --dataset DATA")

    run_in_folder(_request(args, merge), body, dry_run=args.dry_run)
