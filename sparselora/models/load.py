"""Load a classifier or a causal language model with its tokenizer, on a device, and check what was loaded."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name

from sparselora.errors import InputError, shown
from sparselora.models.four_bit import is_4bit, keep_storage
from sparselora.models.gguf_header import is_gguf, read_gguf_header
from sparselora.models.gguf_models import gguf_place, mend
from sparselora.models.model_files import find_model
from sparselora.models.packaged import PACKAGES
from sparselora.models.quiet_loading import quiet_loading
from sparselora.runs.process import process_rank

_LOG = logging.getLogger("sparselora")
"""What a user should know of a model that is used all the same; without a handler, Python writes it to stderr."""


def resolve_device(device: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:n`` as a device that is there; to be called before CUDA is first used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:n") from None
    if resolved.type not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:n")
    count = torch.cuda.device_count() if resolved.type == "cuda" else 0
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        raise InputError(f"device {device!r} is not there: {count} CUDA devices found; use --device cpu")
    if resolved.index:
        # The Trainer uses the first visible device, so make the chosen one the only one.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[resolved.index]
    return torch.device(resolved.type)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or ``cpu``, as it stands in the record of a run."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def is_bf16(dtype: str, device: torch.device) -> bool:
    """Return whether ``--dtype`` means bfloat16 on this device: ``auto`` does on CUDA."""
    return dtype == "bf16" or (dtype == "auto" and device.type == "cuda")


def is_main_process() -> bool:
    """Return whether this process speaks for all that `accelerate launch` or torchrun started."""
    return process_rank() == 0


def load_classifier(model: str, num_labels: int) -> tuple[nn.Module, Any]:
    """A float32 sequence classifier of ``num_labels`` classes, and its tokenizer.

    A head of that many classes is kept as it is; where there is none, or one of another size (said on stderr), a fresh
    one is drawn from torch's global generator: seed it first. The model pads as the tokenizer does, and the tokenizer's
    ``model_max_length`` is at most what the model has positions for.

    Raises:
        InputError: no such model here or on the hub, one that cannot be loaded as a classifier, whose weights are
            missing, do not fit, or are not finite, or a tokenizer without words or padding.
    """
    loaded, tokenizer = _load(
        transformers.AutoModelForSequenceClassification,
        model,
        "as a classifier",
        num_labels=num_labels,
        dtype=torch.float32,
    )
    if tokenizer.pad_token is None:
        raise InputError(f"model {model!r} has no padding token, so sentences cannot be batched; use an encoder")
    return loaded, tokenizer


def load_causal_lm(
    model: str,
    dtype: torch.dtype = torch.float32,
    *,
    in_4bit: bool = False,
    in_8bit: bool = False,
    flash_attention: bool = False,
) -> tuple[nn.Module, Any]:
    """A causal language model with its weights in ``dtype``, in 4 bits (NF4) or in 8 (LLM.int8), and its tokenizer.

    A tokenizer without padding pads with EOS. The key-value cache, which training has no use for, is off. Weights in 4
    bits keep their storage, in evaluation too (`sparselora.models.four_bit`).

    Raises:
        InputError: no such model here or on the hub, one that cannot be loaded as a causal language model (an encoder
            among them), weights that are missing, do not fit, or are not finite, a tokenizer without words or without
            EOS, a package that is not installed.
    """
    options: dict[str, Any] = {"dtype": dtype}
    for wanted, package, why in (
        (in_4bit, "bitsandbytes", "load_in_4bit"), (in_8bit, "bitsandbytes", "load_in_8bit"),
        (flash_attention, "flash_attn", "use_flash_attention_2")
    ):  # fmt: skip
        if wanted and importlib.util.find_spec(package) is None:
            raise InputError(f"{why} needs the package {package}; install it, or set {why}: false")
    if in_8bit:
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for every product
    if in_4bit or in_8bit:
        name = "load_in_4bit" if in_4bit else "load_in_8bit"
        if model not in PACKAGES and is_gguf(Path(find_model(model))):
            raise InputError(f"{name} quantises a model, and {model!r} is a quantised file; leave it out")
        options["quantization_config"] = (
            transformers.BitsAndBytesConfig(load_in_8bit=True)
            if in_8bit
            else transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=True,
            )
        )  # fmt: skip
    if flash_attention:
        options["attn_implementation"] = "flash_attention_2"
    loaded, tokenizer = _load(transformers.AutoModelForCausalLM, model, "as a causal language model", **options)
    if in_4bit and not any(is_4bit(weight) for weight in loaded.parameters()):
        raise InputError(f"model {model!r} is quantised otherwise than in 4 bits; leave load_in_4bit out")
    if in_8bit and not any(weight.dtype == torch.int8 for weight in loaded.parameters()):
        raise InputError(f"model {model!r} is quantised otherwise than in 8 bits; leave load_in_8bit out")
    if tokenizer.eos_token is None:
        raise InputError(f"the tokenizer of model {model!r} has no end-of-sequence token, so no text would end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        cast(Any, loaded.config).get_text_config().pad_token_id = tokenizer.pad_token_id
    cast(Any, loaded.config).use_cache = False
    return loaded, tokenizer


_ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "electra", "camembert"})
"""Families that transformers also offers as causal models, for a use that is not ours."""


def _load(auto_class: Any, model: str, what: str, **options: Any) -> tuple[Any, Any]:
    """``auto_class`` from ``model`` and its tokenizer, both checked for what every task needs."""
    source, causal = find_model(model), auto_class is transformers.AutoModelForCausalLM
    header = read_gguf_header(Path(source)) if is_gguf(Path(source)) else None
    with quiet_loading():
        try:
            # A name that is nowhere fails here, once.
            place = {"pretrained_model_name_or_path": source} if header is None else gguf_place(header)
            config = transformers.AutoConfig.from_pretrained(**place, trust_remote_code=False)
            _check_dropout(model, config)
            _refuse_packed_integers(model, config)
            if causal and config.model_type in _ENCODERS and getattr(config, "is_decoder", None) is False:
                raise InputError(f"model {model!r} is an encoder ({config.model_type}); use task classification")
            tokenizer = transformers.AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
            method = _fp8_method(config)
            if method:
                # By itself transformers does so only where there is no GPU for its own fp8 layers, which have no LoRA.
                options["quantization_config"] = transformers.FineGrainedFP8Config.from_dict(
                    {**method, "dequantize": True}
                )
            # Of sizes that do not fit the report is wanted, not transformers' error, which does not name them.
            loaded, report = auto_class.from_pretrained(
                **place, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
        except InputError:
            raise
        except Exception as error:  # missing, offline, no weights, unknown architecture: the library raises many kinds
            reason = " ".join(str(error).split())
            if "trust_remote_code" in reason:
                raise _needs_code(model) from None
            raise InputError(
                f"model {model!r} could not be loaded {what} ({reason[:160]}); "
                f"use a local folder, a GGUF file, {' or '.join(PACKAGES)}, or a hub name while online"
            ) from None
    if header is None:
        _check_tokenizer_class(model, source)
    else:
        mend(loaded, tokenizer, header)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where it finds no file
        raise InputError(f"model {model!r} has no tokenizer; put tokenizer.json next to its weights")
    _check_report(model, loaded, report, [] if causal else head_modules(loaded))
    _check_blocks(model, loaded, method)
    for name, weight in loaded.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise InputError(f"model {model!r} holds NaN or infinite values in {name}; the weights are damaged")
    if tokenizer.pad_token_id is not None:  # a decoder's classifier looks there for a text's last token
        loaded.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = min(tokenizer.model_max_length, _positions(loaded))
    keep_storage(loaded)
    tokenizer.embedding_rows = loaded.get_input_embeddings().weight.shape[0]  # for `sparselora.data.tokens.check_ids`
    return loaded, tokenizer


def _refuse_packed_integers(model: str, config: Any) -> None:
    """Refuse a checkpoint of GPTQ or AWQ, whose layers no LoRA here has been tried on."""
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
    if (name := str(getattr(method, "value", method)).lower()) in ("gptq", "awq"):
        raise InputError(
            f"model {model!r} is quantised by {name}, which is not supported; take its original with load_in_4bit"
        )


def _fp8_method(config: Any) -> dict[str, Any]:
    """Settings of a checkpoint whose weights are in fp8 with a scale for each block; {} for another."""
    stored = getattr(config, "quantization_config", None)
    return dict(stored) if isinstance(stored, Mapping) and stored.get("quant_method") == "fp8" else {}


def _check_blocks(model: str, loaded: nn.Module, method: Mapping[str, Any]) -> None:
    """Refuse sides that no whole number of blocks makes: transformers takes the blocks for smaller ones there."""
    block = method.get("weight_block_size")
    if not isinstance(block, Sequence) or len(block) != 2:
        return
    skipped = [*(method.get("modules_to_not_convert") or []), "lm_head"]
    for name, module in loaded.named_modules():
        if not isinstance(module, nn.Linear) or any(entry in name for entry in skipped):
            continue
        sides = tuple(module.weight.shape)
        if sides[0] % block[0] or sides[1] % block[1]:
            raise InputError(
                f"model {model!r} is stored in fp8 in blocks of {_size(block)}, and {name} is {_size(sides)}, no whole "
                "number of them; convert the model to bf16 first"
            )


def _check_dropout(model: str, config: Any) -> None:
    """Refuse a dropout in config.json that is no probability: transformers reads it when the first step has begun."""
    text = config.get_text_config()
    try:
        defaults = type(text)()
    except Exception:  # a configuration made of others has no defaults of its own
        return
    for name, value in vars(text).items():
        usual = getattr(defaults, name, None)
        if not (name.endswith(("dropout", "dropout_prob", "pdrop")) and type(usual) in (int, float)):
            continue
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise InputError(f"model {model!r}: {name} in config.json must be a number from 0 to 1, got {shown(value)}")


def _needs_code(model: str) -> InputError:
    return InputError(
        f"model {model!r} needs code of its own (auto_map in its files), and no model's code is run; use a model whose "
        "architecture and tokenizer transformers has"
    )


def _check_tokenizer_class(model: str, source: str) -> None:
    """Raise where a tokenizer's class is code of the model's: transformers then takes the architecture's usual one."""
    settings = get_tokenizer_config(source)
    named = settings.get("tokenizer_class")
    if "AutoTokenizer" in (settings.get("auto_map") or {}) and (not named or tokenizer_class_from_name(named) is None):
        raise _needs_code(model)


