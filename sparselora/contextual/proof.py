"""Proofs that our code computes what a model's own does, before it takes its place.

A proof runs both on the same few random tokens, in training mode and from the same seed, so that dropout counts, and
compares the results relative to their size. An exception on either side disproves. A proof leaves no trace: the modes
and gradients of the model and the states of the random generators are as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sparselora.contextual.sharding import gathered
from sparselora.errors import InputError
from sparselora.models.labels import IGNORED

Tensor = torch.Tensor
Run = Callable[[], Sequence[Tensor]]

_SEED = 20_061
_ROWS, _LENGTH, _PROMPT = 2, 8, 3
_LOUD = 100.0
"""Size of the logits that stand in for the output layer's: soft-capping is invisible on small ones."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in training mode without LoRA dropout and recomputation; afterwards it is as it was.

    LoRA dropout is left out because ours draws the same distribution, but in another order. Modules with running
    statistics stay in evaluation mode, where they keep them.

    Raises:
        InputError: a pass has put other modules into the model (BigBird does, for short inputs): what was found before
            is no longer there.
    """
    modules: list[Any] = list(model.modules())
    modes = [module.training for module in modules]
    recomputing = [module for module in modules if getattr(module, "gradient_checkpointing", False) is True]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(list(devices)):
        try:
            for module in modules:
                module.training = not isinstance(module, _BatchNorm)
            for module in modules:
                if isinstance(module, LoraLayer):
                    for dropout in module.lora_dropout.modules():
                        dropout.training = False
            for module in recomputing:
                module.gradient_checkpointing = False
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for module in recomputing:
                module.gradient_checkpointing = True
    if [id(module) for module in model.modules()] != [id(module) for module in modules]:
        raise InputError(
            f"{type(model).__name__} is not supported: a pass over {_LENGTH} tokens has put other modules into it; "
            "load it with settings under which it keeps its modules (for BigBird, attention_type original_full)"
        )


def disproof(reference: Run, candidate: Run, limit: float) -> str | None:
    """Return why two computations are not the same function; None where they agree.

    Args:
        reference, candidate: give the tensors to compare, in the same order. Both run from one seed, ``reference``
            first, inside `undisturbed`.
        limit: largest relative difference ``‖candidate − reference‖ / ‖reference‖`` of any of them.

    Raises:
        InputError: either raised it.
        torch.OutOfMemoryError: it says nothing about the function.
    """
    results = []
    for run in (reference, candidate):
        computed = _computed(run)
        if isinstance(computed, str):
            return computed
        results.append(computed)
    difference = relative_difference(*results)
    return None if difference <= limit else f"relative difference {difference:.1e}"


def failure(run: Run) -> str | None:
    """Return why a computation does not run, from the seed of every proof; None where it does, whatever it gives.

    Raises:
        InputError, torch.OutOfMemoryError: as `disproof`.
    """
    computed = _computed(run)
    return computed if isinstance(computed, str) else None


def _computed(run: Run) -> list[Tensor] | str:
    """Return the results of a computation from the seed of every proof, or why there are none."""
    seed_generators()
    try:
        return list(run())
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        return f"a trial fails with {type(error).__name__}: {message[:160]}"


def repeated(run: Run) -> Run:
    """Return ``run`` with its first results for every call: from one seed, they are those of any other."""
    return functools.cache(run)


def seed_generators() -> None:
    """Start the default generators of the CPU and of a CUDA that is in use from the seed of every proof."""
    torch.default_generator.manual_seed(_SEED)
    if torch.cuda.is_initialized():  # before that, seeding would be remembered for later
        torch.cuda.manual_seed_all(_SEED)


def relative_difference(reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> float:
    """Largest ``‖candidate − reference‖ / ‖reference‖`` over pairs of tensors; inf for other shapes, NaN or inf."""
    if [x.shape for x in reference] != [x.shape for x in candidate]:
        return float("inf")
    largest = 0.0
    for a, b in zip(reference, candidate, strict=True):
        a, b = a.detach().double(), b.detach().double()
        difference, size = float((a - b).norm()), float(a.norm())
        error = difference / max(size, 1e-12)
        largest = max(largest, error if error == error and size < float("inf") else float("inf"))
    return largest


def tolerance(weight: Tensor, exact: float, low: float) -> float:
    """``exact`` where products with ``weight`` are formed in full precision, ``low`` in half precision or 4 bits."""
    return low if is_low_precision(weight) else exact


def is_low_precision(weight: Tensor) -> bool:
    """Return whether products with ``weight`` have fewer than 24 bits."""
    if weight.dtype not in (torch.float32, torch.float64):
        return True
    return weight.is_cuda and weight.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


def random_input(shape: tuple[int, ...], like: Tensor, amplitudes: Sequence[float]) -> Tensor:
    """Normal values in the dtype and on the device of ``like``, row i of the first dimension of size amplitudes[i]."""
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.randn(len(amplitudes), *shape, generator=generator)
    sizes = torch.tensor(amplitudes).view(-1, *(1 for _ in shape))
    dtype = like.dtype if like.dtype.is_floating_point else torch.get_default_dtype()
    return (x * sizes).to(like.device, dtype)


# --- the tokens to try ----------------------------------------------------------------------------------------------


def trial_batch(model: Any) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` of two rows, one padded left and one right.

    The tokens are random among those that are ordinary (`ordinary_tokens`); a prompt carries no labels.
    """
    device = next(model.parameters()).device
    ordinary = ordinary_tokens(model, _ROWS * _LENGTH)
    ids = ordinary[torch.arange(_ROWS * _LENGTH) % len(ordinary)].view(_ROWS, _LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :1] = 0
    mask[1, -2:] = 0
    labels = ids.clone()
    labels[:, :_PROMPT] = IGNORED
    labels[mask == 0] = IGNORED
    padding = getattr(_text_config(model), "pad_token_id", None)
    if isinstance(padding, int) and padding >= 0:
        ids[mask == 0] = padding
    return {name: x.to(device) for name, x in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


@torch.no_grad()
def ordinary_tokens(model: Any, count: int) -> Tensor:
    """Random distinct token ids ``(≤ count,)`` that are not special and whose embedding is not zero."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # a model of characters or patches
        return _drawn_tokens(model, count, None)
    if embedding is None:
        return _drawn_tokens(model, count, None)
    with gathered(embedding):
        return _drawn_tokens(model, count, getattr(embedding, "weight", None))


def _drawn_tokens(model: Any, count: int, weight: Any) -> Tensor:
    """Return `ordinary_tokens` of an embedding's ``weight``, or of a model without any."""
    config = _text_config(model)
    size = getattr(config, "vocab_size", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        size = min(weight.shape[0], size or weight.shape[0])
    if not size:
        raise InputError(f"{type(model).__name__} has no vocabulary; contextual sparsity takes models of token ids")
    special = _special_tokens(model.config) | _special_tokens(config)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(_SEED)).tolist()
    tokens: list[int] = []
    while order and len(tokens) < count:
        drawn = torch.tensor([token for token in order[:count] if token not in special], dtype=torch.long)
        order = order[count:]
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.dtype.is_floating_point:
            drawn = drawn[weight[drawn.to(weight.device)].abs().amax(dim=1).cpu() > 0] if len(drawn) else drawn
        tokens += drawn.tolist()
    if not tokens:
        raise InputError(
            f"{type(model).__name__} has no token but special ones and ones whose embedding is zero, so nothing can be "
            "tried on it; load the model's weights"
        )
    return torch.tensor(tokens[:count])


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _special_tokens(config: Any) -> set[int]:
    special: set[int] = set()
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index")):
            special |= {token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)}
    return special


