"""Check the mathematics of spectral editing, and one tiny edit from file to file, on this machine.

No GPU, no network, no data: a random Llama of two layers with a random LoRA, made on the spot in a temporary folder and
gone afterwards. A line a check; exit status 1 if one fails.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sparselora.models.adapter_files import AdapterFile
    from sparselora.spectral.edit import AdapterEdit

    Batches = list[dict[str, torch.Tensor]]

_MODE = "abs_select"
_LETTERS = 64
"""Size of the vocabulary."""

EXAMPLES = """\
  sparselora smoke_test
  sparselora smoke_test --seed 1 --debug"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the model, the adapter and the data")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a check that breaks")


def run(args: argparse.Namespace) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        subject = make_subject(Path(folder), args.seed)
        failed = sum(not passes(check, subject, args.debug) for check in CHECKS)
    if failed:
        raise RuntimeError(f"{failed} of {len(CHECKS)} checks failed")
    print(f"all {len(CHECKS)} checks passed")


# --- what is checked ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A folder for files, the adapter in it, the model that has it in float64, and a few padded batches."""

    folder: Path
    adapter: AdapterFile
    model: Any
    batches: Batches
    seed: int

    def logits(self, model: Any = None) -> torch.Tensor:
        import torch

        with torch.no_grad():
            inputs = {name: value for name, value in self.batches[0].items() if name != "labels"}
            logits: torch.Tensor = (model or self.model)(**inputs).logits[inputs["attention_mask"].bool()]
        return logits

    def loss(self) -> float:
        """Mean over all labels of the batches, by the definition."""
        import torch

        total, labels = 0.0, 0
        with torch.no_grad():
            for batch in self.batches:
                logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                labelled = batch["labels"][:, 1:] != -100
                scores = logits[:, :-1][labelled].log_softmax(dim=-1)
                total -= float(scores.gather(1, batch["labels"][:, 1:][labelled][:, None]).sum())
                labels += int(labelled.sum())
        return total / labels


