"""The request for an edit, as the command line or a line of a grid states it, and its name in a grid; needs no
torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselora.config.train import TrainConfig
from sparselora.models.adapter_config import read_peft_config
from sparselora.models.prompt_template import template_outputs
from sparselora.runs.grid import is_local_data
from sparselora.spectral.modes import NEEDS_BASE, EditOptions

GSM8K = "openai/gsm8k:main"
WRITTEN = (
    "run.json", "adapter_config.json", "adapter_model.safetensors", "spectral_edit_meta.json", "sensitivity.csv",
    "edited.csv", *(f"plots/{name}.{kind}" for name in ("spectra", "sensitivity", "layers") for kind in ("png", "csv")),
)  # fmt: skip
REPORT = ("report.md", "report.csv", "report_items.csv", "plots/report.png", "plots/report.csv")
INTRUDERS = "intruders.csv"
GENERAL = ("general.csv", "general_items.csv")
DESCENT = "sgd.csv"
SGD_STEPS = (1, 2, 5)
"""Numbers of SGD steps on the calibration rows that an edit is compared with."""
ANSWERS = ("metrics_gsm8k.json", "items_gsm8k.csv")


@dataclass(frozen=True)
class EditRequest:
    """One edit of one adapter: what to change, what to calibrate on, what to evaluate.

    Attributes:
        adapter: folder of the adapter.
        config: base model, data, device and seed.
        mode: a key of `sparselora.spectral.modes.MODES`.
        options: numbers of the mode.
        target_modules: ends of the names of the modules to edit; None: all.
        layer_min, layer_max: first and last layer to edit; None: no limit.
        sensitivity: table of an earlier edit of this adapter, in place of calibration; None: calibrate.
        calib_samples, calib_bsz: training rows to calibrate on, and rows of one batch.
        report: evaluate the edit and its controls on held-out rows.
        draws: random draws of the report.
        oracle: the report has gd by the gradient of the evaluation rows themselves, an upper bound.
        sgd: the report has the adapter after SGD steps on the calibration rows.
        general_dataset: general text, on which the report measures what the adapter forgets; None: it does not.
        general_samples: rows of it; 0: all.
        gsm8k: source of the questions that the edited adapter answers; None: it answers none.
        fewshot, max_new_tokens: worked examples before each question, tokens an answer may have.
        eval_bsz: rows of one batch of the evaluation.
    """

    adapter: str
    config: TrainConfig
    mode: str
    options: EditOptions
    target_modules: tuple[str, ...] | None
    layer_min: int | None
    layer_max: int | None
    sensitivity: Path | None
    calib_samples: int
    calib_bsz: int
    report: bool
    draws: int
    oracle: bool
    sgd: bool
    general_dataset: str | None
    general_samples: int
    gsm8k: str | None
    fewshot: int
    max_new_tokens: int
    eval_bsz: int

    @property
    def is_calibrated(self) -> bool:
        """The statistics are measured, not read from a file."""
        return self.sensitivity is None

    @property
    def needs_base(self) -> bool:
        """The mode depends on the base weights, too."""
        return self.mode in NEEDS_BASE

    @property
    def needs_model(self) -> bool:
        return self.is_calibrated or self.report or self.gsm8k is not None or self.needs_base

    @property
    def needs_rows(self) -> bool:
        return self.is_calibrated or self.report

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the files that the edit writes."""
        return (
            WRITTEN
            + ((INTRUDERS,) if self.needs_base else ())
            + template_outputs(self.adapter)
            + (REPORT if self.report else ())
            + ((DESCENT,) if self.sgd else ())
            + (GENERAL if self.general_dataset is not None else ())
            + (ANSWERS if self.gsm8k is not None else ())
        )


def sgd_name(steps: int) -> str:
    """Return the name in a report of the adapter after so many SGD steps."""
    return f"SGD, {steps} {'step' if steps == 1 else 'steps'}"


def edit_task(adapter: str, dataset: str | None) -> str:
    """Return the task of the adapter in a folder, as its configuration says, else by the data."""
    recorded = str(read_peft_config(Path(adapter)).get("task_type"))
    is_text = dataset is not None and (dataset.startswith("glue/") or dataset == "docstrings")
    by_data = "classification" if is_text else "causal_lm"
    return {"SEQ_CLS": "classification", "CAUSAL_LM": "causal_lm"}.get(recorded, by_data)


def questions_source(dataset: str | None) -> str:
    """Return the data set, if it is GSM8K by its name, else GSM8K of the hub."""
    return dataset if dataset and dataset != "gsm8k" and "gsm8k" in Path(dataset).name.lower() else GSM8K


# --- in a grid ----------------------------------------------------------------------------------------------------

INPUTS = ("adapter", "model", "dataset", "eval_file", "sensitivity", "general_dataset")
"""The arguments that name files or folders."""


def name_parts(values: Mapping[str, Any]) -> tuple[list[str], frozenset[str]]:
    """Return how the name of an edit in a grid begins: adapter, mode and seed; and the flags to leave out behind."""
    path = Path(str(values.get("adapter") or "none"))
    # `train` calls every adapter just "adapter": there the folder that it is in says more.
    name = path.parent.name if path.name == "adapter" and path.parent.name else path.name
    parts = [name, str(values["mode"]), f"seed{values['seed']}"]
    return parts, frozenset({"mode", "seed", "device", "report", "calib_bsz", "eval_bsz", *INPUTS})


def reads_hub(values: Mapping[str, Any]) -> bool:
    """Return whether an edit with these values reads data on the hub."""
    return bool(values["eval_gsm8k"]) or not (values["dataset"] is None or is_local_data(values["dataset"]))
