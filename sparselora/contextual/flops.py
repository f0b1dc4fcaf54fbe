"""Cost of a token in a LoRA training step: multiply-accumulates by component, dense and under a `SparsityConfig`.

Counted from ``config.json`` and the settings alone. One MAC is two FLOPs. Norms, activations, softmax, embeddings,
biases and the optimizer are not counted: none of them is a matrix product.

A *forward* count times its training factor is what a step does: a frozen weight is multiplied twice (the output and the
gradient of the input; no gradient of the weight), an adapter three times, the two products of the attention scores
three times, an estimate once. An encoder's trained head, some ten-thousandth of the step, counts as if it were frozen.
Recomputation (gradient checkpointing) is not counted, and that nothing needs the gradient of the first layer's q, k and
v inputs is not subtracted. Where ``context_backward`` cuts the context in a layer, its tokens are multiplied once, and
so is the context of sequences that it does not sample; the attention scores are counted whole, as they are computed.

Exact savings, which the dense step of this package has as well: a decoder's output layer at the labelled positions
only, and in its last layer queries, scores, o and the FFN at output tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparselora.config.sparsity import Part, SparsityConfig
from sparselora.contextual.modes import mode_of
from sparselora.errors import InputError
from sparselora.models.architectures import Architecture, Config, Matrix, architecture
from sparselora.numerics.channels import keep_count

FACTORS = {
    "estimator": 1,
    "FFN": 2,
    "attention projections": 2,
    "attention scores": 3,
    "adapter": 3,
    "head": 2,
}
"""Component → multiplications of a training step per multiplication of the forward pass."""

ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert")


# --- what is counted ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer that decide what a token costs.

    ``q_width`` is heads · head_dim, ``kv_width`` is kv_heads · head_dim; ``head_macs`` are those of the output layer at
    one position of a decoder, and of the classifier for one sequence of an encoder.
    """

    model_type: str
    layers: int
    width: int
    ffn_width: int
    gated: bool
    q_width: int
    kv_width: int
    head_macs: int
    decoder: bool

    @classmethod
    def from_config(cls, config: Config) -> Shape:
        """From what a ``config.json`` says.

        Raises:
            InputError: an unknown architecture, or one whose FFN is a mixture of experts.
        """
        model = architecture(config)
        if any("experts" in matrix.name for matrix in model.matrices):
            raise InputError(f"{model.model_type} has a mixture of experts, which contextual sparsity does not support")
        q, k = _find(model, "q"), _find(model, "k")
        gated = "gate" in model.targets()
        ffn = _find(model, "up" if gated else "fc1")
        decoder = model.model_type not in ENCODERS
        embedded = config.get("word_embed_proj_dim") or q.d_in
        # An encoder's classifier: a square layer and two classes, once a sequence.
        head = int(config["vocab_size"]) * int(embedded) if decoder else q.d_in * (q.d_in + 2)
        return cls(
            model_type=model.model_type,
            layers=q.count,
            width=q.d_in,
            ffn_width=ffn.d_out // len(ffn.parts),
            gated=gated,
            q_width=q.d_out // len(q.parts),
            kv_width=k.d_out // len(k.parts),
            head_macs=head,
            decoder=decoder,
        )

    @property
    def sides(self) -> dict[str, tuple[int, int]]:
        """Short name of each projection → its (d_out, d_in)."""
        d, f = self.width, self.ffn_width
        attention = {
            "q": (self.q_width, d), "k": (self.kv_width, d), "v": (self.kv_width, d), "o": (d, self.q_width),
        }  # fmt: skip
        ffn = {"gate": (f, d), "up": (f, d), "down": (d, f)} if self.gated else {"fc1": (f, d), "fc2": (d, f)}
        return attention | ffn


def _find(model: Architecture, part: str) -> Matrix:
    return model.resolve([part])[0]


@dataclass(frozen=True)
class Workload:
    """A batch: rows, tokens of a row, and how many of those are labelled (a decoder's output tokens; 0 for an encoder).

    Raises:
        InputError: a size below 1, or more labels than tokens.
    """

    batch: int
    seq: int
    labelled: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.seq < 1:
            raise InputError(f"batch and sequence must be at least 1, got {self.batch} × {self.seq}")
        if not 0 <= self.labelled <= self.seq:
            raise InputError(f"labelled tokens must be between 0 and the sequence's {self.seq}, got {self.labelled}")

    @property
    def output_share(self) -> float:
        return self.labelled / self.seq

    @property
    def context_tokens(self) -> int:
        """Context tokens of the whole batch."""
        return self.batch * (self.seq - self.labelled)


