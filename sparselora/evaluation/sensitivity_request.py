"""Settings of one measurement of the sensitivity of layers, frozen; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparselora.config.sparsity import Part, SparsityConfig
from sparselora.config.train import TrainConfig

OUTPUTS = (
    "run.json", "sensitivity.csv", "allocation.csv", "check.csv", "chosen.yaml", "uniform.yaml",
    "loss_by_layer.csv", "loss_by_layer.png",
)  # fmt: skip
_DECISIVE = (
    "model", "task", "dataset", "eval_file", "text_fields", "label_field", "prompt_field", "completion_field",
    "template", "train_samples", "max_length", "train_bsz", "dtype", "seed",
)  # fmt: skip
"""Settings of training that decide the result; those of the adapter and its optimization do not."""


@dataclass(frozen=True)
class SensitivityRequest:
    """One measurement: which layers at which sparsities, on which rows, and the budget of the schedule that follows.

    Attributes:
        config: model, data, batch size, device and seed.
        sparsity: everything but the sparsities themselves: mode, ranks, compensation, which tokens.
        levels: part of a layer → the sparsities to measure it at, ascending; may be empty.
        samples: training rows to measure on.
        held_out: other training rows, to check the schedules on.
        budget: share of the frozen projections' dense FLOPs that sparse tokens may compute.
        adapter: folder of an adapter to measure with; None for the model alone.
        cache_dir: folder that keeps estimators and calibration between runs.
    """

    config: TrainConfig
    sparsity: SparsityConfig
    levels: Mapping[Part, Sequence[float]]
    samples: int
    held_out: int
    budget: float
    adapter: str | None
    cache_dir: str | None

    @property
    def is_causal(self) -> bool:
        return self.config.task == "causal_lm"

    @property
    def parts(self) -> list[Part]:
        """The parts of a layer that have levels."""
        return [part for part, levels in self.levels.items() if levels]

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings that decide the result, by which a run is known."""
        values = self.config.to_dict()
        sparsity = {name: value for name, value in self.sparsity.to_dict().items() if "_sparsity" not in name}
        return {
            **{name: values[name] for name in _DECISIVE}, "device": self.config.device.partition(":")[0],
            "sparsity": sparsity, **{f"{part}_levels": levels for part, levels in self.levels.items()},
            "samples": self.samples, "held_out": self.held_out, "budget": self.budget, "adapter": self.adapter,
            **({"load_in_4bit": True} if self.config.load_in_4bit else {}),
            **({} if self.config.chat_template is None else {"chat_template": self.config.chat_template}),
        }  # fmt: skip
