"""A sparse LoRA with TRL's SFTTrainer: one line more than a dense run.

python examples/trl_trainer.py                                     # a tiny Llama with random weights, in seconds
python examples/trl_trainer.py --model FOLDER --data mine.jsonl    # your decoder, rows with "prompt" and "completion"

DPOTrainer and GRPOTrainer take the same line. Needs TRL: pip install 'sparselora[trainers]'.
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from sparselora import SparsityConfig, sparsify


def tiny_model():
    """A random Llama and its tokenizer of bytes: any text goes in."""
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({"<eos>": 0, "<pad>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    shape = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(shape), PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    )


def sums(count: int) -> Dataset:
    """Instruction data where none is given."""
    rows = [(i % 10, i // 10 % 10) for i in range(count)]
    return Dataset.from_list([{"prompt": f"What is {a} plus {b}?\n", "completion": str(a + b)} for a, b in rows])


def main(argv=None) -> SFTTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a decoder (default: a tiny random Llama)")
    parser.add_argument("--data", help="JSON lines with prompt and completion (default: sums)")
    parser.add_argument("--ffn_sparsity", type=float, default=0.9)
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--out_dir", default="runs/trl_example")
    args = parser.parse_args(argv)

    if args.model is None:
        model, tokenizer = tiny_model()
    else:
        model, tokenizer = (kind.from_pretrained(args.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    data = sums(400) if args.data is None else load_dataset("json", data_files=args.data, split="train")
    arguments = SFTConfig(
        output_dir=args.out_dir, max_steps=args.max_steps, per_device_train_batch_size=16, learning_rate=5e-3,
        logging_steps=min(10, args.max_steps), report_to=[], save_strategy="no", disable_tqdm=True,
        bf16=torch.cuda.is_available(),
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora
    )  # fmt: skip

    # The first layer stays dense: an error made there passes through all others.
    sparse = SparsityConfig(mode="static", ffn_sparsity=args.ffn_sparsity, layer_sparsity={"layer.0": 0.0})
    handle = sparsify(trainer, sparse)  # the one line

    trainer.train()
    handle.remove()
    trainer.save_model(args.out_dir)  # a plain PEFT adapter
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; adapter in {args.out_dir}")
    return trainer


if __name__ == "__main__":
    main()
