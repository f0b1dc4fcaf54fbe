"""AdaLoRA adapters read as plain LoRA: the same update, which every loader of LoRA understands.

AdaLoRA stores P diag(E) Q with ``lora_B (d_out, r)``, ``lora_E (r, 1)``, ``lora_A (r, d_in)``, of which its masks
(``rank_pattern``) keep some triplets, and applies ΔW = c · B (E∘A). c is alpha / (init_r + 1e-5), by the rank at the
beginning and not the one that is left; without an alpha, the rank that is left takes its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselora.errors import InputError
from sparselora.models.adapter_config import CONFIG, read_peft_config
from sparselora.models.adapter_files import AdapterFile, open_adapter
from sparselora.models.adapter_names import PREFIX, LoraModule
from sparselora.models.adapter_tensors import stored_tensors, weights_file
from sparselora.models.class_names import recorded_names
from sparselora.models.prompt_template import recorded_template

if TYPE_CHECKING:
    import torch

_KEY = re.compile(rf"^{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<part>[AEB])(?:\.[^.]+)?$")
_OWN_FIELDS = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
_OFFSET = 1e-5
"""Added to the rank by PEFT, against a division by 0."""


@dataclass(frozen=True)
class _ConvertedFile(AdapterFile):
    """An adapter whose tensors are not those of its file.

    Attributes:
        converted: every tensor by PEFT's key.
    """

    converted: dict[str, torch.Tensor] | None = None

    @cached_property
    def _stored(self) -> dict[str, torch.Tensor]:
        assert self.converted is not None
        return self.converted


def open_as_lora(folder: str | Path) -> AdapterFile:
    """Read a PEFT LoRA adapter to edit it, or an AdaLoRA adapter as the plain LoRA of the same update.

    Raises:
        InputError: what `open_adapter` refuses; an AdaLoRA on embeddings, with an incomplete triplet, or with masks
            that do not fit its factors.
    """
    folder = Path(folder)
    config = read_peft_config(folder)
    if config.get("peft_type") != "ADALORA":
        return open_adapter(folder)
    path = weights_file(folder)
    stored = stored_tensors(path)
    triplets: dict[str, dict[str, torch.Tensor]] = {}
    other: dict[str, torch.Tensor] = {}
    for key, tensor in stored.items():
        match = _KEY.match(key)
        if match:
            triplets.setdefault(match["module"], {})[match["part"]] = tensor
        elif ".lora_" in key:
            raise InputError(
                f"adapter {folder.name} holds {key}; only linear layers of an AdaLoRA adapter can be converted"
            )
        else:
            other[key] = tensor
    if not triplets:
        raise InputError(f"adapter {folder.name} holds no lora_A, lora_E and lora_B weights")
    masks = _masks(folder, config)
    tensors: dict[str, torch.Tensor] = {}
    entries: dict[str, LoraModule] = {}
    for module, triplet in triplets.items():
        A, B, scaling = _plain_factors(folder, config, module, triplet, masks.get(module))
        entry = LoraModule(f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight", scaling)
        tensors |= {entry.key_A: A, entry.key_B: B}
        entries[module] = entry
    tensors |= other
    adapter = _ConvertedFile(
        path,
        {name: value for name, value in config.items() if name not in _OWN_FIELDS} | {"peft_type": "LORA"},
        {key: key for key in tensors},
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        entries,
        recorded_names(folder),
        recorded_template(folder),
        tensors,
    )
    _ = adapter.tensors  # damage is found here, before anything is written
    return adapter


def _masks(folder: Path, config: dict[str, Any]) -> dict[str, list[bool]]:
    """Return the masks by module, from the names of their lora_E."""
    pattern = config.get("rank_pattern") or {}
    masks = {}
    for name, mask in pattern.items():
        if not isinstance(mask, list) or not all(isinstance(value, bool) for value in mask):
            raise InputError(
                f"adapter {folder.name}, {CONFIG}: rank_pattern of an AdaLoRA adapter must be lists of true and false, "
                f"got another value for {name}; save the adapter again"
            )
        masks[name.partition(".lora_E")[0]] = mask
    return masks


def _plain_factors(
    folder: Path, config: dict[str, Any], module: str, triplet: dict[str, torch.Tensor], mask: list[bool] | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return ``lora_A (r, d_in)`` with E in it, ``lora_B (d_out, r)``, and the scaling.

    In float32 where they are stored in 16 bits, so that the product is not rounded; a module without a triplet left
    gets one of zeros, for PEFT has no rank 0.
    """
    import torch

    if set(triplet) != {"A", "E", "B"}:
        raise InputError(
            f"adapter {folder.name}: {module} has no lora_{min({'A', 'B', 'E'} - set(triplet))}; restore the file"
        )
    A, E, B = (triplet[part] for part in "AEB")
    if A.dim() != 2 or B.dim() != 2 or E.shape != (len(A), 1) or B.shape[1] != len(A):
        raise InputError(
            f"adapter {folder.name}: {module} has lora_A {tuple(A.shape)}, lora_E {tuple(E.shape)} and lora_B "
            f"{tuple(B.shape)}, which do not fit together; restore the file"
        )
    if mask is not None:
        if len(A) == len(mask):  # saved before its masks were applied
            index = torch.tensor(mask, dtype=torch.bool)
            A, E, B = A[index], E[index], B[:, index]
        if len(A) != sum(mask):
            raise InputError(
                f"adapter {folder.name}: {module} has rank {len(A)}, and its mask in {CONFIG} keeps {sum(mask)} of "
                f"{len(mask)}; the two files do not belong together"
            )
    alpha, first_rank = config.get("lora_alpha", 1), config.get("init_r", 12)
    for name, value in (("lora_alpha", alpha), ("init_r", first_rank)):
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
            raise InputError(f"adapter {folder.name}, {CONFIG}: {name} must be a number; correct it")
    scaling = (alpha if alpha > 0 else float(len(A))) / (first_rank + _OFFSET)
    kind = torch.promote_types(A.dtype, torch.float32)
    if len(A) == 0:
        return torch.zeros(1, A.shape[1], dtype=kind), torch.zeros(len(B), 1, dtype=kind), scaling
    return A.to(kind) * E.to(kind), B.to(kind), scaling
