"""What each layer computes for its sparse tokens in this step: the choice of channels, and the FFN that follows it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.estimator import (
    AttentionEstimator,
    FFNEstimator,
    oracle_attention_scores,
    oracle_ffn_scores,
)
from sparselora.contextual.frozen import FrozenLinear, FusedLinear, Lora, Operand
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.row_linear import Segment, join_linear, split_linear
from sparselora.contextual.selection import (
    kept_attention_channels,
    query_channels,
    select_attention_channels,
    select_ffn_channels,
)
from sparselora.contextual.structure import Attention, Block, Structure
from sparselora.contextual.surrogate import AffineMap
from sparselora.kernels.activation import gated_activation
from sparselora.kernels.casts import CastTable
from sparselora.kernels.select import attention_indices
from sparselora.kernels.slots import Channels

Tensor = torch.Tensor


@dataclass(frozen=True)
class FFNChoice:
    """What stands in for the whole FFN at sparse tokens.

    ``kept`` are the FFN channels that are computed, ascending; None computes none. ``bias (d,)`` is added to the second
    projection's own (the mean of what is dropped). ``map`` adds an affine map of the FFN's input.
    """

    kept: Tensor | None = None
    bias: Tensor | None = None
    map: AffineMap | None = None


@dataclass(eq=False)
class AttentionChoice:
    """The channels of each projection that sparse tokens have, or (``maps``: q, k, v, o) what stands in for it.

    ``qkv`` are those of q, k and v counted as side by side, the first ``queries`` of them q's and the next ``keys``
    k's; ``out`` are the input channels of the output projection. `channels` gives those of other parts too.
    """

    heads: Attention
    qkv: Channels | None = None
    out: Channels | None = None
    queries: int = 0
    keys: int = 0
    maps: tuple[AffineMap, ...] | None = None
    _made: dict[str, Channels] = field(default_factory=dict)

    def channels(self, part: str) -> Channels | None:
        """Of ``q``, ``k``, ``v``, ``o``, ``qkv`` or ``kv``; None where all channels are there (``maps``)."""
        if self.maps is not None:
            return None
        if part in ("qkv", "o"):
            return self.qkv if part == "qkv" else self.out
        if part not in self._made:
            self._made[part] = Channels.of(*self._indices(part))
        return self._made[part]

    def _indices(self, part: str) -> tuple[Tensor, int]:
        """Channels of a part, and how many it has in all; of ``kv`` they are counted over q, k and v."""
        assert self.qkv is not None
        q, k, v = fused_sizes(self.heads)
        first, last = self.queries, self.queries + self.keys
        index = self.qkv.index
        return {
            "q": (index[:first], q), "k": (index[first:last] - q, k), "v": (index[last:] - q - k, v),
            "kv": (index[first:], q + k + v),
        }[part]  # fmt: skip

    @functools.cached_property
    def side_by_side(self) -> AffineMap:
        """The maps of q, k and v as one: the same input, outputs side by side."""
        assert self.maps is not None
        three = self.maps[:1] if self.heads.fused else self.maps[:3]
        return AffineMap(
            torch.cat([m.down for m in three]), torch.block_diag(*(m.up for m in three)),
            torch.cat([m.bias for m in three]),
        )  # fmt: skip


@contextmanager
def aside(x: Tensor, wanted: bool) -> Iterator[Callable[[], Any]]:
    """Run the block on a second stream, after all that came before; the yielded function gives the event of its end.

    It is for a selection, which occupies one multiprocessor or two, beside the dense tokens' products on all others;
    what would want them all is to be done before, or it waits for those products. What the block allocates may be freed
    any time: a later block on that stream waits for everything that was enqueued before it.
    """
    if not wanted or not x.is_cuda:
        yield lambda: None
        return
    stream = _side_stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        yield stream.record_event


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


@dataclass
class Step:
    """One pass over a batch.

    ``seed`` is that of mode random; ``choices`` are kept for a recomputation of the pass. ``packed``: our own code runs
    the whole of it, and leaves layers out where nothing depends on them.
    """

    layout: TokenLayout
    sparse: bool
    split: int
    seed: int
    choices: dict[tuple[int, str], FFNChoice | AttentionChoice] = field(default_factory=dict)
    packed: bool = False
    _samples: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    def sample(self, most: int, total: int) -> Tensor | None:
        """Indices of at most ``most`` of the first ``total`` rows, evenly spaced, the same for every layer."""
        if (most, total) not in self._samples:
            self._samples[most, total] = self.layout.spread(most, total)
        return self._samples[most, total]


class LayerPlan:
    """One block of the model with its sparsity, and everything that chooses its channels."""

    def __init__(self, structure: Structure, block: Block, config: SparsityConfig) -> None:
        self.block, self.config = block, config
        ffn, attention = block.ffn, block.attention

        def linear(name: str) -> FrozenLinear:
            return FrozenLinear(name, structure.module(name))

        self.up, self.down = linear(ffn.up), linear(ffn.down)
        self.gate = None if ffn.gate is None else linear(ffn.gate)
        self.attention: dict[str, FrozenLinear] = {part: linear(getattr(attention, part)) for part in "qkvo"}
        self.first = FusedLinear([self.up] if self.gate is None else [self.gate, self.up])
        parts = ["q"] if attention.fused else list("qkv")
        self.qkv = FusedLinear([self.attention[part] for part in parts])
        self.ffn_sparsity = config.ratio(block.index, "ffn")
        self.attention_sparsity = config.ratio(block.index, "attention")
        self.ffn_estimator: FFNEstimator | None = None
        self.attention_estimator: AttentionEstimator | None = None
        self.fixed_ffn: FFNChoice | None = None
        self.fixed_attention: AttentionChoice | None = None
        self.mean: Tensor | None = None
        self.mean_output: Tensor | None = None

    @property
    def linears(self) -> list[FrozenLinear]:
        """The block's linear layers: q, k, v, o, gate, up, down."""
        return [*self.attention.values(), *(x for x in (self.gate, self.up, self.down) if x is not None)]

    def release(self) -> None:
        """Give parameters that were moved together memory of their own."""
        self.first.release()
        self.qkv.release()

    # --- choosing ---

    def ffn_chooser(self, x: Tensor, step: Step, voters: Tensor | None = None) -> Callable[[], FFNChoice] | None:
        """What makes the choice for the sparse tokens of this step, scores ready; None where the layer is dense.

        Args:
            x: inputs of the FFN ``(t, d)``.
            voters: which rows of ``x`` have a say, in order; None for all.
        """
        if not step.sparse or self.ffn_sparsity == 0 or len(x) == 0:
            return None
        known: Any = self.fixed_ffn or step.choices.get((self.block.index, "ffn"))
        scores = None if known is not None else self._ffn_scores(x.detach(), step, voters)

        @torch.no_grad()
        def choose() -> FFNChoice:
            choice: FFNChoice = known
            if scores is not None:
                kept = select_ffn_channels(scores, self.ffn_sparsity)
                choice = FFNChoice(kept, self.compensation(kept, x.dtype))
            step.choices[self.block.index, "ffn"] = choice
            return choice

        return choose

    @torch.no_grad()
    def _ffn_scores(self, x: Tensor, step: Step, voters: Tensor | None) -> Tensor:
        if self.config.mode == "random":
            return self._draw(self.up.base.weight.device, self.ffn_width, step, 0)
        if self.config.mode == "oracle":
            return self._oracle_ffn(x if voters is None else x.index_select(0, voters))
        assert self.ffn_estimator is not None
        return self.ffn_estimator.scores(_sample(x, voters, step, self.config.estimator_tokens))

    def compensation(self, kept: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Mean contribution of the channels that are not kept, W_down (E h without them)."""
        if self.mean is None:
            return None
        assert self.mean_output is not None
        total = self.mean_output
        if kept is not None:
            down = self.down.stored().index_select(1, kept).to(self.mean.dtype)
            total = total - down @ self.mean.index_select(0, kept)
        return total.to(dtype)

    def _oracle_ffn(self, x: Tensor) -> Tensor:
        gate = None if self.gate is None else self.gate.effective(x.dtype)
        return oracle_ffn_scores(
            x, self.up.effective(x.dtype), gate, act=self.block.ffn.act, up_bias=self.up.bias(x.dtype),
            gate_bias=None if self.gate is None else self.gate.bias(x.dtype),
        )  # fmt: skip

    def attention_chooser(
        self, x: Tensor, step: Step, voters: Tensor | None = None
    ) -> Callable[[], AttentionChoice] | None:
        """As `ffn_chooser`, from the input of q, k and v."""
        if not step.sparse or self.attention_sparsity == 0 or len(x) == 0:
            return None
        known: Any = self.fixed_attention or step.choices.get((self.block.index, "attention"))
        scores = None if known is not None else self._attention_scores(x.detach(), step, voters)

        @torch.no_grad()
        def choose() -> AttentionChoice:
            choice: AttentionChoice = known
            if scores is not None:
                choice = attention_choice(self.block.attention, *scores, self.attention_sparsity)
            step.choices[self.block.index, "attention"] = choice
            return choice

        return choose

    @torch.no_grad()
    def _attention_scores(self, x: Tensor, step: Step, voters: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.config.mode == "random":
            width = self.block.attention.kv_width
            return self._draw(x.device, width, step, 1), self._draw(x.device, width, step, 2)
        if self.config.mode == "oracle":
            return self._oracle_attention(x if voters is None else x.index_select(0, voters))
        assert self.attention_estimator is not None
        return self.attention_estimator.scores(_sample(x, voters, step, self.config.estimator_tokens))

    def _oracle_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.block.attention
        parts = ["q"] if heads.fused else list("qkv")
        found = [
            torch.nn.functional.linear(
                x, self.attention[p].effective(x.dtype), self.attention[p].bias(x.dtype)
            ) for p in parts
        ]  # fmt: skip
        if heads.fused:
            found = list(found[0].split(fused_sizes(heads), dim=1))
        q, k, v = found
        return oracle_attention_scores(
            q, k, v, heads=heads.heads, kv_heads=heads.kv_heads, head_dim=heads.head_dim, rope=heads.rope
        )

    def _draw(self, device: torch.device, n: int, step: Step, stream: int) -> Tensor:
        """A draw that depends on the seed, the step, the layer and the stream alone: a resumed run repeats it."""
        generator = torch.Generator(device=device)
        generator.manual_seed((step.seed * 1_000_003 + self.block.index * 4 + stream) % (1 << 62))
        return torch.rand(n, generator=generator, device=device)

    @property
    def ffn_width(self) -> int:
        return self.up.stored().shape[0]

    # --- computing ---

    def ffn(
        self, x: Tensor, split: int, step: Step, voters: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The FFN of rows ``x (n, d)`` in their dtype: rows before ``split`` by this step's choice, the others whole.

        Args:
            voters: which of the rows before ``split`` have a say in the choice; None for all.
            noise: factors of the hidden channels ``(n, d_ff)``, from their dropout; None without.
        """
        n, dtype = len(x), x.dtype
        chooser = self.ffn_chooser(x[:split], step, voters)
        choice: FFNChoice | None = None
        first: tuple[Operand, ...] = ()
        last: tuple[Operand, ...] = ()
        with aside(x, chooser is not None and self.fixed_ffn is None) as done:
            if chooser is not None:
                choice = chooser()
                first, last = self._first(choice, dtype), self._last(choice, dtype)
            ready = done()
        parts: list[tuple[int, int, FFNChoice | None]] = [(0, n, None)]
        if choice is not None:
            parts = [(0, split, choice), (split, n, None)]
        parts = [part for part in parts if part[1] > part[0]]
        segments, joined = [], []
        for start, stop, chosen in parts:
            whole = chosen is None
            segments.append(
                Segment(start, stop, self._first(None, dtype) if whole else first, None if whole else ready)
            )
            joined.append(Segment(start, stop, self._last(None, dtype) if whole else last))
        outputs = iter(split_linear(x, segments)) if any(s.operands for s in segments) else iter(())
        inputs = [
            self._hidden(segment.operands, outputs, chosen, None if noise is None else noise[segment.rows])
            for segment, (_, _, chosen) in zip(segments, parts)
        ]
        width = self.down.stored().shape[0]
        if not any(inputs):
            return x.new_zeros(n, width)
        return join_linear(inputs, joined, (n, width))

    def _first(self, choice: FFNChoice | None, dtype: torch.dtype) -> tuple[Operand, ...]:
        """The operands of `split_linear`: gate and up, and the first factor of a map."""
        first: list[Operand] = []
        kept = None if choice is None else choice.kept
        if choice is None or kept is not None:
            rows = kept if kept is None or self.gate is None else torch.cat((kept, kept + self.ffn_width))
            first.append(self.first.operand(dtype, rows))
        if choice is not None and choice.map is not None:
            first.append(Operand(choice.map.down.to(dtype)))
        return tuple(first)

    def _last(self, choice: FFNChoice | None, dtype: torch.dtype) -> tuple[Operand, ...]:
        """The operands of `join_linear`: down, and the second factor of a map."""
        last: list[Operand] = []
        if choice is None or choice.kept is not None:
            down = self.down.operand(dtype, columns=None if choice is None else choice.kept)
            if choice is not None and choice.bias is not None:
                extra = choice.bias.to(dtype)
                bias = extra if down.bias is None else down.bias + extra
                down = replace(down, bias=bias)
            last.append(down)
        if choice is not None and choice.map is not None:
            fitted = choice.map.to(dtype=dtype)
            last.append(Operand(fitted.up, fitted.bias))
        return tuple(last)

    def _hidden(
        self, operands: Sequence[Operand], outputs: Iterator[Tensor], choice: FFNChoice | None, noise: Tensor | None
    ) -> list[Tensor]:
        """The inputs of `join_linear`'s terms, from this segment's outputs of `split_linear` and its ``noise``."""
        got = [next(outputs) for _ in operands]
        if choice is None or choice.kept is not None:
            act = self.block.ffn.act
            got[0] = act(got[0]) if self.gate is None else gated_activation(got[0], act)
            if noise is not None:
                kept = None if choice is None else choice.kept
                got[0] = got[0] * (noise if kept is None else noise.index_select(1, kept))
        return got

    def projection(self, part: str, choice: AttentionChoice | None, dtype: torch.dtype) -> Operand:
        """The operand of q, k or v (or of all, where one matrix computes them) for rows that follow ``choice``."""
        linear = self.attention[part]
        if choice is None:
            return linear.operand(dtype)
        if choice.maps is not None:
            fitted = choice.maps["qkvo".index(part)].to(dtype=dtype)
            return Operand(fitted.up, fitted.bias, fitted.down, linear.lora())
        channels = choice.channels("qkv" if self.block.attention.fused else part)
        assert channels is not None
        return linear.operand(dtype, rows=channels.index)

    def projections(self, rows: Channels | None, choice: AttentionChoice | None, dtype: torch.dtype) -> Operand:
        """The operand of q, k and v side by side, restricted to ``rows``, or what stands in for it."""
        if choice is not None and choice.maps is not None:
            fitted = choice.side_by_side.to(dtype=dtype)
            return Operand(fitted.up, fitted.bias, fitted.down, self.qkv.lora())
        return self.qkv.operand(dtype, None if rows is None else rows.index)

    def output(self, choice: AttentionChoice | None, dtype: torch.dtype) -> Operand:
        """The operand of the output projection, for rows that hold the channels ``choice.o``."""
        linear = self.attention["o"]
        if choice is None:
            return linear.operand(dtype)
        if choice.maps is not None:
            fitted = choice.maps[3].to(dtype=dtype)
            return Operand(fitted.up, fitted.bias, fitted.down, linear.lora())
        assert choice.out is not None
        return linear.operand(dtype, columns=choice.out.index)


def fused_sizes(heads: Attention) -> list[int]:
    """Rows of q, k and v in a fused projection."""
    return [heads.heads * heads.head_dim, heads.kv_width, heads.kv_width]


def attention_choice(heads: Attention, qk: Tensor, v: Tensor, sparsity: float) -> AttentionChoice:
    """The channels that stay, from scores per kv channel."""
    shape = (heads.heads, heads.kv_heads, heads.head_dim, heads.rope)
    kept = kept_attention_channels(sparsity, heads.kv_heads, heads.head_dim, pairs=heads.rope)
    group = heads.heads // heads.kv_heads
    made = attention_indices(qk, v, kept, *shape)
    if made is not None:
        qkv, out = Channels(*made[:2]), Channels(*made[2:])
    else:
        sizes = fused_sizes(heads)
        k = select_attention_channels(qk, sparsity, heads.kv_heads, heads.head_dim, pairs=heads.rope)
        v_ = select_attention_channels(v, sparsity, heads.kv_heads, heads.head_dim, pairs=False)
        q, o = (query_channels(index, heads.kv_heads, heads.heads, heads.head_dim) for index in (k, v_))
        qkv = Channels.of(torch.cat((q, k + sizes[0], v_ + sizes[0] + sizes[1])), sum(sizes))
        out = Channels.of(o, sizes[0])
    return AttentionChoice(heads, qkv, out, kept[0] * group, kept[0])


def _sample(x: Tensor, voters: Tensor | None, step: Step, most: int) -> Tensor:
    """At most ``most`` of the rows that have a say, evenly spaced; 0 takes all."""
    index = step.sample(most, len(x) if voters is None else len(voters))
    if voters is not None:
        index = voters if index is None else voters.index_select(0, index)
    return x if index is None else x.index_select(0, index)


class Casts:
    """Copies of every LoRA factor in the dtype of a pass, made by one call for the whole model.

    The factors of layers that share an input stand in one A and one block-diagonal B, so that their thin products are
    one.
    """

    def __init__(self, plans: Sequence[LayerPlan]) -> None:
        self._layers: list[FrozenLinear | FusedLinear] = [
            layer for plan in plans for layer in (plan.qkv, plan.attention["o"], plan.first, plan.down)
        ]
        self._state: tuple[Any, ...] | None = None
        self._table = CastTable([], [], [])
        self._casts: list[tuple[FrozenLinear | FusedLinear, tuple[Tensor, Tensor]]] = []

    @torch.no_grad()
    def prepare(self, dtype: torch.dtype) -> None:
        """Make room for the copies, where the factors are others than at the last pass."""
        loras = [(layer, layer.lora()) for layer in self._layers]
        found = [(layer, lora) for layer, lora in loras if lora is not None]
        adapters = [adapter for _, lora in found for adapter in lora.adapters]
        state = (dtype, *((a.A.data_ptr(), a.B.data_ptr(), a.scale) for a in adapters))
        if state != self._state:
            self._allocate(found, dtype)
            self._state = state

    def refresh(self) -> None:
        """Make the copies current and hand them to the layers."""
        self._table.run()
        for layer, cast in self._casts:
            layer.cast = cast

    def _allocate(self, found: Sequence[tuple[FrozenLinear | FusedLinear, Lora]], dtype: torch.dtype) -> None:
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        scales: list[float] = []
        self._casts = []
        for layer, lora in found:
            first = lora.adapters[0].A
            A = torch.empty(lora.rank, first.shape[1], dtype=dtype, device=first.device)
            B = torch.zeros(lora.d_out, lora.rank, dtype=dtype, device=first.device)
            for adapter, out, rank in zip(lora.adapters, lora.outs, lora.ranks):
                sources += [adapter.A.detach(), adapter.B.detach()]
                targets += [A[rank], B[out, rank]]
                scales += [1.0, adapter.scale]
            self._casts.append((layer, (A, B)))
        self._table = CastTable(sources, targets, scales)

    def forget(self) -> None:
        """Take the copies away again: another pass may come after the factors have changed."""
        for layer, _ in self._casts:
            layer.cast = None