# --- which weights were loaded ---


def _check_report(model: str, loaded: Any, report: dict[str, Any], head: Sequence[str]) -> None:
    """Raise where a weight of the model is not from its file: it would be a random one.

    Tied weights and buffers that are not saved are no part of transformers' ``report``.

    Args:
        head: top-level modules that may be fresh.
    """
    missing = {str(key) for key in report["missing_keys"]}
    mismatched = {str(key): (tuple(stored), tuple(built)) for key, stored, built in report["mismatched_keys"]}
    unexpected = sorted(map(str, report["unexpected_keys"]))

    def in_head(key: str) -> bool:
        return key.partition(".")[0] in head

    if lacking := sorted(key for key in missing if not in_head(key)):
        others = f"; its files have {_listed(unexpected)}, which the model lacks" if unexpected else ""
        raise InputError(
            f"model {model!r} has no weights for {_listed(lacking)}, which would stay random{others}; check its "
            "config.json (model_type) and weights"
        )
    if wrong := sorted(key for key in mismatched if not in_head(key)):
        stored, built = mismatched[wrong[0]]
        raise InputError(
            f"model {model!r} has weights of other sizes than its config.json says: {_listed(wrong)}, the first of "
            f"them {_size(stored)} and not {_size(built)}; they would stay random, so restore the configuration"
        )
    if errors := report.get("error_msgs"):
        raise InputError(f"model {model!r} could not be loaded: {' '.join(str(errors[0]).split())[:160]}")
    _check_unexpected(model, loaded, unexpected, head)
    if (fresh := sorted(key for key in mismatched if in_head(key))) and is_main_process():
        stored, built = mismatched[fresh[0]]
        _LOG.warning(
            f"model {model!r} has a head of another size ({fresh[0]} is {_size(stored)}, wanted {_size(built)}): "
            "it gets a fresh one"
        )


