"""Checks of the mathematics of spectral editing, and of one tiny edit from file to file, on this machine.

The subject is a random Llama of two layers with a random LoRA: no GPU, no network, no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sparselora.models.adapter_files import AdapterFile, open_adapter
from sparselora.models.labels import IGNORED
from sparselora.spectral.edit import AdapterEdit, decompositions, in_place, name_in_model
from sparselora.spectral.factors import adapter_svd, refactor
from sparselora.spectral.modes import EditOptions
from sparselora.spectral.sensitivity import decompose, measure

Batches = list[dict[str, torch.Tensor]]

_MODE = "abs_select"
_LETTERS = 64
"""Size of the vocabulary."""


@dataclass(frozen=True)
class Subject:
    """A folder for files, the adapter in it, the model that has it in float64, and a few padded batches."""

    folder: Path
    adapter: AdapterFile
    model: Any
    batches: Batches
    seed: int

    def logits(self, model: Any = None) -> torch.Tensor:
        with torch.no_grad():
            inputs = {name: value for name, value in self.batches[0].items() if name != "labels"}
            logits: torch.Tensor = (model or self.model)(**inputs).logits[inputs["attention_mask"].bool()]
        return logits

    def loss(self) -> float:
        """Mean over all labels of the batches, by the definition."""
        total, labels = 0.0, 0
        with torch.no_grad():
            for batch in self.batches:
                logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                labelled = batch["labels"][:, 1:] != IGNORED
                scores = logits[:, :-1][labelled].log_softmax(dim=-1)
                total -= float(scores.gather(1, batch["labels"][:, 1:][labelled][:, None]).sum())
                labels += int(labelled.sum())
        return total / labels


def make_subject(folder: Path, seed: int) -> Subject:
    """Build the subject of a seed, and write its adapter into ``folder``."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=6, lora_alpha=9, target_modules=["o_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(tiny_llama(seed).float(), config).save_pretrained(str(folder / "adapter"))
    adapter = open_adapter(folder / "adapter")
    return Subject(folder, adapter, loaded(folder / "adapter", seed), make_batches(seed), seed)


def tiny_llama(seed: int) -> Any:
    """Build a random Llama of two layers, in float64 throughout.

    The norms of transformers go through float32, where no difference of losses would be fine enough.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=_LETTERS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, torch.nn.RMSNorm(config.hidden_size, config.rms_norm_eps))
    return model.double().eval()


def loaded(folder: Path, seed: int) -> Any:
    """Load the model with an adapter's files, by plain PEFT."""
    return PeftModel.from_pretrained(tiny_llama(seed), str(folder)).eval()


