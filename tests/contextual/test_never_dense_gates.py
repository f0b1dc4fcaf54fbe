"""Gates and trainers of others next to a sparse step: what they would switch off without a word, they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from sparselora.config.sparsity import SparsityConfig
from sparselora.config.token_gates import TokenGateConfig
from sparselora.contextual.handle import sparsify
from sparselora.contextual.trainers import SparsityCallback
from sparselora.errors import InputError
from sparselora.novelty import SLoRATrainer
from sparselora.token_gates.gates import TokenGateCallback, attach_token_gates
from tests.contextual.test_never_dense import FromLogits, NeverBegins, custom_loss
from tests.helpers.contextual_models import ragged, tiny
from tests.novelty.test_novelty_trainer import SMALL, arguments, examples

# --- token gates and the novelty gate --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"supervision": "energy"}, {"select": "threshold"}], ids=str)
@pytest.mark.parametrize(
    ("kind", "more", "options"),
    [
        (FromLogits, {}, {}),
        (Trainer, {"label_smoothing_factor": 0.1}, {}),
        (Trainer, {}, {"compute_loss_func": custom_loss}),
    ],
)
def test_gates_whose_objective_would_be_lost_stop(kind, more, options, settings, tmp_path):
    for name, stops in (("learned", True), ("task", False)):
        model = tiny("llama").float()
        attach_token_gates(model, TokenGateConfig(**(settings if stops else {})))
        trainer = kind(model, arguments(tmp_path, **more), train_dataset=examples(4), **options)
        if stops:
            with pytest.raises(InputError, match=r"train through the model's own loss .*no label smoothing"):
                trainer.train()
        else:  # the control: gates of the task's loss alone train on any
            trainer.train()
            assert trainer.state.global_step == 2, name


def test_gates_that_no_pass_reaches_are_told(tmp_path):
    model, batch = tiny("bert").float(), ragged("bert")
    gates = attach_token_gates(model, TokenGateConfig(policy="energy"))
    model(**batch).loss.backward()
    told = r"reached none of the .* token gates: adapter default is merged, disabled"
    with pytest.raises(InputError, match=told), model.disable_adapter():
        model(**batch)
    with model.disable_adapter(), torch.no_grad():  # a reference pass
        model(**batch)
    model.merge_adapter()
    with pytest.raises(InputError, match="reached none"):
        model(**batch)
    model.unmerge_adapter()
    gates.set_budget(1.0)
    with model.disable_adapter():
        model(**batch)


def test_a_budget_that_nobody_steps_is_an_error(tmp_path):
    for kind, stops in ((NeverBegins, True), (Trainer, False)):
        model = tiny("llama").float()
        gates = attach_token_gates(model, TokenGateConfig(policy="energy", anneal_ratio=0.5))
        trainer = kind(model, arguments(tmp_path), train_dataset=examples(4))
        trainer.add_callback(TokenGateCallback(gates))
        if stops:
            with pytest.raises(InputError, match="whose beginning TokenGateCallback was not told of"):
                trainer.train()
        else:
            trainer.train()


class OwnStep(SLoRATrainer):
    """A trainer whose step is its own, past the gate's."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        loss = model(**{name: value for name, value in inputs.items() if torch.is_tensor(value)}).loss
        loss.backward()
        return loss.detach()


class OwnBackward(SLoRATrainer):
    """A trainer whose backward pass goes past the accelerator."""

    def _offer(self, loss: torch.Tensor, **kwargs: Any) -> None:
        loss.backward()


@pytest.mark.filterwarnings("ignore:no gating will happen")
@pytest.mark.parametrize(
    ("kind", "cause"), [(OwnStep, "training_step is overridden"), (OwnBackward, "did not go through accelerator")]
)
def test_a_trainer_past_the_novelty_gate_stops(kind, cause, tmp_path):
    for policy in ("novelty", "random"):
        config = SMALL | {"policy": policy}
        trainer = kind(tiny("llama"), arguments(tmp_path), train_dataset=examples(8), gate_config=config)
        with pytest.raises(InputError, match=cause):
            trainer.train()
        control = SLoRATrainer(tiny("llama"), arguments(tmp_path), train_dataset=examples(8), gate_config=config)
        control.train()
        assert len(control.gate_table()) == 4


# --- TRL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["sparsify", "trainer"])
def test_supervised_fine_tuning_with_trl(first, tmp_path):
    trl = pytest.importorskip("trl", reason="the trainer of TRL")
    from datasets import Dataset

    from tests.helpers.byte_llama import byte_llama, byte_tokenizer

    data = Dataset.from_list([{"prompt": f"Q: {i} and {i % 5}? ", "completion": f"A: {3 * i}"} for i in range(12)])
    losses = {}
    for mode in ("plain", "dense", "svd"):
        torch.manual_seed(1)
        lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(byte_llama().float(), lora)
        sparse = SparsityConfig(mode="svd", svd_rank=4, ffn_sparsity=0.9)
        config = sparse if mode == "svd" else SparsityConfig(mode="dense")
        args = trl.SFTConfig(
            str(tmp_path), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, use_cpu=True, bf16=False,
            report_to="none", logging_steps=1, disable_tqdm=True, save_strategy="no", seed=0,
        )  # fmt: skip
        handle = sparsify(model, config, cache_dir=tmp_path) if first == "sparsify" and mode != "plain" else None
        trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=byte_tokenizer())
        if first == "trainer" and mode != "plain":
            handle = sparsify(trainer.model, config, cache_dir=tmp_path)
        if handle is not None:
            trainer.add_callback(SparsityCallback(handle))
        trainer.train()
        losses[mode] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        if mode == "svd":
            assert handle is not None
            assert handle.choices()
    assert losses["dense"] == pytest.approx(losses["plain"], abs=1e-5)
    assert max(abs(a - b) for a, b in zip(losses["svd"], losses["plain"])) > 1e-4
