"""The measurements of a bench as frozen requests: multiplications, step times and their parts, quality of estimates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselora.bench.payoff import with_sparsity
from sparselora.bench.rivals import RIVALS
from sparselora.bench.rivals.jobs import CASE_NAMES, Case, cases
from sparselora.bench.rivals.processes import LIMIT_S
from sparselora.bench.setup import Setup, SetupRequest, check_tokens, resolve
from sparselora.config.sparsity import SparsityConfig
from sparselora.config.train import TrainConfig, read_sparsity
from sparselora.contextual.modes import selects_channels
from sparselora.errors import InputError, shown, suggest


@dataclass(frozen=True)
class FlopsRequest:
    """Count the multiplications of two configurations.

    Attributes:
        before: configuration to compare with; None: PEFT as it is, without the exact savings.
        after: configuration of interest.
        labels: names of the two.
        unit: ``MACs`` or ``FLOPs``.
    """

    setup: Setup
    before: SparsityConfig | None
    after: SparsityConfig
    labels: tuple[str, str]
    unit: str

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], setup: Setup) -> FlopsRequest:
        """Check and freeze parsed arguments.

        Raises:
            InputError: no sparsity settings, or a configuration to compare with that cannot be read.
        """
        after, against = _sparsity(setup), arguments["against"]
        names = {"dense": SparsityConfig(mode="dense"), "peft": None}
        before = names[against] if against in names else read_sparsity(against)
        if before is not None:
            before.check(setup.shape.layers)
        labels = (Path(against).stem, Path(arguments["sparsity"] or after.mode).stem)
        return cls(setup, before, after, labels, arguments["unit"])

    @property
    def outputs(self) -> tuple[str, ...]:
        return "run.json", "flops.csv", "flops_per_layer.csv", "flops.png"


@dataclass(frozen=True)
class TimesRequest:
    """Time whole training steps of several variants.

    Attributes:
        rounds: timed steps of each variant.
        warmup: untimed steps of each variant before them.
        combinations: time fp8 and no context backward too, alone and together, dense and sparse.
        rivals: other trainers to time, by their names in `sparselora.bench.rivals.RIVALS`.
        cases: batches to compare with them on; none without rivals.
        rival_limit_s: seconds that each rival may take.
        sweeps: values by what is varied: ``sparsity``, ``seq`` (tokens of a row) or ``batch`` (rows).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:n``.
        dtype: ``auto``, ``fp32`` or ``bf16``.
        seed: of the adapter, the random weights and the batches.
    """

    setup: Setup
    rounds: int
    warmup: int
    combinations: bool
    rivals: tuple[str, ...]
    cases: tuple[Case, ...]
    rival_limit_s: float
    sweeps: Mapping[str, tuple[float, ...]]
    device: str
    dtype: str
    seed: int

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], setup: Setup) -> TimesRequest:
        """Check and freeze parsed arguments.

        Raises:
            InputError: a value out of range, or a batch that the model or the device has no room for.
        """
        rounds, warmup = _rounds(arguments)
        swept: dict[str, Any] = {"seq": arguments["seqs"], "batch": arguments["batches"]}
        if setup.config is not None and selects_channels(setup.config):  # other modes are the same at all sparsities
            swept = {"sparsity": arguments["sparsities"]} | swept
            for value in arguments["sparsities"]:
                with_sparsity(setup.config, setup.shape.layers, value)
        for flag, other in (("seqs", "train_bsz"), ("batches", "seq")):
            for value in arguments[flag] or ():
                if value < 1:
                    raise InputError(f"--{flag} must be at least 1, got {value}")
                check_tokens(value, arguments[other])
        sweeps = {name: tuple(sorted(set(values))) for name, values in swept.items() if values}
        device, dtype, seed = (arguments[name] for name in ("device", "dtype", "seed"))
        rivals = _rivals(arguments["against"], setup)
        compared, limit_s = _comparison(arguments, setup) if rivals else ((), LIMIT_S)
        combined = arguments["combinations"]
        return cls(setup, rounds, warmup, combined, rivals, compared, limit_s, sweeps, device, dtype, seed)

    @property
    def outputs(self) -> tuple[str, ...]:
        names = ("steps", *(f"by_{name}" for name in self.sweeps))
        tables = ("every_step.csv", "against.csv") if self.rivals else ("every_step.csv",)
        return "run.json", *tables, *(f"{name}.{end}" for name in names for end in ("csv", "png"))


@dataclass(frozen=True)
class ExplainRequest:
    """Profile whole training steps, part by part.

    Attributes:
        rounds: profiled steps of each variant.
        warmup: steps of each variant before them.
        device, dtype, seed: as in `TimesRequest`.
    """

    setup: Setup
    rounds: int
    warmup: int
    device: str
    dtype: str
    seed: int

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], setup: Setup) -> ExplainRequest:
        """Check and freeze parsed arguments.

        Raises:
            InputError: a value out of range.
        """
        return cls(setup, *_rounds(arguments), *(arguments[name] for name in ("device", "dtype", "seed")))

    @property
    def outputs(self) -> tuple[str, ...]:
        return "run.json", "explain.csv", "explain.png"


@dataclass(frozen=True)
class EstimatesRequest:
    """Measure how well estimates rank channels on real texts.

    Attributes:
        sparsity: settings of the estimates, and how many channels of each layer count.
        texts: training settings with the data set and its fields.
        ranks: ranks of the estimators.
        samples: texts, in batches of the setup's size.
        device, dtype: as in `TimesRequest`.
        seed: of the choice of texts.
    """

    setup: Setup
    sparsity: SparsityConfig
    texts: TrainConfig
    ranks: tuple[int, ...]
    samples: int
    device: str
    dtype: str
    seed: int

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], setup: Setup) -> EstimatesRequest:
        """Check and freeze parsed arguments.

        Raises:
            InputError: no sparsity settings, no weights of a real model, or no texts.
        """
        sparsity, fields = _sparsity(setup), ("dataset", "text_fields", "prompt_field", "completion_field")
        if not isinstance(setup.source, str):
            raise InputError(
                "--estimators needs the weights of a real --model; random ones (--shape) have no structure"
            )
        texts = setup.train.merge({name: arguments[name] for name in fields})
        if texts.dataset is None:
            raise InputError("--estimators needs texts: give --dataset FILE")
        samples, device, dtype, seed = (arguments[name] for name in ("samples", "device", "dtype", "seed"))
        return cls(setup, sparsity, texts, tuple(arguments["ranks"]), samples, device, dtype, seed)

    @property
    def outputs(self) -> tuple[str, ...]:
        return "run.json", "estimators_by_batch.csv", "estimators.csv", "estimators.png"


BenchRequest = FlopsRequest | TimesRequest | ExplainRequest | EstimatesRequest


def bench_request(arguments: Mapping[str, Any]) -> BenchRequest:
    """Check parsed arguments and freeze them, before anything is built.

    Raises:
        InputError: an argument out of range, or one that does not fit the model or the measurement.
    """
    setup = resolve(SetupRequest.from_arguments(arguments))
    kind = next((name for name in ("flops", "explain", "estimators") if arguments[name]), None)
    if kind is not None and arguments["combinations"]:
        raise InputError(f"--combinations is for times; leave it out, or --{kind}")
    if kind in ("explain", "estimators") and arguments["against"] != "dense":
        raise InputError(f"--against is for times and --flops; leave it out, or --{kind}")
    for name in ("cases", "rival_limit_s"):
        if arguments[name] is not None and (kind is not None or arguments["against"] == "dense"):
            raise InputError(f"--{name} is for times of other trainers; name them by --against, or leave it out")
    if kind == "flops":
        return FlopsRequest.from_arguments(arguments, setup)
    setup.check_lengths([arguments["seq"], *(arguments["seqs"] or [])])
    if kind == "explain":
        return ExplainRequest.from_arguments(arguments, setup)
    if kind == "estimators":
        return EstimatesRequest.from_arguments(arguments, setup)
    return TimesRequest.from_arguments(arguments, setup)


def _rounds(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Return the timed steps of each variant, and the untimed ones before them."""
    rounds, warmup = arguments["rounds"], arguments["warmup"]
    if rounds < 1 or warmup < 0:
        raise InputError(f"--rounds must be at least 1 and --warmup 0, got {rounds} and {warmup}")
    return rounds, warmup


