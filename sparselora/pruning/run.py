"""One cell of Phase C from its settings to its files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from transformers import set_seed

from sparselora.data.batches import Example, encode_texts
from sparselora.data.instructions import InstructionData, encode_instructions, load_instructions
from sparselora.data.texts import TextData, load_text_data
from sparselora.errors import InputError
from sparselora.models import load as models
from sparselora.models.class_names import read_classes
from sparselora.models.fresh_adapter import adapt_model, load_named_classifier
from sparselora.models.model_files import model_facts
from sparselora.numerics.stats import is_at_chance
from sparselora.pruning.cell import Cell
from sparselora.pruning.outputs import write_cell
from sparselora.pruning.study import Outcome, Study
from sparselora.runs.folder import NOTHING_LEARNED, RunFolder
from sparselora.runs.process import complain, process_rank
from sparselora.training.run import leave_process_group


def run_cell(
    cell: Cell, folder: RunFolder, out_dir: Path, say: Callable[[str], object] = lambda text: None
) -> Outcome | None:
    """Load, train, prune, train on and write everything; every process of a distributed run calls it.

    Args:
        folder: of the cell, held but not entered: nothing is written before the data and the model have been checked.
        out_dir: folder of the sweep, for its ``results.csv``.
        say: called with a line about what is going to be trained.
    Returns:
        What was measured; None in all processes but the first.
    Raises:
        InputError: data, a model or settings that do not go together.
        RuntimeError: the loss stopped being finite.
    """
    is_main = process_rank() == 0
    study = prepare(cell, folder)
    if is_main:
        say(f"{folder.folder.name}\n  target modules: {', '.join(study.target_modules)}")
    with folder if is_main else contextlib.nullcontext():  # every process trains, the first keeps the records
        outcome = study.run()
        if is_main:
            if warning := _warning(study, outcome):
                complain(warning)
                folder.note(**{NOTHING_LEARNED: warning})
            write_cell(folder, out_dir, study, outcome)
    leave_process_group()
    return outcome if is_main else None


def prepare(cell: Cell, folder: RunFolder) -> Study:
    """Load the data and the model of ``cell``, attach a fresh adapter, and encode the data.

    Raises:
        InputError: data or a model that cannot be used, or a phase without a step.
    """
    data = _load_data(cell)
    device = models.resolve_device(cell.device)
    state = PartialState(cpu=device.type == "cpu")
    steps = cell.steps(len(data.train), state.num_processes)
    device = state.device  # of several processes, each has its own
    folder.note(device=models.device_name(device), **model_facts(cell.model))
    set_seed(cell.seed)  # before the head and the adapter are drawn
    bf16 = models.is_bf16(cell.dtype, device)
    if isinstance(data, TextData):
        model, tokenizer = load_named_classifier(cell.model, data.labels)
    else:
        model, tokenizer = models.load_causal_lm(cell.model, torch.bfloat16 if bf16 else torch.float32)
    train, held_out = (_encode(frame, data, tokenizer, cell.max_length) for frame in (data.train, data.eval))
    adapted, target_modules = adapt_model(model, cell, task_type="CAUSAL_LM" if cell.is_causal else "SEQ_CLS")
    return Study(
        cell=cell,
        data=data,
        model=adapted.to(device),
        tokenizer=tokenizer,
        target_modules=target_modules,
        train=train,
        held_out=held_out,
        steps=steps,
        device=device,
        bf16=bf16,
        folder=folder.folder,
    )


def _load_data(cell: Cell) -> TextData | InstructionData:
    rows: dict[str, Any] = {
        "eval_file": cell.eval_file, "train_samples": cell.train_samples, "eval_samples": cell.eval_samples,
        "seed": cell.seed,
    }  # fmt: skip
    if cell.is_causal:
        data = load_instructions(
            cell.dataset,
            prompt_field=cell.prompt_field,
            completion_field=cell.completion_field,
            template=cell.template,
            **rows,
        )
        if data.eval.empty:
            raise InputError(f"{cell.dataset} has no row left to evaluate on; give more rows, or --eval_file")
        return data
    return load_text_data(
        cell.dataset,
        text_fields=cell.text_fields,
        label_field=cell.label_field,
        classes=read_classes(cell.model, is_fixed=False),
        **rows,
    )


def _encode(frame: pd.DataFrame, data: TextData | InstructionData, tokenizer: Any, max_length: int) -> list[Example]:
    if isinstance(data, TextData):
        return encode_texts(frame, data.text_fields, tokenizer, max_length)
    return list(encode_instructions(frame, tokenizer, max_length, data.template).examples)


def _warning(study: Study, outcome: Outcome) -> str | None:
    """Describe a model that had learned nothing when it was pruned; None for one that had."""
    before, act = outcome.before, "pruning" if study.cell.gate is None else "gating"
    if not study.steps[0]:
        return None
    if isinstance(study.data, TextData):
        labels = study.data.eval["label"].to_numpy()
        if not is_at_chance(before.rows["predicted"].to_numpy() == labels, labels):
            return None
        state = f"accuracy {before.accuracy:.4f} before {act} is at chance (n = {len(labels)})"
    else:
        assert outcome.untrained is not None
        if before.loss < outcome.untrained.loss:
            return None
        state = (
            f"loss {before.loss:.4f} before {act} is not below that without an adapter, {outcome.untrained.loss:.4f}"
        )
    return (
        f"WARNING: {state}: {act} it says nothing; train longer (--warmup_epochs), on more rows (--train_samples) or "
        "with another --lr"
    )
