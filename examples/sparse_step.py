"""A sparse LoRA step in a plain training loop: one dense run, one sparse run, same batches.

python examples/sparse_step.py              # a tiny Llama with random weights, on a CPU, in seconds
python examples/sparse_step.py --mode svd   # the published choice of channels

The task: a row is 24 random tokens and then its first 4 tokens again. The 24 are context (no label), the 4 are learned.
A tiny model says nothing about yours (here the sparse step is even slower): `sparselora bench` and `train` do.
"""

import argparse
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sparselora import SparsityConfig, sparsify

CONTEXT, ANSWER, VOCABULARY = 24, 4, 32


def build_model(seed: int):
    """A random Llama of four layers with a LoRA on its attention projections and FFNs."""
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(shape), lora)


def make_batch(seed: int, rows: int = 16):
    """Token ids, mask and labels ``(rows, 28)``; the label -100 marks the context."""
    context = torch.randint(VOCABULARY, (rows, CONTEXT), generator=torch.Generator().manual_seed(seed))
    tokens = torch.cat([context, context[:, :ANSWER]], dim=1)
    labels = tokens.clone()
    labels[:, :CONTEXT] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def train(config: SparsityConfig | None, steps: int, seed: int) -> tuple[float, float, float]:
    """Train for ``steps``; return the held-out loss before and after (nats per label), and milliseconds per step."""
    model = build_model(seed)
    batches = [make_batch(1000 + step) for step in range(steps)]
    held_out = make_batch(0, rows=64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    # Static channels are chosen once, on a few training batches; svd, random and skip need no calibration.
    handle = None if config is None else sparsify(model, config, calibration=batches[:4])

    before = evaluate(model, held_out)
    model.train()
    start = time.perf_counter()
    for step, batch in enumerate(batches):
        if handle is not None:
            handle.begin_step(step, steps)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    step_ms = 1000 * (time.perf_counter() - start) / steps

    after = evaluate(model, held_out)  # dense: evaluation never uses the sparse step unless asked
    if handle is not None:
        handle.remove()  # the model computes what it did before the conversion, bit for bit
        assert evaluate(model, held_out) == after
    return before, after, step_ms


@torch.no_grad()
def evaluate(model, batch) -> float:
    model.eval()
    loss = float(model(**batch).loss)
    model.train()
    return loss


def main(argv=None) -> dict[str, tuple[float, float, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="static", choices=["static", "svd", "random", "skip"])
    parser.add_argument(
        "--ffn_sparsity", type=float, default=0.75, help="share of FFN channels dropped for context tokens"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    # The first layer stays dense: an error made there passes through all others.
    sparse = SparsityConfig(mode=args.mode, ffn_sparsity=args.ffn_sparsity, layer_sparsity={"layer.0": 0.0})
    results = {"plain PEFT": train(None, args.steps, args.seed), args.mode: train(sparse, args.steps, args.seed)}
    for name, (before, after, step_ms) in results.items():
        print(f"{name:<10}  loss {before:.3f} -> {after:.3f} nats per label, {step_ms:.1f} ms per step")
    return results


if __name__ == "__main__":
    main()
