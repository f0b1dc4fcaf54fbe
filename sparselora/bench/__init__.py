"""Measurements of ``python -m sparselora bench``.

setup             model, shape, sparsity, adapter and batch
request           the three measurements, frozen
multiplications   what two configurations compute per token, counted
against           our steps next to those of other trainers, which `rivals` runs in processes of their own
step_times        whole training steps of the variants of one model
explain           where the time of a step goes, by a profile whose operations `step_parts` sorts
rates             products and copies of a device per second
estimates         how well estimates rank channels on real texts
timing            steps of several variants, interleaved
payoff            from step times to ratios, ceilings, overheads and the point of breaking even
estimator_check   estimates of each layer against its oracle

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "break_even": "bench.payoff",
        "check_estimators": "bench.estimator_check",
        "step_table": "bench.timing",
        "time_variants": "bench.timing",
    },
)
