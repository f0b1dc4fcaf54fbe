"""Settings of a training run: a dataclass, with strict YAML in and out.

Each field carries the rule its value must keep and a line of help (`Option`), so that a command builds its flags from
them. An unknown key, a key given twice, a value of another type or outside its range is an `InputError` of one line.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from sparselora.config import LARGEST_SEED
from sparselora.config.fields import Settings, Texts, as_tuple
from sparselora.config.novelty import ORACLE, GateConfig
from sparselora.config.sparsity import SparsityConfig
from sparselora.config.token_gates import TokenGateConfig
from sparselora.config.yaml_text import read_yaml
from sparselora.errors import InputError, shown, suggest
from sparselora.runs.former_names import FORMER_NAMES, with_present_names
from sparselora.runs.user_files import read_text

Task = Literal["classification", "causal_lm"]
Dtype = Literal["auto", "fp32", "bf16"]
Initialisation = Literal[
    "default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "eva", "lora_ga"
]
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
"""transformers' schedules, except for the two that follow the evaluation loss (reduce_lr_on_plateau, greedy)."""
TASKS: tuple[Task, ...] = get_args(Task)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

PRINCIPAL: frozenset[str] = frozenset({"pissa", "pissa_niter_4", "pissa_niter_16", "olora", "lora_ga"})
"""Values of ``init_lora_weights`` that move a part of the base weights into the adapter: without it, the model is not
the base."""


def _as_pairs(value: Any) -> Any:
    """Return a mapping as a tuple of ``name=value``; anything else as it is."""
    return tuple(f"{name}={setting}" for name, setting in value.items()) if isinstance(value, Mapping) else value


def _as_numbers(value: Any) -> Any:
    """Return a whole number, or a list of them, as texts; anything else as it is."""
    values = as_tuple((value,) if type(value) is int else value)
    return tuple(str(v) if type(v) is int else v for v in values) if isinstance(values, tuple) else values


Pairs = Annotated[Texts, BeforeValidator(_as_pairs)]
"""Settings as ``name=value``, or a mapping of them in a file."""
Layers = Annotated[Texts, BeforeValidator(_as_numbers)]
"""Numbers of layers and ranges of them, such as ``0 4-7``."""

SECTIONS: dict[str, dict[str, str]] = {
    "model": {
        "name": "model", "load_in_4bit": "load_in_4bit", "load_in_8bit": "load_in_8bit",
        "use_flash_attention_2": "use_flash_attention_2", "dtype": "dtype",
    },
    "lora": {
        "r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora",
        "use_dora": "use_dora", "init_lora_weights": "init_lora_weights", "target_modules": "target_modules",
        "exclude_modules": "exclude_modules", "layers_to_transform": "layers_to_transform",
    },
    "data": {
        "dataset_name": "dataset", "train_split": "train_split", "max_seq_length": "max_length",
        "eval_file": "eval_file", "prompt_field": "prompt_field", "completion_field": "completion_field",
        "template": "template", "chat_template": "chat_template", "train_samples": "train_samples",
        "eval_samples": "eval_samples", "dedupe": "dedupe", "shuffle_batches": "shuffle_batches",
    },
}  # fmt: skip
"""Sections of a configuration file whose keys are settings of `TrainConfig` under another name."""

ALIASES = {
    "per_device_train_batch_size": "train_bsz", "per_device_eval_batch_size": "eval_bsz",
    "gradient_accumulation_steps": "grad_accum", "learning_rate": "lr", "num_train_epochs": "epochs",
    "lr_scheduler_type": "scheduler", "lr_scheduler_kwargs": "scheduler_kwargs",
}  # fmt: skip
"""The Trainer's names of settings."""

NESTED: dict[str, type[SparsityConfig | GateConfig | TokenGateConfig]] = {
    "sparsity": SparsityConfig, "novelty": GateConfig, "token_gate": TokenGateConfig,
}  # fmt: skip
"""Sections of `TrainConfig` that are settings of their own; None (in a file null, as a flag ``none``) is without."""


