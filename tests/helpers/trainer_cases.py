"""Trainers of transformers and TRL on a tiny model: plain, sparse, and with the sparse pass's definition as hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.handle import Handle, sparsify
from sparselora.contextual.trainers import SparsityCallback
from tests.helpers.byte_llama import byte_llama, byte_tokenizer
from tests.helpers.contextual_models import masked

Weights = dict[str, torch.Tensor]

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}A: {{ message['content'] }}\n"
    "{% endgeneration %}{% else %}Q: {{ message['content'] }}\n{% endif %}{% endfor %}"
)
SPARSITY: dict[str, Any] = {"layer_sparsity": {"layer.0-1": 0.75}, "seed": 5}
MODES: dict[str, dict[str, Any]] = {
    "svd": {"svd_rank": 4},
    "static": {},
    "surrogate": {"surrogate_rank": 4},
    "oracle": {},
    "random": {},
    "skip": {},
}


def config_of(mode: str, **more: Any) -> SparsityConfig:
    return (
        SparsityConfig(mode=mode) if mode == "dense" else SparsityConfig(mode=mode, **SPARSITY, **MODES[mode], **more)
    )


def lora_model() -> Any:
    """A random Llama of two layers and 258 tokens, float32, with a random LoRA."""
    torch.manual_seed(1)
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    return get_peft_model(byte_llama().float(), lora)


def sums() -> list[dict[str, str]]:
    return [{"prompt": f"Q: {i} and {i * i % 7}? ", "completion": f"A: {3 * i + 5}"} for i in range(12)]


def prompt_completion() -> Dataset:
    return Dataset.from_list(sums())


def conversations() -> Dataset:
    turns = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}] * 2
        for row in sums()
    ]
    return Dataset.from_list([{"messages": turn} for turn in turns])


def pairs() -> Dataset:
    rows = [row | {"chosen": row["completion"], "rejected": row["prompt"][:4]} for row in sums()]
    return Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows])


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": row["prompt"]} for row in sums()])


def calibration() -> list[dict[str, torch.Tensor]]:
    """The rows of `sums` as the model takes them, padded on the right."""
    rows = encoded()
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])

    ids, labels = padded("input_ids", 1), padded("labels", -100)
    return [{"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": labels}]


def encoded() -> list[dict[str, list[int]]]:
    tokenizer = byte_tokenizer()
    rows = []
    for row in sums():
        prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 1, "labels": -100}
    batch = {k: torch.tensor([row[k] + [v] * (length - len(row[k])) for row in rows]) for k, v in fills.items()}
    return batch | {"attention_mask": (batch["input_ids"] != 1).long()}


def summed_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss of the user's own: the squared one of transformers' loss per batch."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()).square()


def digits(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between random completions."""
    return [float(sum(map(ord, text)) % 17) / 17 for text in completions]


@dataclass(frozen=True)
class Case:
    """One trainer in one setting.

    Attributes:
        trainer: ``Trainer``, or the name of one of TRL's.
        arguments: of its configuration.
        options: of its constructor.
        data: its training data.
        masks_loss: the definition of the pass trains in this setting in place of ``arguments``' one; checkpointing
            computes the same thing twice, and hooks do not live as long.
    """

    name: str
    trainer: str
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    data: Callable[[], Any] = prompt_completion
    masks_loss: dict[str, Any] = field(default_factory=dict)


_STORED: dict[str, Any] = {"gradient_checkpointing": False}
_ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def _checkpointed(reentrant: bool) -> dict[str, Any]:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}


CASES = [
    Case("loss of the model", "Trainer", data=encoded),
    Case("accumulation", "Trainer", _ACCUMULATED, data=encoded),
    Case("label smoothing", "Trainer", {"label_smoothing_factor": 0.1}, data=encoded),
    Case("own loss function", "Trainer", options={"compute_loss_func": summed_loss}, data=encoded),
    Case("checkpointing", "Trainer", _checkpointed(False), data=encoded, masks_loss=_STORED),
    Case("checkpointing, reentrant", "Trainer", _checkpointed(True), data=encoded, masks_loss=_STORED),
    Case("completions", "SFTTrainer"),
    Case("assistant turns", "SFTTrainer", {"assistant_only_loss": True}, data=conversations),
    Case("packing, best fit", "SFTTrainer", {"packing": True, "max_length": 64}),
    Case("packing, wrapped", "SFTTrainer", {"packing": True, "max_length": 64, "packing_strategy": "wrapped"}),
    Case("no padding", "SFTTrainer", {"padding_free": True, "max_length": None}),
    Case("accumulation", "SFTTrainer", _ACCUMULATED),
    Case("label smoothing", "SFTTrainer", {"label_smoothing_factor": 0.1}),
    Case("dynamic fine-tuning", "SFTTrainer", {"loss_type": "dft"}),
    Case("own loss function", "SFTTrainer", options={"compute_loss_func": summed_loss}),
    Case("checkpointing", "SFTTrainer", _checkpointed(False), masks_loss=_STORED),
    Case("checkpointing, reentrant", "SFTTrainer", _checkpointed(True), masks_loss=_STORED),
    Case("pairs", "DPOTrainer", data=pairs),
    Case("pairs, checkpointing", "DPOTrainer", _checkpointed(False), data=pairs, masks_loss=_STORED),
    Case("sampling", "GRPOTrainer", options={"reward_funcs": digits}, data=prompts),
    Case("sampling, two updates", "GRPOTrainer", {"num_iterations": 2}, {"reward_funcs": digits}, prompts),
]


