"""The learning rate that a tuning chose for each arm of a study."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from sparselora.errors import InputError
from sparselora.runs.files import read_table


def tuned_rates(folder: Path, arms: Iterable[str] = ()) -> dict[str, float]:
    """Return arm → the learning rate of its run with the least held-out loss; a run that diverged is never the best.

    Args:
        folder: of the finished runs ``ARM_lrRATE``.
        arms: those that must be there.

    Raises:
        InputError: one of ``arms`` has no finished run with a finite loss.
    """
    best: dict[str, tuple[float, float]] = {}
    for path in sorted(folder.glob("*_lr*/summary.csv")):
        arm, _, rate = path.parent.name.rpartition("_lr")
        loss = float(read_table(path, numbers=("eval_loss",))["eval_loss"].iloc[0])
        if math.isfinite(loss):
            best[arm] = min(best.get(arm, (math.inf, 0.0)), (loss, float(rate)))
    if lacking := [arm for arm in arms if arm not in best]:
        raise InputError(
            f"{folder} has no finished run of {', '.join(lacking)} with a finite loss; run the grid of tuning "
            "first, or lower its rates"
        )
    return {arm: rate for arm, (_, rate) in best.items()}
