"""One cell of Phase C from its settings to its files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from sparselora.data.batches import encode_texts
from sparselora.data.texts import load_text_data
from sparselora.models import load as models
from sparselora.models.class_names import read_classes
from sparselora.models.fresh_adapter import adapt_model, load_named_classifier
from sparselora.models.model_files import model_facts
from sparselora.numerics.stats import is_at_chance
from sparselora.pruning.cell import Cell
from sparselora.pruning.outputs import write_cell
from sparselora.pruning.study import Outcome, Study
from sparselora.runs.folder import RunFolder
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
            labels, before = study.data.eval["label"].to_numpy(), outcome.before
            if study.steps[0] and is_at_chance(before.predicted == labels, labels):
                act = "pruning" if cell.gate is None else "gating"
                complain(
                    f"WARNING: accuracy {before.accuracy:.4f} before {act} is at chance (n = {len(labels)}): {act} it "
                    "says nothing; train longer (--warmup_epochs), on more rows (--train_samples) or with another --lr"
                )
            write_cell(folder, out_dir, study, outcome)
    leave_process_group()
    return outcome if is_main else None


def prepare(cell: Cell, folder: RunFolder) -> Study:
    """Load the data and the model of ``cell``, attach a fresh adapter, and encode the data.

    Raises:
        InputError: data or a model that cannot be used, or a phase without a step.
    """
    data = load_text_data(
        cell.dataset,
        text_fields=cell.text_fields,
        label_field=cell.label_field,
        eval_file=cell.eval_file,
        train_samples=cell.train_samples,
        eval_samples=cell.eval_samples,
        seed=cell.seed,
        classes=read_classes(cell.model, is_fixed=False),
    )
    device = models.resolve_device(cell.device)
    state = PartialState(cpu=device.type == "cpu")
    steps = cell.steps(len(data.train), state.num_processes)
    device = state.device  # of several processes, each has its own
    folder.note(device=models.device_name(device), **model_facts(cell.model))
    set_seed(cell.seed)  # before the head and the adapter are drawn
    model, tokenizer = load_named_classifier(cell.model, data.labels)
    adapted, target_modules = adapt_model(model, cell)
    return Study(
        cell=cell,
        data=data,
        model=adapted.to(device),
        tokenizer=tokenizer,
        target_modules=target_modules,
        train=encode_texts(data.train, data.text_fields, tokenizer, cell.max_length),
        held_out=encode_texts(data.eval, data.text_fields, tokenizer, cell.max_length),
        steps=steps,
        device=device,
        bf16=models.is_bf16(cell.dtype, device),
        folder=folder.folder,
    )
