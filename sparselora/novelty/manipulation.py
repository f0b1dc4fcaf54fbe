"""The manipulation check of a novelty gate: were the accepted batches newer than the rejected ones?

A run in which they hardly were is no test of novelty: its gate accepted nearly at random, whatever its loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from sparselora.config.novelty import BY_NOVELTY
from sparselora.numerics.stats import auc

LEAST_AUC = 0.8
"""AUC of novelty, accepted against rejected batches, below which a run does not count. Normal novelties give 0.87 with
the steepness that a gate takes by itself, 2 over their spread, and 0.57 with an eighth of it."""

COLUMNS = ("novelty_beta", "choice_auc", "duplicate_auc")
"""Columns of a summary that `manipulation_check` gives."""


def manipulation_check(decisions: pd.DataFrame, policy: str, beta: float) -> dict[str, float]:
    """Return the check of a run, NaN where a number does not apply.

    ``novelty_beta`` is β. ``choice_auc`` is the AUC of the novelty of accepted against rejected batches, after burn-in,
    under a policy that decides by novelty alone. ``duplicate_auc`` is that of batches of originals against batches that
    are mostly planted near-duplicates. 0.5 is no difference.

    Args:
        decisions: columns ``novelty``, ``threshold``, ``accept`` and ``planted``, as the log of the gate has them.
    """
    gated = decisions[decisions["threshold"].notna() & decisions["novelty"].notna()]
    check = dict.fromkeys(COLUMNS, math.nan)
    if policy in BY_NOVELTY and len(gated):
        is_accepted = gated["accept"] == 1
        check["novelty_beta"] = beta
        check["choice_auc"] = auc(gated.loc[is_accepted, "novelty"], gated.loc[~is_accepted, "novelty"])
    is_original, is_planted = gated["planted"] < 0.5, gated["planted"] > 0.5
    check["duplicate_auc"] = auc(gated.loc[is_original, "novelty"], gated.loc[is_planted, "novelty"])
    return check


def describe_check(summary: Mapping[str, Any]) -> list[str]:
    """Return what the columns of `manipulation_check` in a run's summary say; nothing where they do not apply."""
    beta, choice, duplicates = (float(summary.get(name, math.nan)) for name in COLUMNS)
    sentences = []
    if not math.isnan(choice):
        text = f"AUC of novelty, accepted against rejected: {choice:.2f} (steepness {beta:.3g})"
        if choice < LEAST_AUC:
            text += f", below {LEAST_AUC}: the gate did not choose, read this run as one of random skipping"
        sentences.append(text)
    if not math.isnan(duplicates):
        sentences.append(f"AUC of novelty, original batches against planted near-duplicates: {duplicates:.2f}")
    return sentences
