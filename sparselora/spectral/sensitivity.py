"""Sensitivity of the loss to each singular value of an adapter's updates: g_i = ∂L/∂σ_i of ΔW = U diag(σ) Vᵀ.

With G = ∂L/∂ΔW = Σ_tokens δ xᵀ the value is g_i = u_iᵀ G v_i. Two routes compute it, neither forms G ``(d_out, d_in)``:

- ``hooks``: Σ_tokens ⟨δ, u_i⟩⟨x, v_i⟩, with x what enters lora_A and δ the gradient at the LoRA layer's output. The
  rows of a batch stay apart, so every statistic is exact whatever the batch size.
- ``factor``: from ∂L/∂lora_B, with solves of size r only. The rows of a batch are summed, so that it gives the mean,
  and the other statistics only where every batch holds one example.

σ holds the scaling c = alpha / r, and so does no g: c enters the second route alone, through ∂L/∂lora_B = c·G Aᵀ. Of
equal singular values only the sum of g over their common space is defined; of σ_i = 0, g_i belongs to the u_i and v_i
at hand, and is 0 where one of them is a zero vector (padding).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional as F

from sparselora.errors import InputError, suggest
from sparselora.models.labels import IGNORED
from sparselora.models.lora import lora_layers, weights
from sparselora.spectral.factors import AdapterSVD, adapter_svd

if TYPE_CHECKING:
    import pandas as pd

Tensor = torch.Tensor
Batch = Mapping[str, Tensor]


COLUMNS = ("module", "index", "sigma", "mean", "mean_abs", "fisher")
"""Of the table: one row a singular value, ``index`` counts from the largest."""

_STATISTICS = COLUMNS[2:]


@dataclass(frozen=True)
class Sensitivity:
    """Singular values of one module and the reaction of the loss to each, float64 on the CPU, ``(r,)`` each.

    The loss L is the mean over all labels of the calibration set. Example e of n contributes g_e = n / labels ×
    the gradient of its summed loss, so that the mean over examples is the gradient of L; examples without a label are
    not counted.

    Attributes:
        sigma: descending, the scaling included.
        mean: mean of g_e, which is ∂L/∂σ.
        mean_abs: mean of |g_e|; NaN where examples could not be separated (see the ``factor`` route).
        fisher: mean of g_e²; NaN likewise.
    """

    module: str
    sigma: Tensor
    mean: Tensor
    mean_abs: Tensor
    fisher: Tensor


# --- measure ------------------------------------------------------------------------------------------------------


def decompose(
    model: nn.Module, modules: Iterable[str] | None = None, adapter: str | None = None
) -> dict[str, AdapterSVD]:
    """The decompositions of the LoRA updates of ``model`` by module name, in module order.

    Args:
        modules: the names to take, as `lora_layers` gives them; by default all. Others may be of any kind.
        adapter: by default the one that is active.
    Raises:
        InputError: what `lora_layers` refuses among these modules; several adapters are active.
    """
    adapter = adapter or _active_adapter(model)
    layers = _chosen_layers(model, modules, adapter)
    return {name: adapter_svd(*weights(layer, adapter), layer.scaling[adapter]) for name, layer in layers.items()}


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    svds: Mapping[str, AdapterSVD],
    *,
    route: str = "hooks",
    adapter: str | None = None,
    progress: Callable[[], object] = lambda: None,
) -> list[Sensitivity]:
    """The reaction of the loss to every singular value in ``svds``, in their order.

    The model is in evaluation mode meanwhile: no dropout (lora_dropout neither) and no gradient checkpointing. Its
    modes, ``requires_grad`` and ``grad`` are afterwards as before. Neither the sizes of the batches nor their padding
    matters: where a row is padded on the left and the model takes positions, they count from its first token.

    Args:
        batches: ``input_ids (B, L)``, ``attention_mask (B, L)`` and ``labels``: ``(B, L)`` for a causal language model
            (shifted by one here, −100 is ignored, and so is what follows padding: nothing predicts it), ``(B,)`` class
            indices for a classifier. Anything else in a batch goes to the model. Batches without labels count nothing.
        svds: along which directions, by module; see `decompose`. They are of the weights in use, or of what those
            were rounded from.
        route: a key of `ROUTES`.
        adapter: by default the one that is active.
        progress: called after each batch.
    Raises:
        InputError: no label in all batches; a loss or a gradient that is not finite; an adapter that is merged or not
            in use; the rows of a batch that cannot be separated inside a module (``hooks``).
    """
    if route not in ROUTES:
        raise InputError(f"unknown route {route!r}{suggest(route, ROUTES)}; known: {', '.join(ROUTES)}")
    adapter = adapter or _active_adapter(model)
    sites = [_Site(name, layer, adapter, svds[name]) for name, layer in _chosen_layers(model, svds, adapter).items()]
    sums = {site.name: _Sums.zeros(len(site.svd.sigma)) for site in sites}
    examples = labels = 0
    with frozen_in_evaluation(model):
        for number, raw in enumerate(batches, start=1):
            batch = PreparedBatch.of(model, raw)
            if batch.labels:
                forward = functools.partial(_summed_loss, model, batch, number)
                for site, gradients in zip(sites, ROUTES[route](sites, batch, forward)):
                    sums[site.name].add(gradients, apart=len(gradients) == batch.rows or batch.examples == 1)
            examples, labels = examples + batch.examples, labels + batch.labels
            progress()
    if labels == 0:
        raise InputError("no calibration batch has a label to predict; give examples with labels other than -100")
    return [sums[name].statistics(name, svd.sigma, examples, labels) for name, svd in svds.items()]


@dataclass
class _Sums:
    """Over examples, of the gradients s of their summed losses: Σ s, Σ |s| and Σ s²."""

    plain: Tensor
    absolute: Tensor
    square: Tensor

    @classmethod
    def zeros(cls, r: int) -> _Sums:
        return cls(*(torch.zeros(r, dtype=torch.float64) for _ in range(3)))

    def add(self, gradients: Tensor, *, apart: bool) -> None:
        """``gradients (rows, r)``; unless they are ``apart``, a row stands for several examples."""
        gradients = gradients.cpu()
        unknown = 0.0 if apart else torch.nan
        self.plain += gradients.sum(dim=0)
        self.absolute += gradients.abs().sum(dim=0) + unknown
        self.square += gradients.square().sum(dim=0) + unknown

    def statistics(self, module: str, sigma: Tensor, examples: int, labels: int) -> Sensitivity:
        if not torch.isfinite(self.plain).all():
            raise InputError(f"{module}: a gradient is not finite; load the model in float32 or bfloat16")
        return Sensitivity(
            module=module,
            sigma=sigma.detach().double().cpu(),
            mean=self.plain / labels,
            mean_abs=self.absolute / labels,
            fisher=self.square * (examples / labels**2),
        )


# --- the two routes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Site:
    """A LoRA layer and the directions to measure along."""

    name: str
    layer: LoraLayer
    adapter: str
    svd: AdapterSVD

    @functools.cached_property
    def U(self) -> Tensor:
        """``(d_out, r)`` where the layer is."""
        return self._here(self.svd.U)

    @functools.cached_property
    def V(self) -> Tensor:
        """``(d_in, r)`` where the layer is."""
        return self._here(self.svd.V)

    @functools.cached_property
    def coordinates(self) -> Tensor:
        """``(r, r)``: those of V in the rows of A, so that Aᵀ X = V, or V's projection on their span.

        Aᵀ = Q_a R_a gives X = R_a⁺ Q_aᵀ V. Rows of A that depend on others need the pseudo-inverse; it is that of a
        matrix of at most r×r.
        """
        A, _ = weights(self.layer, self.adapter)
        Q, R = torch.linalg.qr(A.detach().double().T)
        return torch.linalg.pinv(R) @ (Q.T @ self.V)

    def _here(self, directions: Tensor) -> Tensor:
        return directions.to(weights(self.layer, self.adapter)[1].device, torch.float64)


def hook_gradients(sites: Sequence[_Site], batch: PreparedBatch, forward: Callable[[], Tensor]) -> list[Tensor]:
    """∂(summed loss)/∂σ of each row of the batch, ``(B, r)`` for each site: Σ_tokens ⟨δ, u_i⟩⟨x, v_i⟩.

    Only thin projections ``(tokens, r)`` are kept between forward and backward. No parameter needs a gradient.
    """
    gradients = [
        torch.zeros(batch.rows, len(site.svd.sigma), dtype=torch.float64, device=site.U.device) for site in sites
    ]
    # Added to each output: the backward pass has to come by every one of them, whatever else needs a gradient.
    anchor = torch.zeros((), requires_grad=True)
    with ExitStack() as stack:
        for site, total in zip(sites, gradients):
            stack.enter_context(_watching(site, total, batch, anchor))
        torch.autograd.grad(forward(), anchor, allow_unused=True)
    return gradients


@contextmanager
def _watching(site: _Site, total: Tensor, batch: PreparedBatch, anchor: Tensor) -> Iterator[None]:
    """Add the products of one layer to ``total (B, r)`` whenever the gradient of its output is known."""
    entered: list[Tensor] = []

    def on_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entered.append(inputs[0].detach().double() @ site.V)

    def on_output(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        projected = entered.pop()

        def on_gradient(delta: Tensor) -> None:
            total.add_(_sum_by_row((delta.double() @ site.U) * projected, batch, site.name))

        output = output + anchor
        output.register_hook(on_gradient)
        return output

    lora_A: nn.Module = site.layer.lora_A[site.adapter]
    module = cast(nn.Module, site.layer)
    handles = [lora_A.register_forward_pre_hook(on_input), module.register_forward_hook(on_output)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sum_by_row(products: Tensor, batch: PreparedBatch, module: str) -> Tensor:
    """``(..., r)`` summed over tokens, ``(B, r)``."""
    r = products.shape[-1]
    if batch.rows == 1:
        return products.reshape(1, -1, r).sum(dim=1)
    # Of a language model, (n, d) are tokens that were gathered from several rows, even where n happens to be B.
    if products.shape[0] != batch.rows or (products.dim() == 2 and batch.causal):
        raise InputError(
            f"{module} does not see the {batch.rows} rows of a batch one by one (its input is "
            f"{tuple(products.shape[:-1])}); give batches of one example"
        )
    return products.reshape(batch.rows, -1, r).sum(dim=1)


def factor_gradients(sites: Sequence[_Site], batch: PreparedBatch, forward: Callable[[], Tensor]) -> list[Tensor]:
    """∂(summed loss)/∂σ of the whole batch, ``(1, r)`` for each site, from the gradient of lora_B.

    g_B = c·G Aᵀ, and Aᵀ = Q_a R_a with V = Q_a V̂, so that g = diag(Uᵀ g_B R_a⁻¹ V̂) / c. B may be anything, zero
    included. Where A has not full row rank, R_a⁺ stands for the inverse; all σ > 0 have their v in the span of A's
    rows, and of other v what lies outside of it counts as 0: the gradient of lora_B does not know.
    """
    for site in sites:
        if site.layer.scaling[site.adapter] == 0:
            raise InputError(f"{site.name} has scaling 0, so that lora_B gets no gradient; take the route 'hooks'")
    lora_Bs = [weights(site.layer, site.adapter)[1] for site in sites]
    for lora_B in lora_Bs:
        lora_B.requires_grad_(True)
    gradients = []
    for site, grad in zip(sites, torch.autograd.grad(forward(), lora_Bs, materialize_grads=True)):
        on_left = site.U.T @ grad.double()
        gradients.append(((on_left * site.coordinates.T).sum(dim=1) / site.layer.scaling[site.adapter])[None])
    return gradients


ROUTES: dict[str, Callable[[Sequence[_Site], PreparedBatch, Callable[[], Tensor]], list[Tensor]]] = {
    "hooks": hook_gradients,
    "factor": factor_gradients,
}


# --- the model and its loss ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedBatch:
    """A batch on the model's device.

    Attributes:
        inputs: what the model is called with.
        targets: ``(B, L − 1)`` what each position predicts, or ``(B,)`` classes; `IGNORED` where nothing counts.
        examples: rows with a label.
        labels: labels in all.
    """

    inputs: dict[str, Any]
    targets: Tensor
    examples: int
    labels: int

    @property
    def rows(self) -> int:
        return len(self.targets)

    @property
    def causal(self) -> bool:
        return self.targets.dim() == 2

    @classmethod
    def of(cls, model: nn.Module, batch: Batch) -> PreparedBatch:
        device = next(model.parameters()).device
        inputs = {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items() if name != "labels"}
        mask = inputs.get("attention_mask")
        mask = mask if mask is not None and mask.dim() == 2 else None
        targets = _targets(batch, mask)
        if targets.dim() == 2 and mask is not None and "position_ids" not in inputs and not mask[:, 0].all():
            wrapped: Any = model
            base = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
            if "position_ids" in inspect.signature(base.forward).parameters:
                inputs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        counted = (targets != IGNORED).reshape(len(targets), -1)
        return cls(inputs, targets.to(device), int(counted.any(dim=1).sum()), int(counted.sum()))


def _targets(batch: Batch, mask: Tensor | None) -> Tensor:
    """Return the label that each position predicts; a batch without labels predicts nothing."""
    labels = batch.get("labels")
    if labels is None:
        return torch.full((len(batch["input_ids"]),), IGNORED)
    if labels.dim() not in (1, 2) or labels.is_floating_point():
        raise InputError(
            f"labels must be token ids (B, L) or class indices (B,), got {labels.dtype} {tuple(labels.shape)}"
        )
    if labels.dim() == 1:
        return labels
    targets = labels[:, 1:]
    return targets if mask is None else targets.masked_fill(mask[:, :-1].to(targets.device) == 0, IGNORED)


def cross_entropy_sum(model: nn.Module, batch: PreparedBatch) -> Tensor:
    """Return the cross-entropy of every label of the batch in nats, summed; at least in float32."""
    logits = model(**batch.inputs).logits
    counted = batch.targets != IGNORED
    logits = (logits[:, :-1] if batch.causal else logits)[counted]
    precise = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(precise), batch.targets[counted], reduction="sum")


def _summed_loss(model: nn.Module, batch: PreparedBatch, number: int) -> Tensor:
    """Return `cross_entropy_sum`, if a gradient can be taken of it."""
    loss = cross_entropy_sum(model, batch)
    if not torch.isfinite(loss):
        raise InputError(
            f"the loss of calibration batch {number} is {loss.item()}; check its examples, or load the model in "
            f"float32 or bfloat16"
        )
    if not loss.requires_grad:
        raise InputError(f"no chosen module takes part in the loss of calibration batch {number}")
    return loss


@contextmanager
def frozen_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter with a gradient, gradients on; all of it undone at the end."""
    modes = {module: module.training for module in model.modules()}
    needs = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    for parameter in needs:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, needed in needs.items():
            parameter.requires_grad_(needed)


