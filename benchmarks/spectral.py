"""The SVD of an adapter's update against the dense one, and what it takes to edit a whole adapter of a 7B model.

    python benchmarks/spectral.py

The dense SVD of B A is the alternative that needs no thought; its floor here is one thin QR of each factor. Repetitions
of our SVD are spread around the dense one, and the ratio is of medians. The second part opens an adapter (rank 64 on
down_proj and o_proj of 32 layers), decomposes it, edits it by made-up statistics, and writes it; calibration aside.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from sparselora.models.adapter_files import AdapterFile, open_adapter, write_adapter
from sparselora.spectral.factors import AdapterSVD, adapter_svd, refactor
from sparselora.spectral.modes import EditOptions, edit_spectrum

D, R, LAYERS, WIDE = 4096, 64, 32, 11008


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def against_dense(rounds: int, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(R, D, generator=generator), torch.randn(D, R, generator=generator)
    for _ in range(5):
        adapter_svd(A, B, 1.0)
    ours: list[float] = []
    dense: list[float] = []
    for _ in range(rounds):
        ours += [seconds(lambda: adapter_svd(A, B, 1.0))[0] for _ in range(repeats)]
        took, exact = seconds(lambda: torch.linalg.svd(B @ A))
        dense.append(took)
        ours += [seconds(lambda: adapter_svd(A, B, 1.0))[0] for _ in range(repeats)]
    svd = adapter_svd(A, B, 1.0)
    error = float(((svd.sigma.float() - exact[1][:R]) / exact[1][0]).abs().max())
    thin, whole = statistics.median(ours), statistics.median(dense)
    quartiles = statistics.quantiles(ours, n=4)
    print(f"{D}×{D}, r {R}, float32: dense SVD {whole:.2f} s, ours {1e3 * thin:.2f} ms "
          f"[{1e3 * quartiles[0]:.2f}, {1e3 * quartiles[2]:.2f}]: {whole / thin:.0f} times; "
          f"largest difference of sigma {error:.1e} of the largest")  # fmt: skip


def write_source(folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    LoraConfig(r=R, lora_alpha=R, target_modules=["down_proj", "o_proj"], task_type="CAUSAL_LM").save_pretrained(
        str(folder)
    )
    tensors = {}
    for layer in range(LAYERS):
        for name, d_in in (("mlp.down_proj", WIDE), ("self_attn.o_proj", D)):
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(R, d_in, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(D, R, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")


def decomposed(adapter: AdapterFile) -> dict[str, AdapterSVD]:
    return {module: adapter_svd(*adapter.factors(module)) for module in adapter.modules}


def edited(adapter: AdapterFile, svds: dict[str, AdapterSVD]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    new = {}
    for module, svd in svds.items():
        g = torch.rand(svd.rank, generator=torch.Generator().manual_seed(2)).double().numpy()
        result = edit_spectrum("abs_select", svd.sigma.numpy(), g, g, g**2, EditOptions())
        new[module] = refactor(svd, torch.from_numpy(result.sigma), *adapter.factors(module))
    return new


def whole_adapter() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "source"), Path(scratch, "edited")
        source.mkdir()
        write_source(source)
        opening, adapter = seconds(lambda: open_adapter(source))
        decomposing, svds = seconds(lambda: decomposed(adapter))
        editing, factors = seconds(lambda: edited(adapter, svds))
        writing, _ = seconds(lambda: write_adapter(target, adapter, factors))
    total = opening + decomposing + editing + writing
    print(f"7B shape, {2 * LAYERS} modules, r {R}: open {opening:.2f} s, decompose {decomposing:.2f}, edit "
          f"{editing:.2f}, write {writing:.2f}: {total:.2f} s in all")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="dense decompositions (default: 2)")
    parser.add_argument("--repeats", type=int, default=20, help="of ours before and after each (default: 20)")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    against_dense(args.rounds, args.repeats)
    whole_adapter()


if __name__ == "__main__":
    main()
