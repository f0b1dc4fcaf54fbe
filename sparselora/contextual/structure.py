"""Find the FFN and attention blocks of a transformer by its structure, and prove each finding by a small probe.

A block list is the longest ``nn.ModuleList`` whose elements hold linear layers. In an element, the linear layers under
a module called ``…Attention…`` are the attention projections; the others are the FFN: one layer up and one down, or, if
gated, two up. Which of the two is the gate, and where dropout stands, the probe decides: the block's own forward must
equal ours on random tokens. The order of q, k and v inside a fused projection is proved by the model's own attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sparselora.contextual.proof import (
    disproof,
    random_input,
    seed_generators,
    tolerance,
    trial_batch,
    undisturbed,
)
from sparselora.contextual.sharding import gathered, is_sharded, shards_inside, unwrapped
from sparselora.errors import InputError

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FFN:
    """Module names inside the model, and the activation.

    ``unit`` is the module whose forward is replaced. In a ``pair`` (BERT) that is the module around ``up`` and the
    activation, and ``down`` stands elsewhere, in a module that adds dropout, residual and norm. ``inner_dropout`` is
    applied to the hidden channels, ``dropout`` to the unit's output.
    """

    unit: str
    up: str
    down: str
    gate: str | None
    act: Activation
    pair: bool
    dropout: Activation | None
    inner_dropout: Activation | None


@dataclass(frozen=True)
class NumberedDropout:
    """Dropout whose probability is a number ``name`` on the module that applies it."""

    module: nn.Module
    name: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, getattr(self.module, self.name), self.module.training)


@dataclass(frozen=True)
class Attention:
    """Names of the projections (equal for q, k and v where one matrix computes all three) and the head counts."""

    q: str
    k: str
    v: str
    o: str
    heads: int
    kv_heads: int
    head_dim: int
    rope: bool

    @property
    def fused(self) -> bool:
        return self.q == self.k

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Block:
    """One layer of the stack."""

    index: int
    name: str
    ffn: FFN
    attention: Attention


@dataclass(frozen=True)
class Structure:
    """``model`` without PEFT's wrapper, its blocks, and whether it is a causal language model."""

    model: nn.Module
    blocks: tuple[Block, ...]
    causal: bool

    def module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)