@dataclass(frozen=True)
class Lora:
    """Rank, and the short names (`sparselora.models.architectures.TARGETS`) of what is adapted."""

    rank: int
    targets: tuple[str, ...] = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Cost:
    """MACs of one component, summed over the layers.

    Attributes:
        context, output, mean: forward, per context token, output token, and token on average.
        training: of a training step, per token on average.
    """

    component: str
    context: float
    output: float
    mean: float
    training: float


# --- one layer ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Computed:
    """The part of a layer that one kind of token computes: channels of the FFN, fractions of q and k and of v and o.

    ``ffn_map`` and ``attention_map`` are the rank of the affine map in their place, 0 where there is none.
    """

    ffn: int
    attention: float = 1.0
    ffn_map: int = 0
    attention_map: int = 0
    query: bool = True


def _computed(shape: Shape, config: SparsityConfig, layer: int) -> _Computed:
    """Return the part of layer ``layer`` that a sparse token computes."""
    mode, ffn, attention = mode_of(config), config.ratio(layer, "ffn"), config.ratio(layer, "attention")
    rank = mode.map_rank(config)
    return _Computed(
        ffn=mode.ffn_channels(config, shape.ffn_width, ffn) if ffn > 0 else shape.ffn_width,
        attention=1.0 if rank else keep_count(shape.kv_width, 1 - attention) / shape.kv_width,
        ffn_map=rank if ffn > 0 else 0,
        attention_map=rank if attention > 0 else 0,
    )


def _projections(shape: Shape, computed: _Computed) -> dict[str, tuple[float, float]]:
    """Short name of each frozen projection → (d_out, d_in) as computed; (0, 0) where it is not."""
    sides: dict[str, tuple[float, float]] = {}
    for name, (d_out, d_in) in shape.sides.items():
        if name in "qkv":
            sides[name] = (d_out * computed.attention, d_in)
        elif name == "o":
            sides[name] = (d_out, d_in * computed.attention)
        elif name in ("down", "fc2"):
            sides[name] = (d_out, computed.ffn)
        else:
            sides[name] = (computed.ffn, d_in)
        if (name in "qo" and not computed.query) or (name not in "qkvo" and not computed.ffn):
            sides[name] = (0, 0)
    return sides


def _token(shape: Shape, computed: _Computed, lora: Lora | None, keys: float) -> dict[str, float]:
    """Forward MACs of one token in one layer, by component."""
    sides = _projections(shape, computed)
    if computed.attention_map:
        computed_sides = [shape.sides[name] for name in "qkvo" if sides[name] != (0, 0)]
        attention: float = computed.attention_map * sum(d_out + d_in for d_out, d_in in computed_sides)
    else:
        attention = sum(sides[name][0] * sides[name][1] for name in "qkvo")
    ffn = sum(out * into for name, (out, into) in sides.items() if name not in "qkvo")
    adapted = [sides[name] for name in lora.targets if name in sides] if lora else []
    return {
        "FFN": ffn + computed.ffn_map * 2 * shape.width,
        "attention projections": attention,
        "attention scores": 2 * shape.q_width * keys if computed.query else 0,
        "adapter": sum((out + into) * lora.rank for out, into in adapted if out) if lora else 0,
    }


def estimator_macs(
    shape: Shape, config: SparsityConfig, layer: int, parts: Sequence[Part] = ("ffn", "attention")
) -> int:
    """MACs per considered token of the estimates that choose the channels of a layer; 0 where nothing is estimated.

    Those of a layer are made by the projections into the FFN's hidden layer, and by q, k and v.
    """
    mode = mode_of(config)
    estimated = {"ffn": ("gate", "up") if shape.gated else ("fc1",), "attention": ("q", "k", "v")}
    sides = [shape.sides[name] for part in parts if config.ratio(layer, part) > 0 for name in estimated[part]]
    return sum(mode.choosing_macs(config, d_out, d_in) for d_out, d_in in sides)


