"""The loss of each rank that a finished adapter could have, on held-out rows, and the least rank that costs nothing.

Every candidate is the adapter cut by one method to one budget of ranks. It is put into the model, which is loaded once,
and evaluated on the same rows as the whole adapter. Rows are the unit: a verdict is about this adapter on such rows,
and says nothing of another training seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import special
from torch import Tensor

from sparselora.config.train import TrainConfig
from sparselora.data.load import Data, encode_rows
from sparselora.errors import InputError
from sparselora.evaluation.adapted_model import AdaptedModel, load_adapted_model
from sparselora.evaluation.losses import mean_loss
from sparselora.models import lora
from sparselora.models.adalora import open_as_lora
from sparselora.models.adapter_config import read_peft_config, vllm_rank
from sparselora.models.adapter_files import AdapterFile, padded
from sparselora.models.load import device_name
from sparselora.models.model_files import model_facts
from sparselora.numerics.reconstruction import energy_rank
from sparselora.numerics.stats import equivalence_p, holm
from sparselora.runs.files import write_csv
from sparselora.runs.folder import RunFolder
from sparselora.runs.progress import Progress
from sparselora.spectral import calibrate as cal
from sparselora.spectral.edit import decompositions, generator, in_place, name_in_model
from sparselora.spectral.factors import AdapterSVD, truncated
from sparselora.spectral.reduce import ReducedAdapter, cut_adapter, reduce_adapter
from sparselora.spectral.squeeze import budget_ranks, directions, uniform_ranks
from sparselora.spectral.weighted import LeftBasis, random_basis, second_moments, weighted_basis

SVD, WEIGHTED, RANDOM = "svd", "activations", "random"
"""Methods: the best approximation of ΔW, of ΔW on real inputs, and a random subspace of it, which is the control."""
UNIFORM, GLOBAL, ENERGY = "uniform", "global", "energy"
"""Budgets: one rank for all modules, its parameters where they hold the most, the least rank for a share of energy."""
WHOLE, NONE = "whole adapter", "no LoRA"
EQUIVALENT, UNDECIDED, CONTROL = "equivalent", "undecided", "control"
_LEVEL = 0.05
_CALIBRATION_ROWS = 64
_CONTROLS = 6
"""Stream of the control's random numbers; `sparselora.spectral.edit` has the ones before it."""


@dataclass(frozen=True)
class RankCurveRequest:
    """The evaluation of a finished adapter at lower ranks.

    Attributes:
        adapter: its folder.
        config: base model, data, device and seed.
        ranks: uniform ranks, each with a global budget of as many parameters; None: halves of the adapter's down to 1.
        energies: shares of ‖ΔW‖² in place of ranks.
        margin: share of the whole adapter's loss that counts as no difference.
        calib_samples: training rows for the second moments of the inputs; 0: only the plain SVD; None: 64, or all there
            are.
    """

    adapter: str
    config: TrainConfig
    ranks: tuple[int, ...] | None
    energies: tuple[float, ...] | None
    margin: float
    calib_samples: int | None


@dataclass(frozen=True)
class Candidate:
    """The adapter at one budget of ranks, cut by one method.

    Attributes:
        level: the uniform rank, or the share of energy, that the budget belongs to.
        bases: module → its SVD, or other directions to project it on.
        ranks: module → its rank.
    """

    method: str
    budget: str
    level: float
    bases: Mapping[str, AdapterSVD | LeftBasis]
    ranks: Mapping[str, int]

    @property
    def name(self) -> str:
        return f"{self.method}, {self.budget} {self.level:g}"

    @property
    def largest_rank(self) -> int:
        """The rank that a file and a server need for it."""
        return max(self.ranks.values())

    def source(self, module: str) -> AdapterSVD:
        """Return the SVD of which the module keeps the first directions."""
        basis = self.bases[module]
        return basis if isinstance(basis, AdapterSVD) else basis.cut(self.ranks[module])

    def reduced(self, adapter: AdapterFile) -> ReducedAdapter:
        """Return the adapter cut in this way, to be written."""
        return cut_adapter(adapter, lambda name, svd: (self._of(name, svd), self.ranks[name]))

    def _of(self, module: str, svd: AdapterSVD) -> AdapterSVD:
        return svd if isinstance(self.bases[module], AdapterSVD) else self.source(module)


