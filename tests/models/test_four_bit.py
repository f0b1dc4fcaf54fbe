"""Frozen weights in 4 bits: what no pass may change, and `train --load_in_4bit` from command to merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

bnb = pytest.importorskip("bitsandbytes", reason="4-bit weights need the package bitsandbytes")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM  # noqa: E402

from sparselora.__main__ import main  # noqa: E402
from sparselora.config.sparsity import SparsityConfig  # noqa: E402
from sparselora.contextual.frozen import FrozenLinear  # noqa: E402
from sparselora.contextual.handle import sparsify  # noqa: E402
from sparselora.data.batches import Collator  # noqa: E402
from sparselora.data.instructions import encode_instructions, load_instructions  # noqa: E402
from sparselora.models import lora  # noqa: E402
from sparselora.models.four_bit import dequantised, is_4bit, keep_storage  # noqa: E402
from sparselora.models.load import load_causal_lm  # noqa: E402
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions  # noqa: E402
from tests.helpers.train_command import killed_in_step  # noqa: E402

SIZES = {"vocab_size": 43, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None,
         "eos_token_id": 1, "pad_token_id": 2}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers whose sizes are multiples of 256."""
    folder = make_tiny_llama(tmp_path_factory.mktemp("models") / "llama256")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("instructions")
    return write_instructions(folder / "train.jsonl", 24), write_instructions(folder / "dev.jsonl", 9, 9)


# --- storage ------------------------------------------------------------------------------------------------------


def quantised(folder: Path, kind: str, double: bool) -> Any:
    """The model in 4 bits with a LoRA whose B is not zero, in training mode."""
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=double,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map="cpu", dtype=torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model.train()


def stored(model: Any) -> dict[str, list[torch.Tensor]]:
    """Every tensor that a 4-bit weight is made of."""
    found = {}
    for name, weight in model.named_parameters():
        if is_4bit(weight):
            state = weight.quant_state
            parts = [weight.data, state.absmax, state.code]
            if state.nested:
                parts += [state.offset, state.state2.absmax, state.state2.code]
            found[name] = [part.clone() for part in parts]
    assert len(found) == 14
    return found


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 43, (3, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :9] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


KINDS = [(kind, double) for kind in ("nf4", "fp4") for double in (True, False)]


