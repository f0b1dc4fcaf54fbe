"""`merge`: the files hold what PEFT's merge_and_unload computes, bit for bit, and what has no one weight is refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparselora.__main__ import main
from sparselora.errors import InputError
from sparselora.models.load import load_causal_lm
from sparselora.models.prompt_template import TEMPLATE_FILE, recorded_template, write_template
from tests.helpers.chat_templates import make_chat_llama, plain
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions


def llama(folder: Path, dtype: torch.dtype, *, tied: bool = False, shards: bool = False) -> Path:
    """A tiny Llama with a tokenizer; in several files where ``shards`` says so."""
    make_tiny_llama(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=43, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, pad_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size="10KB" if shards else "5GB")
    return folder


def gpt2(folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=43, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).to(dtype).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter of ``base`` with factors that are not zero."""
    torch.manual_seed(2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
        elif parameter.requires_grad:
            parameter.data += 0.5
    model.save_pretrained(folder)
    return folder


def merge(base: Path, source: Path, out: Path, *arguments: str) -> int:
    return main(["merge", "--model", str(base), "--adapter", str(source), "--out_dir", str(out), *arguments])


def loss(out: Path, source: list[str], data: list[str]) -> float:
    """The held-out loss by `eval`."""
    assert main(["eval", *source, *data, "--out_dir", str(out)]) == 0
    metrics: dict[str, float] = json.loads((out / "metrics_causal_lm.json").read_text())
    return metrics["loss"]


def by_peft(base: Path, source: Path, dtype: torch.dtype | str = "auto") -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), source)
    return model.merge_and_unload().state_dict()


def assert_equal(out: Path, wanted: dict[str, torch.Tensor]) -> None:
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert merged[name].dtype == tensor.dtype, name
        if "embed_tokens" in name and tensor.dtype == torch.bfloat16:  # PEFT rounds this update first
            torch.testing.assert_close(merged[name], tensor, rtol=2**-6, atol=2**-8)
        else:
            assert torch.equal(merged[name], tensor), name


