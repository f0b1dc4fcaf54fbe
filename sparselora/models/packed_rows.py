"""Proof that a model keeps the sequences of one row apart, where their positions begin again and no mask is given."""

from __future__ import annotations

from typing import Any

import torch

from sparselora.errors import InputError, one_line
from sparselora.models.load import evaluating

Tensor = torch.Tensor

_LENGTHS = (7, 12, 9)
_SHARE = 0.1
"""Largest change of the logits by what stands before a sequence in its row, as a share of the change where the row is
one sequence. SmolLM2-135M (sdpa, on a CPU) has 0.03 in bf16, by rounding, and 0.00000 in fp32; a model that does not
look at positions has 1."""


@torch.no_grad()
def check_packed_rows(model: Any) -> None:
    """Raise where a causal language model does not keep packed sequences apart.

    Two rows of random sequences, packed, against each sequence by itself. The control is the same rows as one sequence.

    Raises:
        InputError: the model attends, or carries a state, from one sequence to the next.
    """
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
    words = min(1000, model.config.get_text_config().vocab_size)
    sequences = [torch.randint(0, words, (1, n), generator=generator).to(device) for n in _LENGTHS]
    rows = torch.cat([torch.cat(sequences, dim=1), torch.cat(sequences[::-1], dim=1)])
    positions = [torch.arange(n, device=device) for n in _LENGTHS]
    restarting = torch.stack([torch.cat(positions), torch.cat(positions[::-1])])
    with evaluating(model):
        alone = [model(input_ids=ids, use_cache=False).logits.float() for ids in sequences]
        expected = torch.cat([torch.cat(alone, dim=1), torch.cat(alone[::-1], dim=1)])
        try:
            packed = model(input_ids=rows, position_ids=restarting, use_cache=False).logits.float()
        except TypeError as error:
            reason = one_line(str(error))[:160]
            raise InputError(
                f"packing is not supported for {type(model).__name__}, which takes no positions ({reason}); use "
                "group_by_length"
            ) from None
        joined = model(input_ids=rows, use_cache=False).logits.float()
    change, control = ((logits - expected).norm() for logits in (packed, joined))
    if not change <= _SHARE * control:
        raise InputError(
            f"packing is not supported for {type(model).__name__} with attention {model.config._attn_implementation}: "
            "the sequences of a row are not kept apart where their positions begin again (the logits change by "
            f"{float(change / control):.2f} of what they do in one sequence); use group_by_length"
        )