@dataclass(frozen=True)
class RankCurve:
    """The table of an evaluation, the chosen candidate (None where none is), and the result in sentences."""

    table: pd.DataFrame
    choice: Candidate | None
    sentences: list[str]

    @property
    def text(self) -> str:
        """The loss of every candidate, then the result in sentences."""
        table = self.table
        columns = {
            "method": table["method"],
            "budget": [f"{b} {x:g}" if b else "" for b, x in zip(table["budget"], table["level"])],
            "rank": table["rank"],
            "parameters": table["params"].map("{:,}".format),
            "loss": table["loss"].map("{:.4f}".format),
            **({"accuracy": table["accuracy"].map("{:.4f}".format)} if "accuracy" in table else {}),
            "difference (95 %)": [
                "" if i == 0 else f"{d:+.4f} [{low:+.4f}, {high:+.4f}]"
                for i, (d, low, high) in enumerate(zip(table["difference"], table["ci_low"], table["ci_high"]))
            ],
            "p (Holm)": table["p_adjusted"].map(lambda p: "" if p != p else f"{p:.2g}"),
            "verdict": table["verdict"],
        }
        return "\n".join([pd.DataFrame(columns).to_string(index=False), *self.sentences])


# --- the candidates -----------------------------------------------------------------------------------------------


def halves(rank: int) -> tuple[int, ...]:
    """Return the halves of ``rank`` down to 1, rounded down."""
    ladder = []
    while rank > 1:
        rank //= 2
        ladder.append(rank)
    return tuple(ladder)


def check_levels(request: RankCurveRequest, adapter: AdapterFile) -> tuple[int, ...]:
    """Return the ranks to evaluate; none where energies are.

    Raises:
        InputError: an adapter without a lower rank; ranks that are not below its own.
    """
    if not adapter.modules:
        raise InputError(f"adapter {adapter.name} has LoRA on embeddings and convolutions only; none can be reduced")
    largest = max(len(adapter.factors(module)[0]) for module in adapter.modules)
    if largest == 1:
        raise InputError(f"adapter {adapter.name} has rank 1 in every module; there is no lower rank to evaluate")
    if request.energies is not None:
        return ()
    for rank in request.ranks or ():
        if not 1 <= rank < largest:
            raise InputError(
                f"ranks must be from 1 to {largest - 1}, below the {largest} of adapter {adapter.name}, got {rank}"
            )
    return tuple(sorted(set(request.ranks or halves(largest)), reverse=True))


def plan_candidates(
    svds: Mapping[str, AdapterSVD],
    weighted: Mapping[str, LeftBasis] | None,
    ranks: Sequence[int],
    energies: Sequence[float],
    seed: int,
) -> list[Candidate]:
    """Return every candidate, the largest level first; a global budget that comes out uniform is left out.

    Args:
        weighted: bases by the second moments of the inputs; None without them.
    """
    bases: dict[str, Mapping[str, AdapterSVD | LeftBasis]] = {SVD: svds}
    # Budgets read singular values and sizes alone; those of a weighted basis are of ΔW C^½.
    spectra: dict[str, Mapping[str, AdapterSVD]] = {SVD: svds}
    if weighted is not None:
        bases[WEIGHTED] = weighted
        spectra[WEIGHTED] = {name: AdapterSVD(basis.U, basis.sigma, basis.rows.T) for name, basis in weighted.items()}
    chance = {name: random_basis(svd, generator(seed, _CONTROLS, i)) for i, (name, svd) in enumerate(svds.items())}
    candidates = []
    for rank in ranks:
        uniform = uniform_ranks(svds, rank)
        candidates += [Candidate(method, UNIFORM, rank, bases[method], uniform) for method in bases]
        for method in bases:
            spent = budget_ranks(spectra[method], rank, 1)
            if spent != uniform:
                candidates.append(Candidate(method, GLOBAL, rank, bases[method], spent))
        candidates.append(Candidate(RANDOM, UNIFORM, rank, chance, _within(uniform, chance)))
    for energy in sorted(set(energies), reverse=True):
        for method in bases:
            least = {name: _least_rank(svd, energy) for name, svd in spectra[method].items()}
            candidates.append(Candidate(method, ENERGY, energy, bases[method], least))
        least = {name: _least_rank(svd, energy) for name, svd in svds.items()}
        candidates.append(Candidate(RANDOM, ENERGY, energy, chance, _within(least, chance)))
    return candidates