def base_layer(module: nn.Module) -> nn.Module:
    """The frozen layer under a LoRA layer; the module itself where there is none."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def base_weight(module: nn.Module) -> torch.Tensor:
    """The frozen weight of a linear layer as it is stored, quantised or not: its device and dtype, not its values."""
    return cast(torch.Tensor, base_layer(module).weight)


def out_in(module: nn.Module) -> tuple[int, int]:
    """``(d_out, d_in)`` of a linear layer of any storage."""
    base = base_layer(module)
    if isinstance(base, Conv1D):
        return base.weight.shape[1], base.weight.shape[0]
    return base.out_features, base.in_features  # type: ignore[return-value]


def _linears(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Linear layers by name, in module order; a LoRA layer counts as one and is not entered."""
    for name, child in root.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, LoraLayer):
            if isinstance(child.get_base_layer(), (nn.Linear, Conv1D)):
                yield path, child
        elif isinstance(child, (nn.Linear, Conv1D)):
            yield path, child
        else:
            yield from _linears(child, f"{path}.")


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside the wrappers of PEFT, DDP and torch.compile."""
    compiled: Any = getattr(model, "_orig_mod", model)
    inner: Any = compiled.module if type(compiled).__name__ == "DistributedDataParallel" else compiled
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def find_blocks(model: nn.Module) -> Structure:
    """The `Structure` of a transformers model, with or without an adapter.

    Raises:
        InputError: no stack of blocks, a block that is not one attention and one FFN of linear layers, or one whose
            forward is something else; it names the module and its class.
    """
    inner = unwrap(model)
    stacks = [
        (name, module)
        for name, module in inner.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(len(list(_linears(m))) >= 3 for m in module)
    ]
    if not stacks:
        raise InputError(
            f"{type(inner).__name__} has no stack of transformer blocks with linear layers; "
            f"its parts are: {', '.join(dict.fromkeys(type(m).__name__ for _, m in inner.named_children()))}"
        )
    if any(unwrapped(module) is not module for module in inner.modules()):
        raise InputError(
            f"layers of {type(inner).__name__} are wrapped for activation checkpointing; call sparsify before the "
            "model is wrapped and sharded, or use gradient_checkpointing of the model itself"
        )
    names = [name for name, _ in stacks]
    stacks = [item for item in stacks if not any(item[0].startswith(f"{name}.") for name in names)]  # parts of a block
    name, stack = max(stacks, key=lambda item: len(item[1]))
    for path, module in stack.named_modules(prefix=name):
        _check_layer(path, module)
    rope = any("Rotary" in type(module).__name__ for module in inner.modules())
    with undisturbed(inner):
        blocks = []
        for i, layer in enumerate(stack):
            if shards_inside(layer):
                raise InputError(
                    f"parts of {name}.{i} are sharded by themselves; call fully_shard on whole blocks, or call "
                    "sparsify before it"
                )
            with gathered(layer):
                blocks.append(_block(inner, i, f"{name}.{i}", layer, rope))
        structure = Structure(inner, tuple(blocks), is_causal(inner))
        for block in distinct_blocks(structure):
            if block.attention.fused and (reason := attention_disproof(structure, block)):
                raise InputError(
                    f"attention of {block.name} ({type(inner.get_submodule(block.name)).__name__}) is not supported: "
                    f"{_last(block.attention.q)} computes q, k and v in one, and their order inside it could not be "
                    f"proved ({reason}); wanted all of q, then k, then v, head by head"
                )
    return structure


def is_causal(model: nn.Module) -> bool:
    """Return whether a transformers model is a causal language model."""
    return any(kind.__name__.endswith(("ForCausalLM", "LMHeadModel")) for kind in type(model).__mro__)


def distinct_blocks(structure: Structure) -> list[Block]:
    """The first of the blocks that have the same classes of attention and the same shapes."""
    kinds: dict[Any, Block] = {}
    for block in structure.blocks:
        heads = block.attention
        around = type(structure.module(heads.q.rpartition(".")[0])).__name__
        shapes = tuple(out_in(structure.module(name)) for name in (heads.q, heads.k, heads.v, heads.o))
        kinds.setdefault((around, shapes), block)
    return list(kinds.values())


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _block(model: nn.Module, index: int, name: str, layer: nn.Module, rope: bool) -> Block:
    linears = dict(_linears(layer))
    around = [n for n, m in layer.named_modules() if n and "Attention" in type(m).__name__]
    inside = {n: m for n, m in linears.items() if any(n.startswith(f"{a}.") for a in around)}
    outside = {n: m for n, m in linears.items() if n not in inside}
    ffn = _ffn(model, layer, name, outside)
    return Block(index, name, ffn, _attention(model, layer, name, inside, rope))


# --- weights and adapters -------------------------------------------------------------------------------------------


def partition(weight: torch.Tensor) -> str | None:
    """Return who keeps ``weight`` in parts, one a process, so that it is not whole here; None where it is whole."""
    if isinstance(weight, DTensor):
        return "fully_shard (FSDP2)"
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        return "DeepSpeed ZeRO-3"
    return "FSDP" if weight.numel() == 0 or weight.dim() != 2 else None


def _check_layer(name: str, module: nn.Module) -> None:
    """Raise where an adapter is no plain LoRA, or a linear layer's weight is not whole."""
    if isinstance(module, BaseTunerLayer):
        plain = isinstance(module, LoraLayer) and isinstance(module.lora_A, nn.ModuleDict)
        if not plain or not all(isinstance(a, nn.Linear) for a in cast(LoraLayer, module).lora_A.values()):
            kind = f"{type(module).__module__.split('.')[-2]}.{type(module).__name__}"
            raise InputError(
                f"{name} has an adapter of the kind {kind}; contextual sparsity takes plain LoRA or rsLoRA"
            )
    weight = getattr(module, "weight", None)
    if not isinstance(module, (nn.Linear, Conv1D)) or not isinstance(weight, torch.Tensor) or is_sharded(module):
        return
    if owner := partition(weight):
        order = "deepspeed.initialize" if "Deep" in owner else owner.partition(" ")[0]
        raise InputError(
            f"the weight of {name} is partitioned by {owner} ({tuple(weight.shape)} here); call sparsify before {order}"
        )


