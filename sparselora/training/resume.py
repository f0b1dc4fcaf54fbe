"""The files of a training run, and the step at which it begins: 0, or that of its last checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from sparselora.models.prompt_template import TEMPLATE_FILE
from sparselora.runs.folder import RunFolder
from sparselora.runs.process import complain, process_rank
from sparselora.training.checkpoints import Checkpoint, last_checkpoint, own_checkpoints

if TYPE_CHECKING:
    import pandas as pd  # at run time only where a run goes on: --help need not wait for it

ADAPTER_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
OUTPUTS = (
    "run.json", "config.yaml", "metrics.csv", "eval.csv", "layers.csv", "summary.csv", "predictions.csv", "loss.png",
    *ADAPTER_FILES, "adapter/README.md",
)  # fmt: skip
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in that of the run."""
JINJA_FILE = "adapter/chat_template.jinja"
"""The chat template that was given, for servers that read a file."""
GENERATIONS = "generations.csv"
"""Answers to held-out prompts at each evaluation."""
GATE_LOG = "gate.csv"
"""Decisions of a novelty gate."""
SQUEEZE_LOG = "squeeze.csv"
"""Cuts of the adapter's rank."""
DUPLICATES = "duplicates.csv"
"""Training rows that were left out as near-duplicates."""
TOKEN_GATE_OUTPUTS = (
    "token_gate.csv", "adapter/token_gate.json", "adapter/token_gate.safetensors",
    "adapter_static/adapter_config.json", "adapter_static/adapter_model.safetensors",
)  # fmt: skip


def outputs_of(config: TrainConfig) -> tuple[str, ...]:
    """Return the names of the files that a run of ``config`` writes, checkpoints left out."""
    records: tuple[str, ...] = (SQUEEZE_LOG,) if config.squeeze else ()
    records += (DUPLICATES,) if config.dedupe is not None else ()
    adapters = ("adapter", "adapter_static") if config.token_gate else ("adapter",)
    templates = tuple(f"{name}/{TEMPLATE_FILE}" for name in adapters) if config.task == "causal_lm" else ()
    templates += (JINJA_FILE,) if config.chat_template is not None else ()
    templates += (GENERATIONS,) if config.generations else ()
    if config.gated:
        return (*OUTPUTS, *templates, *records, GATE_LOG)
    return (*OUTPUTS, *templates, *records, *(TOKEN_GATE_OUTPUTS if config.token_gate else ()))


@dataclass(frozen=True)
class Start:
    """The step at which a run begins: 0, or the one after ``checkpoint``, with the records of the steps before it.

    Attributes:
        is_resumed: an interrupted run goes on, with or without a checkpoint.
        checkpoint: the last whole one; None without any.
        metrics: ``metrics.csv`` of the interrupted run.
        evaluations: its ``eval.csv``; None where it does not evaluate on the way.
    """

    is_resumed: bool = False
    checkpoint: Checkpoint | None = None
    metrics: pd.DataFrame | None = None
    evaluations: pd.DataFrame | None = None


def find_start(config: TrainConfig, folder: RunFolder, *, resume: bool) -> Start:
    """Find out where the run of ``config`` begins, from what is in its folder.

    Args:
        resume: go on with an interrupted run, if there is one.
    Raises:
        InputError: the folder holds another run, there are checkpoints and neither ``resume`` nor ``folder.overwrite``
            says what to do with them, or the records of the steps before a checkpoint are damaged.
    """
    status, checkpoints = folder.noted("status"), folder.folder / CHECKPOINTS
    if status == "success" and not folder.overwrite:
        raise InputError(
            f"output folder {folder.folder} holds a finished run with other arguments; use --overwrite or another "
            "folder"
        )
    if not resume or status is None:
        earlier = own_checkpoints(checkpoints, folder.noted("fingerprint"))
        if earlier and not folder.overwrite:
            cure = "use --resume to go on" if folder.can_resume() else "repeat its arguments with --resume to go on"
            raise InputError(
                f"output folder {folder.folder} holds an interrupted run with a checkpoint of step {earlier[-1].step}; "
                f"{cure}, or --overwrite to begin again"
            )
        return Start()
    if not folder.can_resume():
        raise InputError(
            f"--resume: {folder.folder} holds an interrupted run with other arguments; repeat its arguments"
        )
    checkpoint, torn = last_checkpoint(checkpoints, folder.fingerprint)
    if process_rank() == 0:
        for line in torn:
            place = checkpoint.path.name if checkpoint else "the beginning"
            complain(f"{line}; going on from {place}")
    if checkpoint is None:
        return Start(is_resumed=True)
    return Start(True, checkpoint, *_earlier_records(config, folder.folder, checkpoint.step))


def _earlier_records(config: TrainConfig, folder: Path, step: int) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """``metrics.csv`` and ``eval.csv`` (None without evaluations) of an interrupted run, whole up to ``step``."""
    from sparselora.training.meter import METRICS

    metrics = _earlier_table(folder / "metrics.csv", METRICS, list(range(1, step + 1)), step)
    if not config.eval_steps:
        return metrics, None
    steps = list(range(config.eval_steps, step + 1, config.eval_steps))
    if not steps:
        return metrics, None
    return metrics, _earlier_table(folder / "eval.csv", ("step", "loss", "accuracy", "n"), steps, step)


def _earlier_table(path: Path, columns: Sequence[str], steps: list[int], last: int) -> pd.DataFrame:
    import pandas as pd

    cure = "restore it, or begin again by --overwrite"
    try:
        table = pd.read_csv(path)
        recorded_steps = table.loc[table["step"] <= last, list(columns)].astype(float)["step"].tolist()
    except FileNotFoundError:
        raise InputError(f"--resume: {path} is missing; {cure}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"--resume: {path} is not the table that the run wrote ({reason}); {cure}") from None
    if recorded_steps != steps:
        raise InputError(
            f"--resume: {path} has {len(recorded_steps)} rows up to step {last} of the checkpoint, not the "
            f"{len(steps)} that the run wrote; {cure}"
        )
    return table
