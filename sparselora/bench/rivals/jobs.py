"""The work of a rival's process as plain data: a model, its adapter, and the batches to take steps on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a trainer that patches transformers has to be the first to import it
    from sparselora.contextual.flops import Workload


LAYOUTS = ("full", "padded", "packed")

CASE_NAMES = (*LAYOUTS, *(f"{layout}-all" for layout in LAYOUTS))
"""The batches to compare on by their names: a layout, labelled as the work says or, with ``-all``, whole."""


@dataclass(frozen=True)
class Case:
    """Batches to time steps on.

    Attributes:
        layout: ``full`` (rows of full length), ``padded`` (rows of half to full length, padded on the right) or
            ``packed`` (the same rows one after the other in one, without padding).
        batch, seq: rows, and tokens of the longest.
        labelled: labelled tokens of a row of full length; of a shorter one, the same share.
    """

    layout: str
    batch: int
    seq: int
    labelled: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row: every batch of a case has the same, so that nothing is compiled for one alone."""
        if self.layout == "full" or self.batch == 1:
            return [self.seq] * self.batch
        least = (self.seq + 1) // 2
        return [self.seq - round(i * (self.seq - least) / (self.batch - 1)) for i in range(self.batch)]

    @property
    def tokens(self) -> int:
        """Tokens of a batch without padding."""
        return sum(self.lengths)


def cases(work: Workload, names: Sequence[str] = CASE_NAMES) -> tuple[Case, ...]:
    """Return the batches to compare on by ``names``, in the order of `CASE_NAMES`, each once."""
    compared = []
    for name in CASE_NAMES:
        labelled = work.seq if name.endswith("-all") else work.labelled
        if name in names:
            compared.append(Case(name.removesuffix("-all"), work.batch, work.seq, labelled))
    return tuple(dict.fromkeys(compared))


@dataclass(frozen=True)
class Job:
    """One rival's work.

    Attributes:
        rival: its name in `sparselora.bench.rivals.RIVALS`.
        source: name or folder of a model, or a configuration for random weights.
        vocabulary: number of tokens to draw from.
        rank, alpha, targets: of the LoRA; targets None: the attention projections.
        device: ``cpu`` or ``cuda``.
        bf16: bfloat16 weights and autocast; otherwise float32.
        rounds, warmup: timed steps of a case, and untimed ones before them.
        seed: of the adapter, random weights and batches.
        cases: the batches, in order.
    """

    rival: str
    source: str | Mapping[str, Any]
    vocabulary: int
    rank: int
    alpha: float
    targets: tuple[str, ...] | None
    device: str
    bf16: bool
    rounds: int
    warmup: int
    seed: int
    cases: tuple[Case, ...]

    def serialised(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def deserialised(cls, text: str) -> Job:
        values = json.loads(text)
        targets = values["targets"]
        return cls(
            **values
            | {
                "targets": None if targets is None else tuple(targets),
                "cases": tuple(Case(**case) for case in values["cases"]),
            }
        )
