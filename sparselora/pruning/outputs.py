"""The files of a cell of Phase C, and its row of the sweep's ``results.csv``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselora.config.token_gates import SETTINGS, TENSORS
from sparselora.errors import InputError
from sparselora.models.prompt_template import TEMPLATE_FILE
from sparselora.pruning.gate_flags import variant_text
from sparselora.runs.files import upsert_row, write_csv, write_json
from sparselora.runs.folder import RunFolder
from sparselora.runs.user_files import read_json_object

if TYPE_CHECKING:
    import pandas as pd

    from sparselora.pruning.cell import Cell
    from sparselora.pruning.study import GateOutcome, Outcome, Study

ARGUMENTS = "run_args.json"
"""In the folder of a cell, its arguments; in that of the sweep, those of the last cell that ended."""
ANSWER_LOSS = "answer_loss"
"""Metric of a language model: its loss, in nats a labelled token."""
_FILES = ("run.json", ARGUMENTS, "loss_curve.csv", "loss_curve.png", "eval_curve.csv", "predictions.csv")
_ADAPTER_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
_GATE_FILES = (
    f"adapter/{SETTINGS}", f"adapter/{TENSORS}", "adapter_static/adapter_config.json",
    "adapter_static/adapter_model.safetensors", "token_gate.csv", "token_gate.png",
)  # fmt: skip

RESULT_COLUMNS = (
    "model", "dataset", "method", "keep_ratio", "lora_r", "effective_r", "seed", "train_samples", "eval_samples",
    "warmup_epochs", "post_epochs", "acc_before", "acc_after", "delta_acc", "warm_time_sec", "post_time_sec",
    "target_modules", "lora_trainable_params", "lora_total_params", "acc_right_after", "loss_before",
    "loss_right_after", "loss_after", "metric", "metric_before", "metric_right_after", "metric_after",
    "steps_to_recovery", "warm_step_ms", "post_step_ms", "warm_samples_per_s", "post_samples_per_s", "peak_mb",
    "head_params", "adapter_flops_per_token_before", "adapter_flops_per_token_after", "scope", "masked", "lr",
    "train_bsz", "active_r", "gate_params", "gate_flops_per_token", "gate", "metric_static", "acc_static", "run_id",
    "run_dir",
)  # fmt: skip
"""A row of results.csv. The first nineteen columns are the published ones."""


def cell_files(cell: Cell) -> tuple[str, ...]:
    """Names of the files in a cell's folder when it has ended.

    A masked model is no smaller than its adapter: none is written.
    """
    files = [*_FILES]
    templates = (f"adapter/{TEMPLATE_FILE}",) if cell.is_causal else ()
    if not cell.mask:
        files += (*_ADAPTER_FILES, *templates)
    if cell.gate is not None:
        files += (*_GATE_FILES, *(name.replace("adapter", "adapter_static") for name in templates))
    return tuple(files)


def refuse_foreign_arguments(out_dir: Path, finished: Sequence[str]) -> None:
    """Raise where ``run_args.json`` of a sweep's folder, which every cell replaces, is no cell's.

    Args:
        finished: the run_ids in the sweep's results.csv. A cell that was killed before its row has its folder.
    Raises:
        InputError: it is not.
    """
    path = out_dir / ARGUMENTS
    if not os.path.lexists(path):
        return
    try:
        run_id = None if path.is_symlink() else read_json_object(path, allow_nan=True).get("run_id")
    except InputError:
        run_id = None
    if not isinstance(run_id, str) or (run_id not in finished and not _has_cell(out_dir, run_id)):
        raise InputError(
            f"{path} is in the way: no cell of this sweep wrote it, and this one would; move it away or use another "
            "folder"
        )


def _has_cell(out_dir: Path, run_id: str) -> bool:
    return any(folder.name.endswith(f"_{run_id}") for folder in out_dir.iterdir() if folder.is_dir())


def completed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row that a cell noted, with the columns that came after it."""
    since = {"active_r": row["effective_r"], "gate_params": 0, "gate_flops_per_token": 0, **row}
    return {name: since.get(name) for name in RESULT_COLUMNS}


def write_cell(folder: RunFolder, out_dir: Path, study: Study, outcome: Outcome) -> None:
    """Write the cell's files, then its row in ``out_dir/results.csv``.

    The model of ``study`` is taken apart on the way (`Study.export_and_dismantle`): the last thing to do with it.
    """
    from sparselora.report.training import plot_loss_curve

    cell, data = study.cell, study.data
    losses, evaluations = curves(outcome)
    write_csv(folder.path("loss_curve.csv"), losses)
    write_csv(folder.path("eval_curve.csv"), evaluations)
    act = "pruning" if cell.gate is None else "gating"
    plot_loss_curve(folder.path("loss_curve.png"), losses, evaluations, len(data.eval), act, causal=cell.is_causal)
    predictions = data.eval[["row"]] if cell.is_causal else data.eval[["row", "label"]]
    answer = "loss" if cell.is_causal else "predicted"
    if cell.is_causal:
        predictions = predictions.assign(tokens=outcome.before.rows["tokens"].to_numpy())
    moments = {"before": outcome.before, "right_after": outcome.right_after, "after": outcome.after}
    if outcome.gate is not None:
        moments["static"] = outcome.gate.static_evaluation
    predictions = predictions.assign(**{name: moment.rows[answer].to_numpy() for name, moment in moments.items()})
    if outcome.gate is not None:
        write_gate(folder, outcome.gate, outcome.active_r)
    write_csv(folder.path("predictions.csv"), predictions)
    if not cell.mask:
        study.export_and_dismantle(outcome.gate)
    folder.note(ranks=outcome.ranks)
    settings = folder.arguments | {"target_modules": study.target_modules, "run_id": folder.fingerprint}
    for path in (folder.path(ARGUMENTS), out_dir / ARGUMENTS):
        write_json(path, settings)
    row = result_row(study, outcome, folder)
    folder.note(result=row)
    upsert_row(out_dir / "results.csv", row)