def make_subject(folder: Path, seed: int) -> Subject:
    import torch
    from peft import LoraConfig, get_peft_model

    from sparselora.models.adapter_files import open_adapter

    torch.manual_seed(seed)
    config = LoraConfig(
        r=6, lora_alpha=9, target_modules=["o_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(tiny_llama(seed).float(), config).save_pretrained(str(folder / "adapter"))
    adapter = open_adapter(folder / "adapter")
    return Subject(folder, adapter, loaded(folder / "adapter", seed), make_batches(seed), seed)


def tiny_llama(seed: int) -> Any:
    """In float64 throughout: the model's own norms go through float32, where no difference of losses would be fine
    enough."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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
    """The model with an adapter's files, by plain PEFT."""
    from peft import PeftModel

    return PeftModel.from_pretrained(tiny_llama(seed), str(folder)).eval()


def make_batches(seed: int) -> Batches:
    """Two batches of rows of unlike length, padded on the right, without labels on their first half."""
    import torch

    random, batches = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        ids = torch.randint(2, _LETTERS, (3, 20), generator=random)
        places, lengths = torch.arange(20), torch.tensor([[20], [14], [9]])
        labels = ids.masked_fill((places < lengths // 2) | (places >= lengths), -100)
        batches.append({"input_ids": ids, "attention_mask": (places < lengths).long(), "labels": labels})
    return batches


# --- the checks ---------------------------------------------------------------------------------------------------

Check = tuple[str, float, Callable[[Subject], float]]
"""What is checked, the largest error that passes, and what gives the error."""


def passes(check: Check, subject: Subject, debug: bool) -> bool:
    name, limit, measure = check
    try:
        error = measure(subject)
    except Exception as broken:
        if debug:
            raise
        print(f"FAILED  {name}: {type(broken).__name__}: {' '.join(str(broken).split())}")
        return False
    good = error <= limit  # NaN is not
    print(f"{'ok' if good else 'FAILED':<6}  {name}: error {error:.1e} (at most {limit:.0e})")
    return good


def svd_against_dense(subject: Subject) -> float:
    """Singular values by thin factors and of the whole d_out × d_in product; of the largest value."""
    import torch

    from sparselora.spectral.factors import adapter_svd

    worst = 0.0
    for module in subject.adapter.modules:
        A, B, scaling = subject.adapter.factors(module)
        svd = adapter_svd(A, B, scaling)
        dense = torch.linalg.svdvals(scaling * B.double() @ A.double())[: svd.rank]
        rebuilt = (svd.U * svd.sigma) @ svd.V.T - scaling * B.double() @ A.double()
        worst = max(worst, float((svd.sigma - dense).abs().max() / dense[0]), float(rebuilt.norm() / dense[0]))
    return worst


def routes_agree(subject: Subject) -> float:
    """∂L/∂σ from hooks and from the gradients of the factors; of the largest."""
    from sparselora.spectral.sensitivity import decompose, measure

    svds = decompose(subject.model)
    hooks, factor = (measure(subject.model, subject.batches, svds, route=route) for route in ("hooks", "factor"))
    return max(float((a.mean - b.mean).abs().max() / a.mean.abs().max()) for a, b in zip(hooks, factor))


def finite_differences(subject: Subject) -> float:
    """∂L/∂σ of three directions of every module against central differences of the loss; of the largest."""
    from sparselora.spectral.edit import in_place, name_in_model
    from sparselora.spectral.factors import refactor
    from sparselora.spectral.sensitivity import decompose, measure

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
    """Logits with every update decomposed and put together again in the stored type, less those before."""
    from sparselora.spectral.edit import in_place

    before = subject.logits()
    with in_place(subject.model, edited(subject).unchanged().factors(round_trip=True)):
        after = subject.logits()
    error = float((after - before).abs().max())
    return error if bool((subject.logits() == before).all()) else float("inf")  # restored bit for bit


def edit_on_disk(subject: Subject) -> float:
    """Logits of an edit that was written and loaded by plain PEFT, less those with U diag(σ') Vᵀ built in full."""
    import torch

    edit = edited(subject)
    edit.write(subject.folder / "edited")
    written, expected = loaded(subject.folder / "edited", subject.seed), tiny_llama(subject.seed)
    for module in edit.modules:
        sigma = torch.from_numpy(module.result.sigma)
        with torch.no_grad():
            expected.get_submodule(module.module).weight += (module.svd.U * sigma) @ module.svd.V.T
    return float((subject.logits(written) - subject.logits(expected)).abs().max())


def edit_changes_something(subject: Subject) -> float:
    """0 if the edit has the counts and factors that it should, and moves the logits; else 1."""
    from sparselora.spectral.edit import in_place

    edit, before = edited(subject), subject.logits()
    with in_place(subject.model, edit.factors()):
        moved = float((subject.logits() - before).abs().max())
    counts = all((module.result.count("core"), module.result.count("noise")) == (2, 2) for module in edit.modules)
    return float(not (counts and moved > 1e-3))


def edited(subject: Subject) -> AdapterEdit:
    """Edit every module by `_MODE`, with statistics of the subject's batches."""
    from dataclasses import replace

    from sparselora.spectral.edit import AdapterEdit, decompositions, name_in_model
    from sparselora.spectral.modes import EditOptions
    from sparselora.spectral.sensitivity import measure

    svds = decompositions(subject.adapter, list(subject.adapter.modules))
    measured = measure(subject.model, subject.batches, {name_in_model(module): svd for module, svd in svds.items()})
    statistics = {module: replace(sensitivity, module=module) for module, sensitivity in zip(svds, measured)}
    return AdapterEdit.by_mode(subject.adapter, svds, statistics, _MODE, EditOptions(), seed=0)


CHECKS: tuple[Check, ...] = (
    ("SVD of B A in factor space against the dense one", 1e-10, svd_against_dense),
    ("dL/dσ by hooks against dL/dσ by factor gradients", 1e-8, routes_agree),
    ("dL/dσ against finite differences of the loss", 1e-5, finite_differences),
    ("round trip leaves the logits as they are", 1e-6, round_trip),
    (f"{_MODE} changes what it should", 0.0, edit_changes_something),
    (f"{_MODE}, written and loaded by plain PEFT", 1e-6, edit_on_disk),
)
