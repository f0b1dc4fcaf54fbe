"""`train --squeeze`: when the rank falls, the same bytes after a resume and in two processes, under every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from sparselora.__main__ import main
from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from sparselora.training.rank_schedule import RankSchedule, SqueezeCallback
from sparselora.training.trainer import FineTuner
from tests.helpers.processes import start_two
from tests.helpers.train_command import ADAPTER, Train

SPARSE = ["--sparsity.ffn_sparsity", "0.75", "--sparsity.svd_rank", "4", "--sparsity.surrogate_rank", "4"]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`train --squeeze 8:4:2`: 15 steps, cuts after the fourth and the eighth."""
    fields = ("--prompt_field", "question", "--completion_field", "answer")
    settings = (*fields, "--grad_accum", "2", "--epochs", "3", "--squeeze", "8:4:2")
    return Train(tmp_path_factory.mktemp("squeeze"), *settings)


# --- settings -----------------------------------------------------------------------------------------------------


def test_the_first_rank_is_where_training_begins() -> None:
    config = TrainConfig.from_dict({"squeeze": "64:16"})
    assert (config.lora_r, config.squeeze_ranks) == (64, (64, 16))
    assert TrainConfig().merge({"squeeze": "32:8"}).lora_r == 32
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig(lora_r=5).squeeze_ranks == (5,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"squeeze": "16:64"}, "must fall from rank to rank, got 16:64: 64 is not below 16"),
        ({"squeeze": "16:16"}, "must fall"),
        ({"squeeze": "16:0"}, "must end at rank 1 or more"),
        ({"squeeze": "16"}, "must be ranks with colons"),
        ({"squeeze": "a:b"}, "must be ranks with colons"),
        ({"squeeze": "16:-4"}, "must be ranks with colons"),
        ({"squeeze": "64:16", "lora_r": 8}, "begins at rank 64, and lora_r is 8"),
        ({"squeeze_budget": "global"}, "squeeze_budget is given without squeeze"),
        ({"squeeze_ratio": 0.2}, "squeeze_ratio is given without squeeze"),
        ({"squeeze": "64:16", "squeeze_multiple": 4}, "squeeze_multiple is for squeeze_budget global"),
        ({"squeeze": "16:4", "squeeze_budget": "global"}, "squeeze_multiple must be at most the last rank"),
        ({"squeeze": "64:16", "use_dora": True}, "squeeze and use_dora are both given"),
        ({"squeeze": "64:16", "init_lora_weights": "pissa"}, "squeeze and init_lora_weights pissa are both given"),
        ({"squeeze": "64:16", "init_lora_weights": "olora"}, "squeeze and init_lora_weights olora are both given"),
        ({"squeeze": "64:16", "token_gate": {}}, "squeeze and token_gate are both given"),
        ({"squeeze": "64:16", "squeeze_warmup_ratio": 0.1, "novelty": {}}, "squeeze_warmup_ratio and an enabled"),
    ],
)
def test_settings_that_contradict_one_another(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig.from_dict(settings)


def test_cuts_divide_their_share_of_the_steps() -> None:
    config = TrainConfig.from_dict({"squeeze": "64:32:16", "squeeze_ratio": 0.6, "squeeze_warmup_ratio": 0.03})
    schedule = RankSchedule.of(config, 100)
    assert schedule is not None
    assert schedule.cuts == (30, 60)
    assert [schedule.rank_in(step) for step in (1, 30, 31, 60, 61, 100)] == [64, 64, 32, 32, 16, 16]
    assert [schedule.lr_factor(step) for step in (29, 30, 31, 32, 33, 60, 63)] == [1, 0.25, 0.5, 0.75, 1, 0.25, 1]
    assert RankSchedule.of(TrainConfig(), 100) is None
    with pytest.raises(InputError, match="train longer"):
        RankSchedule.of(config, 2)
    with pytest.raises(InputError, match="train longer"):
        RankSchedule.of(config.replace(squeeze="64:16", squeeze_ratio=0.99), 10)


# --- a run --------------------------------------------------------------------------------------------------------


def test_a_run_ends_at_the_last_rank_and_says_what_each_cut_cost(train: Train) -> None:
    assert train("plain") == 0
    tensors = load_file(train.folder / "plain" / ADAPTER)
    assert {len(value) for name, value in tensors.items() if "lora_A" in name} == {2}
    table = train.table("plain", "squeeze")
    assert table["step"].unique().tolist() == [4, 8]
    assert set(zip(table["step"], table["rank_before"], table["rank_after"])) == {(4, 8, 4), (8, 4, 2)}
    assert np.allclose(table["retained_energy"] + table["relative_error"] ** 2, 1)
    assert (table["relative_error"] > 0.01).all()
    assert "layers.0.self_attn.q_proj" in table["module"].iloc[0]
    flops = train.table("plain", "metrics").groupby("tokens")["active_flops_per_token"].agg(["first", "last"])
    assert (flops["last"] <= flops["first"]).all()
    summary = train.table("plain", "summary")
    assert summary["trainable_params"].iloc[0] == sum(value.numel() for value in tensors.values())


def test_the_loss_right_after_is_that_of_the_truncated_adapter(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`reduce` of the adapter before a cut, evaluated by `eval`, against the model right after it."""
    from sparselora.models.lora import export_adapter

    losses: list[float] = []
    original = SqueezeCallback.on_step_begin

    def watched(callback: SqueezeCallback, args: Any, state: Any, control: Any, **named: Any) -> None:
        is_cut = state.global_step == 8
        if is_cut:
            export_adapter(callback._model, tmp_path / "before", str(train.folder / "llama"), template="{prompt}")  # type: ignore[arg-type]
        original(callback, args, state, control, **named)
        if is_cut:
            rows = trainers[0].evaluate_rows()
            losses.append(float(rows["loss"].sum() / rows["tokens"].sum()))
            callback._model.train()

    trainers: list[FineTuner] = []
    run = FineTuner.run

    def remembered(trainer: FineTuner, *arguments: Any) -> None:
        trainers.append(trainer)
        run(trainer, *arguments)

    monkeypatch.setattr(SqueezeCallback, "on_step_begin", watched)
    monkeypatch.setattr(FineTuner, "run", remembered)
    assert train(str(tmp_path / "run"), "--template", "{prompt}") == 0
    assert (
        main(["reduce", "--adapter", str(tmp_path / "before"), "--rank", "2", "--out_dir", str(tmp_path / "cut")]) == 0
    )
    evaluated = {}
    for name in ("before", "cut"):
        files = [train.arguments[i + 1] for i in (2, 4, 6)]
        arguments = ["--model", files[0], "--dataset", files[1], "--eval_file", files[2], "--task", "causal_lm"]
        fields = ["--prompt_field", "question", "--completion_field", "answer", "--device", "cpu"]
        out = tmp_path / f"eval_{name}"
        assert main(["eval", *arguments, *fields, "--adapter", str(tmp_path / name), "--out_dir", str(out)]) == 0
        items = pd.read_csv(out / "items_causal_lm.csv")
        evaluated[name] = float(items["loss"].sum() / items["tokens"].sum())
    assert losses == [pytest.approx(evaluated["cut"], rel=1e-5)]
    assert abs(evaluated["before"] - evaluated["cut"]) > 1e-3  # the control: the cut is no small thing here


@pytest.mark.parametrize("killed_in", [3, 4, 6, 10])
def test_a_resumed_run_is_the_uninterrupted_one_before_at_and_after_a_cut(
    train: Train, tmp_path: Path, killed_in: int
) -> None:
    arguments = ["--save_steps", "2", "--eval_steps", "3", "--lora_dropout", "0.1", "--squeeze_warmup_ratio", "0.2"]
    if not (train.folder / "whole").exists():
        assert train("whole", *arguments) == 0
    broken = str(tmp_path / "broken")
    train.kill_in_step(killed_in, broken, *arguments)
    assert train(broken, *arguments, "--resume") == 0
    for name, columns in (("metrics", ["step", "loss", "lr", "tokens"]), ("eval", None), ("squeeze", None)):
        whole, resumed = (train.table(out, name) for out in ("whole", broken))
        names = columns or list(whole)
        pd.testing.assert_frame_equal(whole[names], resumed[names], check_exact=True)
    assert (train.folder / "whole" / ADAPTER).read_bytes() == (tmp_path / "broken" / ADAPTER).read_bytes()


def test_the_learning_rate_rises_again_after_a_cut(train: Train) -> None:
    assert train("rewarmed", "--squeeze_warmup_ratio", "0.2") == 0
    assert train("unchanged") == 0
    rewarmed, unchanged = (train.table(out, "metrics")["lr"] for out in ("rewarmed", "unchanged"))
    factors = (rewarmed / unchanged).tolist()
    assert factors == pytest.approx([1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 0.25, 0.5, 0.75, 1, 1, 1, 1])


@pytest.mark.parametrize(
    "step",
    [
        ("svd", "--sparsity.mode", "svd", *SPARSE),
        ("static", "--sparsity.mode", "static", *SPARSE, "--sparsity.attention_sparsity", "0.5"),
        ("surrogate", "--sparsity.mode", "surrogate", *SPARSE),
        ("skip", "--sparsity.mode", "skip", *SPARSE),
        ("fp8", "--sparsity.mode", "dense", "--sparsity.frozen_precision", "fp8_emulated"),
        ("detached", "--sparsity.mode", "dense", "--sparsity.context_backward", "none"),
        ("activated", "--no-adapter_on_context", "--template", "{prompt} w1 w2 w3"),
        ("checkpointed", "--gradient_checkpointing"),
        ("novelty", "--novelty.policy", "novelty", "--novelty.k_topk", "8", "--novelty.burn_in", "2"),
        ("loraplus", "--loraplus_lr_ratio", "4"),
        ("sgd", "--optim", "sgd", "--optim_args", "momentum=0.9"),
        ("global", "--squeeze_budget", "global", "--squeeze_multiple", "2"),
    ],
    ids=lambda step: step[0],
)
def test_every_kind_of_step_goes_on_after_a_cut(train: Train, step: tuple[str, ...]) -> None:
    name, *arguments = step
    assert train(f"step_{name}", *arguments) == 0
    table = train.table(f"step_{name}", "squeeze")
    assert table["step"].unique().tolist() == [4, 8]
    if name == "global":
        last = table[table["step"] == 8]
        spent = (last["rank_after"] * (last["d_out"] + last["d_in"])).sum()
        assert spent <= (2 * (last["d_out"] + last["d_in"])).sum()
    metrics = train.table(f"step_{name}", "metrics")
    assert np.isfinite(metrics["loss"]).all()
    tensors = load_file(train.folder / f"step_{name}" / ADAPTER)
    assert max(len(value) for key, value in tensors.items() if "lora_A" in key) == table["rank_after"].iloc[-8:].max()


def test_two_processes_cut_to_the_same_bytes_and_train_as_one_with_twice_the_batch(
    train: Train, tmp_path: Path
) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import hashlib, os, sys, torch\n"
        "from sparselora.training.trainer import FineTuner\n"
        "from sparselora.__main__ import main\n"
        "step, lines = FineTuner.training_step, []\n"
        "def watched(trainer, *args, **named):\n"
        "    loss = step(trainer, *args, **named)\n"
        "    state = trainer.optimizer.state\n"
        "    tensors = [t for p in trainer.model.parameters() if p.requires_grad\n"
        "               for t in (p, *(v for v in state.get(p, {}).values() if v.dim()))]\n"
        "    digest = hashlib.sha256(b''.join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()\n"
        "    lines.append(f'{trainer.state.global_step} {sum(t.numel() for t in tensors)} {digest}')\n"
        "    return loss\n"
        "FineTuner.training_step = watched\n"
        "status = main(sys.argv[1:])\n"
        f"open(rf'{tmp_path}/' + os.environ['RANK'], 'w').write('\\n'.join(lines))\n"
        "sys.exit(status)\n"
    )
    two = ["train", *train.arguments, "--train_bsz", "2", "--eval_steps", "6", "--out_dir", str(tmp_path / "two")]
    start_two(str(script), *two, folder=tmp_path)
    lines = [(tmp_path / rank).read_text().splitlines() for rank in "01"]
    assert lines[0] == lines[1]
    assert len({line.split()[1] for line in lines[0]}) >= 3  # the control: the adapter did shrink, twice
    assert len({line.split()[2] for line in lines[0]}) >= 15
    assert train(str(tmp_path / "one"), "--eval_steps", "6") == 0
    one, both = (pd.read_csv(tmp_path / out / "metrics.csv") for out in ("one", "two"))
    assert both["tokens"].tolist() == one["tokens"].tolist()
    assert both["loss"].tolist() == pytest.approx(one["loss"].tolist(), rel=1e-3)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--squeeze", "4:8"], "squeeze must fall"),
        (["--squeeze", "4:0"], "PEFT has no rank 0"),
        (["--squeeze", "33:8"], "lora_r must be between 1 and"),
        (["--max_steps", "2"], "train longer, or name fewer ranks"),
        (["--optim", "adafactor"], "those of Adafactor are not known to turn"),
        (["--token_gate.policy", "energy"], "squeeze and token_gate are both given"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    train: Train, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train.assert_refused(arguments, message, capsys)