def write_gate(folder: RunFolder, gate: GateOutcome, active_r: float) -> None:
    """Write the frequency of each channel as a table and a figure, and the active ranks to ``run.json``."""
    from sparselora.report.training import plot_gate
    from sparselora.token_gates.outputs import channel_table

    plot_gate(folder.path("token_gate.png"), channel_table(gate.frequency, gate.energy), active_r)
    folder.note(active_rank=gate.active_rank)


def curves(outcome: Outcome) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training loss by step, and held-out accuracy and loss by step; steps count through both phases."""
    import pandas as pd

    warm = len(outcome.warm.losses)
    phases = [(1, "warmup", outcome.warm.losses), (1 + warm, "post", outcome.post.losses)]
    losses = pd.DataFrame(
        [(first + i, phase, loss) for first, phase, values in phases for i, loss in enumerate(values)],
        columns=["step", "phase", "train_loss"],
    )
    points = [("before", warm, outcome.before), ("right_after", warm, outcome.right_after)]
    points += [("post", warm + step, evaluation) for step, evaluation in sorted(outcome.post.evaluations.items())]
    evaluations = pd.DataFrame(
        [(step, moment, e.accuracy, e.loss) for moment, step, e in points],
        columns=["step", "moment", "accuracy", "eval_loss"],
    )
    return losses, evaluations


def result_row(study: Study, outcome: Outcome, folder: RunFolder) -> dict[str, Any]:
    """Return the cell's row of results.csv, with the columns `RESULT_COLUMNS`."""
    from sparselora.data.texts import TextData
    from sparselora.models.model_files import public_name

    cell, data = study.cell, study.data
    before, right_after, after = outcome.before, outcome.right_after, outcome.after
    gated = outcome.gate
    row = {
        "model": public_name(cell.model),
        "dataset": data.name,
        "method": cell.method,
        "keep_ratio": cell.keep_ratio,
        "lora_r": cell.lora_r,
        "effective_r": sum(outcome.ranks.values()) / len(outcome.ranks),
        "seed": cell.seed,
        "train_samples": len(data.train),
        "eval_samples": len(data.eval),
        "warmup_epochs": cell.warmup_epochs,
        "post_epochs": cell.post_epochs,
        "acc_before": before.accuracy,
        "acc_after": after.accuracy,
        "delta_acc": after.accuracy - before.accuracy,
        "warm_time_sec": outcome.warm.seconds,
        "post_time_sec": outcome.post.seconds,
        "target_modules": " ".join(study.target_modules),
        "lora_trainable_params": outcome.adapter_params[1],
        "lora_total_params": outcome.adapter_params[0],
        "acc_right_after": right_after.accuracy,
        "loss_before": before.loss,
        "loss_right_after": right_after.loss,
        "loss_after": after.loss,
        "metric": data.metric if isinstance(data, TextData) else ANSWER_LOSS,
        "metric_before": before.metric,
        "metric_right_after": right_after.metric,
        "metric_after": after.metric,
        "steps_to_recovery": outcome.steps_to_recovery(),
        "warm_step_ms": outcome.warm.step_ms,
        "post_step_ms": outcome.post.step_ms,
        "warm_samples_per_s": outcome.warm.samples_per_s,
        "post_samples_per_s": outcome.post.samples_per_s,
        "peak_mb": outcome.peak_mb,
        "head_params": outcome.head_params,
        "adapter_flops_per_token_before": outcome.adapter_flops_per_token[0],
        "adapter_flops_per_token_after": outcome.adapter_flops_per_token[1],
        "scope": cell.scope,
        "masked": cell.mask,
        "lr": cell.lr,
        "train_bsz": cell.train_bsz,
        "active_r": outcome.active_r,
        "gate_params": gated.parameters if gated else 0,
        "gate_flops_per_token": gated.flops_per_token if gated else 0,
        "gate": variant_text(cell.gate),
        "metric_static": gated.static_evaluation.metric if gated else None,
        "acc_static": gated.static_evaluation.accuracy if gated else None,
        "run_id": folder.fingerprint,
        "run_dir": folder.folder.name,
    }
    assert tuple(row) == RESULT_COLUMNS
    # What was not measured (no steps in a phase, no memory figure on this system) is empty.
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
