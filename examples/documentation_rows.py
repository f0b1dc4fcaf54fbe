"""Write instruction rows harvested from the documentation of installed packages: name the library of a sentence.

python examples/documentation_rows.py rows.jsonl                # 200 rows, no network
python -m sparselora profile --model smollm2 --dataset rows.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sparselora.data.texts import harvest_docstrings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="jsonl file to write")
    parser.add_argument("--rows", type=int, default=200, help="rows to write (default: 200)")
    args = parser.parse_args()

    data = harvest_docstrings()
    drawn = data.train.sample(args.rows, random_state=0)
    lines = [
        json.dumps({"prompt": text, "completion": data.labels[label]})
        for text, label in zip(drawn["text"], drawn["label"])
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{args.rows} rows: {args.out}")


if __name__ == "__main__":
    main()
