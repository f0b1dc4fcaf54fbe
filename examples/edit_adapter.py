"""Edit the spectrum of a finished adapter, and ask whether the edit beats random edits of the same energy.

python examples/edit_adapter.py                # trains a tiny adapter first, in seconds
python examples/edit_adapter.py --mode abs_select

Each update ΔW = scaling · B A is decomposed into singular directions. On a few rows we measure g = dL/dσ, how the loss
reacts to each singular value, rescale the values, and write an adapter that plain PEFT loads. In our studies this did
not improve a finished adapter; the null below is how you find that out for yours.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sparselora.models.adapter_files import read_adapter
from sparselora.spectral.edit import AdapterEdit, decompositions, in_place, name_in_model
from sparselora.spectral.modes import EditOptions
from sparselora.spectral.sensitivity import measure

VOCABULARY = 32


def base_model():
    """A random Llama of two layers, the same at every call."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(shape)


def make_batch(seed: int, rows: int):
    """Sixteen random tokens, then the first of them four times; only these four are labelled."""
    context = torch.randint(VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(seed))
    tokens = torch.cat([context, context[:, :1].expand(-1, 4)], dim=1)
    labels = tokens.clone()
    labels[:, :16] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def train_adapter(folder: Path, steps: int) -> None:
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    model = get_peft_model(base_model(), LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(steps):
        model(**make_batch(step, rows=16)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@torch.no_grad()
def loss_of(model) -> float:
    """Loss on rows that no adapter was trained on, nats per label."""
    model.eval()
    return float(model(**make_batch(10_000, rows=128)).loss)


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="gd", choices=["gd", "abs_select", "smooth_abs", "z_score", "fisher"])
    parser.add_argument("--eta", type=float, default=0.02, help="step of mode gd")
    parser.add_argument("--draws", type=int, default=20, help="random edits of the same energy: the null")
    parser.add_argument("--steps", type=int, default=200, help="of training the adapter")
    parser.add_argument("--out_dir", type=Path, default=Path("runs/edit_example"))
    args = parser.parse_args(argv)

    train_adapter(args.out_dir / "adapter", args.steps)
    adapter = read_adapter(args.out_dir / "adapter")
    model = PeftModel.from_pretrained(base_model(), args.out_dir / "adapter")

    # Decompose every module in thin factors, and measure the loss's reaction to each singular value.
    svds = decompositions(adapter, list(adapter.modules))
    calibration = [make_batch(20_000, rows=32)]  # rows that the adapter has not seen
    measured = measure(model, calibration, {name_in_model(module): svd for module, svd in svds.items()})
    statistics = dict(zip(svds, measured))

    edit = AdapterEdit.by_mode(adapter, svds, statistics, args.mode, EditOptions(eta=args.eta), seed=0)
    losses = {"unedited": loss_of(model)}
    with in_place(model, edit.factors()):
        losses["edited"] = loss_of(model)
    draws = []
    for draw in range(args.draws):
        with in_place(model, edit.random_draw(0, draw).factors()):
            draws.append(loss_of(model))
    losses["mean of the draws"] = float(np.mean(draws))

    for name, loss in losses.items():
        print(f"{name:<18} held-out loss {loss:.5f} nats per label ({loss - losses['unedited']:+.5f})")
    rank_p = (1 + sum(loss <= losses["edited"] for loss in draws)) / (1 + len(draws))
    print(f"predicted change {edit.predicted().second:+.5f}; rank p {rank_p:.3f} against the null")

    edit.write(args.out_dir / "edited")
    loaded = PeftModel.from_pretrained(base_model(), args.out_dir / "edited")  # plain PEFT
    assert abs(loss_of(loaded) - losses["edited"]) < 1e-5
    return losses


if __name__ == "__main__":
    main()
