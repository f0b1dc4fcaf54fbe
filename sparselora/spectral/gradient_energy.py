"""Gradients of a fresh LoRA on training rows, as inner products of blocks of rows: what ranks are suggested from.

At the start of training lora_B is 0 and ∂L/∂lora_B = s · G Aᵀ with G = ∂L/∂ΔW ``(d_out, d_in)``: G seen through the
random directions in A's rows, here orthonormal. Its left singular vectors are those along which the first steps move
the output (a randomised range finder), and G itself is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparselora.config.train import TrainConfig
from sparselora.data.batches import Collator
from sparselora.data.load import encode_rows, load_data
from sparselora.errors import InputError
from sparselora.evaluation.adapted_model import load_adapted_model
from sparselora.models.adapter_names import PREFIX
from sparselora.models.fresh_adapter import adapt_model
from sparselora.models.load import evaluating
from sparselora.models.lora import lora_layers, set_factors, weights
from sparselora.runs.progress import Progress
from sparselora.spectral.edit import ROWS, generator


@dataclass(frozen=True)
class ModuleGradients:
    """Gradients Y_i ``(d_out, r)`` of one module's lora_B, summed over the batches of block i of n.

    Attributes:
        gram: ``(n, n, r, r)``: Y_iᵀ Y_j.
    """

    d_out: int
    d_in: int
    gram: NDArray[np.float64]


def measure_gradients(config: TrainConfig, samples: int, blocks: int) -> tuple[str, dict[str, ModuleGradients]]:
    """Return the name of the data, and the gradients of every module that ``config`` would adapt.

    Args:
        config: model, data, target modules and seed; twice ``lora_r`` random directions are taken, or all
            that a module has.
        samples: training rows, drawn by the seed, in ``blocks`` of equal size.
    Raises:
        InputError: data, a model or modules that do not go together; too few rows; a loss that is not finite.
    """
    data = load_data(config)
    if samples > len(data.train):
        raise InputError(f"--samples {samples} is more than the {len(data.train)} training rows of {data.name}")
    order = generator(config.seed, ROWS).permutation(len(data.train))[:samples]
    loaded = load_adapted_model(config, None, len(data.labels))
    task_type = "CAUSAL_LM" if config.task == "causal_lm" else "SEQ_CLS"
    model, _ = adapt_model(loaded.model, config, task_type=task_type)
    model.to(loaded.device)
    layers = lora_layers(model)
    random = torch.Generator().manual_seed(config.seed)
    for layer in layers.values():
        A, B = weights(layer)
        # More directions than the rank, so that a module can be given more than it.
        wide = torch.randn(A.shape[1], min(2 * config.lora_r, A.shape[1], len(B)), generator=random)
        rows = torch.linalg.qr(wide)[0].T.contiguous().to(A)
        set_factors(layer, rows, B.new_zeros(len(B), len(rows)))
    examples = encode_rows(data.train.iloc[order], data, loaded.tokenizer, config)
    collator = Collator(loaded.tokenizer.pad_token_id, causal=False, longest=loaded.tokenizer.model_max_length)
    factors = [weights(layer)[1] for layer in layers.values()]
    sums: list[list[Tensor]] = []
    with evaluating(model), Progress(blocks, "block", "gradients") as progress:
        for part in np.array_split(np.arange(samples), blocks):
            total = [torch.zeros_like(B, dtype=torch.float64) for B in factors]
            for start in range(0, len(part), config.train_bsz):
                batch = collator.tensors([examples[i] for i in part[start : start + config.train_bsz]])
                inputs = {name: value.to(loaded.device) for name, value in batch.items()}
                with torch.autocast(loaded.device.type, torch.bfloat16, enabled=loaded.bf16):
                    loss = model(**inputs).loss
                if not bool(torch.isfinite(loss)):
                    raise InputError(f"the loss on {data.name} is {loss.item()}; load the model by --dtype fp32")
                for whole, gradient in zip(total, torch.autograd.grad(loss, factors)):
                    whole += gradient.double()
            sums.append([whole.cpu() for whole in total])
            progress.update()
    return data.name, {
        name.removeprefix(PREFIX): _module_gradients([block[i] for block in sums], weights(layer)[0].shape[1])
        for i, (name, layer) in enumerate(layers.items())
    }


def _module_gradients(blocks: Sequence[Tensor], d_in: int) -> ModuleGradients:
    stacked = torch.stack(list(blocks))  # (n, d_out, r)
    return ModuleGradients(stacked.shape[1], d_in, torch.einsum("ids,jdt->ijst", stacked, stacked).numpy())
