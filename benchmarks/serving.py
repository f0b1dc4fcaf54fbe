"""Costs of the rank of an adapter that is served: bytes, load time, and tokens per second of transformers' generate.

python benchmarks/serving.py --model ./qwen05 --out serving.csv

Adapters of random values, of each rank on every linear, are written and loaded as PEFT loads them; what they hold does
not change what they cost. Each variant generates as many tokens from the same prompts, in interleaved rounds: the base
model with an adapter next to it, and the base model into which one was merged, which is the base model's own speed. The
columns of vLLM are arithmetic from its source, not a measurement: it pads every adapter to the least of its sizes that
is as large (max_lora_rank), and reserves that much for each of max_loras slots.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sparselora.models.adapter_config import vllm_rank  # noqa: E402
from sparselora.models.load import device_name, resolve_device  # noqa: E402
from sparselora.runs.files import write_csv  # noqa: E402

MERGED = "merged"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BYTES = {"bf16": 2, "fp32": 4}
"""Of a number, by --dtype."""


def write_adapter(base: Any, rank: int, folder: Path) -> int:
    """Write an adapter of random values and return the bytes of its tensors' file."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1e-3)  # so that the text stays that of the base model
    model.save_pretrained(str(folder))
    return (folder / "adapter_model.safetensors").stat().st_size


def slot_bytes(base: Any, rank: int, number_bytes: int) -> int:
    """Return what vLLM reserves for one adapter: the factors of every linear at ``rank``."""
    layers = [layer for name, layer in base.named_modules() if name.rsplit(".", 1)[-1] in LINEARS]
    return sum((layer.in_features + layer.out_features) * rank * number_bytes for layer in layers)


@contextlib.contextmanager
def timed(times: list[float], device: torch.device) -> Iterator[None]:
    """Append the wall-clock seconds of the block to ``times``, until the device is done."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    times.append(time.perf_counter() - start)


def load_seconds(base: Any, folder: Path, device: torch.device, rounds: int) -> list[float]:
    """Return the times from a folder to a model that has the adapter, which is taken out again each time."""
    times: list[float] = []
    for _ in range(rounds + 1):  # the first fills the disk's cache
        with timed(times, device):
            adapted = PeftModel.from_pretrained(base, str(folder))
        base = adapted.unload()
    return times[1:]


def generate(model: Any, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Return ``prompts (n, length)`` with exactly ``new_tokens`` more, chosen greedily."""
    with torch.no_grad():
        output: torch.Tensor = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=new_tokens,
            min_new_tokens=new_tokens, pad_token_id=0,
        )  # fmt: skip
    assert output.shape[1] == prompts.shape[1] + new_tokens
    return output


def measure(args: argparse.Namespace, folder: Path) -> pd.DataFrame:
    """Return a row per variant and batch size."""
    device = resolve_device(args.device)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    plain = copy.deepcopy(base)
    sizes = {f"r{rank}": write_adapter(base, rank, folder / f"r{rank}") for rank in args.ranks}
    loads = {name: load_seconds(base, folder / name, device, args.rounds) for name in sizes}
    slots = {rank: slot_bytes(base, vllm_rank(rank) or rank, BYTES[args.dtype]) for rank in args.ranks}

    adapted: Any = None
    for name in sizes:
        if adapted is None:
            adapted = PeftModel.from_pretrained(base, str(folder / name), adapter_name=name)
        else:
            adapted.load_adapter(str(folder / name), adapter_name=name)
    merged = PeftModel.from_pretrained(plain, str(folder / next(iter(sizes)))).merge_and_unload().eval()

    def variant(name: str) -> Any:
        if name == MERGED:
            return merged
        adapted.set_adapter(name)
        return adapted.eval()

    names = [*sizes, MERGED]
    times: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in names for batch in args.batches}
    for batch in args.batches:
        vocabulary = base.config.vocab_size
        prompts = torch.randint(vocabulary, (batch, args.prompt_tokens), generator=torch.Generator().manual_seed(0))
        prompts = prompts.to(device)
        for name in names:
            generate(variant(name), prompts, 4)
        for _ in range(args.rounds):
            for name in names:
                model = variant(name)
                with timed(times[name, batch], device):
                    generate(model, prompts, args.new_tokens)

    rows = []
    for (name, batch), values in times.items():
        rank = None if name == MERGED else int(name[1:])
        speeds = batch * args.new_tokens / np.array(values)
        rows.append({
            "model": Path(args.model).name,
            "variant": name,
            "rank": rank,
            "batch": batch,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "rounds": args.rounds,
            "tokens_per_s": float(np.median(speeds)),
            "tokens_per_s_min": float(speeds.min()),
            "tokens_per_s_max": float(speeds.max()),
            "of_merged": float(np.median(times[MERGED, batch]) / np.median(values)),
            "adapter_bytes": sizes.get(name),
            "load_ms": None if rank is None else 1000 * float(np.median(loads[name])),
            "vllm_max_lora_rank": None if rank is None else vllm_rank(rank),
            "vllm_slot_bytes": None if rank is None else slots[rank],
            "vllm_slot_share_used": None if rank is None else rank / (vllm_rank(rank) or rank),
            "dtype": args.dtype,
            "device": device_name(device),
            "torch": torch.__version__,
        })  # fmt: skip
    return pd.DataFrame(rows).astype(dict.fromkeys(_COUNTS, "Int64"))


_COUNTS = ("rank", "adapter_bytes", "vllm_max_lora_rank", "vllm_slot_bytes")
"""Columns that are whole numbers where they are not empty."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a language model")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 16, 4], metavar="N", help="ranks of the adapters")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], metavar="N", help="prompts at a time")
    parser.add_argument("--prompt_tokens", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new_tokens", type=int, default=48, help="tokens generated for a prompt")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all variants")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    parser.add_argument("--dtype", choices=tuple(BYTES), default="bf16", help="of the weights and the adapters")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(args, Path(folder))
    print(table.to_string(index=False))
    if args.out is not None:
        write_csv(args.out, table)


if __name__ == "__main__":
    main()