def _check_unexpected(model: str, loaded: Any, unexpected: Sequence[str], head: Sequence[str]) -> None:
    """Raise where weights that were left out are the model's own body: further layers of it, or all of it again."""
    prefix = loaded.base_model_prefix + "."
    names = [name for name, _ in loaded.named_parameters() if name.partition(".")[0] not in head]
    body = {name.removeprefix(prefix) for name in names}
    of_any_layer = {_LAYER_NUMBER.sub("#", name) for name in body}
    if further := [key for key in unexpected if _LAYER_NUMBER.sub("#", key.removeprefix(prefix)) in of_any_layer]:
        raise InputError(
            f"model {model!r} has weights for {_listed(further)}, more layers than its config.json says; "
            "restore the configuration"
        )
    twins: dict[str, set[str]] = {}
    for key in unexpected:
        parts = key.split(".")
        for start in range(len(parts)):
            if (ending := ".".join(parts[start:])) in body:
                twins.setdefault(".".join(parts[:start]), set()).add(ending)
                break
    for under, endings in twins.items():
        if endings == body:
            raise InputError(
                f"model {model!r} has all weights of its body twice, again under {under!r} ({_listed(unexpected)}); "
                "keep one of them"
            )


_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _listed(keys: Sequence[str]) -> str:
    """The first few of ``keys`` and how many there are."""
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more ({len(keys)} in all)"


def _size(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _positions(model: nn.Module) -> int:
    """Return the length of text, in tokens, that the model has positions for."""
    most = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return int(most) - module.padding_idx - 1  # RoBERTa counts positions from behind the padding
    return int(most)


def head_modules(model: nn.Module) -> list[str]:
    """Top-level modules with parameters outside the pretrained encoder: DistilBERT's head is two of them."""
    encoder = getattr(model, "base_model_prefix", "")
    return [name for name, child in model.named_children() if name != encoder and any(True for _ in child.parameters())]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
