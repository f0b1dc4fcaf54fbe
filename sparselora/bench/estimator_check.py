"""Estimators on real activations: the channels that each layer's ranks first against its oracle's, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.cache import Cache
from sparselora.contextual.estimator import (
    AttentionEstimator,
    FFNEstimator,
    oracle_attention_scores,
    oracle_ffn_scores,
)
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.selection import estimator_quality
from sparselora.contextual.structure import Attention, Block, Structure, base_layer, find_blocks
from sparselora.data.instructions import encode_instructions, load_instructions
from sparselora.data.texts import load_text_data
from sparselora.data.tokens import encode_fields
from sparselora.errors import InputError
from sparselora.models.labels import IGNORED

Tensor = torch.Tensor
Row = dict[str, Any]
Check = Callable[[Tensor, Tensor], list[Row]]
"""(all context tokens ``(T, d)``, those an estimate looks at) → rows."""


@torch.no_grad()
def check_estimators(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    config: SparsityConfig,
    ranks: Sequence[int],
    *,
    cache_dir: str | Path | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[Row]:
    """One row a batch, layer, part (ffn, attention qk, attention v) and rank, at the sparsity of the layer.

    The activations are those of the dense model in evaluation mode. The oracle sees every context token of the batch,
    an estimate at most ``config.estimator_tokens`` of them. Columns: batch, layer, part, rank, sparsity, those of
    `sparselora.contextual.selection.estimator_quality`, context_tokens.

    Args:
        batches: ``input_ids``, ``attention_mask`` and, for a causal model, ``labels``, on the CPU.
        ranks: of the estimators; those above the smallest side of a part's projections are left out of that part.
    Raises:
        InputError: no layer is sparse under ``config``, an unknown layer, ranks that are all out of range, a batch
            without context.
    """
    structure = find_blocks(model)
    config.check(len(structure.blocks))
    checks = _checks(structure, config, sorted(set(ranks)), Cache(cache_dir))
    if not checks:
        raise InputError("no layer is sparse in this configuration, so there is nothing to estimate; set ffn_sparsity")
    device = next(structure.model.parameters()).device
    rows: list[Row] = []
    training = structure.model.training
    structure.model.eval()
    try:
        for number, batch in enumerate(batches):
            layout = TokenLayout.build(batch["attention_mask"], batch.get("labels"), causal=structure.causal).to(device)
            if not layout.n_context:
                raise InputError(f"batch {number} has no context token: every token predicts a label")
            with _watching(structure, checks, layout, config, rows, number):
                inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
                structure.model(**inputs)
            progress()
    finally:
        structure.model.train(training)
    return rows


@contextmanager
def _watching(
    structure: Structure,
    checks: Mapping[str, list[Check]],
    layout: TokenLayout,
    config: SparsityConfig,
    rows: list[Row],
    number: int,
) -> Iterator[None]:
    """Runs the checks of each module on what enters it."""
    context = layout.tokens[: layout.n_context]
    spread = layout.spread(config.estimator_tokens, layout.n_context)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].shape[:-1] != (layout.batch, layout.length):  # relative positions, in DeBERTa
                return
            x = args[0].reshape(-1, args[0].shape[-1])[context]
            some = x if spread is None else x[spread]
            for check in checks[name]:
                rows.extend({"batch": number, **row, "context_tokens": layout.n_context} for row in check(x, some))

        return look

    handles = [structure.module(name).register_forward_pre_hook(hook(name)) for name in checks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _checks(structure: Structure, config: SparsityConfig, ranks: Sequence[int], cache: Cache) -> dict[str, list[Check]]:
    checks: dict[str, list[Check]] = {}
    for block in structure.blocks:
        if config.ratio(block.index, "ffn") > 0:
            checks.setdefault(block.ffn.up, []).append(_ffn_check(structure, block, config, ranks, cache))
        if config.ratio(block.index, "attention") > 0:
            checks.setdefault(block.attention.q, []).append(_attention_check(structure, block, config, ranks, cache))
    return checks


def _weight(structure: Structure, name: str) -> tuple[Tensor, Tensor | None]:
    """``(d_out, d_in)`` and the bias of a projection."""
    base = base_layer(structure.module(name))
    weight, bias = cast(Tensor, base.weight), cast("Tensor | None", base.bias)
    if not weight.is_floating_point():
        raise InputError(f"{name} is stored in {weight.dtype}; check estimators on weights that are not quantised")
    return (weight.T if isinstance(base, Conv1D) else weight), bias


def _fitting(ranks: Sequence[int], weights: Sequence[Tensor], name: str) -> list[int]:
    most = min(min(weight.shape) for weight in weights)
    fitting = [rank for rank in ranks if 1 <= rank <= most]
    if not fitting:
        raise InputError(f"estimator ranks for {name} must be between 1 and {most}, got {', '.join(map(str, ranks))}")
    return fitting


def _ffn_check(structure: Structure, block: Block, config: SparsityConfig, ranks: Sequence[int], cache: Cache) -> Check:
    up, up_bias = _weight(structure, block.ffn.up)
    gate, gate_bias = _weight(structure, block.ffn.gate) if block.ffn.gate else (None, None)
    parts: dict[str, Any] = {"act": block.ffn.act, "up_bias": up_bias, "gate_bias": gate_bias}
    fitting = _fitting(ranks, [up], block.ffn.up)
    estimators = {rank: FFNEstimator(up, gate, rank=rank, cache=cache, **parts) for rank in fitting}
    sparsity = config.ratio(block.index, "ffn")

    def check(x: Tensor, some: Tensor) -> list[Row]:
        oracle = oracle_ffn_scores(x, up, gate, **parts)
        return [
            {"layer": block.index, "part": "ffn", "rank": rank, "sparsity": sparsity}
            | estimator_quality(estimator.scores(some), oracle, sparsity)
            for rank, estimator in estimators.items()
        ]

    return check


def _attention_check(
    structure: Structure, block: Block, config: SparsityConfig, ranks: Sequence[int], cache: Cache
) -> Check:
    attention = block.attention
    (q, qb), (k, kb), (v, vb) = _qkv(structure, attention)
    heads: dict[str, Any] = {name: getattr(attention, name) for name in ("heads", "kv_heads", "head_dim", "rope")}
    estimators = {
        rank: AttentionEstimator(q, k, v, rank=rank, cache=cache, q_bias=qb, k_bias=kb, v_bias=vb, **heads)
        for rank in _fitting(ranks, [q, k, v], attention.q)
    }
    sparsity = config.ratio(block.index, "attention")

    def check(x: Tensor, some: Tensor) -> list[Row]:
        linear = nn.functional.linear
        oracle = oracle_attention_scores(linear(x, q, qb), linear(x, k, kb), linear(x, v, vb), **heads)
        rows = []
        for rank, estimator in estimators.items():
            for part, estimated, true in zip(("attention qk", "attention v"), estimator.scores(some), oracle):
                row = {"layer": block.index, "part": part, "rank": rank, "sparsity": sparsity}
                rows.append(row | estimator_quality(estimated, true, sparsity))
        return rows

    return check


def _qkv(structure: Structure, attention: Attention) -> list[tuple[Tensor, Tensor | None]]:
    if not attention.fused:
        return [_weight(structure, name) for name in (attention.q, attention.k, attention.v)]
    weight, bias = _weight(structure, attention.q)
    widths = [attention.heads * attention.head_dim, attention.kv_width, attention.kv_width]
    biases = bias.split(widths) if bias is not None else (None, None, None)
    return list(zip(weight.split(widths), biases))


# --- texts and tables ---------------------------------------------------------------------------------------------


def text_batches(
    dataset: str,
    tokenizer: Any,
    *,
    causal: bool,
    fields: Sequence[str] | None,
    samples: int,
    batch: int,
    max_length: int,
    seed: int,
) -> list[dict[str, Tensor]]:
    """Padded batches of ``samples`` texts drawn by ``seed``, on the CPU.

    Args:
        fields: prompt and completion of a causal model; the text columns of an encoder (None: found).
    Raises:
        InputError: as `instructions.load_instructions` and `texts.load_text_data`; sizes below 1.
    """
    if samples < 1 or batch < 1:
        raise InputError(f"samples and batch must be at least 1, got {samples} and {batch}")
    if causal:
        prompt, completion = fields or ("prompt", "completion")
        instructions = load_instructions(
            dataset, prompt_field=prompt, completion_field=completion, train_samples=samples, seed=seed
        )
        examples = encode_instructions(instructions.train, tokenizer, max_length, instructions.template).examples
    else:
        data = load_text_data(dataset, text_fields=fields, train_samples=samples, seed=seed)
        encoded = encode_fields(data.train, data.text_fields, tokenizer, max_length)
        examples = [{"input_ids": ids} for ids in encoded["input_ids"]]
    return [_padded(examples[i : i + batch], tokenizer.pad_token_id) for i in range(0, len(examples), batch)]


def _padded(examples: Sequence[Mapping[str, list[int]]], pad: int) -> dict[str, Tensor]:
    width = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": pad, "labels": IGNORED, "attention_mask": 0}
    rows = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples]
    return {
        name: torch.tensor([[*row[name], *[fill[name]] * (width - len(row[name]))] for row in rows]) for name in rows[0]
    }


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the batches, a row a layer, part and rank; ``n`` is the number of batches."""
    measures = ["recall", "random_recall", "cosine", "energy", "random_energy"]
    grouped = rows.groupby(["part", "layer", "rank", "sparsity"], sort=False)[measures]
    table = grouped.mean().join(grouped.std(ddof=0).add_suffix("_std"))
    return table.join(grouped.size().rename("n")).reset_index()


def format_estimates(means: pd.DataFrame) -> str:
    """Return the table of `summarise` as text, a row a part and rank, averaged over layers."""
    columns = ["sparsity", "recall", "random_recall", "energy", "random_energy", "cosine"]
    by_rank = means.groupby(["part", "rank"])[columns].mean().reset_index()
    return (
        f"{by_rank.to_string(index=False, float_format='{:.3f}'.format)}\n"
        "recall: part of the oracle's channels found; energy: Σ oracle² of the found against that of the oracle's own."
    )