def build(case: Case, model: Any, folder: Path, **more: Any) -> Any:
    """The trainer of ``case``, with SGD: what it learns is its gradients."""
    settings: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.5,
        "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True, "report_to": "none",
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "seed": 0, "gradient_checkpointing": False,
    }  # fmt: skip
    settings |= case.arguments | more
    if case.trainer == "Trainer":
        options = {"data_collator": collate} | case.options
        arguments = TrainingArguments(**settings, remove_unused_columns=False)
        return Trainer(model, arguments, train_dataset=case.data(), **options)
    import trl

    kind = getattr(trl, case.trainer)
    configuration = getattr(trl, case.trainer.replace("Trainer", "Config"))
    settings["bf16"] = settings.get("bf16", False)
    if case.trainer == "GRPOTrainer":
        settings = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1} | settings
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return kind(
        model=model, args=configuration(**settings), train_dataset=case.data(), processing_class=tokenizer,
        **case.options,
    )  # fmt: skip


@dataclass
class Trained:
    """Result of a run: the adapter's weights, and the handle's latest choices and path."""

    weights: Weights
    choices: dict[Any, Any]
    packed_passes: int = 0
    losses: list[float] = field(default_factory=list)


def weights_of(model: Any) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def difference(a: Weights, b: Weights) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def train(case: Case, config: SparsityConfig | None, order: str, folder: Path, **more: Any) -> Trained:
    """Train by ``case``'s trainer, sparse if there is a ``config``.

    Args:
        order: ``trainer``: `sparsify` of the trainer; ``before`` and ``after``: of the model before and after the
            trainer is made, with `SparsityCallback`.
    """
    model = lora_model()
    handle: Handle | None = None
    batches = calibration()
    if config is not None and order == "before":
        handle = sparsify(model, config, calibration=batches, cache_dir=folder)
    trainer = build(case, model, folder / "run", **more)
    if config is not None and order != "before":
        target = trainer if order == "trainer" else trainer.model
        handle = sparsify(target, config, calibration=batches, cache_dir=folder)
    if handle is not None and order != "trainer":
        trainer.add_callback(SparsityCallback(handle))
    packed = _count_packed(handle)
    torch.manual_seed(7)
    trainer.train()
    choices = {} if handle is None else handle.choices()
    if handle is not None:
        handle.remove()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return Trained(weights_of(trainer.model), choices, len(packed), losses)


def _count_packed(handle: Handle | None) -> list[str]:
    """A list that grows with each pass through the layers on packed tokens."""
    calls: list[str] = []
    if handle is not None and handle._decoder is not None:
        original = handle._decoder._through_layers

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append("packed")
            return original(*args, **kwargs)

        handle._decoder._through_layers = counted  # type: ignore[method-assign]
    return calls


def train_masked(case: Case, choices: dict[Any, Any], folder: Path, **more: Any) -> Trained:
    """Train by the plain trainer, with hooks that leave out what a sparse pass leaves out."""
    model = lora_model()
    trainer = build(case, model, folder / "run", **(more | case.masks_loss))
    inner = trainer.model.get_base_model()
    original, original_loss = inner.forward, trainer.compute_loss
    labels: list[torch.Tensor | None] = [None]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (inner.training and torch.is_grad_enabled()):
            return original(*args, **kwargs)
        target = kwargs.get("labels")
        target = labels[0] if target is None else target
        if target is None:  # sampled completions, whose logits alone are asked for; the last one's predicts nothing
            target = kwargs["input_ids"].clone()
            target[:, : -kwargs["logits_to_keep"] + 1] = -100
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(kwargs["input_ids"]) if mask is None else mask
        batch = {"input_ids": kwargs["input_ids"], "attention_mask": mask, "labels": target}
        with masked(trainer.model, batch, choices):
            return original(*args, **kwargs)

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels[0] = None
        if hasattr(inputs, "get"):
            labels[0] = inputs.get("labels")
            if "completion_mask" in inputs and "input_ids" in inputs:
                labels[0] = torch.where(inputs["completion_mask"].bool(), inputs["input_ids"], -100)
        return original_loss(model, inputs, *args, **kwargs)

    inner.forward, trainer.compute_loss = forward, compute_loss
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return Trained(weights_of(trainer.model), choices)
