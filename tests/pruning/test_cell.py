"""A cell's settings: its steps, and the control that is one cell for all keep ratios."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sparselora.errors import InputError
from sparselora.pruning.cell import Cell

ARGUMENTS: dict[str, Any] = {
    "task": "classification", "prompt_field": "prompt", "completion_field": "completion", "template": None,
    "model": "m", "dataset": "d", "text_fields": ["text"], "label_field": "label", "eval_file": None,
    "train_samples": 0, "eval_samples": 0, "max_length": 16, "target_modules": None, "lora_r": 8, "lora_alpha": 16,
    "lora_dropout": 0.0, "method": "svd", "keep_ratio": 0.25, "scope": "global", "mask": True, "warmup_epochs": 1.0,
    "post_epochs": 1.0, "train_bsz": 16, "eval_bsz": 32, "lr": 1e-3, "device": "cpu", "dtype": "auto", "seed": 0,
}  # fmt: skip


def cell(**changes: Any) -> Cell:
    return Cell.from_arguments(ARGUMENTS | {"out_dir": "not a setting"} | changes, None)


def test_a_cell_is_frozen_and_its_control_keeps_everything():
    settings = cell()
    assert (settings.keep_ratio, settings.scope, settings.mask, settings.text_fields) == (
        0.25,
        "global",
        True,
        ("text",),
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.keep_ratio = 1.0  # type: ignore[misc]
    controls = {cell(method="no_prune", keep_ratio=ratio, scope=scope) for ratio in (0.25, 0.5) for scope in "ab"}
    (control,) = controls
    assert (control.keep_ratio, control.scope, control.mask) == (1.0, "module", False)


@pytest.mark.parametrize(
    ("rows", "processes", "epochs", "steps"),
    [
        (40, 1, (1.0, 1.0), (3, 3)),  # a last batch of 8
        (40, 2, (1.0, 1.0), (2, 2)),
        (48, 1, (0.5, 2.5), (2, 8)),  # halves to even: 1.5 → 2, 7.5 → 8
        (40, 1, (0.0, 0.2), (0, 1)),
        (40, 1, (1.0, 0.0), (3, 0)),
    ],
)
def test_steps_of_a_phase(rows, processes, epochs, steps):
    assert cell(warmup_epochs=epochs[0], post_epochs=epochs[1]).steps(rows, processes) == steps


@pytest.mark.parametrize(
    ("epochs", "flag"),
    [((0.1, 0.1), "--warmup_epochs"), ((0.1, 1.0), "--warmup_epochs"), ((1.0, 0.1), "--post_epochs")],
)
def test_a_phase_that_was_asked_for_has_a_step(epochs, flag):
    with pytest.raises(InputError, match=rf"^{flag} 0.1 is no step: an epoch of 40 .* batches of 16 has 3; give"):
        cell(warmup_epochs=epochs[0], post_epochs=epochs[1]).steps(40)


@pytest.mark.parametrize("rows", range(1, 200, 7))
def test_the_share_that_the_message_gives_is_enough(rows):
    with pytest.raises(InputError) as error:
        cell(warmup_epochs=1e-6).steps(rows)
    share = float(str(error.value).partition("give ")[2].split()[0])
    assert cell(warmup_epochs=share, post_epochs=0.0).steps(rows)[0] >= 1
