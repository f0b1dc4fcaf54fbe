"""Find the FFN and attention blocks of a transformer by its structure, and prove each finding by a small probe.

A block list is the longest ``nn.ModuleList`` whose elements hold linear layers. In an element, the linear layers under
a module called ``…Attention…`` are the attention projections; the others are the FFN: one layer up and one down, or, if
gated, two up. Which of the two is the gate, and what the activation is, the probe decides: the block's own forward must
equal ours on random tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparselora.errors import InputError

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FFN:
    """Module names inside the model, and the activation.

    ``unit`` is the module whose forward is replaced. In a ``pair`` (BERT) that is the module around ``up`` and the
    activation, and ``down`` stands elsewhere, in a module that adds dropout, residual and norm.
    """

    unit: str
    up: str
    down: str
    gate: str | None
    act: Activation
    pair: bool
    dropout: nn.Module | None


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
    name, stack = max(stacks, key=lambda item: len(item[1]))
    rope = any("Rotary" in type(module).__name__ for module in inner.modules())
    blocks = tuple(_block(inner, i, f"{name}.{i}", layer, rope) for i, layer in enumerate(stack))
    _prove_ffn(inner, blocks[0])
    return Structure(
        inner,
        blocks,
        causal=any(kind.__name__.endswith(("ForCausalLM", "LMHeadModel")) for kind in type(inner).__mro__),
    )


def _block(model: nn.Module, index: int, name: str, layer: nn.Module, rope: bool) -> Block:
    linears = dict(_linears(layer))
    around = [n for n, m in layer.named_modules() if n and "Attention" in type(m).__name__]
    inside = {n: m for n, m in linears.items() if any(n.startswith(f"{a}.") for a in around)}
    outside = {n: m for n, m in linears.items() if n not in inside}
    return Block(index, name, _ffn(layer, name, outside), _attention(model, layer, name, inside, rope))


# --- attention ----------------------------------------------------------------------------------------------------


def _attention(model: nn.Module, layer: nn.Module, name: str, inside: dict[str, nn.Module], rope: bool) -> Attention:
    config: Any = model.config
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    roles: dict[str, str] = {}
    for path in inside:
        letter = path.rpartition(".")[2][:1]
        roles.setdefault(letter if letter in "qkv" else "o", path)
    if len(inside) == 4 and set(roles) == {"q", "k", "v", "o"}:
        head_dim = out_in(inside[roles["q"]])[0] // heads
        expected: tuple[int, ...] = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        found: tuple[int, ...] = tuple(out_in(inside[roles[part]])[0] for part in "qkv")
    elif len(inside) == 2 and not set(roles) & set("qkv"):
        qkv, out = inside
        head_dim = out_in(inside[out])[1] // heads
        roles = {"q": qkv, "k": qkv, "v": qkv, "o": out}
        expected = ((heads + 2 * kv_heads) * head_dim,)
        found = (out_in(inside[qkv])[0],)
    else:
        raise InputError(
            f"attention of {name} ({type(layer).__name__}) is not supported: it has the linear layers "
            f"{', '.join(inside) or 'none'}; wanted q, k, v and an output, or one fused and an output"
        )
    if expected != found:
        raise InputError(
            f"attention of {name} ({type(layer).__name__}) is not supported: its projections have {found} rows, its "
            f"configuration says {expected} ({heads} heads, {kv_heads} key-value heads of {head_dim})"
        )
    q, k, v, o = (f"{name}.{roles[part]}" for part in "qkvo")
    return Attention(q, k, v, o, heads, kv_heads, head_dim, rope)


# --- FFN ----------------------------------------------------------------------------------------------------------


def _ffn(layer: nn.Module, name: str, outside: dict[str, nn.Module]) -> FFN:
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
    module = layer.get_submodule(unit)
    act = _activation(module)
    if act is None:
        raise InputError(f"FFN of {name} ({kind}) is not supported: {type(module).__name__} has no activation")
    dropout = next((m for _, m in module.named_children() if isinstance(m, nn.Dropout)), None)
    gate, up = (ups[0], ups[1]) if len(ups) == 2 else (None, ups[0])
    return FFN(
        unit=f"{name}.{unit}",
        up=f"{name}.{up}",
        down=f"{name}.{down}",
        gate=None if gate is None else f"{name}.{gate}",
        act=act,
        pair=pair,
        dropout=None if pair else dropout,
    )


def _common(a: str, b: str) -> str:
    """The deepest module around both names; empty for the block itself."""
    shared = []
    for left, right in zip(a.split(".")[:-1], b.split(".")[:-1]):
        if left != right:
            break
        shared.append(left)
    return ".".join(shared)


def _activation(module: nn.Module) -> Activation | None:
    for name in ("act_fn", "activation", "act", "intermediate_act_fn", "activation_fn"):
        found = getattr(module, name, None)
        if callable(found):
            return found
    return None


@torch.no_grad()
def _prove_ffn(model: nn.Module, block: Block) -> None:
    """Raise unless the first block's FFN computes down(act(gate) · up), or down(act(up))."""
    ffn = block.ffn
    up, down = model.get_submodule(ffn.up), model.get_submodule(ffn.down)
    weight = base_weight(up)
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, out_in(up)[1], generator=generator).to(weight.device, dtype)
    unit = model.get_submodule(ffn.unit)
    training = unit.training
    unit.eval()
    try:
        theirs = unit(x)
        hidden = ffn.act(up(x)) if ffn.gate is None else ffn.act(model.get_submodule(ffn.gate)(x)) * up(x)
        ours = hidden if ffn.pair else down(hidden)
    finally:
        unit.train(training)
    error = (ours - theirs).float().norm() / theirs.float().norm().clamp(min=1e-12)
    if not error < (0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-4):
        raise InputError(
            f"FFN {ffn.unit} ({type(unit).__name__}) is not supported: it does not compute "
            f"{'down(act(gate) · up)' if ffn.gate else 'down(act(up))'} (relative difference {float(error):.1e})"
        )
