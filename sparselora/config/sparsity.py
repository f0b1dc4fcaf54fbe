"""Settings of contextual sparsity: which channels a training step computes, in which layers, and when."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparselora.config.fields import LARGEST_SEED, Option, build, check_fields, in_file, option, read_yaml, to_yaml_text
from sparselora.errors import InputError, shown

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

COMPENSATIONS = ("none", "mean")

_LAYER_KEY = re.compile(r"layer\.(\d+)(?:-(\d+))?(?:\.(ffn|attention))?")
_SPARSITY = Option(float, "", low=0, high=1, below=True)


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


def _check_sparsity(name: str, value: Any) -> float:
    if value == 1 and not isinstance(value, bool):
        raise InputError(f"{name} must be {_SPARSITY.accepts()}, got {shown(value)}; to compute no FFN use mode: skip")
    return float(_SPARSITY.check(name, value))


@dataclass(frozen=True)
class SparsityConfig:
    """Channels that a training step computes, by layer, and the steps that are sparse.

    Sparsity is the fraction of channels dropped, in [0, 1). ``ffn_sparsity`` and ``attention_sparsity`` hold for the
    layers that ``layer_sparsity`` does not name. Its keys are ``layer.3`` or ``layer.3-30`` (both ends included),
    followed by ``.attention`` or ``.ffn`` (without: the FFN); a single layer wins over a range, two ranges that overlap
    are an error. With modes ``skip`` and ``surrogate`` an FFN is replaced where its sparsity is above 0; with
    ``dense`` every sparsity reads as 0.

    Raises:
        InputError: a value of another type or outside its range, settings that contradict one another.
    """

    mode: str = option("svd", str, "choice of channels", choices=tuple(MODES))
    svd_rank: int = option(8, int, "rank of the estimator (mode svd)", low=1)
    estimator_tokens: int = option(512, int, "context tokens used to choose channels, evenly spaced; 0: all", low=0)
    ffn_sparsity: float = option(0.0, float, "share of FFN channels dropped", low=0)
    attention_sparsity: float = option(0.0, float, "share of attention channels dropped", low=0)
    layer_sparsity: Mapping[str, float] = field(default_factory=dict)
    sparse_warmup_ratio: float = option(0.0, float, "share of the steps that is dense at the start", low=0, high=1)
    sparse_warmup_steps: int | None = option(None, int, "dense steps at the start", low=0, optional=True)
    sparse_end_ratio: float = option(1.0, float, "share of the steps after which steps are dense again", low=0, high=1)
    sparse_end_step: int | None = option(None, int, "first step that is dense again", low=0, optional=True)
    compensate: str = option("none", str, "contribution of dropped FFN channels", choices=COMPENSATIONS)
    surrogate_rank: int = option(64, int, "rank of the affine map of mode surrogate", low=1)
    surrogate_channels: int = option(0, int, "calibrated FFN channels kept in addition to the map", low=0)
    surrogate_refresh_steps: int = option(0, int, "steps between two fits of the map; 0: fit once", low=0)
    calibration_samples: int = option(256, int, "training samples to calibrate on", low=1)
    dense_output_tokens: bool = option(True, bool, "compute every channel for tokens whose next token is labelled")
    sparse_eval: bool = option(False, bool, "evaluate with sparsity, too")
    seed: int | None = option(
        None, int, "seed of random channels and of the calibration samples (default: the run's)", low=0,
        high=LARGEST_SEED, optional=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("ffn_sparsity", "attention_sparsity"):
            _check_sparsity(name, getattr(self, name))
        check_fields(self)
        if not isinstance(self.layer_sparsity, Mapping):
            raise InputError(f"layer_sparsity must be a mapping of layers to numbers, got {shown(self.layer_sparsity)}")
        ranges = [_parse_layer_key(key) for key in self.layer_sparsity]
        values = {k: _check_sparsity(f"layer_sparsity of {k}", v) for k, v in self.layer_sparsity.items()}
        object.__setattr__(self, "layer_sparsity", values)
        self._check_overlap(ranges)
        self._check_schedule()
        if not self.facts.has_attention and (self.attention_sparsity > 0 or self._largest("attention") > 0):
            raise InputError(
                f"mode {self.mode} leaves out FFNs only; set attention_sparsity and every .attention layer to 0"
            )

    def _check_overlap(self, ranges: list[_LayerRange]) -> None:
        for i, later in enumerate(ranges):
            for earlier in ranges[:i]:
                overlap = later.first <= earlier.last and earlier.first <= later.last
                if overlap and later.part == earlier.part and later.single == earlier.single:
                    raise InputError(
                        f"layer_sparsity keys {earlier.key!r} and {later.key!r} both name the {later.part} of layer "
                        f"{max(later.first, earlier.first)}; give each layer once (a single layer wins over a range)"
                    )

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
    def from_dict(cls, values: Mapping[str, Any]) -> SparsityConfig:
        """From a mapping as `to_dict` gives it; what is left out has its default. Strict: see the module."""
        return build(cls, values, "the sparsity settings")

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

    def to_dict(self) -> dict[str, Any]:
        """Return every setting, in plain types."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"layer_sparsity": dict(self.layer_sparsity)}

    def to_yaml(self) -> str:
        """As `from_yaml` reads it."""
        return to_yaml_text(self.to_dict())


def get_layer_sparsity_ratio(config: SparsityConfig, layer: int, part: Part = "ffn") -> float:
    """The sparsity that ``config`` gives to ``part`` (``ffn`` or ``attention``) of layer ``layer``, counted from 0."""
    return config.ratio(layer, part)
