"""Settings of one profile, frozen; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparselora.config.sparsity import Part, SparsityConfig
from sparselora.config.train import TrainConfig

SETTINGS = (
    "model", "dataset", "eval_file", "prompt_field", "completion_field", "template", "chat_template", "train_split",
    "max_length", "train_bsz", "load_in_4bit", "dtype", "device",
)  # fmt: skip
"""Settings of a training run that a profile has, too."""
PARTIAL = "profile.partial"
"""The file of the layers that are done, for a run that is started again."""
OUTPUTS = (
    "profile.csv", "profile.png", "profile.md", "layers.csv", "energy.csv", "maps.csv", "contrasts.csv", "prompts.csv",
    "schedules.csv", "schedule.yaml", PARTIAL,
)  # fmt: skip


@dataclass(frozen=True)
class ProfileRequest:
    """Checked settings of one profile.

    Attributes:
        config: model, data, template, lengths, batch size, dtype and device.
        base: ranks of estimates and maps, calibration rows and which tokens are sparse; its mode is not used.
        ffn_levels, attention_levels: sparsities to measure, ascending; none leaves the part out.
        rows: held-out rows to measure on; as many others check the whole schedules.
        tolerance: rise of the answer loss, in % of the dense one, that a layer of the schedule may cost.
        schedule: a whole schedule to measure as well; None without.
        cache_dir: folder that keeps estimators and calibration between runs.
    """

    config: TrainConfig
    base: SparsityConfig
    ffn_levels: tuple[float, ...]
    attention_levels: tuple[float, ...]
    rows: int
    tolerance: float
    schedule: SparsityConfig | None
    cache_dir: str | None

    @property
    def levels(self) -> dict[Part, tuple[float, ...]]:
        return {"ffn": self.ffn_levels, "attention": self.attention_levels}

    @property
    def parts(self) -> list[Part]:
        """The parts of a layer that have levels."""
        return [part for part, levels in self.levels.items() if levels]

    @property
    def calibrated(self) -> SparsityConfig:
        """Settings under which calibration measures all that any mode needs of the parts."""
        return self.base.replace(mode="surrogate", **dict[str, Any]({f"{part}_sparsity": 0.5 for part in self.parts}))