ALL = ["q_proj", "o_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"r": 3, "target_modules": ALL}),
    "tied": ({"tied": True}, {"r": 3, "target_modules": ALL}),
    "shards, patterns": (
        {"shards": True},
        {"r": 4, "target_modules": ALL, "use_rslora": True, "rank_pattern": {"up_proj": 2},
         "alpha_pattern": {"q_proj": 3}},
    ),
    "head and embedding": ({}, {"r": 3, "target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "a norm trained whole": ({}, {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_merged_files_are_what_peft_merges(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    kind, settings = CASES[case]
    base = llama(tmp_path / "base", dtype, **kind)
    source = adapter(base, tmp_path / "adapter", **settings)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    assert merge(base, source, tmp_path / "merged") == 0
    assert_equal(tmp_path / "merged", by_peft(base, source))
    assert (len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2) == bool(kind.get("shards"))
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    with pytest.raises(AssertionError):  # the control
        assert_equal(base, by_peft(base, source))


def test_conv1d_weights_are_turned(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base", torch.float32)
    source = adapter(base, tmp_path / "adapter", r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    assert merge(base, source, tmp_path / "merged") == 0
    assert_equal(tmp_path / "merged", by_peft(base, source))


def test_another_dtype_is_that_of_the_model_loaded_so(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", torch.bfloat16)
    source = adapter(base, tmp_path / "adapter", r=3, target_modules=ALL)
    assert merge(base, source, tmp_path / "merged", "--dtype", "fp32") == 0
    assert_equal(tmp_path / "merged", by_peft(base, source, torch.float32))
    exact = by_peft(base, source, torch.float64)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert max(float((merged[name] - exact[name]).abs().max()) for name in exact) < 1e-6


def test_what_train_wrote_gives_the_same_losses_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = llama(tmp_path / "base", torch.float32)
    data = ["--dataset", str(write_instructions(tmp_path / "t.jsonl", 12)), "--task", "causal_lm", "--device", "cpu"]
    arguments = ["--max_steps", "4", "--lr", "2e-2", "--train_bsz", "4", "--template", "{prompt} w1"]
    assert main(["train", "--model", str(base), *data, *arguments, "--out_dir", str(tmp_path / "run")]) == 0
    run = tmp_path / "run" / "adapter"
    capsys.readouterr()
    assert merge(base, run, tmp_path / "merged") == 0
    assert "--template '{prompt} w1'" in capsys.readouterr().out
    losses = [
        loss(tmp_path / "a", ["--model", str(base), "--adapter", str(run)], data),
        loss(tmp_path / "b", ["--model", str(tmp_path / "merged")], data),  # by the template of its record
        loss(tmp_path / "c", ["--model", str(tmp_path / "merged"), "--template", "{prompt} w1"], data),
    ]
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert "WARNING" not in capsys.readouterr().err
    (tmp_path / "merged" / TEMPLATE_FILE).unlink()
    assert abs(loss(tmp_path / "d", ["--model", str(tmp_path / "merged")], data) - losses[0]) > 1e-3  # the control


def test_a_chat_template_of_the_adapter_becomes_that_of_the_merged_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_chat_llama(tmp_path / "base", plain("llama3"))
    template = tmp_path / "chatml.jinja"
    template.write_text(plain("chatml"), encoding="utf-8")
    rows = [{"prompt": f"What is {n} times 8?", "completion": f"It is {8 * n}."} for n in range(12)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = ["--dataset", str(file), "--task", "causal_lm", "--device", "cpu", "--max_length", "128"]
    arguments = ["--max_steps", "4", "--lr", "2e-2", "--train_bsz", "4", "--chat_template", str(template)]
    assert main(["train", "--model", str(base), *data, *arguments, "--out_dir", str(tmp_path / "run")]) == 0
    run, merged = tmp_path / "run" / "adapter", tmp_path / "merged"
    capsys.readouterr()
    assert merge(base, run, merged) == 0
    assert AutoTokenizer.from_pretrained(merged).chat_template == plain("chatml")
    assert AutoTokenizer.from_pretrained(base).chat_template == plain("llama3")
    line = capsys.readouterr().out.splitlines()[-1]
    printed = shlex.split(line.replace("DATA", str(file)))[2:]
    losses = [
        loss(tmp_path / "a", printed, data[4:]),
        loss(tmp_path / "b", ["--model", str(base), "--adapter", str(run)], data),
        loss(tmp_path / "c", ["--model", str(merged)], data),  # by the chat template of its record
    ]
    assert losses[0] == losses[2] == pytest.approx(losses[1], rel=1e-5)
    (merged / TEMPLATE_FILE).unlink()
    assert abs(loss(tmp_path / "d", ["--model", str(merged)], data) - losses[1]) > 1e-3  # the control: no template


def test_a_merged_model_can_be_merged_into(tmp_path: Path) -> None:
    """A template goes along unless the second adapter has another."""
    base, merged = llama(tmp_path / "base", torch.float32), tmp_path / "merged"
    source = adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    write_template(source, "{prompt} w1")
    assert merge(base, source, merged) == 0
    other = adapter(merged, tmp_path / "other", r=2, target_modules=["up_proj"])
    again = tmp_path / "again"
    assert merge(merged, other, again) == 0
    assert_equal(again, by_peft(merged, other))
    assert recorded_template(again) == "{prompt} w1"
    write_template(other, "{prompt} w2")
    assert merge(merged, other, tmp_path / "third") == 0
    assert recorded_template(tmp_path / "third") == "{prompt} w2"


def test_a_damaged_base_is_named_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = llama(tmp_path / "base", torch.float32)
    source = adapter(base, tmp_path / "adapter", r=2, target_modules=ALL)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert merge(base, source, tmp_path / "merged") == 2
    error = capsys.readouterr().err
    assert "up_proj.weight of model base holds NaN" in error
    assert "use --dtype" not in error
    assert not (tmp_path / "merged" / "model.safetensors").exists()


def refused(capsys: pytest.CaptureFixture[str], base: Path, source: Path, out: Path) -> str:
    assert merge(base, source, out) == 2
    assert not out.exists()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m")]
    assert len(lines) == 1
    return lines[0]


def test_what_cannot_be_merged_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = llama(tmp_path / "base", torch.float32, tied=True), tmp_path / "merged"
    plain = adapter(base, tmp_path / "plain", r=2, target_modules=["q_proj"])
    head = adapter(base, tmp_path / "head", r=2, target_modules=["lm_head"])
    assert "whose weight is the embedding's as well" in refused(capsys, base, head, out)
    embedding = adapter(base, tmp_path / "embedding", r=2, target_modules=["embed_tokens"])
    assert "which embedding and output layer share" in refused(capsys, base, embedding, out)
    dora = adapter(base, tmp_path / "dora", r=2, target_modules=["q_proj"], use_dora=True)
    assert "a DoRA adapter" in refused(capsys, base, dora, out)
    partial = adapter(base, tmp_path / "partial", r=2, target_modules=["q_proj"], alora_invocation_tokens=[3])
    assert "active on a part of a text only" in refused(capsys, base, partial, out)
    other = gpt2(tmp_path / "gpt2", torch.float32)
    assert "and the model has no model.layers.0.self_attn.q_proj.weight" in refused(capsys, other, plain, out)
    wide = llama(tmp_path / "wide", torch.float32)
    wrong = adapter(base, tmp_path / "wrong", r=2, target_modules=["up_proj"])
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=43, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                                 num_attention_heads=4)).save_pretrained(wide)  # fmt: skip
    assert "by (48, 32), and the model's weight is (40, 32)" in refused(capsys, wide, wrong, out)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    assert "is quantised (gptq)" in refused(capsys, base, plain, out)
    for method in ("gptq", "awq"):
        config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
        (base / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=f"is quantised by {method}, which is not supported"):
            load_causal_lm(str(base))
