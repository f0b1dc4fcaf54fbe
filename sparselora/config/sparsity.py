"""Settings of contextual sparsity: which channels a training step computes, in which layers, and when."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sparselora.config import LARGEST_SEED
from sparselora.config.fields import Settings
from sparselora.config.yaml_text import read_yaml
from sparselora.errors import InputError, shown
from sparselora.runs.user_files import in_file

Part = Literal["ffn", "attention"]


@dataclass(frozen=True)
class ModeFacts:
    """The facts of a mode that its settings need, without torch; `sparselora.contextual.modes` has its class.

    Attributes:
        help: one line for ``--help`` and the documentation.
        is_sparse: sparsities apply; otherwise each reads as 0.
        needs_calibration: training samples must be seen before the first sparse step, whatever the compensation.
        has_attention: attention can be sparse too, and not the FFN alone.
    """

    help: str
    is_sparse: bool = True
    needs_calibration: bool = False
    has_attention: bool = True


MODES = {
    "dense": ModeFacts("every channel, with the exact savings", is_sparse=False),
    "svd": ModeFacts(
        "the channels that a low-rank estimate of the activations ranks first, chosen every step (the published "
        "method; on a pretrained 0.5B model worse than static)"
    ),
    "oracle": ModeFacts("the channels that contribute most to the output (costs more than dense: a reference)"),
    "oracle_activation": ModeFacts("the channels with the largest true activations (as oracle: a reference)"),
    "random": ModeFacts("channels drawn again in every step (a control)"),
    "random_fixed": ModeFacts("channels drawn once by the seed (the control of static)"),
    "static": ModeFacts("channels calibrated once on training data (the first to try)", needs_calibration=True),
    "surrogate": ModeFacts(
        "a calibrated affine map of low rank in place of the layer (not recommended: on a pretrained 0.5B model worse "
        "than no FFN at all)",
        needs_calibration=True,
    ),
    "skip": ModeFacts("no FFN at all (a control)", has_attention=False),
}
"""Mode by its name, in the order of ``--help``."""

if TYPE_CHECKING:
    ModeName = str
else:
    ModeName = Literal[tuple(MODES)]  # the registry above has the names, and a type checker reads no registry

PRECISIONS = {
    "native": "with the weights as they are, in the dtype of the pass",
    "fp8": "e4m3 with a scale for each row, by the tensor cores of a GPU of compute capability 8.9 or more",
    "fp8_emulated": "the rounding of fp8 in plain torch on any device, slower than native (to try the quality)",
}
"""Precision of frozen products by its name, in the order of ``--help``."""

if TYPE_CHECKING:
    PrecisionName = str
else:
    PrecisionName = Literal[tuple(PRECISIONS)]

_LAYER_KEY = re.compile(r"layer\.(\d+)(?:-(\d+))?(?:\.(ffn|attention))?")


def _refuse_one(value: Any) -> Any:
    if value == 1 and not isinstance(value, bool):
        raise PydanticCustomError("remedy", "to compute no FFN use mode: skip")
    return value


Sparsity = Annotated[float, BeforeValidator(_refuse_one), Field(ge=0, lt=1)]
"""Fraction of channels dropped."""


@dataclass(frozen=True)
class _LayerRange:
    """Layers ``first`` to ``last``, both included, and their part that a key of ``layer_sparsity`` names."""

    key: str
    first: int
    last: int
    part: str

    @property
    def single(self) -> bool:
        return "-" not in self.key


def _parse_layer_key(key: Any) -> _LayerRange:
    match = _LAYER_KEY.fullmatch(key) if isinstance(key, str) else None
    if match is None:
        raise InputError(
            f"layer_sparsity has the key {shown(key)}; write layer.3, layer.3-30, layer.3.attention or layer.3-30.ffn"
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise InputError(f"layer_sparsity key {shown(key)} ends before it begins; write layer.{last}-{first}")
    return _LayerRange(key, first, last, match[3] or "ffn")


@functools.cache
def _ranges(keys: tuple[str, ...]) -> tuple[_LayerRange, ...]:
    """Return what ``keys`` of ``layer_sparsity`` name, single layers first: they win over ranges."""
    return tuple(sorted(map(_parse_layer_key, keys), key=lambda layers: not layers.single))


def _check_overlap(ranges: list[_LayerRange]) -> None:
    for i, later in enumerate(ranges):
        for earlier in ranges[:i]:
            overlap = later.first <= earlier.last and earlier.first <= later.last
            if overlap and later.part == earlier.part and later.single == earlier.single:
                raise InputError(
                    f"layer_sparsity keys {earlier.key!r} and {later.key!r} both name the {later.part} of layer "
                    f"{max(later.first, earlier.first)}; give each layer once (a single layer wins over a range)"
                )


class SparsityConfig(Settings):
    """Channels that a training step computes, by layer, and the steps that are sparse.

    Sparsity is the fraction of channels dropped, in [0, 1). ``ffn_sparsity`` and ``attention_sparsity`` hold for the
    layers that ``layer_sparsity`` does not name. Its keys are ``layer.3`` or ``layer.3-30`` (both ends included),
    followed by ``.attention`` or ``.ffn`` (without: the FFN); a single layer wins over a range, two ranges that overlap
    are an error. With modes ``skip`` and ``surrogate`` an FFN is replaced where its sparsity is above 0; with
    ``dense`` every sparsity reads as 0.

    Raises:
        InputError: a value of another type or outside its range, settings that contradict one another.
    """

    title: ClassVar[str] = "the sparsity settings"

    mode: ModeName = Field("svd", description="choice of channels")
    svd_rank: int = Field(8, ge=1, description="rank of the estimator (mode svd)")
    estimator_tokens: int = Field(
        512, ge=0, description="context tokens used to choose channels, evenly spaced; 0: all"
    )
    ffn_sparsity: Sparsity = Field(0.0, description="share of FFN channels dropped")
    attention_sparsity: Sparsity = Field(0.0, description="share of attention channels dropped")
    layer_sparsity: Mapping[str, Sparsity] = Field(default_factory=dict)
    sparse_warmup_ratio: float = Field(0.0, ge=0, le=1, description="share of the steps that is dense at the start")
    sparse_warmup_steps: int | None = Field(None, ge=0, description="dense steps at the start")
    sparse_end_ratio: float = Field(1.0, ge=0, le=1, description="share of the steps after which steps are dense again")
    sparse_end_step: int | None = Field(None, ge=0, description="first step that is dense again")
    compensate: Literal["none", "mean"] = Field("none", description="contribution of dropped FFN channels")
    surrogate_rank: int = Field(64, ge=1, description="rank of the affine map of mode surrogate")
    surrogate_channels: int = Field(0, ge=0, description="calibrated FFN channels kept in addition to the map")
    surrogate_refresh_steps: int = Field(0, ge=0, description="steps between two fits of the map; 0: fit once")
    calibration_samples: int = Field(256, ge=1, description="training samples to calibrate on")
    context_backward: Literal["full", "none", "upper", "sampled"] = Field(
        "full",
        description="context tokens with a backward pass: in every layer, in none, in all but the upper layers, in "
        "every layer for a random sample of the sequences, weighted so that the gradient stays unbiased",
    )
    context_backward_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share that keeps it: of the layers, from the first (context_backward upper), or of the sequences "
        "(sampled)",
    )
    frozen_precision: PrecisionName = Field("native", description="precision of products with frozen weights")
    dense_output_tokens: bool = Field(True, description="compute every channel for tokens whose next token is labelled")
    sparse_eval: bool = Field(False, description="evaluate with sparsity, too")
    seed: int | None = Field(
        None,
        ge=0,
        le=LARGEST_SEED,
        description="seed of random channels and of the calibration samples (default: the run's)",
    )

    @field_validator("layer_sparsity", mode="before")
    @classmethod
    def _check_keys(cls, layers: Any) -> Any:
        if isinstance(layers, Mapping):
            _check_overlap([_parse_layer_key(key) for key in layers])
        return layers

    @model_validator(mode="after")
    def _check_together(self) -> SparsityConfig:
        self._check_schedule()
        if not self.facts.has_attention and (self.attention_sparsity > 0 or self._largest("attention") > 0):
            raise InputError(
                f"mode {self.mode} leaves out FFNs only; set attention_sparsity and every .attention layer to 0"
            )
        if self.samples_context and self.context_backward_share == 0:
            raise InputError(
                "context_backward sampled needs a context_backward_share above 0; to keep no backward pass use "
                "context_backward none"
            )
        return self

    def _check_schedule(self) -> None:
        if self.sparse_warmup_steps is not None and self.sparse_warmup_ratio > 0:
            raise InputError("sparse_warmup_ratio and sparse_warmup_steps are both given; give one")
        if self.sparse_end_step is not None and self.sparse_end_ratio < 1:
            raise InputError("sparse_end_ratio and sparse_end_step are both given; give one")
        for first, last in (("sparse_warmup_ratio", "sparse_end_ratio"), ("sparse_warmup_steps", "sparse_end_step")):
            begin, end = getattr(self, first), getattr(self, last)
            if begin is not None and end is not None and begin >= end and (begin, end) != (1.0, 1.0):
                raise InputError(f"{first} {begin:g} is not below {last} {end:g}, so no step would be sparse")

    def _largest(self, part: str) -> float:
        return max((self.layer_sparsity[r.key] for r in self._layer_ranges() if r.part == part), default=0.0)

    def _layer_ranges(self) -> tuple[_LayerRange, ...]:
        return _ranges(tuple(self.layer_sparsity))

    # --- what it says ---

    @property
    def facts(self) -> ModeFacts:
        """Return the facts of the mode."""
        return MODES[self.mode]

    @property
    def is_sparse(self) -> bool:
        """Return whether the mode leaves anything out, given a sparsity above 0."""
        return self.facts.is_sparse

    @property
    def cuts_context(self) -> bool:
        """Return whether context tokens have no backward pass, in some layers or all."""
        return self.context_backward != "full"

    @property
    def samples_context(self) -> bool:
        """Return whether the context of a random sample of the sequences has a backward pass."""
        return self.context_backward == "sampled"

    @property
    def is_quantised(self) -> bool:
        """Return whether products with frozen weights are formed from copies of them in 8 bits."""
        return self.frozen_precision != "native"

    @property
    def is_exact(self) -> bool:
        """Return whether a training step computes the loss and the gradients of the plain one, up to its rounding."""
        return not (self.is_sparse or self.changes_every_step)

    @property
    def changes_every_step(self) -> bool:
        """Return whether training steps differ from the plain one by more than sparsity, which follows a schedule."""
        return self.cuts_context or self.is_quantised

    def ratio(self, layer: int, part: Part = "ffn") -> float:
        """Return the sparsity of ``part`` of layer ``layer`` (counted from 0); 0 in mode dense.

        Raises:
            InputError: ``part`` is neither ``ffn`` nor ``attention``.
        """
        if part not in ("ffn", "attention"):
            raise InputError(f"part must be ffn or attention, got {part!r}")
        if not self.is_sparse:
            return 0.0
        for layers in self._layer_ranges():
            if layers.part == part and layers.first <= layer <= layers.last:
                return self.layer_sparsity[layers.key]
        return self.ffn_sparsity if part == "ffn" else self.attention_sparsity

    def attached_layers(self, num_layers: int) -> int | None:
        """Return the number of layers, from the first, in which the context has a backward pass; None for all."""
        if self.context_backward in ("full", "sampled"):
            return None
        return 0 if self.context_backward == "none" else math.ceil(self.context_backward_share * num_layers)

    def check(self, num_layers: int) -> None:
        """Raise an `InputError` where ``layer_sparsity`` names a layer that a model of ``num_layers`` does not have."""
        for layers in self._layer_ranges():
            if layers.last >= num_layers:
                raise InputError(
                    f"layer_sparsity key {layers.key!r} names layer {layers.last}, but the model has {num_layers} "
                    f"layers, 0 to {num_layers - 1}"
                )

    @property
    def needs_calibration(self) -> bool:
        """Return whether training samples must be seen before the first sparse step."""
        return self.facts.needs_calibration or (self.compensate == "mean" and self.is_sparse)

    @property
    def drawing_seed(self) -> int:
        """Return the seed that draws follow: 0 where none is set and no run gives its own."""
        return 0 if self.seed is None else self.seed

    def first_sparse_step(self, total_steps: int) -> int:
        """Return the number of dense steps at the start; a share of ``total_steps`` is rounded up."""
        if self.sparse_warmup_steps is not None:
            return self.sparse_warmup_steps
        return math.ceil(self.sparse_warmup_ratio * total_steps - 1e-9)

    def active(self, step: int, total_steps: int) -> bool:
        """Return whether step ``step`` (counted from 0) of ``total_steps`` is sparse."""
        if step < self.first_sparse_step(total_steps):
            return False
        if self.sparse_end_step is not None:
            return step < self.sparse_end_step
        return self.sparse_end_ratio == 1 or step < math.ceil(self.sparse_end_ratio * total_steps - 1e-9)

    # --- in and out ---

    @classmethod
    def from_yaml(cls, path: str | Path) -> SparsityConfig:
        """From a YAML file: these settings alone, or a training configuration, of which only ``sparsity`` is read.

        A training configuration whose ``sparsity`` is null gives mode dense. `sparselora.config.train.read_sparsity`
        checks the other settings too.
        """
        values = read_yaml(path)
        with in_file(path):
            if "sparsity" not in values:
                return cls.from_dict(values)
            section = values["sparsity"]
            return cls(mode="dense") if section is None else cls.from_dict(section)


def get_layer_sparsity_ratio(config: SparsityConfig, layer: int, part: Part = "ffn") -> float:
    """The sparsity that ``config`` gives to ``part`` (``ffn`` or ``attention``) of layer ``layer``, counted from 0."""
    return config.ratio(layer, part)
