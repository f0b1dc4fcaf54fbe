"""Target modules come from a model's structure, and what cannot be adapted is named."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from sparselora.errors import InputError
from sparselora.models.attach import attach_lora
from sparselora.models.load import head_modules, load_causal_lm, load_classifier, resolve_device
from sparselora.models.model_files import public_name
from sparselora.models.target_modules import attention_projections, resolve_target_modules
from tests.helpers.tiny_llama import make_tiny_llama

SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SMALL))


FAMILIES = {
    "bert": (bert, ["query", "key", "value", "attention.output.dense"], ["classifier"]),
    "roberta": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL)),
        ["query", "key", "value", "attention.output.dense"],
        ["classifier"],
    ),
    "distilbert": (
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=30, dim=16, n_layers=2, n_heads=2, hidden_dim=20)
        ),
        ["q_lin", "k_lin", "v_lin", "out_lin"],
        ["pre_classifier", "classifier"],
    ),
    "gpt2": (
        lambda: GPT2ForSequenceClassification(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2)),
        ["c_attn", "attn.c_proj"],
        ["score"],
    ),
    "llama": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, num_key_value_heads=1)),
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        ["score"],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_projections_and_head_by_structure(family: str) -> None:
    make, targets, head = FAMILIES[family]
    model = make()
    assert attention_projections(model) == targets
    assert head_modules(model) == head
    adapted = attach_lora(model, r=2, alpha=4, dropout=0.0, target_modules=targets, base_model="x")
    modules = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert len(modules) == 2 * len(targets)
    assert all("attn" in name or "attention" in name for name in modules)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained
    assert all(any(f".{part}." in name for part in head) for name in trained)


def test_named_targets_are_obeyed_or_refused() -> None:
    assert resolve_target_modules(bert(), ["query", "intermediate.dense"]) == ["query", "intermediate.dense"]
    with pytest.raises(
        InputError, match=r"'qery' matches no linear layer.*did you mean 'query'.*it has: query, key, value, dense"
    ):
        resolve_target_modules(bert(), ["qery"])


@pytest.mark.parametrize("r", [0, 17])
def test_ranks_outside_the_dimensions_are_refused(r: int) -> None:
    with pytest.raises(InputError, match="lora_r must be between 1 and 16"):
        attach_lora(bert(), r=r, alpha=4, dropout=0.0, target_modules=["query"], base_model="x")


def test_local_folder_loads_with_a_seeded_head(tiny_bert: Path) -> None:
    heads = []
    for _ in range(2):
        torch.manual_seed(3)
        model, tokenizer = load_classifier(str(tiny_bert), num_labels=3)
        heads.append(model.classifier.weight)
    assert torch.equal(*heads)
    assert heads[0].shape == (3, 24)
    assert heads[0].dtype == torch.float32
    assert tokenizer("w1 w2")["input_ids"] == [5, 6]
    assert public_name(str(tiny_bert)) == "tiny_bert"


def test_models_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for name, message in (
        ("no-one/no-such-model", "could not be loaded as a classifier"),
        (str(tmp_path), "has no config.json"),
        (str(tmp_path / "file"), "is a file"),
        (str(tmp_path / "adapter"), "holds an adapter"),
        (str(tmp_path / "nowhere"), "model folder '.*nowhere' does not exist"),
        ("no/such/folder", "model folder 'no/such/folder' does not exist"),
        ("nowhere/", "does not exist"),
        ("", "does not exist"),
        ("~nosuchuser/model", "unknown user"),
        ("x" * 5000, "5000 characters"),
        ("/" + "x/" * 3000, "6001 characters"),
        ("a\0b", "does not exist"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_classifier(name, num_labels=2)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(InputError, match="not there"):
        resolve_device(f"cuda:{torch.cuda.device_count()}")


def test_weights_that_are_not_finite_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("key.weight"))
    weights[name][1, 2] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"NaN or infinite values in .*{name}"):
        load_classifier(str(folder), 2)


@pytest.mark.parametrize("value", [None, -1, 1.5, "0.1", True])
def test_a_dropout_that_is_no_probability_is_refused(tiny_bert: Path, tmp_path: Path, value: object) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_probs_dropout_prob": value}))
    with pytest.raises(InputError):
        load_classifier(str(folder), 2)
    # The control: a probability, and a field that may be null.
    usual = {"attention_probs_dropout_prob": 0.5, "classifier_dropout": None}
    (folder / "config.json").write_text(json.dumps(config | usual))
    assert load_classifier(str(folder), 2)[0].config.attention_probs_dropout_prob == 0.5


def test_a_folder_without_a_tokenizer_is_refused_not_given_an_empty_one(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        load_classifier(str(folder), 2)


def test_texts_are_cut_to_the_positions_a_model_has(tiny_bert: Path, tmp_path: Path) -> None:
    assert load_classifier(str(tiny_bert), 2)[1].model_max_length == 40
    folder = shutil.copytree(tiny_bert, tmp_path / "roberta")
    config = RobertaConfig(**{**SMALL, "vocab_size": 64}, max_position_embeddings=42, pad_token_id=1)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    model, tokenizer = load_classifier(str(folder), 2)
    longest = tokenizer.model_max_length
    assert longest == 40
    model(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):  # the control: one more and there is no position for it
        model(torch.full((1, longest + 1), 5))


# --- weights that do not load -------------------------------------------------------------------------------------


def rewritten(model: Path, folder: Path, change: Any) -> Path:
    """A copy of ``model`` whose tensors are ``change`` of its own."""
    folder = shutil.copytree(model, folder)
    weights = change(load_file(folder / "model.safetensors"))
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def reconfigured(model: Path, folder: Path, **settings: Any) -> Path:
    folder = shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


BODY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {f"x.{k}": v for k, v in w.items()}, r"no weights for bert\..* and \d+ more.*its files have x\."),
        (lambda w: {k: v for k, v in w.items() if not k.endswith(BODY)}, rf"no weights for bert.{BODY}, which would"),
        (lambda w: {}, r"no weights for bert\."),
        (lambda w: {k: v[:-1] if k.endswith(BODY) else v for k, v in w.items()}, rf"{BODY}.* 23 × 24 and not 24 × 24"),
        (lambda w: w | {f"ema.{k}": v + 1 for k, v in w.items()}, "body twice, again under 'ema'"),
        (
            lambda w: w | {k.replace("layer.1", "layer.2"): v for k, v in w.items() if "layer.1" in k},
            "more layers than its config.json says",
        ),
    ],
)
def test_a_body_that_is_not_the_files_is_refused(tiny_bert: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder = rewritten(tiny_bert, tmp_path / "model", change)
    with pytest.raises(InputError, match=message) as caught:
        load_classifier(str(folder), 2)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "settings",
    [{"hidden_size": 48}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"model_type": "distilbert"}],
)
def test_a_configuration_of_another_model_is_refused(tiny_bert: Path, tmp_path: Path, settings: dict) -> None:
    with pytest.raises(InputError, match=r"no weights for|other sizes|more layers"):
        load_classifier(str(reconfigured(tiny_bert, tmp_path / "model", **settings)), 2)


def test_weights_of_a_causal_model_that_do_not_load_are_refused(tmp_path: Path) -> None:
    llama = make_tiny_llama(tmp_path / "llama")
    assert load_causal_lm(str(llama))[0].lm_head.weight.shape == (43, 32)
    for i, (change, message) in enumerate(
        (
            (lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, "no weights for lm_head.weight"),
            (lambda w: {f"module.{k}": v for k, v in w.items()}, r"no weights for .*its files have module\."),
            (lambda w: w | {"lm_head.weight": w["lm_head.weight"][:40]}, "40 × 32 and not 43 × 32"),
        )
    ):
        with pytest.raises(InputError, match=message):
            load_causal_lm(str(rewritten(llama, tmp_path / f"wrong{i}", change)))
    with pytest.raises(InputError, match="other sizes"):
        load_causal_lm(str(reconfigured(llama, tmp_path / "sizes", intermediate_size=64)))
    # The control: what shares its weight with the embeddings is not in the file, and not missing.
    tied = reconfigured(llama, tmp_path / "tied", tie_word_embeddings=True)
    tied = rewritten(tied, tmp_path / "tied2", lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"})
    model = load_causal_lm(str(tied))[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_is_kept_where_it_fits_and_fresh_where_it_does_not(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(5)
    model, tokenizer = load_classifier(str(tiny_bert), num_labels=3)
    assert caplog.text == "", "a body without a head is what a fresh classifier begins with"
    model.save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    same = load_classifier(str(tmp_path / "three"), num_labels=3)[0]
    assert torch.equal(same.classifier.weight, model.classifier.weight)
    assert caplog.text == ""
    fresh = load_classifier(str(tmp_path / "three"), num_labels=2)[0]
    assert fresh.classifier.weight.shape == (2, 24)
    assert torch.equal(fresh.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    assert "head of another size" in caplog.messages[0]
    assert len(caplog.messages) == 1


def test_padding_is_the_tokenizers(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "llama")
    LlamaForSequenceClassification(
        LlamaConfig(**SMALL | {"vocab_size": 43}, num_key_value_heads=1, pad_token_id=None)
    ).save_pretrained(folder)
    model, tokenizer = load_classifier(str(folder), 2)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 2
    rows = [[5, 6, 7, 8], [9, 10, 2, 2]]
    mask = [[1, 1, 1, 1], [1, 1, 0, 0]]
    together = model(torch.tensor(rows), attention_mask=torch.tensor(mask)).logits
    alone = [model(torch.tensor([row[: sum(m)]])).logits[0] for row, m in zip(rows, mask)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-6)
    model.config.pad_token_id = 10  # the control: of another id, the last token is looked for at another place
    wrong = model(torch.tensor(rows), attention_mask=torch.tensor(mask)).logits
    assert not torch.allclose(wrong[1], alone[1], atol=1e-6)


def test_targets_in_the_head(caplog: pytest.LogCaptureFixture) -> None:
    model = RobertaForSequenceClassification(RobertaConfig(**SMALL))
    with pytest.raises(InputError, match=r"'out_proj' is only in the head \(classifier.out_proj\), which is trained"):
        attach_lora(model, r=2, alpha=4, dropout=0.0, target_modules=["query", "out_proj"], base_model="x")
    assert caplog.text == ""
    adapted = attach_lora(model, r=2, alpha=4, dropout=0.0, target_modules=["dense"], base_model="x")
    assert "'dense' is adapted in the body only: classifier.dense is in the head" in caplog.text
    assert not [name for name, _ in adapted.named_parameters() if "classifier" in name and "lora_" in name]


# --- code of a model's folder -------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
Path(__file__).with_name("HAS_RUN").touch()
Path({mark!r}).touch()
from transformers import BertConfig as C, BertForSequenceClassification as M, PreTrainedTokenizerFast as T
"""


