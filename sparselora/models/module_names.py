"""Names of a model's weights in its files → names of the modules that hold them once transformers has loaded it.

transformers renames on loading (``language_model.model.layers`` → ``model.language_model.layers``), joins experts into
one 3-D parameter and splits fused projections. PEFT takes names of modules, and only those of linear layers and
embeddings. Here the model is built without memory (on torch's meta device) and asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

STORED_AS_LOADED = frozenset({
    "bert", "roberta", "xlm-roberta", "distilbert", "gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma",
    "gemma2", "gemma3_text",
})  # fmt: skip
"""Model types whose matrices have the same names in the files as in the model and are all linear layers or embeddings:
nobody has to be asked. A test holds this against transformers."""


_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Model types for which PEFT refuses LoRA on ``out_proj``."""


@dataclass(frozen=True)
class LoadedNames:
    """Modules that hold the weights of a model's files once it is loaded.

    Attributes:
        modules: stored name (without ``.weight``) → name of the linear layer or embedding that holds it.
        left_out: the other stored names → the reason why PEFT cannot adapt them by the name of a module.
        unknown: the reason why transformers could not be asked, so that ``modules`` has the stored names; else "".
    """

    modules: dict[str, str]
    left_out: dict[str, str]
    unknown: str = ""


def loaded_names(folder: Path, model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> LoadedNames:
    """Find the modules that hold the weights of the model in ``folder``.

    Args:
        model_type: of its configuration, ``""`` where it has none.
        shapes: stored name without ``.weight`` → shape of the weight as stored.
    """
    as_stored = {name: name for name in shapes}
    if model_type in STORED_AS_LOADED:
        return LoadedNames(as_stored, {})
    if not model_type:
        return LoadedNames(as_stored, {}, "the folder has no config.json with a model_type")
    try:
        return _ask_transformers(folder, shapes)
    except ImportError:
        return LoadedNames(as_stored, {}, "transformers is not installed")
    except Exception as error:  # code of the model's own, a type it does not know: transformers raises many kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        return LoadedNames(as_stored, {}, f"transformers cannot build this model ({reason})")


def _ask_transformers(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> LoadedNames:
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.pytorch_utils import Conv1D

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or []]
        architecture = next((cls for cls in named if cls is not None), None)
        with torch.device("meta"):
            model = architecture(config) if architecture else transformers.AutoModel.from_config(config)
    finally:
        transformers.logging.set_verbosity(verbosity)
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    one_to_one = {
        pattern: len(converter.source_patterns) == len(converter.target_patterns) == 1
        for converter in converters
        for pattern in converter.source_patterns
    }
    state = model.state_dict()
    modules, left_out = {}, {}
    for name, shape in shapes.items():
        # A stored name that had no ".weight" to lose is that of a parameter, as experts are.
        for key in (f"{name}.weight", name):
            loaded, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if loaded not in state and key in state:
                loaded, pattern = key, None
            if loaded in state:
                break
        owner, _, parameter = loaded.rpartition(".")
        fits = loaded in state and tuple(state[loaded].shape) == tuple(shape)
        # What goes one to one is permuted or transposed at most, which leaves its rank as it is.
        if pattern is not None and not (fits and one_to_one.get(pattern, False)):
            left_out[name] = f"joined with others or split on loading, as {re.sub(r'[0-9]+', '*', loaded)}"
        elif loaded not in state:
            left_out[name] = f"not in {type(model).__name__}"
        elif not fits:
            left_out[name] = f"of another shape in {type(model).__name__}"
        elif parameter != "weight" or not isinstance(
            model.get_submodule(owner), (torch.nn.Linear, torch.nn.Embedding, Conv1D)
        ):
            left_out[name] = f"a parameter of {type(model.get_submodule(owner)).__name__}, which is no linear layer"
        elif getattr(config, "model_type", "") in _MAMBA and owner.endswith("out_proj"):
            left_out[name] = "an out_proj of Mamba, whose kernels take its weight past the LoRA: PEFT refuses it"
        else:
            modules[name] = owner
    return LoadedNames(modules, left_out)
