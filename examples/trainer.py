"""A sparse LoRA with the Hugging Face Trainer: one line more than a dense run.

python examples/trainer.py                                     # a tiny Llama with random weights, in seconds
python examples/trainer.py --model FOLDER --data mine.jsonl    # your decoder, rows with "prompt" and "completion"

With TRL's trainers the line is the same: examples/trl_trainer.py.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sparselora import SparsityConfig, sparsify


def tiny_model():
    """A random Llama whose tokens are bytes: any text goes in."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    return LlamaForCausalLM(shape), lambda text: list(text.encode()), 256


def pretrained(folder: str):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id


def encode(rows, to_ids, end: int) -> list[dict[str, list[int]]]:
    """Prompt and completion as token ids; the label -100 marks the prompt, which is context."""
    examples = []
    for row in rows:
        prompt, completion = to_ids(row["prompt"] + "\n"), [*to_ids(row["completion"]), end]
        examples.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return examples


def collate(examples):
    """Pad on the right; padding has no label and is masked."""
    length = max(len(example["input_ids"]) for example in examples)

    def padded(name: str, fill: int):
        return torch.tensor([example[name] + [fill] * (length - len(example[name])) for example in examples])

    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (length - len(e["input_ids"])) for e in examples])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def sums(count: int):
    """Instruction data where none is given."""
    return [
        {"prompt": f"What is {i % 10} plus {i // 10 % 10}?", "completion": str(i % 10 + i // 10 % 10)}
        for i in range(count)
    ]


def main(argv=None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a decoder (default: a tiny random Llama)")
    parser.add_argument("--data", type=Path, help="JSON lines with prompt and completion (default: sums)")
    parser.add_argument("--ffn_sparsity", type=float, default=0.9)
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--out_dir", default="runs/trainer_example")
    args = parser.parse_args(argv)

    model, to_ids, end = tiny_model() if args.model is None else pretrained(args.model)
    rows = sums(400) if args.data is None else [json.loads(line) for line in args.data.read_text("utf-8").splitlines()]
    examples = encode(rows, to_ids, end)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    peft_model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))

    arguments = TrainingArguments(
        output_dir=args.out_dir, max_steps=args.max_steps, per_device_train_batch_size=16, learning_rate=5e-3,
        logging_steps=min(10, args.max_steps), report_to=[], save_strategy="no", remove_unused_columns=False,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=peft_model, args=arguments, train_dataset=examples, data_collator=collate)

    # Dense for a tenth of the steps, and in the first layer: an error made there passes through all others.
    config = SparsityConfig(
        mode="static", ffn_sparsity=args.ffn_sparsity, layer_sparsity={"layer.0": 0.0}, sparse_warmup_ratio=0.1
    )
    handle = sparsify(trainer, config)  # the one line; it calibrates on rows of the trainer's data

    trainer.train()

    handle.remove()
    peft_model.save_pretrained(args.out_dir)  # a plain PEFT adapter
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; adapter in {args.out_dir}")
    return trainer


if __name__ == "__main__":
    main()