@pytest.mark.parametrize(("kind", "double"), KINDS)
@pytest.mark.parametrize("evaluated", [False, True], ids=["fresh", "evaluated"])
def test_sparsify_and_remove_leave_every_stored_tensor_and_the_loss_as_they_were(
    llama: Path, tmp_path: Path, kind: str, double: bool, evaluated: bool
) -> None:
    model = quantised(llama, kind, double)
    if evaluated:  # which rearranges the weights, on a CPU with AVX-512 BF16
        with torch.no_grad():
            model.eval()(**batch())
        model.train()
    before, loss = stored(model), model(**batch()).loss.item()
    for mode in ("dense", "svd", "static"):
        settings = {} if mode == "dense" else {"ffn_sparsity": 0.5, "svd_rank": 4}
        config = SparsityConfig(mode=mode, **settings)
        handle = sparsify(model, config, calibration=[batch()], cache_dir=tmp_path)
        model(**batch()).loss.backward()
        with torch.no_grad():
            model.eval()(**batch())
        model.train()
        handle.remove()
        for name, parts in stored(model).items():
            for one, two in zip(parts, before[name], strict=True):
                assert torch.equal(one, two), (mode, name)
        assert model(**batch()).loss.item() == loss
    flags = {m.__dict__["support_avx512bf16_for_cpu"] for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert flags == {bnb.functional.has_avx512bf16()}, "and evaluation does again as bitsandbytes likes"


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_rearranged_weight_is_read_as_what_it_was(llama: Path, kind: str, double: bool) -> None:
    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes rearranges weights on a CPU with AVX-512 BF16 alone")
    model = quantised(llama, kind, double)
    name = "base_model.model.model.layers.1.mlp.up_proj"
    layer = model.get_submodule(name)
    matrix = dequantised(layer.weight)
    with torch.no_grad():
        model.eval()(**batch())
    assert layer.weight.quant_state.packing_format_for_cpu
    again = FrozenLinear(name, layer).stored()
    assert again.shape == (512, 256)
    assert again.dtype == matrix.dtype
    # Its scales are in bfloat16 now, so a step of 2^-8 is lost, and no more.
    torch.testing.assert_close(again, matrix, rtol=2**-8, atol=0)
    # The control: read in another order the scales would be those of other blocks.
    assert not torch.allclose(again.roll(1, 0), matrix, rtol=0.5, atol=0)


def test_the_dense_pass_on_4_bit_weights_has_the_gradients_of_peft(llama: Path) -> None:
    model = quantised(llama, "nf4", False)
    keep_storage(model)
    passes = []
    for handle in (None, sparsify(model, SparsityConfig(mode="dense"))):
        loss = model(**batch()).loss
        trained = [p for p in model.parameters() if p.requires_grad]
        passes.append((loss.item(), torch.autograd.grad(loss, trained)))
        if handle is None:
            continue
        handle.remove()
    assert passes[0][0] == pytest.approx(passes[1][0], rel=1e-6)
    for one, two in zip(passes[0][1], passes[1][1]):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


# --- LoRA layers --------------------------------------------------------------------------------------------------


def test_layers_in_4_and_8_bits_are_lora_layers_and_convolutions_are_not(llama: Path) -> None:
    model = quantised(llama, "nf4", True)
    assert next(iter(lora.lora_layers(model))) == "base_model.model.model.layers.0.self_attn.q_proj"
    assert lora.rank(next(iter(lora.lora_layers(model).values()))) == 4
    lora.prune(model, {name: [0, 2] for name in lora.lora_layers(model)})
    assert {lora.rank(layer) for layer in lora.lora_layers(model).values()} == {2}
    eight = torch.nn.Sequential(bnb.nn.Linear8bitLt(256, 256, has_fp16_weights=False))
    adapted = get_peft_model(eight, LoraConfig(r=2, target_modules=["0"]))
    assert list(lora.lora_layers(adapted)) == ["base_model.model.0"]
    conv = get_peft_model(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="Conv2d"):
        lora.lora_layers(conv)


# --- the command --------------------------------------------------------------------------------------------------


def train(llama: Path, files: tuple[Path, Path], out: Path, *more: str) -> int:
    return main(
        ["train", "--task", "causal_lm", "--model", str(llama), "--dataset", str(files[0]), "--eval_file",
         str(files[1]), "--load_in_4bit", "--lora_r", "4", "--lora_alpha", "8", "--lr", "1e-2", "--device", "cpu",
         "--max_steps", "4", "--train_bsz", "4", "--target_modules", "q_proj", "down_proj", "--cache_dir",
         str(out.parent / "cache"), "--out_dir", str(out), *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(llama: Path, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "plain"
    assert train(llama, files, out, "--save_steps", "2") == 0
    return out


def loss_of(model: Any, files: tuple[Path, Path]) -> float:
    tokenizer_of = model.config._name_or_path
    data = load_instructions(str(files[0]), eval_file=str(files[1]))
    tokenizer = load_causal_lm(tokenizer_of)[1]
    rows = Collator(2, causal=True).tensors(encode_instructions(data.eval, tokenizer, 64).examples)
    with torch.no_grad():
        return float(model(**rows).loss)


def test_train_save_reload_and_merge(llama: Path, files: tuple[Path, Path], run: Path) -> None:
    summary = pd.read_csv(run / "summary.csv").iloc[0]
    losses = pd.read_csv(run / "metrics.csv")["loss"]
    assert losses.iloc[-1] < losses.iloc[0]
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {tuple(t.shape) for k, t in tensors.items() if "down_proj.lora_A" in k} == {(4, 512)}
    assert all(t.abs().sum() > 0 for t in tensors.values())
    base, _ = load_causal_lm(str(llama), in_4bit=True)
    alone = loss_of(base.eval(), files)
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    assert loss_of(model, files) == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert alone != pytest.approx(summary["eval_loss"], rel=1e-2), "the control: the adapter matters"
    # On the weights it was trained over, at full precision, merged by plain PEFT.
    whole = LlamaForCausalLM.from_pretrained(llama)
    for name, weight in base.named_parameters():
        if is_4bit(weight):
            target = whole.get_submodule(name.replace(".base_layer", "").removesuffix(".weight"))
            target.weight.data = dequantised(weight).float()
    merged = PeftModel.from_pretrained(whole, run / "adapter").merge_and_unload().eval()
    assert loss_of(merged, files) == pytest.approx(summary["eval_loss"], rel=1e-4)
    merged = model.merge_and_unload()  # in 4 bits: quantised anew
    assert loss_of(merged, files) == pytest.approx(summary["eval_loss"], rel=0.1)


def test_a_resumed_run_is_the_uninterrupted_one(
    llama: Path, files: tuple[Path, Path], run: Path, tmp_path: Path
) -> None:
    with killed_in_step(3):
        train(llama, files, tmp_path / "run", "--save_steps", "2", "--eval_steps", "1")
    assert train(llama, files, tmp_path / "run", "--save_steps", "2", "--eval_steps", "1", "--resume") == 0
    # Evaluations between the steps have changed nothing either: the other run had none.
    one, two = (pd.read_csv(out / "metrics.csv")["loss"].tolist() for out in (run, tmp_path / "run"))
    assert one == two


STEPS = {
    "dense": ["--sparsity.mode", "dense"],
    "svd": ["--sparsity.mode", "svd", "--sparsity.ffn_sparsity", "0.75", "--sparsity.svd_rank", "4"],
    "static": ["--sparsity.mode", "static", "--sparsity.ffn_sparsity", "0.5", "--sparsity.attention_sparsity", "0.5"],
    "surrogate": ["--sparsity.mode", "surrogate", "--sparsity.ffn_sparsity", "0.5", "--sparsity.surrogate_rank", "4"],
    "learned": ["--token_gate.policy", "learned"],
    "novelty": ["--novelty.policy", "novelty", "--novelty.burn_in", "1", "--novelty.k_topk", "8", "--novelty.m", "64",
                "--novelty.k", "8"],
    "both": ["--novelty.policy", "novelty", "--novelty.burn_in", "1", "--novelty.k_topk", "8", "--novelty.m", "64",
             "--novelty.k", "8", "--sparsity.mode", "static", "--sparsity.ffn_sparsity", "0.5"],
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_every_kind_of_step_trains(llama: Path, files: tuple[Path, Path], run: Path, tmp_path: Path, step: str) -> None:
    assert train(llama, files, tmp_path / "run", *STEPS[step]) == 0
    losses, plain = (pd.read_csv(out / "metrics.csv")["loss"].tolist() for out in (tmp_path / "run", run))
    if step == "dense":
        assert losses == pytest.approx(plain, rel=1e-4)
    assert losses[0] == pytest.approx(plain[0], rel=0.5)
    summary = pd.read_csv(tmp_path / "run" / "summary.csv").iloc[0]
    model = PeftModel.from_pretrained(load_causal_lm(str(llama), in_4bit=True)[0], tmp_path / "run" / "adapter").eval()
    if step != "learned":
        assert loss_of(model, files) == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_the_configuration_of_the_large_model_runs(llama: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    config = Path(__file__).resolve().parents[2] / "configs" / "novelty_llama3_8b.yaml"
    smaller = ["--max_length", "64", "--max_steps", "4", "--novelty.k_topk", "8", "--dataloader_num_workers", "0"]
    data = ["--dataset", str(files[0]), "--prompt_field", "question", "--completion_field", "answer"]
    where = ["--model", str(llama), "--device", "cpu", "--out_dir", str(tmp_path / "run")]
    assert main(["train", str(config), *where, *data, *smaller]) == 0
    assert "load_in_4bit: true" in (tmp_path / "run" / "config.yaml").read_text()
    assert len(pd.read_csv(tmp_path / "run" / "gate.csv")) == 4


def test_other_commands_take_the_adapter(llama: Path, files: tuple[Path, Path], run: Path, tmp_path: Path) -> None:
    adapter, data = str(run / "adapter"), ["--dataset", str(files[0]), "--eval_file", str(files[1])]
    out = ["--device", "cpu", "--out_dir"]
    model = ["--model", str(llama), "--adapter", adapter]
    assert main(["eval", *model, *data, "--task", "causal_lm", *out, str(tmp_path / "eval")]) == 0
    metrics = json.loads((tmp_path / "eval" / "metrics_causal_lm.json").read_text())
    assert metrics["loss"] == pytest.approx(pd.read_csv(run / "summary.csv")["eval_loss"][0], rel=0.05)
    edit = ["--model", str(llama), "--adapter", adapter, "--target_modules", "down_proj", *data]
    assert main(["edit", *edit, "--calib_samples", "8", *out, str(tmp_path / "edit")]) == 0
    measure = ["--model", str(llama), "--adapter", adapter, "--task", "causal_lm", *data, "--samples", "6"]
    measure += ["--held_out", "6", "--ffn_levels", "0.75", "--attention_levels", "--sparsity.mode", "oracle"]
    measure += ["--sparsity.svd_rank", "4", "--budget", "0.9", "--train_bsz", "3"]
    losses = []
    for more in ([], ["--load_in_4bit"]):
        folder = tmp_path / f"sensitivity{len(more)}"
        assert main(["sensitivity", *measure, *more, *out, str(folder)]) == 0
        losses.append(pd.read_csv(folder / "sensitivity.csv")["dense_loss"][0])
    assert losses[0] != losses[1], "the second is measured on weights in 4 bits"
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_what_is_quantised_otherwise_is_refused(llama: Path, tmp_path: Path) -> None:
    load_causal_lm(str(llama), in_4bit=True)[0].save_pretrained(tmp_path / "stored")
    for file in llama.glob("tokenizer*"):
        (tmp_path / "stored" / file.name).write_bytes(file.read_bytes())
    again = load_causal_lm(str(tmp_path / "stored"))[0]
    first = load_causal_lm(str(llama), in_4bit=True)[0]
    weights = [dict(m.named_parameters())["model.layers.0.mlp.up_proj.weight"] for m in (first, again)]
    assert torch.equal(*map(dequantised, weights)), "a model that is stored in 4 bits is one"
