"""One layer of the model in a sparse pass: it chooses by its mode, and computes its FFN by the choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from sparselora.config.sparsity import Part, SparsityConfig
from sparselora.contextual.block_linears import BlockLinears
from sparselora.contextual.choices import Choice, FFNChoice, attention_choice
from sparselora.contextual.modes import Mode, mode_of
from sparselora.contextual.operand import Operand
from sparselora.contextual.row_linear import join_linear, split_linear
from sparselora.contextual.selection import select_ffn_channels
from sparselora.contextual.step import Step, side_stream
from sparselora.contextual.structure import Block, Structure
from sparselora.kernels.activation import by_attachment, gated_activation
from sparselora.kernels.rows import EVERY_ROW, AdapterRows, Rows

Tensor = torch.Tensor


class LayerPlan:
    """One block of the model: its linear layers, and the mode by which it is sparse."""

    def __init__(self, structure: Structure, block: Block, config: SparsityConfig) -> None:
        self.block = block
        self.linears = BlockLinears(structure, block)
        self.mode: Mode = mode_of(config)(self.linears, config)

    @property
    def sparsity(self) -> dict[Part, float]:
        """The sparsity of each part; 0 where it is dense."""
        return self.mode.sparsity

    @property
    def quantises(self) -> bool:
        """True if the block's frozen products are formed in fp8."""
        return self.linears.down.precision is not None

    def reads_wide(self, part: Part) -> bool:
        """Return whether anything but fp8 products reads the input of a part: a LoRA, a choice of channels, a map."""
        linears = self.linears.first if part == "ffn" else self.linears.qkv
        return linears.lora() is not None or self.sparsity[part] > 0

    def score(self, part: Part, x: Tensor, step: Step, unmasked: Tensor | None = None) -> Selection | None:
        """Score the channels of a part for the sparse tokens of this step; `Selection.choose` selects by the scores.

        Scores come first and by themselves because they occupy the whole GPU, and the selection does not: it may run on
        a `side_stream`.

        Args:
            x: inputs of the part ``(t, d)``: of the FFN, or of q, k and v.
            unmasked: indices of the rows of ``x`` that count; None for all.
        Returns:
            None where the part is dense in this step.
        """
        if not step.sparse or self.sparsity[part] == 0 or len(x) == 0:
            return None
        fixed = self.mode.fixed.get(part)
        choice = fixed or step.choices.get((self.block.index, part))
        scores: Any = None
        if choice is None:
            place = (self.mode.config.mode, self.block.index, part)
            scores = None if step.scores is None else step.scores.get(place)
            if scores is None:
                score = self.mode.ffn_scores if part == "ffn" else self.mode.attention_scores
                with torch.no_grad():
                    scores = score(x.detach(), step, unmasked)
            if step.scores is not None:
                step.scores[place] = scores
        return Selection(self.mode, part, step, fixed is not None, choice, scores, x.dtype)

    def ffn(
        self, x: Tensor, split: int, step: Step, unmasked: Tensor | None = None, noise: Tensor | None = None,
        detached: int = 0, adapted: AdapterRows = EVERY_ROW,
    ) -> Tensor:  # fmt: skip
        """The FFN of rows ``x (n, d)`` in their dtype: rows before ``split`` by this step's choice, the others whole.

        Args:
            unmasked: indices of the rows before ``split`` that the choice is made by; None for all.
            noise: factors of the hidden channels ``(n, d_ff)``, from their dropout; None without.
            detached: rows before it have no backward pass, as `sparselora.kernels.rows` says.
            adapted: the rows that take part in the LoRAs.
        """
        n, dtype, linears = len(x), x.dtype, self.linears
        selection = self.score("ffn", x[:split], step, unmasked)
        choice: FFNChoice | None = None
        first: tuple[Operand, ...] = ()
        last: tuple[Operand, ...] = ()
        linears.first.join()
        with side_stream(x, selection is not None and not selection.is_fixed) as done:
            if selection is not None:
                choice = cast(FFNChoice, selection.choose())
                first, last = linears.first_operands(choice, dtype), linears.last_operands(choice, dtype)
            ready = done()
        parts: list[tuple[Rows, FFNChoice | None]] = [(Rows(0, n), None)]
        if choice is not None:
            parts = [(Rows(0, split, ready=ready), choice), (Rows(split, n), None)]
        parts = [part for part in parts if len(part[0])]
        rows = [part[0] for part in parts]
        into = [linears.first_operands(None, dtype) if c is None else first for _, c in parts]
        out_of = [linears.last_operands(None, dtype) if c is None else last for _, c in parts]
        outputs = iter(split_linear(x, rows, into, detached, adapted)) if any(into) else iter(())
        inputs = []
        for operands, (part_rows, part_choice) in zip(into, parts):
            part_noise = None if noise is None else noise[part_rows.slice]
            before = len(part_rows) - len(part_rows.after(detached))
            with torch.set_grad_enabled(torch.is_grad_enabled() and before < len(part_rows)):
                inputs.append(self._hidden(operands, outputs, part_choice, part_noise, before))
        width = linears.down.width
        if not any(inputs):
            return x.new_zeros(n, width)
        return join_linear(inputs, [Rows(r.start, r.stop) for r in rows], out_of, (n, width), detached, adapted)

    def _hidden(
        self, operands: Sequence[Operand], outputs: Iterator[Tensor], choice: FFNChoice | None, noise: Tensor | None,
        detached: int,
    ) -> list[Tensor]:  # fmt: skip
        """Return the inputs of `join_linear`'s terms, from these rows' outputs of `split_linear` and their noise."""
        inputs = [next(outputs) for _ in operands]
        if choice is None or choice.channels is not None:
            act = self.block.ffn.act
            if self.linears.gate is None:
                inputs[0] = by_attachment(act, inputs[0], detached)
            else:
                inputs[0] = gated_activation(
                    inputs[0],
                    act,
                    quantise=self.quantises and noise is None,
                    keep_wide=self.linears.down.adapter() is not None,
                    quantise_grad=self.quantises,
                    keep_wide_grad=self.linears.first.lora() is not None,
                    detached=detached,
                )
            if noise is not None:
                if choice is not None and choice.channels is not None:
                    noise = noise.index_select(1, self.linears.computed_channels(choice.channels)[0])
                inputs[0] = inputs[0] * noise
        return inputs


@dataclass(frozen=True, eq=False)
class Selection:
    """The choice of one part of a layer in one step: made already, or to be selected by scores.

    Attributes:
        is_fixed: the choice was made before the first step.
        choice: the choice, where it is made; None where ``scores`` are there to select by.
        dtype: that of the pass.
    """

    mode: Mode
    part: Part
    step: Step
    is_fixed: bool
    choice: Choice | None
    scores: Any
    dtype: torch.dtype

    @torch.no_grad()
    def choose(self) -> Choice:
        """Return the choice, and remember it in the step."""
        choice = self.choice or self._selected()
        self.step.choices[self.mode.linears.block.index, self.part] = choice
        return choice

    def _selected(self) -> Choice:
        sparsity = self.mode.sparsity[self.part]
        if self.part == "attention":
            qk, v = self.scores
            return attention_choice(self.mode.linears.block.attention, qk, v, sparsity)
        channels = select_ffn_channels(self.scores, sparsity)
        return FFNChoice(channels, self.mode.compensation(channels, self.dtype))
