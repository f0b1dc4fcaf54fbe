"""The optimizer steps of a sparse model, as its training loop announces them."""

from __future__ import annotations

from sparselora.config.sparsity import SparsityConfig
from sparselora.errors import InputError


class StepCount:
    """The optimizer step that is under way.

    Attributes:
        number: of the step, from 0; None before one was announced.
        passes: training passes of the model in this step.
        is_active: the settings allow sparse passes in this step.
    """

    def __init__(self, config: SparsityConfig) -> None:
        self._config = config
        self.number: int | None = None
        self.passes = 0
        self.is_active = True
        self._has_begun = False

    def begin(self, step: int, total_steps: int) -> None:
        """Take up step number ``step`` of ``total_steps``."""
        self.number, self.passes, self._has_begun = step, 0, True
        self.is_active = self._config.active(step, total_steps)

    @property
    def is_refresh_due(self) -> bool:
        """True if surrogates are to be fitted again before this step."""
        every = self._config.surrogate_refresh_steps
        return bool(every and self.number and self.number % every == 0 and self.is_active)

    def end(self, is_due: bool) -> None:
        """Close the step; ``is_due`` says that a pass in it had to be ours.

        Raises:
            InputError: it should have been sparse, and no training pass of the model was; or `begin` was not called
                for it.
        """
        if not self._has_begun:
            raise InputError(
                "a step ended that begin_step was not called for, so the sparse schedule is not followed; let the "
                "trainer call on_step_begin of SparsityCallback, or call begin_step(step, total_steps) before each step"
            )
        self._has_begun = False
        if is_due and not self.passes:
            raise InputError(
                f"step {self.number} should have been sparse, and the sparse model was not called in it; the trainer "
                "trains another object (a copy, a reloaded model): call sparsify on that one"
            )

    def check_announced(self) -> None:
        """Raise where the settings follow the steps, and nobody says which one it is."""
        config = self._config
        follows = (
            config.sparse_warmup_ratio > 0 or bool(config.sparse_warmup_steps) or config.sparse_end_ratio < 1
            or config.sparse_end_step is not None or config.surrogate_refresh_steps > 0
        )  # fmt: skip
        if self.number is None and follows:
            raise InputError(
                "the settings follow the training steps (sparse_warmup, sparse_end or surrogate_refresh_steps) and "
                "nothing says which step it is; add SparsityCallback(handle) to the trainer, or call "
                "begin_step(step, total_steps) before each step"
            )

    def next_seed(self) -> int:
        """Count a pass, and return the seed of its draws."""
        number = self.passes if self.number is None else self.number
        repeated = 0 if self.number is None else self.passes
        self.passes += 1
        return (self._config.drawing_seed * 1_000_003 + number) * 1_009 + repeated
