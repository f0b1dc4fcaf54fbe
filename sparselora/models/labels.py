"""The label of a token that is not learned, one and the same for data, losses and everything that reads labels."""

from __future__ import annotations

IGNORED = -100
"""Label of a position without one; the ``ignore_index`` of torch's cross-entropy and of transformers."""