def _active_adapter(model: nn.Module) -> str:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    active = sorted({name for layer in layers for name in layer.active_adapters})
    if len(active) > 1:
        raise InputError(f"several adapters are active ({', '.join(active)}); say which one is meant")
    return active[0] if active else "default"


def _chosen_layers(model: nn.Module, modules: Iterable[str] | None, adapter: str) -> dict[str, LoraLayer]:
    """The layers by name, in module order; each has the adapter in use, apart from its base weight."""
    layers = lora_layers(model, adapter, modules)
    for name, layer in layers.items():
        if layer.merged or layer.disable_adapters or adapter not in layer.active_adapters:
            raise InputError(f"{name}: adapter {adapter!r} is merged, disabled or not active; unmerge or activate it")
    return layers


# --- as a table ---------------------------------------------------------------------------------------------------


def to_frame(sensitivities: Sequence[Sensitivity]) -> pd.DataFrame:
    """One row a singular value, with the columns `COLUMNS`."""
    import pandas as pd

    parts = []
    for item in sensitivities:
        values = {name: getattr(item, name).numpy() for name in _STATISTICS}
        parts.append(pd.DataFrame({"module": item.module, "index": range(len(item.sigma)), **values}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS))


def from_frame(frame: pd.DataFrame) -> list[Sensitivity]:
    """Return the statistics in a table of `to_frame`, modules in order of appearance.

    Of a CSV file every bit comes back if pandas reads it with ``float_precision="round_trip"``.

    Raises:
        InputError: a column is missing or not numeric, or the indices of a module are not 0, 1, …, r − 1.
    """
    missing = [name for name in COLUMNS if name not in frame]
    if missing:
        raise InputError(
            f"the table of sensitivities has no column {', '.join(missing)}; it needs {', '.join(COLUMNS)}"
        )
    sensitivities = []
    for module, rows in frame.groupby("module", sort=False):
        rows = rows.sort_values("index")
        if rows["index"].tolist() != list(range(len(rows))):
            raise InputError(f"the table of sensitivities does not hold every index of {module} once; measure again")
        try:
            values = {name: torch.tensor(rows[name].to_numpy(dtype="float64")) for name in _STATISTICS}
        except (TypeError, ValueError):
            raise InputError(f"the table of sensitivities holds what is no number in {module}; measure again") from None
        sensitivities.append(Sensitivity(str(module), **values))
    return sensitivities