def _flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with `SECTIONS` and `ALIASES` in our own names; a setting given by two names is an error."""
    flat: dict[str, Any] = {}

    def put(name: str, value: Any, source: str) -> None:
        if name in flat:
            raise InputError(f"{name} is given twice, once as {source}; give it once")
        flat[name] = value

    for key, value in with_present_names(values, "train").items():
        if key in SECTIONS and isinstance(value, Mapping):
            for inner, setting in value.items():
                if inner not in SECTIONS[key]:
                    near, names = suggest(str(inner), SECTIONS[key]), ", ".join(SECTIONS[key])
                    raise InputError(f"unknown key {shown(inner)} in section {key}{near} (known: {names})")
                put(SECTIONS[key][inner], setting, f"{key}.{inner}")
        else:
            put(str(ALIASES.get(key, key)), value, key)
    return flat


def _with_starting_rank(values: dict[str, Any]) -> dict[str, Any]:
    """Return ``values`` with the first rank of ``squeeze`` as ``lora_r``, where they give a squeeze and no rank."""
    first = str(values.get("squeeze")).partition(":")[0]
    if "lora_r" in values or not (first.isascii() and first.isdigit() and 0 < len(first) < 7):
        return values
    return values | {"lora_r": int(first)}


class TrainConfig(Settings):
    """Everything that decides a training run's result.

    ``sparsity`` None is plain PEFT, untouched; ``novelty`` None runs every backward pass; ``token_gate`` None has every
    rank channel active for every token. `from_dict` also understands the sections ``model``, ``lora`` and ``data`` and
    the names of the Trainer (`SECTIONS`, `ALIASES`).

    Raises:
        InputError: a value of another type or outside its range, settings that contradict one another.
    """

    title: ClassVar[str] = "the training settings"

    model: str | None = Field(None, description="hub name, local folder, GGUF file, minilm or smollm2")
    task: Task = Field("classification", description="kind of model and data")
    # data
    dataset: str | None = Field(None, description="data set: docstrings, glue/<task>, or a file")
    eval_file: str | None = Field(None, description="held-out rows (default: every fifth row)")
    text_fields: Texts | None = Field(None, description="text columns (classification)")
    label_field: str = Field("label", description="label column")
    prompt_field: str = Field("prompt", description="prompt column")
    completion_field: str = Field("completion", description="completion column")
    template: str | None = Field(None, description="text around a prompt, with {prompt} in it")
    chat_template: str | None = Field(
        None, description="Jinja file or text that renders conversations (default: the tokenizer's)"
    )
    train_samples: int = Field(0, ge=0, description="training rows, drawn by seed; 0: all")
    eval_samples: int = Field(0, ge=0, description="held-out rows to evaluate; 0: all")
    dedupe: float | None = Field(
        None, gt=0, le=1, description="leave out training rows this similar (cosine of token triples) to an earlier one"
    )
    max_length: int = Field(512, ge=2, description="tokens after which a text is cut")
    packing: bool = Field(False, description="fill each row of a batch with several samples (causal_lm)")
    group_by_length: bool = Field(False, description="batch samples of similar length")
    shuffle_batches: bool = Field(
        False, description="keep consecutive rows together as batches, and draw the order of the batches alone"
    )
    streaming: bool = Field(
        False, description="read training rows from a jsonl file as batches need them, in place of holding all"
    )
    train_split: str = Field("train", description="training split of a hub data set")
    # adapter
    lora_r: int = Field(16, ge=1, description="LoRA rank")
    lora_alpha: float = Field(32.0, gt=0, description="LoRA alpha")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before lora_A")
    use_rslora: bool = Field(False, description="scale the update by alpha / sqrt(r)")
    use_dora: bool = Field(False, description="DoRA: a trained norm for each row of a weight; dense steps only")
    init_lora_weights: Initialisation = Field("default", description="PEFT's initialisation of the factors")
    target_modules: Texts | None = Field(
        None,
        description="names, all-linear or an expression (default: attention projections)",
    )
    exclude_modules: Texts | None = Field(None, description="modules to leave out: ends of names, or one expression")
    layers_to_transform: Layers | None = Field(None, description="layers to adapt, such as 0 4-7 (default: all)")
    adapter_on_context: bool = Field(
        True,
        description="adapter active on the whole prompt; false: an activated LoRA, from the template's closing text on "
        "(causal_lm)",
    )
    squeeze: str | None = Field(
        None, description="ranks in the course of training, the first in place of lora_r, as 64:16 or 64:32:16"
    )
    squeeze_ratio: float = Field(
        0.5, gt=0, lt=1, description="share of the steps in which the rank falls, by cuts as far apart as one another"
    )
    squeeze_budget: Literal["uniform", "global"] = Field(
        "uniform",
        description="one rank for every module, or the parameters of that spent where the updates need them",
    )
    squeeze_multiple: int = Field(8, ge=1, description="whose multiples the ranks of a global budget are")
    squeeze_warmup_ratio: float = Field(
        0.0, ge=0, lt=1, description="share of the steps in which lr rises again after each cut"
    )
    # optimization
    epochs: float = Field(1.0, gt=0, description="passes over the training data")
    max_steps: int = Field(0, ge=0, description="optimizer steps; 0: set by epochs")
    train_bsz: int = Field(8, ge=1, description="samples in a batch, per device")
    eval_bsz: int = Field(16, ge=1, description="samples in an evaluation batch, per device")
    grad_accum: int = Field(1, ge=1, description="batches in an optimizer step")
    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="share of steps in which lr rises")
    weight_decay: float = Field(0.0, ge=0, description="the optimizer's weight decay")
    scheduler: Scheduler = Field("linear", description="schedule of the learning rate")
    scheduler_kwargs: Pairs | None = Field(None, description="settings of the schedule, such as min_lr=1e-5")
    optim: str = Field("adamw_torch_fused", description="optimizer, by the Trainer's name, or muon")
    optim_args: Pairs | None = Field(None, description="settings of the optimizer, such as momentum=0.9")
    loraplus_lr_ratio: float | None = Field(None, gt=0, description="LoRA+: learning rate of lora_B over lora_A's")
    max_grad_norm: float = Field(1.0, ge=0, description="norm that gradients are clipped to; 0: not clipped")
    neftune_noise_alpha: float | None = Field(None, gt=0, description="NEFTune: size of the noise on embeddings")
    # machine
    load_in_4bit: bool = Field(False, description="4-bit frozen weights, causal_lm")
    load_in_8bit: bool = Field(False, description="8-bit frozen weights, causal_lm, dense steps only")
    use_flash_attention_2: bool = Field(False, description="compute attention with flash_attn")
    tf32: bool = Field(False, description="fp32 products in TF32 on an NVIDIA GPU")
    dataloader_num_workers: int = Field(0, ge=0, description="processes that prepare batches")
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    dtype: Dtype = Field("auto", description="of frozen weights and computation")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:n")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="seed of everything random")
    # what is written
    save_steps: int = Field(0, ge=0, description="steps between checkpoints; 0: none")
    eval_steps: int = Field(0, ge=0, description="steps between evaluations; 0: at end")
    logging_steps: int = Field(1, ge=1, description="steps between rows of the log")
    report_to: Literal["none", "wandb", "tensorboard", "trackio"] = Field(
        "none", description="tracker in addition to the CSV files"
    )
    generations: int = Field(0, ge=0, description="held-out prompts to answer at each evaluation, causal_lm")
    push_to_hub: bool = Field(False, description="upload the adapter when it is trained")
    hub_model_id: str | None = Field(None, description="repository to upload to, as owner/name")
    sparsity: SparsityConfig | None = None
    novelty: GateConfig | None = None
    token_gate: TokenGateConfig | None = None

    @field_validator(*NESTED, mode="before")
    @classmethod
    def _build_section(cls, section: Any, info: ValidationInfo) -> Any:
        return NESTED[str(info.field_name)].from_dict(section) if isinstance(section, Mapping) else section

    @field_validator("chat_template")
    @classmethod
    def _read_chat_template(cls, value: str | None) -> str | None:
        return None if value is None else chat_template_text(value)

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        self._check_token_gate()
        self._check_squeeze()
        self._check_quantised()
        self._check_adapter()
        for name in ("scheduler_kwargs", "optim_args"):
            for pair in getattr(self, name) or ():
                if not re.fullmatch(r"\w+=[^=,\s]+", pair):
                    raise InputError(f"{name} takes NAME=VALUE, such as min_lr=1e-5, got {shown(pair)}")
        if self.generations and self.task != "causal_lm":
            raise InputError(f"generations are texts of a language model; leave them out, got task {self.task}")
        if self.push_to_hub and not self.hub_model_id:
            raise InputError("push_to_hub needs hub_model_id, the repository to upload to, as owner/name")
        if self.hub_model_id and not self.push_to_hub:
            raise InputError("hub_model_id is given without push_to_hub, so nothing would be uploaded; give both")
        if self.load_in_4bit and self.sparsity is not None and self.sparsity.is_quantised:
            raise InputError(
                f"load_in_4bit and frozen_precision {self.sparsity.frozen_precision} are both given; fp8 products "
                "would store each weight in 16 bits again (8 for each direction): give one"
            )
        if self.packing and self.task != "causal_lm":
            raise InputError(f"packing is for task causal_lm, got task {self.task}")
        self._check_activated()
        if self.packing and (self.token_gate is not None or self.gated):
            gate = "token_gate" if self.token_gate is not None else "an enabled novelty gate"
            raise InputError(f"packing and {gate} are both given, which does not go together; give one")
        if self.packing and self.group_by_length:
            raise InputError("packing and group_by_length are both given; a packed row has no padding to save")
        self._check_batches()
        self._check_streaming()
        if self.chat_template is not None and self.task != "causal_lm":
            raise InputError(f"chat_template is for task causal_lm, got task {self.task}")
        if self.chat_template is not None and self.template is not None:
            raise InputError("template and chat_template are both given; one of them writes the prompts: give one")
        if self.template is not None and "{prompt}" not in self.template:
            raise InputError(f"template must have {{prompt}} in it, got {shown(self.template)}")
        return self

    def _check_batches(self) -> None:
        """Raise for a setting that would tear the batches of consecutive rows apart."""
        if not self.shuffle_batches:
            return
        obstacles = {
            "packing": self.packing,
            "group_by_length": self.group_by_length,
            "train_samples": self.train_samples > 0,
            "dedupe": self.dedupe is not None,
        }
        for obstacle, is_set in obstacles.items():
            if is_set:
                raise InputError(
                    f"shuffle_batches and {obstacle} are both given; the latter takes consecutive rows apart: give one"
                )
        if self.dataset is not None and self.eval_file is None:
            raise InputError(
                "shuffle_batches needs eval_file: without one every fifth row is held out, and no batch stays whole"
            )

    def _check_streaming(self) -> None:
        """Raise for what needs every training row at once."""
        if not self.streaming:
            return
        obstacles = {
            f"task {self.task}": self.task != "causal_lm",
            "packing": self.packing,
            "group_by_length": self.group_by_length,
            "dedupe": self.dedupe is not None,
            "adapter_on_context false": not self.adapter_on_context,
            "an enabled novelty gate": self.gated,
        }
        for obstacle, is_set in obstacles.items():
            if is_set:
                raise InputError(
                    f"streaming and {obstacle} are both given, which looks at every training row at once: give one"
                )
        if self.dataset is not None and self.eval_file is None:
            raise InputError("streaming needs eval_file: no rows are held out from the file that is trained on")

    def _check_quantised(self) -> None:
        for name, is_set in (("load_in_4bit", self.load_in_4bit), ("load_in_8bit", self.load_in_8bit)):
            if is_set and self.task != "causal_lm":
                raise InputError(f"{name} is for task causal_lm; a classifier's new head is not quantised")
            if is_set and self.init_lora_weights in PRINCIPAL:
                raise InputError(
                    f"{name} and init_lora_weights {self.init_lora_weights} are both given, which does not go "
                    "together: the rest of a weight would be quantised again, to another function"
                )
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("load_in_4bit and load_in_8bit are both given; give one")
        if self.load_in_8bit and self.sparsity is not None:
            raise InputError(
                "load_in_8bit and sparsity are both given; a sparse pass does not compute with 8-bit weights: use "
                "load_in_4bit, or leave one out"
            )

    def _check_adapter(self) -> None:
        """Raise for a kind of adapter and another setting that do not go together."""
        principal = self.init_lora_weights in PRINCIPAL
        kind = "use_dora" if self.use_dora else f"init_lora_weights {self.init_lora_weights}" if principal else None
        obstacles = {
            "token_gate": self.token_gate is not None,
            "adapter_on_context false": not self.adapter_on_context,
            "sparsity": self.sparsity is not None and self.use_dora,
            f"init_lora_weights {self.init_lora_weights}": self.use_dora and self.init_lora_weights != "default",
        }
        for obstacle, is_set in obstacles.items():
            if kind and is_set:
                raise InputError(f"{kind} and {obstacle} are both given, which does not go together; give one")
        if self.init_lora_weights == "orthogonal" and self.lora_r % 2:
            raise InputError(f"init_lora_weights orthogonal needs an even lora_r, got {self.lora_r}")
        for text in self.layers_to_transform or ():
            if not re.fullmatch(r"\d{1,5}(-\d{1,5})?", text):
                raise InputError(f"layers_to_transform takes layers and ranges, such as 0 4-7, got {shown(text)}")

    def _check_activated(self) -> None:
        if self.adapter_on_context:
            return
        if self.task != "causal_lm":
            raise InputError(f"adapter_on_context false is for task causal_lm, got task {self.task}")
        obstacles = {
            "packing": self.packing,
            "gradient_checkpointing": self.gradient_checkpointing,
            "token_gate": self.token_gate is not None,
            "an enabled novelty gate": self.gated,
        }
        for obstacle, is_set in obstacles.items():
            if is_set:
                raise InputError(
                    f"adapter_on_context false and {obstacle} are both given, which does not go together; give one"
                )

    def _check_token_gate(self) -> None:
        if self.token_gate is None:
            return
        if self.sparsity is not None:
            raise InputError(
                "token_gate and sparsity are both given; a sparse pass leaves out the modules that are gated: give one"
            )
        if self.gated:
            raise InputError(
                "token_gate and an enabled novelty gate are both given; gate tokens or backward passes, not both"
            )

    def _check_squeeze(self) -> None:
        ranks = self.squeeze_ranks
        if self.squeeze is None:
            for name in ("squeeze_ratio", "squeeze_budget", "squeeze_multiple", "squeeze_warmup_ratio"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise InputError(f"{name} is given without squeeze, which has the ranks; give it, as 64:16")
            return
        if ranks[0] != self.lora_r:
            raise InputError(
                f"squeeze {self.squeeze} begins at rank {ranks[0]}, and lora_r is {self.lora_r}; leave lora_r out"
            )
        if self.squeeze_budget == "global" and self.squeeze_multiple > ranks[-1]:
            raise InputError(
                f"squeeze_multiple must be at most the last rank of squeeze, {ranks[-1]}, got {self.squeeze_multiple}: "
                "every module gets that many channels"
            )
        if (
            self.squeeze_budget == "uniform"
            and self.squeeze_multiple != type(self).model_fields["squeeze_multiple"].default
        ):
            raise InputError("squeeze_multiple is for squeeze_budget global; the uniform rank is the one that is given")
        if self.use_dora or self.init_lora_weights in PRINCIPAL:
            kind = "use_dora" if self.use_dora else f"init_lora_weights {self.init_lora_weights}"
            raise InputError(
                f"squeeze and {kind} are both given; what is cut is B A, and there "
                + ("the norms of the weights" if self.use_dora else "a part of the base weights")
                + " would be cut with it: give one"
            )
        if self.token_gate is not None:
            raise InputError(
                "squeeze and token_gate are both given; a cut turns the rank channels that the gates choose from: "
                "give one"
            )
        if self.gated and self.novelty is not None and self.novelty.policy == ORACLE:
            raise InputError(
                f"squeeze and novelty policy {ORACLE} are both given; a cut changes the gradients that the policy "
                "compares: give one"
            )
        if self.squeeze_warmup_ratio and self.gated:
            raise InputError(
                "squeeze_warmup_ratio and an enabled novelty gate are both given; the gate's schedule counts accepted "
                "updates, not steps: give one"
            )

    @property
    def squeeze_ranks(self) -> tuple[int, ...]:
        """Return the ranks in the course of the training, the first where it begins; one alone without ``squeeze``."""
        if self.squeeze is None:
            return (self.lora_r,)
        parts = self.squeeze.split(":")
        if len(parts) < 2 or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
            raise InputError(f"squeeze must be ranks with colons between them, as 64:16, got {shown(self.squeeze)}")
        ranks = tuple(int(part) for part in parts)
        if min(ranks) < 1:
            raise InputError(f"squeeze must end at rank 1 or more, got {self.squeeze}; PEFT has no rank 0")
        for high, low in itertools.pairwise(ranks):
            if low >= high:
                raise InputError(
                    f"squeeze must fall from rank to rank, got {self.squeeze}: {low} is not below {high}; a rank above "
                    "that at the start cannot be reached by cutting"
                )
        return ranks

    @property
    def gated(self) -> bool:
        """Return whether backward passes are gated."""
        return self.novelty is not None and self.novelty.enable

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Return the numbers of the layers that are adapted; None for all."""
        if self.layers_to_transform is None:
            return None
        ends = [[int(end) for end in text.split("-")] for text in self.layers_to_transform]
        return tuple(sorted({layer for low, *high in ends for layer in range(low, (high or [low])[0] + 1)}))

    @property
    def seeded_sparsity(self) -> SparsityConfig | None:
        """Return the sparsity settings with the run's seed, where they set none of their own."""
        if self.sparsity is None or self.sparsity.seed is not None:
            return self.sparsity
        return self.sparsity.replace(seed=self.seed)

    def merge(self, overrides: Mapping[str, Any]) -> TrainConfig:
        """Return this configuration with ``overrides`` in place of its values; one that is None was not given.

        A section of `NESTED` may be a mapping of the settings that change in it (it begins at its defaults where this
        configuration has none), an object in place of the whole section, or the word ``none``.

        Raises:
            InputError: as for the constructor, and for an unknown name.
        """
        changes = with_present_names({k: v for k, v in overrides.items() if v is not None}, "train")
        changes = _with_starting_rank(changes)
        for name in NESTED:
            section, present = changes.get(name), getattr(self, name)
            if section == "none":
                changes[name] = None
            elif isinstance(section, Mapping):
                settings = present.to_dict() if present else {}
                section = with_present_names(section, name) if name in FORMER_NAMES else section
                changes[name] = settings | {key: value for key, value in section.items() if value is not None}
        return self.replace(**changes)

    @classmethod
    def _by_field(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return _with_starting_rank(_flattened(values))

    def to_dict(self) -> dict[str, Any]:
        """Return every setting, in plain types; a section as a mapping or None, and the seed of its draws."""
        sparsity = self.seeded_sparsity
        return super().to_dict() | {"sparsity": sparsity and sparsity.to_dict()}


def chat_template_text(value: str) -> str:
    """Return a chat template that is given as a file or as its text, which has braces.

    Raises:
        InputError: neither of the two.
    """
    text = value if "{" in value else read_text(value, f"chat_template {shown(value)}", remedy="name a Jinja file")
    if "{" not in text:
        raise InputError(
            f"chat_template {shown(value)} has no Jinja expression in it; give a chat template or its file"
        )
    return text


def read_sparsity(path: str | Path) -> SparsityConfig:
    """Return the sparsity settings of a YAML file: alone in it, or the section of a training configuration.

    Raises:
        InputError: the file is missing, or any of its settings is unknown or outside its range.
    """
    if "sparsity" in read_yaml(path):
        TrainConfig.from_yaml(path)
    return SparsityConfig.from_yaml(path)
