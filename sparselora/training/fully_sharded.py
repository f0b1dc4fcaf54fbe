"""`train` over a base that FSDP2 shards, where `accelerate launch --use_fsdp` asks for it.

The model is sharded as accelerate shards it, before it is made sparse and before the Trainer sees it: a card never
holds it whole. Adapter and optimizer are gathered to be saved, and read again by any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.environment import parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import OPTIMIZER_NAME

from sparselora.config.train import TrainConfig
from sparselora.contextual.sharding import is_unit
from sparselora.errors import InputError

_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Those whose steps on shards were compared with one process's."""
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
"""The first process gets what is trained, whole, in host memory."""


def wants_shards() -> bool:
    """Return whether accelerate was told to shard."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def is_sharded(model: Any) -> bool:
    """Return whether `shard` was called for ``model``."""
    return is_unit(model)


def check_shards(config: TrainConfig) -> None:
    """Raise for settings that do not go with shards.

    Raises:
        InputError: settings of the run or of accelerate; it names them.
    """
    obstacles = {
        f"task {config.task}": config.task != "causal_lm",
        "load_in_4bit": config.load_in_4bit,
        "load_in_8bit": config.load_in_8bit,
        "use_dora": config.use_dora,
        f"init_lora_weights {config.init_lora_weights}": config.init_lora_weights != "default",
        "adapter_on_context false": not config.adapter_on_context,
        "token_gate": config.token_gate is not None,
        "an enabled novelty gate": config.gated,
        "squeeze": config.squeeze is not None,
        "neftune_noise_alpha": config.neftune_noise_alpha is not None,
        "loraplus_lr_ratio": config.loraplus_lr_ratio is not None,
        f"optim {config.optim}": config.optim not in _OPTIMIZERS,
    }
    for obstacle, is_set in obstacles.items():
        if is_set:
            raise InputError(
                f"{obstacle} does not go with accelerate's FSDP (docs/many_gpus.md); leave it out, or launch with DDP"
            )
    plugin = FullyShardedDataParallelPlugin()
    settings = {
        "fsdp_version 1": plugin.fsdp_version != 2,
        "fsdp_auto_wrap_policy other than TRANSFORMER_BASED_WRAP": os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper()
        != "TRANSFORMER_BASED_WRAP",
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing (gradient_checkpointing is ours)": plugin.activation_checkpointing,
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
    }
    for setting, is_set in settings.items():
        if is_set:
            raise InputError(
                f"train does not run with accelerate's {setting}; its settings are fsdp_version 2, "
                "fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP, and the others false"
            )


def shard(model: PeftModel, *, bf16: bool) -> None:
    """Shard ``model``, which is in host memory, block by block onto the card of each process.

    Weights keep their dtypes, as on one card: the adapter is in float32 next to a base in bfloat16.

    Args:
        bf16: the Trainer will compute in bfloat16 autocast.
    """
    plugin = FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", fsdp_plugin=plugin)
    fsdp2_prepare_model(accelerator, model)


def whole_adapter(model: Any) -> dict[str, Any]:
    """Return the trained tensors by their names in ``model``, whole; empty but in the first process, and every process
    must call it."""
    return get_model_state_dict(model, options=_WHOLE)


def whole_moments(model: Any, optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's state, whole; empty but in the first process, and every process must call it."""
    return get_optimizer_state_dict(model, _plain(optimizer), options=_WHOLE)


def load_moments(model: Any, optimizer: Any, folder: str) -> None:
    """Read what `whole_moments` returned from the checkpoint in ``folder``."""
    state = torch.load(Path(folder, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
    set_optimizer_state_dict(model, _plain(optimizer), state, options=_WHOLE)


@torch.no_grad()
def load_adapter(model: Any, folder: str) -> None:
    """Read the adapter of a checkpoint into the shards.

    Raises:
        InputError: it is of other modules.
    """
    tensors: Mapping[str, torch.Tensor] = load_file(Path(folder, SAFETENSORS_WEIGHTS_NAME))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = name.replace(f".{model.active_adapter}.", ".")
        if key not in tensors:
            raise InputError(f"the checkpoint {folder} has no {key}; remove it, or begin again by --overwrite")
        assert isinstance(parameter, DTensor)
        whole = tensors[key].to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
