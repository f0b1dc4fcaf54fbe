"""How long Phase B takes beside its floor and two peers, interleaved in one run.

  1. every figure of every layer, against one thin float32 SVD per matrix, in one process on loaded weights;
  2. the whole process without figures, against WeightWatcher (its default analysis, model loaded by transformers);
  3. the whole process with all figures, against a plain script: transformers model, one SVD and one explicit rank-k
     reconstruction per matrix, one pyplot figure per layer with tight_layout.

    python benchmarks/inspection.py --peer_python PYTHON_WITH_WEIGHTWATCHER

Every process starts cold but for the file cache, which a first, uncounted round warms. WeightWatcher needs the extra
`bench`. The word embeddings, which WeightWatcher analyses too, are in all three (no limit on elements).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sparselora.inspection.layer import Settings, measure_layer  # noqa: E402
from sparselora.models.packaged import resolve_alias  # noqa: E402
from sparselora.models.weights import list_tensors, load_matrix  # noqa: E402

WEIGHTWATCHER = """
import logging, sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)
import weightwatcher
details = weightwatcher.WeightWatcher(model=model, log_level=logging.ERROR).analyze()
details.to_csv(sys.argv[2] + "/details.csv")
"""

PLAIN_SCRIPT = """
import sys
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np, pandas as pd
from transformers import AutoModel
model, k, rows = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False), 8, []
for name, parameter in model.named_parameters():
    if parameter.ndim != 2:
        continue
    W = parameter.detach().numpy()
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    norm = np.linalg.norm(W)
    rows.append((name, np.linalg.norm(W - (U[:, :k] * s[:k]) @ Vt[:k]) / norm, (s[:k] ** 2).sum() / norm**2))
    plt.figure(figsize=(6.4, 4.0))
    plt.semilogy(s)
    plt.axvline(k, linestyle="--")
    plt.title(name); plt.xlabel("index"); plt.ylabel("singular value")
    plt.tight_layout()
    plt.savefig(f"{sys.argv[2]}/svd_{name}.png", dpi=110)
    plt.close()
pd.DataFrame(rows, columns=["param", "svd_topk_err", "topk_energy"]).to_csv(sys.argv[2] + "/layers.csv", index=False)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="folder with safetensors, or minilm (default: minilm)")
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter that has WeightWatcher")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, each runs every variant once (default: 5)")
    args = parser.parse_args()
    model = resolve_alias(args.model)
    loads = ", ".join(f"{load:.1f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    print(f"{args.model}, {os.cpu_count()} cores, load average before the run {loads}, {args.repeats} rounds\n")

    matrices = [(info.name, load_matrix(info)) for info in list_tensors(model).matrices]
    settings = Settings(8, 0.3, (0.01, 0.05, 0.1, 0.3), seed=0)
    floor = interleaved(
        {
            "all figures": lambda: [measure_layer(W, name, settings) for name, W in matrices],
            "one thin float32 SVD each": lambda: thin_svds(matrices),
            "the same on one BLAS thread": lambda: thin_svds(matrices, threads=1),
        },
        args.repeats,
    )
    table(f"1. {len(matrices)} matrices in one process", floor, "half the SVDs: 2.0x")

    phase_b = [sys.executable, str(ROOT / "inspect_svd_predictors.py"), "--model", args.model, "--max_elems", "0"]
    if subprocess.run([args.peer_python, "-c", "import weightwatcher"], capture_output=True, check=False).returncode:
        print("2. left out: no weightwatcher in --peer_python (pip install '.[bench]')\n")
    else:
        processes = {
            "Phase B, no figures": lambda: whole(lambda out: [*phase_b, "--plots", "none", "--out_dir", out]),
            "WeightWatcher": lambda: whole(lambda out: [args.peer_python, "-c", WEIGHTWATCHER, model, out]),
        }
        table("2. whole process, tables only", interleaved(processes, args.repeats), "5.0x")
    processes = {
        "Phase B, all figures": lambda: whole(lambda out: [*phase_b, "--out_dir", out]),
        "pyplot figure per layer": lambda: whole(lambda out: [sys.executable, "-c", PLAIN_SCRIPT, model, out]),
    }
    table("3. whole process, a figure per layer", interleaved(processes, args.repeats), "4.0x")


def thin_svds(matrices: list[tuple[str, np.ndarray]], threads: int | None = None) -> None:
    """What a plain script does with each matrix. On a busy machine BLAS threads wait for each other: hence both."""
    with threadpool_limits(threads, user_api="blas"):
        for _, W in matrices:
            np.linalg.svd(W, full_matrices=False)


def whole(command: Callable[[str], list[str]]) -> None:
    """Run a command to its end, with an empty folder to write into."""
    with tempfile.TemporaryDirectory() as out:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run(command(out), check=True, capture_output=True, env=environment)


def interleaved(variants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant, one after the other in every round; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def table(title: str, seconds: dict[str, list[float]], wanted: str) -> None:
    """Median and range of each variant, and how often the first fits into each of the others."""
    print(title)
    ours = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"  {name:<28}{middle:8.3f} s  ({min(values):.3f}–{max(values):.3f}){middle / ours:8.2f}x")
    print(f"  wanted: at least {wanted}\n", flush=True)


if __name__ == "__main__":
    main()
