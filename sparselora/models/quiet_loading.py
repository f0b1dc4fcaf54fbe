"""Loading by transformers without its progress bars and notices."""

from __future__ import annotations

import functools
import logging

import transformers
from transformers import modeling_gguf_pytorch_utils


class quiet_loading:
    """No progress bars and no notice of the fresh head, which is what we asked for."""

    def __enter__(self) -> None:
        self._verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity(logging.ERROR)
        transformers.logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one clear line, not a line for every retry
        # The conversion of GGUF has a bar that no setting turns off.
        self._bar = modeling_gguf_pytorch_utils.tqdm
        modeling_gguf_pytorch_utils.tqdm = functools.partial(self._bar, disable=True)

    def __exit__(self, *_: object) -> None:
        transformers.logging.set_verbosity(self._verbosity)
        modeling_gguf_pytorch_utils.tqdm = self._bar