def _rivals(against: str, setup: Setup) -> tuple[str, ...]:
    """Return the names in ``against``, parted by commas; none for ``dense``, which is timed in any case."""
    if against == "dense":
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in against.split(",")))
    for name in names:
        if name not in RIVALS:
            raise InputError(
                f"--against names {shown(name)}{suggest(name, RIVALS)}; without --flops it takes trainers, parted by "
                f"commas: {','.join(RIVALS)}"
            )
    if not setup.shape.decoder:
        raise InputError(f"--against times causal language models; {setup.shape.model_type} is an encoder")
    return names


def _comparison(arguments: Mapping[str, Any], setup: Setup) -> tuple[tuple[Case, ...], float]:
    """Return the batches to compare with rivals on, and the seconds that each rival may take."""
    limit_s = LIMIT_S if arguments["rival_limit_s"] is None else arguments["rival_limit_s"]
    if limit_s <= 0:
        raise InputError(f"--rival_limit_s must be above 0, got {limit_s:g}")
    return cases(setup.work, arguments["cases"] or CASE_NAMES), limit_s


def _sparsity(setup: Setup) -> SparsityConfig:
    if setup.config is None:
        raise InputError("--flops and --estimators need --sparsity, a YAML file such as configs/llama_sparse.yaml")
    return setup.config
