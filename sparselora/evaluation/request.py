"""Settings of one evaluation, frozen: the task, the model, the rows and the way to measure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparselora.models.adapter_config import read_peft_config

GSM8K = "openai/gsm8k:main"
TASKS = ("gsm8k", "causal_lm", "classification")


@dataclass(frozen=True)
class EvalRequest:
    """Settings of one evaluation, by the names of the flags of `eval`; task and data set as resolved.

    Attributes:
        task: one of `TASKS`.
        adapter: folder of an adapter; None for the model alone.
        eval_samples: rows to evaluate; 0 for all.
        eval_bsz: rows of a batch.
        fewshot: worked examples before each question (gsm8k).
        max_new_tokens: tokens that an answer may have (gsm8k).
        backend: what generates answers: auto, transformers or vllm.
    """

    task: str
    model: str
    adapter: str | None
    dataset: str
    eval_file: str | None
    text_fields: tuple[str, ...] | None
    label_field: str
    prompt_field: str
    completion_field: str
    template: str | None
    chat_template: str | None
    max_length: int
    eval_samples: int
    eval_bsz: int
    fewshot: int
    max_new_tokens: int
    backend: str
    device: str
    dtype: str
    seed: int

    @property
    def metrics_name(self) -> str:
        return f"metrics_{self.task}.json"

    @property
    def items_name(self) -> str:
        return f"items_{self.task}.csv"

    @property
    def generations_name(self) -> str:
        """File of the texts that were generated, apart: what is published need not hold them."""
        return f"generations_{self.task}.csv"

    @property
    def outputs(self) -> tuple[str, ...]:
        if self.task == "gsm8k":
            return self.metrics_name, self.items_name, self.generations_name
        return self.metrics_name, self.items_name

    @property
    def arguments(self) -> dict[str, Any]:
        """Settings that decide the result, by which a run is known; which of several GPUs it was does not matter."""
        arguments = asdict(self) | {"device": self.device.partition(":")[0]}
        if self.chat_template is None:  # so that a run from before there was one is known again
            del arguments["chat_template"]
        return arguments

    @property
    def is_gated(self) -> bool:
        """Return whether the adapter has gates that choose the active rank channels of each token."""
        return self.adapter is not None and (Path(self.adapter) / "token_gate.json").is_file()

    def adapter_config(self) -> dict[str, Any]:
        """Read the adapter's configuration; empty without an adapter.

        Raises:
            InputError: there is none in the folder, or it cannot be read.
        """
        return {} if self.adapter is None else read_peft_config(Path(self.adapter))
