"""Write rows for a language model from the documentation of installed packages: the last words of long sentences.

python examples/documentation_rows.py rows.jsonl                # 200 rows, no network
python -m sparselora profile --model smollm2 --dataset rows.jsonl --template '{prompt}'
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sparselora.data.texts import harvest_docstrings

LONG = 16
"""Words of the shortest sentence that is used."""
LAST = 4
"""Words of a completion: the fewer, the more of it follows from the prompt."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="jsonl file to write")
    parser.add_argument("--rows", type=int, default=200, help="rows to write (default: 200)")
    args = parser.parse_args(arguments)

    sentences = [text.split() for text in harvest_docstrings().train.sample(frac=1, random_state=0)["text"]]
    rows = [
        {"prompt": " ".join(words[:-LAST]), "completion": " " + " ".join(words[-LAST:])}
        for words in sentences
        if len(words) >= LONG
    ][: args.rows]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows: {args.out}")


if __name__ == "__main__":
    main()
