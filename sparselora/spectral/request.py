"""The request for an edit, as the command line or a line of a grid states it, checked and frozen; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparselora.config.train import TrainConfig
from sparselora.models.prompt_template import template_outputs
from sparselora.spectral.modes import EditOptions

GSM8K = "openai/gsm8k:main"
WRITTEN = (
    "run.json", "adapter_config.json", "adapter_model.safetensors", "spectral_edit_meta.json", "sensitivity.csv",
    "edited.csv", *(f"plots/{name}.{kind}" for name in ("spectra", "sensitivity", "layers") for kind in ("png", "csv")),
)  # fmt: skip
REPORT = ("report.md", "report.csv", "report_items.csv", "plots/report.png", "plots/report.csv")
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
    gsm8k: str | None
    fewshot: int
    max_new_tokens: int
    eval_bsz: int

    @property
    def is_calibrated(self) -> bool:
        """The statistics are measured, not read from a file."""
        return self.sensitivity is None

    @property
    def needs_model(self) -> bool:
        return self.is_calibrated or self.report or self.gsm8k is not None

    @property
    def needs_rows(self) -> bool:
        return self.is_calibrated or self.report

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the files that the edit writes."""
        return (
            WRITTEN
            + template_outputs(self.adapter)
            + (REPORT if self.report else ())
            + (ANSWERS if self.gsm8k is not None else ())
        )