# --- the output layer and whole passes -----------------------------------------------------------------------------


def head_disproof(model: Any, head: nn.Module) -> str | None:
    """Return why the loss is not the cross-entropy of ``head`` on the backbone's last hidden state; None if it is.

    Loud logits stand in for the output layer's, so that whatever is done to them afterwards shows.
    """
    batch = trial_batch(model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"]
    seen: list[Tensor] = []
    loud: list[Tensor] = []

    def replace(_: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        seen.append(args[0])
        loud.append(_LOUD * random_input(tuple(logits.shape[1:]), logits, [1.0] * len(logits)))
        return loud[-1]

    def theirs() -> list[Tensor]:
        hook = head.register_forward_hook(replace)
        try:
            output = model(**batch)
        finally:
            hook.remove()
        return [seen[0], output.logits, output.loss]

    def ours() -> list[Tensor]:
        if len(loud) != 1:
            raise RuntimeError(f"the output layer is called {len(loud)} times in a pass, not once")
        hidden = getattr(model, model.base_model_prefix)(**inputs)[0]
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        wide = loud[0].flatten(0, 1).to(torch.promote_types(loud[0].dtype, torch.float32))
        return [hidden, loud[0], F.cross_entropy(wide, following.flatten(), ignore_index=IGNORED)]

    with torch.no_grad():
        return disproof(theirs, ours, 1e-3)


def with_gradients(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Run:
    """The loss, and its gradients of ``parameters`` as one vector, as what a proof compares."""

    def run() -> list[Tensor]:
        with torch.enable_grad():
            value = loss()
            if not parameters:
                return [value.detach()]
            gradients = torch.autograd.grad(value, list(parameters), allow_unused=True)
        flat = [
            torch.zeros_like(p, dtype=torch.float32).flatten() if g is None else g.float().flatten()
            for p, g in zip(parameters, gradients, strict=True)
        ]
        return [value.detach(), torch.cat([part.to(flat[0].device) for part in flat])]

    return run