def _least_rank(svd: AdapterSVD, energy: float) -> int:
    return max(1, min(energy_rank(svd.sigma.cpu().numpy(), energy), directions(svd)))


def _within(ranks: Mapping[str, int], bases: Mapping[str, LeftBasis]) -> dict[str, int]:
    """Return the ranks, at most the directions that each basis has."""
    return {name: min(rank, len(bases[name].rows)) for name, rank in ranks.items()}


# --- the losses ---------------------------------------------------------------------------------------------------


def run_rank_curve(request: RankCurveRequest, folder: RunFolder) -> RankCurve:
    """Evaluate every candidate, write the tables and the figure, and the chosen adapter if there is one.

    Args:
        folder: reserved, but not entered: nothing is written before the input has been checked.
    Raises:
        InputError: an adapter, a model or rows that do not go together; rows without a label; fewer than two rows.
    """
    config = request.config
    adapter = open_as_lora(request.adapter)
    ranks = check_levels(request, adapter)
    with Progress(len(adapter.modules), "module", "SVD") as progress:
        svds = decompositions(adapter, list(adapter.modules), progress.update)
    data = cal.load_rows(config, request.adapter)
    samples = min(_CALIBRATION_ROWS, len(data.train)) if request.calib_samples is None else request.calib_samples
    rows = cal.drawn_rows(data, samples, config.seed) if samples else None
    with _loadable(adapter, request.adapter) as path:
        adapted = load_adapted_model(config, path, len(data.labels))
    lora.lora_layers(adapted.model, names=map(name_in_model, svds))  # refuses kinds that cannot be cut
    examples = encode_rows(data.eval, data, adapted.tokenizer, config)
    if len(examples) < 2:
        raise InputError(f"{data.name} has {len(examples)} held-out rows; a paired test needs 2 or more")
    weighted = None if rows is None else _weighted(adapted, svds, rows, data, config)
    candidates = plan_candidates(svds, weighted, ranks, request.energies or (), config.seed)
    with folder:
        folder.note(device=device_name(adapted.device), **model_facts(config.model))
        with Progress(len(examples) * (len(candidates) + 2), "row", "reduce") as progress:
            losses = cal.held_out(adapted, examples, data.eval, config.eval_bsz, progress.update)
            items = {WHOLE: losses(), NONE: _losses_in_place(adapted, _zeros(svds), losses)}
            for candidate in candidates:
                items[candidate.name] = _losses_in_place(adapted, _factors(candidate, adapter), losses)
        curve = judge(adapter, svds, candidates, items, request.margin)
        _write(folder, curve, items, f"{adapter.name} on {data.name}", request.margin)
        if curve.choice is not None:
            result = curve.choice.reduced(adapter)
            result.write(folder.folder)
            write_csv(folder.path("reduce.csv"), result.table)
    return curve


@contextmanager
def _loadable(adapter: AdapterFile, folder: str) -> Iterator[str]:
    """Yield a folder from which PEFT loads the adapter as plain LoRA: its own, or of an AdaLoRA a temporary one."""
    if read_peft_config(Path(folder)).get("peft_type") != "ADALORA":
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        largest = max(len(adapter.factors(module)[0]) for module in adapter.modules)
        reduce_adapter(adapter, largest, None).write(Path(temporary))
        yield temporary


def _weighted(
    adapted: AdaptedModel, svds: Mapping[str, AdapterSVD], rows: pd.DataFrame, data: Data, config: TrainConfig
) -> dict[str, LeftBasis]:
    """Return the bases by the inputs of ``rows``, of the factors that are in the model."""
    examples = encode_rows(rows, data, adapted.tokenizer, config)
    batches = cal.batches(examples, adapted.tokenizer, config.eval_bsz)
    layers = lora.lora_layers(adapted.model, names=map(name_in_model, svds))
    with Progress(len(batches), "batch", "calibration") as progress:
        moments = second_moments(adapted.model, batches, layers, bf16=adapted.bf16, progress=progress.update)
    bases = {}
    for module, svd in svds.items():
        layer = layers[name_in_model(module)]
        A, B = (factor.detach().cpu() for factor in lora.weights(layer))
        bases[module] = weighted_basis(A, B, layer.scaling["default"], moments[name_in_model(module)]).first(svd.rank)
    return bases


