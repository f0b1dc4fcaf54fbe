"""The sparsity modes: one class each, with all that the rest of the package asks about a mode.

A mode says what stands, for the sparse tokens of one layer, in place of the whole layer: channels chosen by scores in
every step, channels fixed by calibration, an affine map, or nothing. It also says what that costs, what calibration has
to measure, and what it is compared with. `MODES` is the registry; nothing outside this module compares a mode's name.
Names, help lines and the facts that settings need are in `sparselora.config.sparsity.MODES`.

A new mode is a class here, its line there, and a row in the table of masked references in `tests/contextual`.

Costs are counted without torch, so torch and what imports it are imported inside the functions that compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparselora.config.sparsity import Part, SparsityConfig
from sparselora.numerics.channels import keep_count

if TYPE_CHECKING:
    import torch

    from sparselora.contextual.block_linears import BlockLinears
    from sparselora.contextual.choices import Choice
    from sparselora.contextual.estimator import AttentionEstimator, FFNEstimator
    from sparselora.contextual.step import Step
    from sparselora.contextual.surrogate import AffineMap

    Tensor = torch.Tensor
    Moments = Mapping[str, Tensor]
    """Measurements of one layer on calibration tokens, by name; see `sparselora.contextual.statistics`."""


class Mode:
    """A way in which one layer of a model is sparse.

    Class attributes:
        replaces_layer: the layer is replaced or not, so all sparsities above 0 are the same; an encoder's replaced
            layer leaves its adapter without a gradient.
        computes_nothing: no frozen product is left of a sparse FFN: no mode does less work.
        is_capturable: a pass with dense output tokens may be captured as a CUDA graph: its choices follow from the
            weights and the batch alone, and need no decision of the host.
        fits_maps: calibration fits affine maps, so it measures pairs of inputs and outputs.
        control: mode that computes as many channels without choosing them, to time this one against; None where
            choosing costs nothing in a step.

    Attributes:
        linears: the layer's linear layers.
        sparsity: of each part, 0 where it is dense.
        fixed: choices that hold for every step, by part.
        mean: mean activation of each FFN channel ``(d_ffn,)``, where dropped channels are compensated; else None.
        mean_output: the second projection of ``mean`` ``(d,)``.
    """

    replaces_layer: ClassVar[bool] = False
    computes_nothing: ClassVar[bool] = False
    is_capturable: ClassVar[bool] = True
    fits_maps: ClassVar[bool] = False
    control: ClassVar[str | None] = None

    def __init__(self, linears: BlockLinears, config: SparsityConfig) -> None:
        self.linears = linears
        self.config = config
        index = linears.block.index
        self.sparsity: dict[Part, float] = {part: config.ratio(index, part) for part in ("ffn", "attention")}
        self.fixed: dict[str, Choice] = {}
        self.mean: Tensor | None = None
        self.mean_output: Tensor | None = None

    # --- before the first step ---

    def attach(self, cache_dir: str | Path | None, attached: Mode | None = None) -> None:
        """Prepare what needs no data: estimators from weights, or a fixed choice.

        Args:
            cache_dir: folder of estimators kept between runs; None for the user's.
            attached: the same mode of the same layer at other sparsities; its estimators serve here too.
        """

    def fix(self, moments: Moments, dtype: torch.dtype) -> None:
        """Fix choices by what calibration has measured; ``dtype`` is that of the weights."""

    # --- in every step ---

    def ffn_scores(self, x: Tensor, step: Step, unmasked: Tensor | None) -> Tensor:
        """Return a score of each FFN channel ``(d_ffn,)`` for tokens ``x (t, d)``, the FFN's input.

        Args:
            unmasked: indices of the rows of ``x`` that count; None for all.
        """
        raise NotImplementedError(f"{type(self).__name__} fixes its choice before the first step")

    def attention_scores(self, x: Tensor, step: Step, unmasked: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return scores of the kv channels of q and k, and of v, each ``(kv_heads·head_dim,)``; as `ffn_scores`."""
        raise NotImplementedError(f"{type(self).__name__} fixes its choice before the first step")

    def compensation(self, channels: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return the mean contribution ``(d,)`` of the FFN channels other than ``channels``; None without."""
        if self.mean is None:
            return None
        assert self.mean_output is not None
        total = self.mean_output
        if channels is not None:
            total = total - self.linears.down.columns(channels, self.mean.dtype) @ self.mean.index_select(0, channels)
        return total.to(dtype)

    # --- costs ---

    @classmethod
    def ffn_channels(cls, config: SparsityConfig, width: int, sparsity: float) -> int:
        """Return how many of ``width`` FFN channels a sparse token computes at ``sparsity`` above 0."""
        return keep_count(width, 1 - sparsity)

    @classmethod
    def map_rank(cls, config: SparsityConfig) -> int:
        """Return the rank of the affine map that a sparse part computes; 0 without a map."""
        return 0

    @classmethod
    def choosing_macs(cls, config: SparsityConfig, d_out: int, d_in: int) -> int:
        """Return the MACs of choosing by one projection ``(d_out, d_in)``, per token that is looked at."""
        return 0


class Dense(Mode):
    """Every channel; `SparsityConfig.ratio` gives it the sparsity 0 everywhere."""


class Svd(Mode):
    """The channels with the largest activations, by rank-k estimates of the first projections."""

    control = "random"

    def __init__(self, linears: BlockLinears, config: SparsityConfig) -> None:
        super().__init__(linears, config)
        self.ffn_estimator: FFNEstimator | None = None
        self.attention_estimator: AttentionEstimator | None = None

    def attach(self, cache_dir: str | Path | None, attached: Mode | None = None) -> None:
        from sparselora.contextual.estimator import build_attention_estimators, build_ffn_estimators

        rank = self.config.svd_rank
        if isinstance(attached, Svd) and attached.config.svd_rank == rank:
            self.ffn_estimator, self.attention_estimator = attached.ffn_estimator, attached.attention_estimator
        if self.sparsity["ffn"] and self.ffn_estimator is None:
            (self.ffn_estimator,) = build_ffn_estimators([self.linears.ffn_weights()], rank, cache_dir).values()
        if self.sparsity["attention"] and self.attention_estimator is None:
            weights = [self.linears.attention_weights()]
            (self.attention_estimator,) = build_attention_estimators(weights, rank, cache_dir).values()

    def ffn_scores(self, x: Tensor, step: Step, unmasked: Tensor | None) -> Tensor:
        assert self.ffn_estimator is not None
        return self.ffn_estimator.scores(step.sampled(x, unmasked, self.config.estimator_tokens))

    def attention_scores(self, x: Tensor, step: Step, unmasked: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self.attention_estimator is not None
        return self.attention_estimator.scores(step.sampled(x, unmasked, self.config.estimator_tokens))

    @classmethod
    def choosing_macs(cls, config: SparsityConfig, d_out: int, d_in: int) -> int:
        return config.svd_rank * (d_out + d_in)


class OracleActivation(Mode):
    """The channels with the largest true activations: what the estimates of mode ``svd`` are estimates of."""

    is_capturable = False
    control = "random"

    def ffn_scores(self, x: Tensor, step: Step, unmasked: Tensor | None) -> Tensor:
        from sparselora.contextual.estimator import oracle_ffn_scores

        x = x if unmasked is None else x.index_select(0, unmasked)
        up, gate = self.linears.up, self.linears.gate
        return oracle_ffn_scores(
            x,
            up.effective(x.dtype),
            None if gate is None else gate.effective(x.dtype),
            act=self.linears.block.ffn.act,
            up_bias=up.bias(x.dtype),
            gate_bias=None if gate is None else gate.bias(x.dtype),
        )

    def attention_scores(self, x: Tensor, step: Step, unmasked: Tensor | None) -> tuple[Tensor, Tensor]:
        from torch.nn.functional import linear

        from sparselora.contextual.choices import fused_sizes
        from sparselora.contextual.estimator import oracle_attention_scores

        x = x if unmasked is None else x.index_select(0, unmasked)
        heads = self.linears.block.attention
        layers = [self.linears.attention[part] for part in (["q"] if heads.fused else list("qkv"))]
        outputs = [linear(x, layer.effective(x.dtype), layer.bias(x.dtype)) for layer in layers]
        if heads.fused:
            outputs = list(outputs[0].split(fused_sizes(heads), dim=1))
        q, k, v = outputs
        return oracle_attention_scores(
            q, k, v, heads=heads.heads, kv_heads=heads.kv_heads, head_dim=heads.head_dim, rope=heads.rope
        )

    @classmethod
    def choosing_macs(cls, config: SparsityConfig, d_out: int, d_in: int) -> int:
        return d_out * d_in


class Oracle(OracleActivation):
    """The channels with the largest true contributions: the bound that every choice of channels is compared with.

    An FFN channel c contributes h_c·W_down[:, c] to the output, so its score is ‖h_c‖·‖W_down[:, c]‖ over the sparse
    tokens of the step. Attention channels are scored as in `OracleActivation`.
    """

    def ffn_scores(self, x: Tensor, step: Step, unmasked: Tensor | None) -> Tensor:
        import torch

        scores = super().ffn_scores(x, step, unmasked)
        return scores * torch.linalg.vector_norm(self.linears.down.effective(scores.dtype), dim=0)


class Random(Mode):
    """Channels drawn again in every step: the control of what is chosen in every step, and a kind of dropout."""

    is_capturable = False

    def ffn_scores(self, x: Tensor, step: Step, unmasked: Tensor | None) -> Tensor:
        return self._draw(self.linears.device, self.linears.ffn_width, step, 0)

    def attention_scores(self, x: Tensor, step: Step, unmasked: Tensor | None) -> tuple[Tensor, Tensor]:
        width = self.linears.block.attention.kv_width
        return self._draw(x.device, width, step, 1), self._draw(x.device, width, step, 2)

    def _draw(self, device: torch.device, n: int, step: Step, stream: int) -> Tensor:
        """Draw ``n`` uniform numbers by seed, step, layer and stream alone, so that a resumed run repeats them."""
        import torch

        generator = torch.Generator(device=device)
        generator.manual_seed((step.seed * 1_000_003 + self.linears.block.index * 4 + stream) % (1 << 62))
        return torch.rand(n, generator=generator, device=device)


class RandomFixed(Mode):
    """Channels drawn once, by seed and layer alone, and the same in every step: the control of ``static``."""

    def attach(self, cache_dir: str | Path | None, attached: Mode | None = None) -> None:
        self._draw(None)

    def fix(self, moments: Moments, dtype: torch.dtype) -> None:
        self._draw(dtype)  # the same channels, now with the mean of those that are dropped

    def _draw(self, dtype: torch.dtype | None) -> None:
        """Fix the choice; ``dtype`` is that of the weights, None before calibration."""
        import torch

        from sparselora.contextual.choices import FFNChoice, attention_choice
        from sparselora.contextual.selection import select_ffn_channels

        def scores(n: int, stream: int) -> Tensor:
            # On the CPU, so that a run on another device has the same channels.
            generator = torch.Generator()
            generator.manual_seed(
                (self.config.drawing_seed * 1_000_003 + self.linears.block.index * 4 + stream) % (1 << 62)
            )
            return torch.rand(n, generator=generator).to(self.linears.device)

        if self.sparsity["ffn"]:
            channels = select_ffn_channels(scores(self.linears.ffn_width, 0), self.sparsity["ffn"])
            self.fixed["ffn"] = FFNChoice(channels, None if dtype is None else self.compensation(channels, dtype))
        if self.sparsity["attention"]:
            heads = self.linears.block.attention
            qk, v = scores(heads.kv_width, 1), scores(heads.kv_width, 2)
            self.fixed["attention"] = attention_choice(heads, qk, v, self.sparsity["attention"])


class Static(Mode):
    """The channels with the largest activations on calibration data, the same in every step."""

    def fix(self, moments: Moments, dtype: torch.dtype) -> None:
        from sparselora.contextual.choices import FFNChoice, attention_choice
        from sparselora.contextual.selection import select_ffn_channels

        if self.sparsity["ffn"]:
            channels = select_ffn_channels(moments["norms"], self.sparsity["ffn"])
            self.fixed["ffn"] = FFNChoice(channels, self.compensation(channels, dtype))
        if self.sparsity["attention"]:
            heads = self.linears.block.attention
            self.fixed["attention"] = attention_choice(heads, moments["qk"], moments["v"], self.sparsity["attention"])


class Surrogate(Mode):
    """A calibrated affine map of low rank, for an FFN with the most active channels next to it if so configured."""

    replaces_layer = True
    fits_maps = True

    def fix(self, moments: Moments, dtype: torch.dtype) -> None:
        from sparselora.contextual.choices import AttentionChoice, FFNChoice
        from sparselora.contextual.selection import largest_channels

        def fitted(part: str) -> AffineMap:
            from sparselora.contextual.surrogate import AffineMap

            tensors = {name: moments[f"{part}.{name}"] for name in ("down", "up", "bias")}
            return AffineMap.from_tensors(tensors).to(dtype=dtype)

        if self.sparsity["ffn"]:
            count = self.config.surrogate_channels
            channels = largest_channels(moments["norms"], count) if count else None
            self.fixed["ffn"] = FFNChoice(channels, None, fitted("ffn"))
        if self.sparsity["attention"]:
            heads = self.linears.block.attention
            parts = ("q", "q", "q", "o") if heads.fused else ("q", "k", "v", "o")
            self.fixed["attention"] = AttentionChoice(heads, maps=tuple(fitted(part) for part in parts))

    @classmethod
    def ffn_channels(cls, config: SparsityConfig, width: int, sparsity: float) -> int:
        return min(config.surrogate_channels, width)

    @classmethod
    def map_rank(cls, config: SparsityConfig) -> int:
        return config.surrogate_rank


class Skip(Mode):
    """No FFN at all, or its mean output alone: the control of every approximation of an FFN."""

    replaces_layer = True
    computes_nothing = True

    def attach(self, cache_dir: str | Path | None, attached: Mode | None = None) -> None:
        from sparselora.contextual.choices import FFNChoice

        self.fixed["ffn"] = FFNChoice()

    def fix(self, moments: Moments, dtype: torch.dtype) -> None:
        from sparselora.contextual.choices import FFNChoice
        from sparselora.contextual.surrogate import AffineMap

        if self.mean_output is None:
            return
        mean, bias = self.mean_output.to(dtype), self.linears.down.bias(dtype)
        d_in = self.linears.up.stored().shape[1]
        down, up = mean.new_zeros(0, d_in), mean.new_zeros(len(mean), 0)
        self.fixed["ffn"] = FFNChoice(map=AffineMap(down, up, mean if bias is None else mean + bias))

    @classmethod
    def ffn_channels(cls, config: SparsityConfig, width: int, sparsity: float) -> int:
        return 0


MODES: dict[str, type[Mode]] = {
    "dense": Dense,
    "svd": Svd,
    "oracle": Oracle,
    "oracle_activation": OracleActivation,
    "random": Random,
    "random_fixed": RandomFixed,
    "static": Static,
    "surrogate": Surrogate,
    "skip": Skip,
}
"""Mode by its name in a `SparsityConfig`."""


def mode_of(config: SparsityConfig) -> type[Mode]:
    """Return the class of a configuration's mode."""
    return MODES[config.mode]


def selects_channels(config: SparsityConfig) -> bool:
    """Return whether a layer's sparsity says how many of its channels are computed."""
    return config.is_sparse and not mode_of(config).replaces_layer