def make_batches(seed: int) -> Batches:
    """Draw two batches of rows of different lengths, padded on the right, without labels on their first half."""
    random, batches = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        ids = torch.randint(2, _LETTERS, (3, 20), generator=random)
        places, lengths = torch.arange(20), torch.tensor([[20], [14], [9]])
        labels = ids.masked_fill((places < lengths // 2) | (places >= lengths), IGNORED)
        batches.append({"input_ids": ids, "attention_mask": (places < lengths).long(), "labels": labels})
    return batches


# --- the checks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        name: in words.
        limit: largest error that passes.
        measure: returns the error.
    """

    name: str
    limit: float
    measure: Callable[[Subject], float]


@dataclass(frozen=True)
class Outcome:
    """Result of a check: its error, or the exception that ended it."""

    check: Check
    error: float
    exception: Exception | None = None

    @property
    def is_passed(self) -> bool:
        return self.error <= self.check.limit  # NaN is not


def run_checks(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yield the outcome of each of `CHECKS` as it is there.

    Args:
        folder: an empty folder for the adapters' files.
        seed: of the model, the adapter and the data.
    """
    subject = make_subject(folder, seed)
    for check in CHECKS:
        try:
            yield Outcome(check, check.measure(subject))
        except Exception as exception:
            yield Outcome(check, float("nan"), exception)


def svd_against_dense(subject: Subject) -> float:
    """Compare the SVD by thin factors with that of the whole d_out × d_in product; relative to the largest value."""
    worst = 0.0
    for module in subject.adapter.modules:
        A, B, scaling = subject.adapter.factors(module)
        svd = adapter_svd(A, B, scaling)
        dense = torch.linalg.svdvals(scaling * B.double() @ A.double())[: svd.rank]
        rebuilt = (svd.U * svd.sigma) @ svd.V.T - scaling * B.double() @ A.double()
        worst = max(worst, float((svd.sigma - dense).abs().max() / dense[0]), float(rebuilt.norm() / dense[0]))
    return worst


def routes_agree(subject: Subject) -> float:
    """Compare ∂L/∂σ from hooks with that from the gradients of the factors; relative to the largest."""
    svds = decompose(subject.model)
    hooks, factor = (measure(subject.model, subject.batches, svds, route=route) for route in ("hooks", "factor"))
    return max(float((a.mean - b.mean).abs().max() / a.mean.abs().max()) for a, b in zip(hooks, factor))


def finite_differences(subject: Subject) -> float:
    """Compare ∂L/∂σ of three directions of every module with central differences of the loss.

    The error is relative to the module's largest.
    """
    svds, worst, step = decompose(subject.model), 0.0, 1e-5
    means = {statistics.module: statistics.mean for statistics in measure(subject.model, subject.batches, svds)}
    for module in subject.adapter.modules:
        svd, mean = svds[name_in_model(module)], means[name_in_model(module)]
        A, B, scaling = subject.adapter.factors(module)
        for i in (0, 2, 5):
            losses = []
            for move in (step, -step):
                sigma = svd.sigma.clone()
                sigma[i] += move
                with in_place(subject.model, {module: refactor(svd, sigma, A.double(), B.double(), scaling)}):
                    losses.append(subject.loss())
            slope = (losses[0] - losses[1]) / (2 * step)
            worst = max(worst, abs(slope - float(mean[i])) / float(mean.abs().max()))
    return worst


def round_trip(subject: Subject) -> float:
    """Compare the logits with every update decomposed and put together again in the stored type with those before."""
    before = subject.logits()
    with in_place(subject.model, edited(subject).unchanged().factors(round_trip=True)):
        after = subject.logits()
    error = float((after - before).abs().max())
    return error if bool((subject.logits() == before).all()) else float("inf")  # restored bit for bit


def edit_on_disk(subject: Subject) -> float:
    """Compare the logits of an edit that plain PEFT has loaded with those of U diag(σ') Vᵀ, built in full."""
    edit = edited(subject)
    edit.write(subject.folder / "edited")
    written, expected = loaded(subject.folder / "edited", subject.seed), tiny_llama(subject.seed)
    for module in edit.modules:
        sigma = torch.from_numpy(module.result.sigma)
        with torch.no_grad():
            expected.get_submodule(module.module).weight += (module.svd.U * sigma) @ module.svd.V.T
    return float((subject.logits(written) - subject.logits(expected)).abs().max())


def edit_changes_something(subject: Subject) -> float:
    """Return 0 if the edit has the counts and factors that it should, and moves the logits; else 1."""
    edit, before = edited(subject), subject.logits()
    with in_place(subject.model, edit.factors()):
        moved = float((subject.logits() - before).abs().max())
    counts = all((module.result.count("core"), module.result.count("noise")) == (2, 2) for module in edit.modules)
    return float(not (counts and moved > 1e-3))


def edited(subject: Subject) -> AdapterEdit:
    """Edit every module by `_MODE`, with statistics of the subject's batches."""
    svds = decompositions(subject.adapter, list(subject.adapter.modules))
    measured = measure(subject.model, subject.batches, {name_in_model(module): svd for module, svd in svds.items()})
    statistics = {module: replace(sensitivity, module=module) for module, sensitivity in zip(svds, measured)}
    return AdapterEdit.by_mode(subject.adapter, svds, statistics, _MODE, EditOptions(), seed=0)


CHECKS: tuple[Check, ...] = (
    Check("SVD of B A in factor space against the dense one", 1e-10, svd_against_dense),
    Check("dL/dσ by hooks against dL/dσ by factor gradients", 1e-8, routes_agree),
    Check("dL/dσ against finite differences of the loss", 1e-5, finite_differences),
    Check("round trip leaves the logits as they are", 1e-6, round_trip),
    Check(f"{_MODE} changes what it should", 0.0, edit_changes_something),
    Check(f"{_MODE}, written and loaded by plain PEFT", 1e-6, edit_on_disk),
)
