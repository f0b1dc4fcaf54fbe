"""Former names of flags and settings: still accepted, and read in the records of earlier runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from sparselora.errors import InputError

FORMER_NAMES: Mapping[str, Mapping[str, str]] = {
    "train": {"slora": "novelty"},
    "novelty": {"target_novelty": "target_accept_rate"},
    "bench": {"batch": "train_bsz"},
    "eval": {
        "base_model": "model", "lora_dir": "adapter", "max_samples": "eval_samples", "batch_size": "eval_bsz",
    },
    "edit": {
        "base_model": "model", "lora_path": "adapter", "calib_batch_size": "calib_bsz",
        "eval_batch_size": "eval_bsz", "eval_fewshot": "fewshot", "eval_max_new_tokens": "max_new_tokens",
    },
    "reduce": {"lora_path": "adapter"},
    "savings": {"rank": "lora_r", "targets": "target_modules"},
    "prune_finetune_lora": {"text_field": "text_fields"},
}  # fmt: skip
"""Former name → present name, by command and, for the novelty gate, by section of the settings."""


def with_present_names(values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return ``values`` with the former names of ``owner``, a key of `FORMER_NAMES`, replaced by the present ones.

    A value of None counts as not given where the other name has one.

    Raises:
        InputError: a value is given under both names.
    """
    former = FORMER_NAMES[owner]
    renamed = {name: value for name, value in values.items() if name not in former}
    for name, value in values.items():
        if name not in former:
            continue
        present = former[name]
        if renamed.get(present) is None:
            renamed[present] = value
        elif value is not None:
            raise InputError(f"{name} is the former name of {present}, and both are given; give one")
    return renamed


def accept_former_names(parser: argparse.ArgumentParser, names: Mapping[str, str]) -> None:
    """Let flags be given by their former names, which the help and the messages do not show.

    Args:
        names: former name → present name, without dashes.
    """
    actions = parser._option_string_actions
    for former, present in names.items():
        for prefix in ("--", "--no-"):
            if (action := actions.get(prefix + present)) is not None:
                actions[prefix + former] = action
