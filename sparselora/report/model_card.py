"""The model card of a trained adapter: settings, results and how to load it, as a README of the hub's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparselora.config.yaml_text import to_yaml_text
from sparselora.report.markdown import markdown_table

_RESULTS = ("steps", "train_rows", "eval_rows", "trainable_params", "train_loss", "eval_loss", "eval_accuracy")
_LEFT_OUT = ("model", "dataset", "eval_file", "device", "hub_model_id", "push_to_hub", "report_to")
"""Settings that say nothing of the adapter, or are in the card already."""


def model_card(
    settings: Mapping[str, Any], defaults: Mapping[str, Any], summary: Mapping[str, Any], base_model: str
) -> str:
    """Return the text of a card.

    Args:
        settings, defaults: of the run, by name; those that differ are listed.
        summary: the row of ``summary.csv``.
        base_model: name of the base model.
    """
    causal = settings["task"] == "causal_lm"
    head: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation" if causal else "text-classification",
        "tags": ["lora", "sparselora"],
    }
    if "/" in base_model:  # a local folder is no name on the hub
        head["base_model"] = base_model
    results = [[name, _text(summary[name])] for name in _RESULTS]
    changed = {name: value for name, value in settings.items() if value != defaults.get(name) and name not in _LEFT_OUT}
    how = "every step dense" if summary["mode"] == "none" else f"mode {summary['mode']}"
    kind = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
    return f"""---
{to_yaml_text(head)}---

# LoRA adapter of {base_model}

Trained with sparselora on {summary["dataset"]}, {how}, in PEFT's format.

## Results

{markdown_table(["", "value"], results)}

Losses are in nats, {"a token that carries a label" if causal else "a row"}; the evaluation is on held-out rows.

## Settings other than the defaults

```yaml
{to_yaml_text(changed)}```

## Use

```python
from peft import PeftModel
from transformers import {kind}

model = PeftModel.from_pretrained({kind}.from_pretrained("{base_model}"), "PATH_OF_THIS_FOLDER")
```
"""


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
