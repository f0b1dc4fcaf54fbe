"""Train a LoRA, remove three quarters of its rank channels, train on, and export what plain PEFT loads.

python examples/pruning.py                  # MiniLM on docstrings, 480 sentences, about two minutes on a CPU
python examples/pruning.py --method random  # the control of the choice

Two rules make pruning honest: the optimizer's moments of the kept channels are carried over, and the loss right after
pruning is looked at before training on hides it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from sparselora.data.batches import Collator, encode_texts
from sparselora.data.texts import load_text_data
from sparselora.models import lora
from sparselora.models.load import load_classifier


def batches(examples, collator, size: int, generator: torch.Generator | None = None):
    """Yield padded batches of ``examples``, in random order if there is a generator."""
    order = range(len(examples)) if generator is None else torch.randperm(len(examples), generator=generator).tolist()
    order = list(order)
    for start in range(0, len(order), size):
        yield collator.tensors([examples[i] for i in order[start : start + size]])


def train(model, optimizer, examples, collator, epochs: int, generator) -> None:
    model.train()
    for _ in range(epochs):
        for batch in batches(examples, collator, 16, generator):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def accuracy(model, examples, collator) -> float:
    model.eval()
    right = 0
    for batch in batches(examples, collator, 32):
        right += int((model(**batch).logits.argmax(dim=-1) == batch["labels"]).sum())
    return right / len(examples)


def make_optimizer(model, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="encoder: minilm, a local folder or a hub name")
    parser.add_argument(
        "--dataset", default="docstrings", help="docstrings, glue/<task>, or a file with text and label"
    )
    parser.add_argument("--method", default="channel_energy", choices=["channel_energy", "magnitude_B", "random"])
    parser.add_argument("--keep_ratio", type=float, default=0.25)
    parser.add_argument("--train_samples", type=int, default=480)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--epochs", type=int, default=2, help="of the warm-up; one more follows the pruning")
    parser.add_argument("--out_dir", type=Path, default=Path("runs/pruned_example"))
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    data = load_text_data(args.dataset, train_samples=args.train_samples, eval_samples=200)
    model, tokenizer = load_classifier(args.model, len(data.labels))
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "key", "value"])
    peft_model = get_peft_model(model, config)
    train_rows, held_out = (encode_texts(frame, data.text_fields, tokenizer, 64) for frame in (data.train, data.eval))
    collator, generator = Collator(tokenizer.pad_token_id, causal=False), torch.Generator().manual_seed(0)

    optimizer = make_optimizer(peft_model, args.lr)
    train(peft_model, optimizer, train_rows, collator, args.epochs, generator)
    results = {"before": accuracy(peft_model, held_out, collator)}
    parameters = lora.adapter_parameters(peft_model)

    # Score every rank channel k = (B[:, k], A[k, :]), keep the best of each module, and shrink the tensors.
    scores = lora.score_channels(peft_model, args.method, rng=np.random.default_rng(0))
    replaced = lora.prune(peft_model, lora.select_channels(scores, keep_ratio=args.keep_ratio, scope="module"))
    smaller = make_optimizer(peft_model, args.lr)
    lora.carry_optimizer_state(optimizer, smaller, replaced)
    results["right after"] = accuracy(peft_model, held_out, collator)

    train(peft_model, smaller, train_rows, collator, 1, generator)
    results["after one more epoch"] = accuracy(peft_model, held_out, collator)
    for moment, value in results.items():
        print(f"accuracy {moment}: {value:.3f} (chance {1 / len(data.labels):.2f}, {len(held_out)} sentences)")
    print(f"LoRA parameters: {parameters} -> {lora.adapter_parameters(peft_model)}")

    lora.export_adapter(peft_model, args.out_dir, base_model=args.model)
    base = load_classifier(args.model, len(data.labels))[0]
    loaded = PeftModel.from_pretrained(base, args.out_dir)  # plain PEFT reads it, with r = 2
    assert accuracy(loaded, held_out, collator) == results["after one more epoch"]
    print(f"adapter in {args.out_dir}")
    return results


if __name__ == "__main__":
    main()