def _factors(candidate: Candidate, adapter: AdapterFile) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors that would be written, in the types of the adapter, their scale included."""
    factors = {}
    for module in adapter.modules:
        A, B, _ = adapter.factors(module)
        factors[module] = truncated(candidate.source(module), candidate.ranks[module], A.dtype, B.dtype)
    return factors


def _zeros(svds: Mapping[str, AdapterSVD]) -> dict[str, tuple[Tensor, Tensor]]:
    return {module: (svd.V.T[:1], torch.zeros_like(svd.U[:, :1])) for module, svd in svds.items()}


def _losses_in_place(
    adapted: AdaptedModel, factors: Mapping[str, tuple[Tensor, Tensor]], losses: Callable[[], pd.DataFrame]
) -> pd.DataFrame:
    """Return the losses with other factors, of any lower ranks and of scaling 1, in the model."""
    layers = lora.lora_layers(adapted.model, names=map(name_in_model, factors))
    filled = {}
    for module, (A, B) in factors.items():
        layer = layers[name_in_model(module)]
        scaling = layer.scaling["default"]
        if scaling == 0:
            raise InputError(f"{module} has scaling 0, so that its adapter does nothing; check lora_alpha")
        filled[module] = padded(A.float(), B.double().div(scaling).float(), lora.rank(layer))
    with in_place(adapted.model, filled):
        return losses()


# --- the verdict --------------------------------------------------------------------------------------------------


def judge(
    adapter: AdapterFile,
    svds: Mapping[str, AdapterSVD],
    candidates: Sequence[Candidate],
    items: Mapping[str, pd.DataFrame],
    margin: float,
) -> RankCurve:
    """Compare every candidate with the whole adapter, row by row, and choose the least rank that is equivalent.

    Two one-sided paired t tests over rows reject "the loss differs by the margin or more"; their p values are adjusted
    over all candidates (Holm), not over the controls. Of the equivalent ones of lower rank, the one whose largest rank
    is the least is chosen, since that is what a file and a server hold; then fewer parameters, then the order here.

    Args:
        items: losses by row of every candidate's name, `WHOLE` and `NONE`.
        margin: share of the whole adapter's loss.
    """
    sizes = {name: len(svd.U) + len(svd.V) for name, svd in svds.items()}
    full_ranks = {name: svd.rank for name, svd in svds.items()}
    no_ranks = dict.fromkeys(full_ranks, 0)
    table = [_row(WHOLE, "", np.nan, full_ranks, sizes, items[WHOLE], items[WHOLE]),
             _row(NONE, "", np.nan, no_ranks, sizes, items[NONE], items[WHOLE])]  # fmt: skip
    for candidate in candidates:
        losses = items[candidate.name]
        row = _row(candidate.method, candidate.budget, candidate.level, candidate.ranks, sizes, losses, items[WHOLE])
        table.append(row | {"p": _equivalence(losses, items[WHOLE], margin)})
    tested = [i for i, candidate in enumerate(candidates, start=2) if candidate.method != RANDOM]
    for i, p in zip(tested, holm([table[i]["p"] for i in tested])):
        table[i] |= {"p_adjusted": p, "verdict": EQUIVALENT if p < _LEVEL else UNDECIDED}
    frame = pd.DataFrame(table)
    frame.loc[frame["method"] == RANDOM, "verdict"] = CONTROL
    frame["verdict"] = frame["verdict"].fillna("")
    frame["margin"] = margin * frame["loss"].iloc[0]
    lower = [i for i in tested if table[i]["verdict"] == EQUIVALENT and table[i]["rank"] < max(full_ranks.values())]
    best = min(lower, key=lambda i: (table[i]["rank"], table[i]["params"], i), default=None)
    is_vacuous = _equivalence(items[NONE], items[WHOLE], margin) < _LEVEL
    sentences = _sentences(adapter, frame, best, len(tested), margin, is_vacuous)
    return RankCurve(frame, None if best is None else candidates[best - 2], sentences)


def _equivalence(losses: pd.DataFrame, whole: pd.DataFrame, margin: float) -> float:
    """P of a difference of the margin or more; 0 where every row has the same loss.

    The summed losses of rows are tested: the number of labels is the same on both sides, so that the ratio of their
    means is that of the losses a label.
    """
    first, second = losses["loss"].to_numpy(), whole["loss"].to_numpy()
    return 0.0 if np.array_equal(first, second) else equivalence_p(first, second, margin, is_relative=True)


def _row(
    method: str, budget: str, level: float, ranks: Mapping[str, int], sizes: Mapping[str, int],
    losses: pd.DataFrame, whole: pd.DataFrame,
) -> dict[str, Any]:  # fmt: skip
    labels = losses["tokens"] if "tokens" in losses else pd.Series(1, index=losses.index)
    loss, error = mean_loss(losses["loss"], labels)
    difference, spread = mean_loss(losses["loss"] - whole["loss"], labels)
    half = float(special.stdtrit(len(losses) - 1, 0.975)) * spread
    largest = max(ranks.values())
    return {
        "method": method, "budget": budget, "level": level, "rank": largest,
        "mean_rank": sum(ranks[name] * sizes[name] for name in ranks) / sum(sizes.values()),
        "params": sum(ranks[name] * sizes[name] for name in ranks),
        "max_lora_rank": (vllm_rank(largest) if largest else None), "n": len(losses),
        "loss": loss, "loss_stderr": error,
        **({"accuracy": float(losses["correct"].mean())} if "correct" in losses else {}),
        "difference": difference, "ci_low": difference - half, "ci_high": difference + half,
        "p": float("nan"), "p_adjusted": float("nan"), "verdict": "",
    }  # fmt: skip


def _sentences(
    adapter: AdapterFile, table: pd.DataFrame, best: int | None, family: int, margin: float, is_vacuous: bool
) -> list[str]:
    whole, nothing = table.iloc[0], table.iloc[1]
    within = f"within {100 * margin:g} % of the loss of the whole adapter"
    sentences = []
    if best is None:
        sentences.append(
            f"no lower rank is shown to be {within} (rank {whole['rank']}, loss {whole['loss']:.4f}, n = {whole['n']} "
            "rows): no adapter is written; more rows or a wider --margin may show one"
        )
    else:
        row = table.iloc[best]
        sentences.append(
            f"least rank {within}: {row['rank']} ({row['method']}, {row['budget']} {row['level']:g}), loss "
            f"{row['loss']:.4f} against {whole['loss']:.4f} of rank {whole['rank']}, difference "
            f"{row['difference']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}], p = {row['p_adjusted']:.2g} "
            f"(Holm, {family} candidates), n = {row['n']} rows"
        )
        sentences.append(_served(int(row["rank"])))
    sentences.append("rows are the unit: this is about this adapter, and not about another training seed")
    if is_vacuous:
        sentences.append(
            f"warning: no LoRA at all is {within} as well ({nothing['difference']:+.4f}), so that the margin says "
            f"nothing about ranks; narrow --margin, or train adapter {adapter.name} further"
        )
    return sentences


def _served(rank: int) -> str:
    served = vllm_rank(rank)
    if served is None:
        return f"vLLM serves no rank as large as {rank}"
    remark = "" if served == rank else f"; it has no {rank}, and reserves memory for {served}"
    return f"vLLM needs --max-lora-rank {served}{remark}"


def _write(folder: RunFolder, curve: RankCurve, items: Mapping[str, pd.DataFrame], title: str, margin: float) -> None:
    from sparselora.report.spectral import losses_by_rank

    write_csv(folder.path("losses_by_rank.csv"), curve.table)
    rows = pd.concat([frame.assign(candidate=name) for name, frame in items.items()], ignore_index=True)
    write_csv(folder.path("losses_by_row.csv"), rows[["candidate", *rows.columns.drop("candidate")]])
    losses_by_rank(folder.path("losses_by_rank.png"), curve.table, title, margin)
