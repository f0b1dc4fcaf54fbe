"""An adapter merged into the weights of its base model, file by file: no model is built.

Each weight becomes W + scaling · B A in the arithmetic of PEFT's ``merge_and_unload``: the update in float32, added to
the weight in place. One file of weights is in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sparselora.config.token_gates import SETTINGS
from sparselora.errors import InputError, few
from sparselora.models.adapter_files import AdapterFile, read_adapter
from sparselora.models.adapter_names import PREFIX
from sparselora.models.model_files import INDEX, gguf_file, model_folder, read_config, weight_files
from sparselora.models.prompt_template import TEMPLATE_FILE, ChatTemplate, write_template
from sparselora.models.safetensors_header import read_header
from sparselora.runs.files import replacing, write_json, write_text
from sparselora.runs.folder import RECORD

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model")
"""Files of a model folder that go along: configurations, tokenizer, chat template; never code."""
CHAT_TEMPLATE = "chat_template.jinja"
"""The file of a chat template, which tokenizers prefer to one in their configuration."""
_WHOLE = ("trained in full", "weight of the base model")
"""Kinds of an adapter's tensors that take the place of one of the base's."""
_TIED = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Merge:
    """A merge whose files have been checked against one another, before anything is written.

    Attributes:
        base: folder of the base model.
        config: its configuration.
        adapter: adapter to merge.
        files: the base's files of weights.
        modules: name of a weight in those files → module of the adapter that changes it.
        replaced: name of a tensor in those files → key of the adapter's tensor that takes its place.
    """

    base: Path
    config: dict[str, Any]
    adapter: AdapterFile
    files: tuple[Path, ...]
    modules: Mapping[str, str]
    replaced: Mapping[str, str]

    def outputs(self) -> tuple[str, ...]:
        """Return the names of the files that `write` writes."""
        index = (INDEX,) if len(self.files) > 1 else ()
        record = (TEMPLATE_FILE,) if self.adapter.template is not None else ()
        template = (CHAT_TEMPLATE,) if self.chat_template is not None else ()
        copied = (path.name for path in self._copied())
        return (*(path.name for path in self.files), *index, *copied, *record, *template, "config.json")

    @property
    def chat_template(self) -> str | None:
        """Text of the chat template that the adapter was trained with, which takes the place of the base's."""
        return self.adapter.template.jinja if isinstance(self.adapter.template, ChatTemplate) else None

    def _copied(self) -> list[Path]:
        left_out = {"config.json", INDEX, "adapter_config.json", RECORD}
        if self.adapter.template is not None:
            left_out.add(TEMPLATE_FILE)
        if self.chat_template is not None:
            left_out.add(CHAT_TEMPLATE)
        paths = {path for pattern in _COPIED for path in self.base.glob(pattern) if path.is_file()}
        return sorted(path for path in paths if path.name not in left_out)

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Write the merged model to ``folder``, its floating-point tensors in ``dtype`` (None: each in its own)."""
        places: dict[str, str] = {}
        size = 0
        for path in self.files:
            tensors: dict[str, torch.Tensor] = {}
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensors[name] = self._merged(name, file.get_tensor(name), dtype)
            places |= dict.fromkeys(tensors, path.name)
            size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            with replacing(folder / path.name) as part:
                save_file(tensors, part, metadata={"format": "pt"})
        if len(self.files) > 1:
            write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
        for path in self._copied():
            with replacing(folder / path.name) as part:
                shutil.copyfile(path, part)
        if self.adapter.template is not None:
            write_template(folder, self.adapter.template)
        if self.chat_template is not None:
            write_text(folder / CHAT_TEMPLATE, self.chat_template)
        changes = {} if dtype is None else {"dtype": _NAMES[dtype]}
        without = {"torch_dtype"} if changes else set()
        config = {name: value for name, value in self.config.items() if name not in without}
        write_json(folder / "config.json", config | changes)

    def _merged(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        kept_dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if name in self.replaced:
            tensor = self.adapter.tensors[self.replaced[name]].clone().contiguous()
        tensor = tensor.to(kept_dtype)
        if name not in self.modules:
            return tensor
        entry = self.adapter.entries[self.modules[name]]
        A, B = (self.adapter.tensors[key].float() for key in (entry.key_A, entry.key_B))
        update = B @ A
        if entry.is_embedding or self.adapter.config.get("fan_in_fan_out"):
            update = update.T
        if not tensor.isfinite().all():
            raise InputError(f"{name} of model {self.base.name} holds NaN or infinite values; the weights are damaged")
        tensor += update * entry.scaling
        if not tensor.isfinite().all():
            raise InputError(f"{name} is not finite with the update of the adapter in {tensor.dtype}; use --dtype fp32")
        return tensor


def open_merge(model: str, adapter: str) -> Merge:
    """Read what is merged, and check that the two belong together.

    Raises:
        InputError: weights that are not plain numbers (GGUF, a quantised checkpoint), an adapter that is no plain
            LoRA (`read_adapter`, token gates, an activated LoRA, a trained bias of lora_B), modules that the model has
            no weights for, or that share them with others.
    """
    if gguf_file(model) is not None:
        raise InputError(f"model {model!r} is a GGUF file, whose weights are quantised; merge into its original")
    base = model_folder(model)
    config, opened = read_config(base), read_adapter(adapter)
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise InputError(
            f"model {model!r} is quantised ({method}), and a merged weight would be rounded once more; merge into its "
            "original of 16 or 32 bits"
        )
    if (Path(adapter) / SETTINGS).is_file():
        raise InputError(f"adapter {opened.name} is gated per token; merge the adapter_static next to it")
    if opened.config.get("alora_invocation_tokens"):
        raise InputError(f"adapter {opened.name} is active on a part of a text only (activated), and no weight is")
    files = tuple(weight_files(base))
    shapes = {tensor.name: tuple(tensor.shape) for path in files for tensor in read_header(path)}
    modules = {_weight(opened, module, shapes): module for module in opened.entries}
    _refuse_shared(opened, config, set(modules), shapes)
    replaced = {}
    for key, kind in opened.carried.items():
        if kind.startswith("LoRA of"):
            continue
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if kind not in _WHOLE or shapes.get(name) != opened.shapes[key]:
            raise InputError(
                f"adapter {opened.name} has {name} ({kind}, {opened.shapes[key]}), for which the files of model "
                f"{model!r} have no place; merge by PEFT's merge_and_unload"
            )
        replaced[name] = key
    _refuse_shared(opened, config, set(replaced), shapes)
    _ = opened.tensors  # damage is found here, before anything is written
    return Merge(base, config, opened, files, modules, replaced)


def _weight(adapter: AdapterFile, module: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the name of the weight that a module of the adapter changes, in the base's files."""
    entry = adapter.entries[module]
    A, B = adapter.shapes[entry.key_A], adapter.shapes[entry.key_B]
    # A file of the body alone has no name of the body before the others.
    names = [f"{module}.weight", f"{module.partition('.')[2]}.weight"]
    name = next((name for name in names if name in shapes), None)
    if name is None:
        if names[0] in _TIED:
            raise InputError(
                f"adapter {adapter.name} changes {module}, whose weight is the embedding's as well; a merged one would "
                "change both: save the base with tie_word_embeddings false"
            )
        raise InputError(
            f"adapter {adapter.name} changes {module}, and the model has no {names[0]}; it has {few(list(shapes))}"
        )
    sides = (B[0], A[1]) if len(A) == len(B) == 2 else ()
    is_turned = entry.is_embedding or bool(adapter.config.get("fan_in_fan_out"))
    if shapes[name] != (sides[::-1] if is_turned else sides):
        raise InputError(
            f"adapter {adapter.name} changes {module} by {sides}, and the model's weight is {shapes[name]}; name the "
            "model that it was trained on"
        )
    return name


def _refuse_shared(
    adapter: AdapterFile, config: Mapping[str, Any], changed: set[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise where an embedding that changes is the output layer's weight too."""
    embeddings = [name for name in changed if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))]
    is_tied = config.get("tie_word_embeddings", not any(name in shapes for name in _TIED))
    tied = [*embeddings, *(name for name in changed if name in _TIED)]
    if tied and is_tied:
        raise InputError(
            f"adapter {adapter.name} changes {tied[0]}, which embedding and output layer share "
            "(tie_word_embeddings); a merged one would change both: save the base with tie_word_embeddings false"
        )


def describe(merge: Merge) -> dict[str, Any]:
    """Return what a merge changes: counts of tensors, for the record of the run."""
    names = sum(len(read_header(path)) for path in merge.files)
    return {"tensors": names, "merged": len(merge.modules), "replaced": len(merge.replaced)}
