"""The three measurements of a bench as frozen requests: multiplications, step times, quality of estimates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparselora.bench.setup import Setup
from sparselora.config.sparsity import SparsityConfig
from sparselora.config.train import TrainConfig


@dataclass(frozen=True)
class FlopsRequest:
    """Count the multiplications of two configurations.

    Attributes:
        before: configuration to compare with; None: PEFT as it is, without the exact savings.
        after: configuration of interest.
        labels: names of the two.
        unit: ``MACs`` or ``FLOPs``.
    """

    setup: Setup
    before: SparsityConfig | None
    after: SparsityConfig
    labels: tuple[str, str]
    unit: str

    @property
    def outputs(self) -> tuple[str, ...]:
        return "run.json", "flops.csv", "flops_per_layer.csv", "flops.png"


@dataclass(frozen=True)
class TimesRequest:
    """Time whole training steps of several variants.

    Attributes:
        rounds: timed steps of each variant.
        warmup: untimed steps of each variant before them.
        sweeps: values by what is varied: ``sparsity``, ``seq`` (tokens of a row) or ``batch`` (rows).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:n``.
        dtype: ``auto``, ``fp32`` or ``bf16``.
        seed: of the adapter, the random weights and the batches.
    """

    setup: Setup
    rounds: int
    warmup: int
    sweeps: Mapping[str, tuple[float, ...]]
    device: str
    dtype: str
    seed: int

    @property
    def outputs(self) -> tuple[str, ...]:
        names = ("steps", *(f"by_{name}" for name in self.sweeps))
        return "run.json", "every_step.csv", *(f"{name}.{end}" for name in names for end in ("csv", "png"))


@dataclass(frozen=True)
class EstimatesRequest:
    """Measure how well estimates rank channels on real texts.

    Attributes:
        sparsity: settings of the estimates, and how many channels of each layer count.
        texts: training settings with the data set and its fields.
        ranks: ranks of the estimators.
        samples: texts, in batches of the setup's size.
        device, dtype: as in `TimesRequest`.
        seed: of the choice of texts.
    """

    setup: Setup
    sparsity: SparsityConfig
    texts: TrainConfig
    ranks: tuple[int, ...]
    samples: int
    device: str
    dtype: str
    seed: int

    @property
    def outputs(self) -> tuple[str, ...]:
        return "run.json", "estimators_by_batch.csv", "estimators.csv", "estimators.png"


BenchRequest = FlopsRequest | TimesRequest | EstimatesRequest
