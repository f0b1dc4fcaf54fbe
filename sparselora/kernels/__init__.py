"""Operations of a sparse training step: each a public function, a plain-torch reference, and a Triton launcher.

``impl="auto"`` takes Triton for CUDA tensors where it is installed, and the reference elsewhere; ``"torch"`` and
``"triton"`` choose. The reference defines the operation.

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "add_rms_norm": "kernels.norm",
        "attention_indices": "kernels.select",
        "gated_activation": "kernels.activation",
        "linear_cross_entropy": "kernels.cross_entropy",
        "thin_product": "kernels.thin",
        "top_indices": "kernels.select",
        "top_logits": "kernels.tops",
    },
)
