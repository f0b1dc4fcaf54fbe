"""Operations of a sparse training step: each a public function, a plain-torch reference, and a Triton launcher.

``impl="auto"`` takes Triton for CUDA tensors where it is installed, and the reference elsewhere; ``"torch"`` and
``"triton"`` choose. The reference defines the operation.
"""
