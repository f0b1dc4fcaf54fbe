"""Write rows with planted redundancy: as many batches of near-duplicates, which a gate should skip, as of originals.

python examples/planted_rows.py rows.jsonl planted.jsonl --batches 200 --held_out rest.jsonl
python -m sparselora train configs/novelty_quick.yaml --model smollm2 --dataset planted.jsonl --eval_file rest.jsonl \
    --shuffle_batches --train_bsz 16

A near-duplicate is an earlier row whose prompt lacks one word. The rows of a batch stand together, so training has to
keep them together (--shuffle_batches, with the same batch); the column ``planted`` marks near-duplicates by 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparselora.data import read_table
from sparselora.errors import InputError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="json, jsonl, parquet, csv or tsv file of rows (.gz too)")
    parser.add_argument("out", type=Path, help="jsonl file to write")
    parser.add_argument("--prompt_field", default="prompt", help="column of the prompts (default: prompt)")
    parser.add_argument("--completion_field", default="completion", help="column of completions (default: completion)")
    parser.add_argument("--batch", type=int, default=16, help="rows of an update (default: 16)")
    parser.add_argument("--batches", type=int, default=0, help="batches of originals (default: all that are whole)")
    parser.add_argument("--copies", type=int, default=8, help="near-duplicates of a batch that has any (default: 8)")
    parser.add_argument("--held_out", type=Path, help="jsonl file to write the rows to that are no originals")
    parser.add_argument("--seed", type=int, default=0, help="draws the originals and what changes (default: 0)")
    args = parser.parse_args(arguments)
    paths = [Path(args.source), args.out, *([args.held_out] if args.held_out is not None else [])]
    if len({path.resolve() for path in paths}) < len(paths):
        parser.error("the source, the file to write and --held_out must be different files; name another")
    for path in paths[1:]:
        if path.is_dir():
            parser.error(f"{path} is a folder; name a jsonl file to write")

    try:
        table = read_table(args.source)
        texts = list(zip(table.texts(args.prompt_field), table.texts(args.completion_field)))
    except InputError as error:
        parser.error(str(error))
    if min(args.batch, args.copies) < 1 or args.batches < 0:
        parser.error("--batch and --copies must be 1 or more, --batches 0 or more")
    batches, rng = args.batches or len(texts) // args.batch, np.random.default_rng(args.seed)
    if not 0 < batches * args.batch <= len(texts):
        parser.error(f"{args.source} has {len(texts)} rows, not {max(batches, 1)} batches of {args.batch}; lower them")
    chosen_rows, others = np.split(rng.permutation(len(texts)), [batches * args.batch])
    order = chosen_rows.reshape(batches, args.batch)
    lines = [line(*texts[row], planted=0) for batch in order for row in batch]
    for number in range(batches):
        for row in order[number // args.copies]:
            prompt, completion = texts[row]
            lines.append(line(without_a_word(prompt, rng), completion, planted=1))
    files = {args.out: lines}
    if args.held_out is not None:
        files[args.held_out] = [line(*texts[row], planted=0) for row in sorted(others)]
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(content), encoding="utf-8")
    print(f"{len(lines)} rows, half of them near-duplicates, in batches of {args.batch}: {args.out}")


def line(prompt: str, completion: str, *, planted: int) -> str:
    return json.dumps({"prompt": prompt, "completion": completion, "planted": planted}) + "\n"


def without_a_word(text: str, rng: np.random.Generator) -> str:
    """Return ``text`` without one of its words, other than the first and the last; one of two words stays whole."""
    words = text.split(" ")
    if len(words) > 2:
        del words[int(rng.integers(1, len(words) - 1))]
    return " ".join(words)


if __name__ == "__main__":
    main()