def with_code(model: Path, folder: Path, part: str) -> tuple[Path, Path]:
    """A copy of ``model`` whose configuration or tokenizer names code in its folder; and what that code would leave."""
    folder, mark = shutil.copytree(model, folder), folder.parent / f"{folder.name}_has_run"
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    if part == "config":
        names = ("AutoConfig", "AutoModelForSequenceClassification", "AutoModelForCausalLM")
        settings = {"model_type": "evil", "auto_map": {n: f"evil.{'C' if n == 'AutoConfig' else 'M'}" for n in names}}
        file = folder / "config.json"
    else:
        settings = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [None, "evil.T"]}}
        file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder, mark


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_no_command_runs_code_of_a_models_folder(
    tiny_bert: Path,
    word_files: tuple[Path, Path],
    trained_classifier: Path,
    tmp_path: Path,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:

    import prune_finetune_lora
    from sparselora.__main__ import main

    folder, mark = with_code(tiny_bert, tmp_path / "model", part)
    data, adapter = ["--dataset", str(word_files[0])], str(trained_classifier / "adapter")
    task = ["--task", "classification"]
    commands = {
        "train": [*data, *task, "--model"],
        "eval": [*data, *task, "--model"],
        "eval_adapter": [*data, *task, "--adapter", adapter, "--model"],
        "edit": [*data, "--target_modules", "query", "--adapter", adapter, "--model"],
        "sensitivity": [*data, *task, "--model"],
        "bench": [*data, "--estimators", "--sparsity", str(tmp_path / "sparsity.yaml"), "--seq", "8", "--model"],
        "prune": [*data, "--model"],
    }
    (tmp_path / "sparsity.yaml").write_text("mode: svd\nffn_sparsity: 0.5\nsvd_rank: 2\n")
    for name, arguments in commands.items():
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
        rest = [*arguments, str(folder), "--out_dir", str(tmp_path / name)]
        status = prune_finetune_lora.main(rest) if name == "prune" else main([name.partition("_")[0], *rest])
        captured = capsys.readouterr()
        assert not mark.exists(), name
        if name == "bench" and part == "config":
            assert "evil" in captured.err
        else:
            assert "needs code of its own" in captured.err, (name, captured.err)
        assert captured.err.count("\n") == 1
        assert status == 2
        assert not list(tmp_path.glob(f"{name}/**/run.json"))
    # The control, in a process of its own: transformers registers the class for the rest of the process.
    auto = "AutoConfig" if part == "config" else "AutoTokenizer"
    code = f"import sys, transformers; transformers.{auto}.from_pretrained(sys.argv[1], trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)
    assert mark.exists(), "where it is trusted, the code does run"
