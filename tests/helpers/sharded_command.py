"""`sparselora` with the arguments of this script, as one of two processes over which accelerate shards.

Writes ``shards0.json`` and ``shards1.json`` to the folder ``SHARDS`` of the environment: how many modules are sharded
by themselves, and the share of the model's numbers that this process keeps. With ``STOP_AT`` in the environment
the run fails in that step, with ``FORGETS`` it resumes without the optimizer's first moments.
"""

import json
import os
import sys
from pathlib import Path

from sparselora.__main__ import main
from sparselora.contextual.sharding import is_unit
from sparselora.training import run, trainer
from tests.helpers.accelerate_steps import call_the_cpu_a_gpu


def record_shards() -> None:
    shard = run.shard

    def recorded(model, **settings):
        shard(model, **settings)
        parameters = list(model.parameters())
        share = sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)
        units = sum(is_unit(module) for module in model.modules())
        Path(os.environ["SHARDS"], f"shards{os.environ['RANK']}.json").write_text(
            json.dumps({"units": units, "share": share})
        )

    run.shard = recorded


def stop_at(last: int) -> None:
    step = trainer.FineTuner.training_step

    def stopping(self, *arguments, **keywords):
        if self.state.global_step == last:
            raise RuntimeError("stopped")
        return step(self, *arguments, **keywords)

    trainer.FineTuner.training_step = stopping


def forget_moments() -> None:
    load = trainer.load_moments

    def forgetful(model, optimizer, folder):
        load(model, optimizer, folder)
        for state in optimizer.state.values():
            state["exp_avg"].zero_()

    trainer.load_moments = forgetful


if __name__ == "__main__":
    call_the_cpu_a_gpu()
    record_shards()
    stops = os.environ.get("STOP_AT")
    if stops:
        stop_at(int(stops))
    if os.environ.get("FORGETS"):
        forget_moments()
    status = main(sys.argv[1:])
    sys.exit(status != 1 if stops else status)