# --- attention ----------------------------------------------------------------------------------------------------


def _attention(model: nn.Module, layer: nn.Module, name: str, inside: dict[str, nn.Module], rope: bool) -> Attention:
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = type(layer).__name__
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise InputError(
            f"attention of {name} ({kind}) is not supported: its configuration has no one num_attention_heads and "
            f"num_key_value_heads for all layers, got {heads!r} and {kv_heads!r}"
        )
    roles: dict[str, str] = {}
    for path in inside:
        letter = path.rpartition(".")[2][:1]
        roles.setdefault(letter if letter in "qkv" else "o", path)
    if len(inside) == 4 and set(roles) == {"q", "k", "v", "o"}:
        head_dim = out_in(inside[roles["q"]])[0] // heads
        expected: tuple[int, ...] = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        rows: tuple[int, ...] = tuple(out_in(inside[roles[part]])[0] for part in "qkv")
        if expected != rows:
            raise InputError(
                f"attention of {name} ({kind}) is not supported: its projections have {rows} rows, its configuration "
                f"says {expected} ({heads} heads, {kv_heads} key-value heads of {head_dim})"
            )
    elif len(inside) == 2:
        qkv, out = inside
        head_dim = out_in(inside[out])[1] // heads
        roles = {"q": qkv, "k": qkv, "v": qkv, "o": out}
        width, count = (heads + 2 * kv_heads) * head_dim, out_in(inside[qkv])[0]
        if width != count:
            raise InputError(
                f"attention of {name} ({kind}) is not supported: the order of q, k and v inside {_last(qkv)} could not "
                f"be proved: it has {count} rows, and {heads} heads of q and {kv_heads} each of k and v of size "
                f"{head_dim} have {width}"
            )
    else:
        raise InputError(
            f"attention of {name} ({kind}) is not supported: it has the linear layers "
            f"{', '.join(inside) or 'none'}; wanted q, k, v and an output, or one fused and an output"
        )
    q, k, v, o = (f"{name}.{roles[part]}" for part in "qkvo")
    return Attention(q, k, v, o, heads, kv_heads, head_dim, rope)


class _Reached(Exception):
    """The output projection has been called."""


def attention_disproof(structure: Structure, block: Block) -> str | None:
    """Return why a block's projections are not q, k and v of the heads that `Attention` says; None if they are.

    What reaches the output projection tells. A channel of v alone reaches the same channel of each head of its group.
    q of other signs changes its own position and head only, k of other signs its group, at other positions too.
    """
    heads = block.attention
    d, group = heads.head_dim, heads.heads // heads.kv_heads
    ids = trial_batch(structure.model)["input_ids"]
    picked = torch.randint(d, (heads.kv_heads,), generator=torch.Generator().manual_seed(0))
    last = heads.kv_heads - 1

    def mixed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return _mixed_heads(structure, heads, ids, part, change).view(*ids.shape, heads.kv_heads, group, d)

    def flipped(positions: slice, channels: slice) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(y: torch.Tensor) -> torch.Tensor:
            y = y.clone()
            y[:, positions, channels] *= -1
            return y

        return change

    def alone(y: torch.Tensor) -> torch.Tensor:
        flags = torch.zeros(heads.kv_heads, d, dtype=y.dtype)
        flags[torch.arange(heads.kv_heads), picked] = 1
        return y * flags.flatten().to(y.device)

    everything = slice(None)

    def theirs() -> list[torch.Tensor]:
        whole = mixed("v", lambda y: y)
        loud = mixed("v", alone) != 0

        def moved(part: str, positions: slice, channels: slice) -> torch.Tensor:
            return (mixed(part, flipped(positions, channels)) - whole).abs() > 1e-5 * whole.abs().max()

        here = moved("q", slice(2, 3), everything)
        elsewhere = moved("k", slice(0, 1), everything)[:, 1:]
        one_head = moved("q", everything, slice(last * group * d, (last * group + 1) * d))
        one_group = moved("k", everything, slice(last * d, (last + 1) * d))
        return [
            loud.any(dim=(0, 1)),
            here.any(dim=(0, 2, 3, 4)),
            elsewhere.any(),
            one_head.any(dim=(0, 1, 4)),
            one_group.any(dim=(0, 1, 3, 4)),
        ]

    def ours() -> list[torch.Tensor]:
        loud = torch.zeros(heads.kv_heads, group, d, dtype=torch.bool)
        loud[torch.arange(heads.kv_heads), :, picked] = True
        here, one_head = torch.arange(ids.shape[1]) == 2, torch.arange(heads.heads) == last * group
        return [loud, here, torch.tensor(True), one_head.view(-1, group), torch.arange(heads.kv_heads) == last]

    with torch.no_grad(), undisturbed(structure.model):
        reason = disproof(lambda: [x.cpu() for x in theirs()], ours, 0.0)
    return reason if reason is None or reason.startswith("a trial") else "are heads interleaved, or grouped?"