def layer_costs(
    shape: Shape, config: SparsityConfig | None, work: Workload, layer: int, lora: Lora | None, *, exact: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Forward MACs of layer ``layer`` by component, per context and per output token."""
    keys = (work.seq + 1) / 2 if shape.decoder else work.seq  # a causal token sees half of the others
    dense = _Computed(shape.ffn_width)
    sparse = _computed(shape, config, layer) if config else dense
    whole = config is None or config.dense_output_tokens
    output = _token(shape, dense if whole else sparse, lora, keys)
    estimate: float = estimator_macs(shape, config, layer) if config else 0
    if exact and shape.decoder and layer == shape.layers - 1:
        # Nothing reads what a context token's FFN would give here, so nothing chooses its channels either.
        sparse = _Computed(0, sparse.attention, 0, sparse.attention_map, query=False)
        estimate = estimator_macs(shape, config, layer, ["attention"]) if config else 0
    if config and config.estimator_tokens and work.context_tokens:
        estimate *= min(1.0, config.estimator_tokens / work.context_tokens)
    context = _token(shape, sparse, lora, keys) | {"estimator": estimate}
    return context, output | {"estimator": 0.0}


# --- the model ----------------------------------------------------------------------------------------------------


def token_costs(
    shape: Shape,
    config: SparsityConfig | None,
    work: Workload,
    lora: Lora | None = None,
    *,
    exact: bool | None = None,
) -> list[Cost]:
    """Cost of a token by component, in the order of `FACTORS`.

    Args:
        config: None is plain PEFT: dense, without the exact savings.
        exact: count the exact savings; by default wherever there is a ``config``.
    Raises:
        InputError: the config names a layer that the model does not have, or a target is unknown to it.
    """
    if config is not None:
        config.check(shape.layers)
    exact = config is not None if exact is None else exact
    for name in lora.targets if lora else ():
        if name not in shape.sides:
            raise InputError(f"unknown target {name!r}; {shape.model_type} has: {' '.join(shape.sides)}")
    share = work.output_share if shape.decoder else 0.0
    layers = [layer_costs(shape, config, work, i, lora, exact=exact) for i in range(shape.layers)]
    attached = config.attached_layers(shape.layers) if config is not None else None
    sampled = config.context_backward_share if config is not None and config.samples_context else 1.0
    costs = []
    for component in FACTORS:
        if component == "head":
            costs.append(_head(shape, work, share, exact))
            continue
        context = sum(by_context[component] for by_context, _ in layers)
        output = sum(by_output[component] for _, by_output in layers)
        attached_context = context
        if component != "attention scores":
            attached_context = sampled * sum(by_context[component] for by_context, _ in layers[:attached])
        backward = (1 - share) * attached_context + share * output
        mean = (1 - share) * context + share * output
        costs.append(Cost(component, context, output, mean, mean + (FACTORS[component] - 1) * backward))
    return costs


def _head(shape: Shape, work: Workload, share: float, exact: bool) -> Cost:
    macs = float(shape.head_macs)
    context, output, mean = (0.0, macs, share * macs) if exact else (macs, macs, macs)
    if not shape.decoder:
        context = output = mean = macs / work.seq
    return Cost("head", context, output, mean, FACTORS["head"] * mean)


def total(costs: Sequence[Cost], *, training: bool = False, components: Sequence[str] = tuple(FACTORS)) -> float:
    """MACs per token on average, forward or of a training step, of ``components``."""
    return sum(cost.training if training else cost.mean for cost in costs if cost.component in components)


# --- one against another ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CostChange:
    """MACs per token of one component, before and after, forward and of a training step."""

    component: str
    before: float
    after: float
    before_training: float
    after_training: float

    @property
    def reduction(self) -> float:
        """1 − after / before; 0 where both are zero, −inf where only ``before`` is."""
        return _reduction(self.before, self.after)

    @property
    def training_reduction(self) -> float:
        return _reduction(self.before_training, self.after_training)


def _reduction(before: float, after: float) -> float:
    if before == 0:
        return 0.0 if after == 0 else float("-inf")
    return 1 - after / before


def compare_costs(before: Sequence[Cost], after: Sequence[Cost]) -> list[CostChange]:
    """A row a component, and their total."""
    rows = [CostChange(b.component, b.mean, a.mean, b.training, a.training) for b, a in zip(before, after, strict=True)]
    sums = (
        sum(getattr(row, name) for row in rows) for name in ("before", "after", "before_training", "after_training")
    )
    return [*rows, CostChange("total", *sums)]


def comparison_table(rows: Sequence[CostChange], unit: str = "MACs") -> list[dict[str, str | float]]:
    """``rows`` as records whose columns name the unit: MACs, or FLOPs (two a MAC)."""
    if unit not in ("MACs", "FLOPs"):
        raise InputError(f"unit must be MACs or FLOPs, got {unit!r}")
    times = 1 if unit == "MACs" else 2
    return [
        {
            "component": row.component,
            f"forward_{unit}_before": times * row.before,
            f"forward_{unit}_after": times * row.after,
            "forward_reduction": row.reduction,
            f"training_{unit}_before": times * row.before_training,
            f"training_{unit}_after": times * row.after_training,
            "training_reduction": row.training_reduction,
        }
        for row in rows
    ]


def format_comparison(rows: Sequence[CostChange], unit: str = "MACs") -> str:
    """A text table of `comparison_table`, per token."""
    head = ["per token", f"forward {unit}", "after", "saved", f"training {unit}", "after", "saved"]
    lines = [head]
    for record in comparison_table(rows, unit):
        values = list(record.values())
        cells = [str(values[0])]
        for i in (1, 4):
            before, after, saved = (float(v) for v in values[i : i + 3])
            cells += [f"{before:,.0f}", f"{after:,.0f}", "new" if saved == float("-inf") else f"{saved:.1%}"]
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    )
