"""The spectrum of a finished adapter: take ΔW = scaling · B A apart, edit its singular values, write it back.

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AdapterEdit": "spectral.edit",
        "AdapterSVD": "spectral.factors",
        "EditOptions": "spectral.modes",
        "EditResult": "spectral.modes",
        "Sensitivity": "spectral.sensitivity",
        "adapter_svd": "spectral.factors",
        "decompositions": "spectral.edit",
        "edit_spectrum": "spectral.modes",
        "in_place": "spectral.edit",
        "measure": "spectral.sensitivity",
        "plan_edit": "spectral.run",
        "reduce_adapter": "spectral.reduce",
        "refactor": "spectral.factors",
    },
)