def _mixed_heads(
    structure: Structure, heads: Attention, ids: torch.Tensor, part: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The input of the output projection ``(batch, length, heads · head_dim)``, q, k or v changed; the pass ends."""
    model: Any = structure.model
    sizes = [heads.heads * heads.head_dim, heads.kv_width, heads.kv_width]
    seen: list[torch.Tensor] = []

    def reach(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].detach())
        if not is_sharded(structure.module(heads.o)):  # where weights are gathered, passes run to their end
            raise _Reached

    def alter(_: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor | None:
        if args[0].shape[:-1] != ids.shape:  # of something else than this batch's tokens
            return None
        if not heads.fused:
            return change(y)
        parts = list(y.split(sizes, dim=-1))
        place = "qkv".index(part)
        parts[place] = change(parts[place])
        return torch.cat(parts, dim=-1)

    hooks = [
        structure.module(heads.o).register_forward_pre_hook(reach),
        structure.module(getattr(heads, part)).register_forward_hook(alter),
    ]
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    seed_generators()
    try:
        model.base_model(**inputs)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0]


# --- FFN ----------------------------------------------------------------------------------------------------------


def _ffn(model: nn.Module, layer: nn.Module, name: str, outside: dict[str, nn.Module]) -> FFN:
    shapes = {path: out_in(module) for path, module in outside.items()}
    ups = [path for path, (d_out, d_in) in shapes.items() if d_out > d_in]
    downs = [path for path, (d_out, d_in) in shapes.items() if d_out < d_in]
    kind = type(layer).__name__
    if len(downs) != 1 or len(ups) not in (1, 2) or len(shapes) != len(ups) + 1:
        raise InputError(
            f"FFN of {name} ({kind}) is not supported: it has the linear layers "
            f"{', '.join(shapes) or 'none'}; wanted one up and one down, or a gate, an up and a down"
        )
    (down,) = downs
    unit = _common(ups[0], down)
    pair = not unit
    unit = unit or ups[0].rpartition(".")[0]
    if not unit:
        raise InputError(f"FFN of {name} ({kind}) is not supported: its layers {ups[0]} and {down} have no own module")
    if len(ups) == 1 and shapes[ups[0]][0] == 2 * shapes[down][1]:
        raise InputError(
            f"FFN of {name} ({kind}) is not supported: {ups[0]} computes gate and up in one; wanted one up and one "
            "down, or a gate, an up and a down"
        )
    module = layer.get_submodule(unit)
    acts = _activations(module)
    if not acts:
        raise InputError(f"FFN of {name} ({kind}) is not supported: {type(module).__name__} has no activation")
    orders = [(None, ups[0])] if len(ups) == 1 else [(ups[0], ups[1]), (ups[1], ups[0])]
    first = FFN(f"{name}.{unit}", "", f"{name}.{down}", None, acts[0], pair, None, None)
    candidates = [
        replace(first, up=f"{name}.{up}", gate=None if gate is None else f"{name}.{gate}", act=act,
                dropout=outer, inner_dropout=inner)
        for act in acts for gate, up in orders for outer, inner in _dropouts(module, pair)
    ]  # fmt: skip
    reasons: list[str] = []
    for ffn in candidates:
        reason = _ffn_disproof(model, ffn)
        if reason is None:
            return ffn
        reasons.append(reason)
    formula = "down(act(gate) · up)" if len(ups) == 2 else "down(act(up))"
    raise InputError(
        f"FFN of {name} ({kind}) is not supported: {type(module).__name__} does not compute {formula}, or has dropout "
        f"that ours would not repeat ({reasons[0]})"
    )


def _common(a: str, b: str) -> str:
    """The deepest module around both names; empty for the block itself."""
    shared = []
    for left, right in zip(a.split(".")[:-1], b.split(".")[:-1]):
        if left != right:
            break
        shared.append(left)
    return ".".join(shared)


def _activations(module: nn.Module) -> list[Activation]:
    names = ("act_fn", "activation", "act", "intermediate_act_fn", "activation_fn")
    return [getattr(module, name) for name in names if callable(getattr(module, name, None))]


def _dropouts(unit: nn.Module, pair: bool) -> list[tuple[Activation | None, Activation | None]]:
    """Places of dropout in an FFN, as pairs of that of the output and that of the hidden channels."""
    every: list[Activation] = [child for child in unit.children() if isinstance(child, nn.Dropout)]
    every += [
        NumberedDropout(unit, name) for name, value in vars(unit).items() if "drop" in name and isinstance(value, float)
    ]
    if pair:  # the output's dropout stands in the module around down
        return [(None, None), *((None, inner) for inner in every)]
    return [
        (None, None), *((outer, None) for outer in every), *((None, inner) for inner in every),
        *((outer, inner) for outer in every for inner in every),
    ]  # fmt: skip


@torch.no_grad()
def _ffn_disproof(model: nn.Module, ffn: FFN) -> str | None:
    """Return why a unit does not compute down(act(gate) · up), or down(act(up)), with its dropout; None if it does.

    Its input is quiet in one row and loud in the other, and its dropout is switched on for the proof.
    """
    up, down, unit = (model.get_submodule(name) for name in (ffn.up, ffn.down, ffn.unit))
    weight = base_weight(up)
    x = random_input((4, out_in(up)[1]), weight, (1.0, 4.0))

    def theirs() -> Sequence[torch.Tensor]:
        return list(unit(x))

    def ours() -> Sequence[torch.Tensor]:
        gate = up if ffn.gate is None else model.get_submodule(ffn.gate)
        hidden = ffn.act(gate(x)) if ffn.gate is None else ffn.act(gate(x)) * up(x)
        if ffn.inner_dropout is not None:
            hidden = hidden * ffn.inner_dropout(torch.ones_like(hidden))
        y = hidden if ffn.pair else down(hidden)
        return list(y if ffn.dropout is None else ffn.dropout(y))

    with _dropout_on(unit):
        return disproof(theirs, ours, tolerance(weight, 1e-3, 0.05))


@contextmanager
def _dropout_on(unit: nn.Module) -> Iterator[None]:
    """The dropout of a module and of its children drops half, whatever its own probability."""
    owners: list[tuple[nn.Module, str]] = [(child, "p") for child in unit.modules() if isinstance(child, nn.Dropout)]
    owners += [(unit, name) for name, value in vars(unit).items() if "drop" in name and isinstance(value, float)]
    probabilities = [getattr(module, name) for module, name in owners]
    try:
        for module, name in owners:
            setattr(module, name, 0.5)
        yield
    finally:
        for (module, name), value in zip(owners, probabilities, strict=True):
            setattr(module, name, value)
