"""Conversations through every command: trained on, recorded with the adapter, and asked for in the same words."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparselora.__main__ import main
from sparselora.models.prompt_template import ChatTemplate, recorded_template
from tests.helpers.chat_templates import make_chat_llama, plain, with_blocks

CPU = ["--device", "cpu", "--max_length", "128"]


def write_chats(path: Path, rows: int, sharegpt: bool = False) -> Path:
    """Sums in two turns; the answer is the last number."""
    lines = []
    for i in range(rows):
        messages = [
            {"role": "system", "content": "be brief"}, {"role": "user", "content": f"{i % 7} and 1"},
            {"role": "assistant", "content": f"{i % 7 + 1}"}, {"role": "user", "content": "and 1"},
            {"role": "assistant", "content": f"It is {i % 7 + 2}"},
        ]  # fmt: skip
        names = {"user": "human", "assistant": "gpt"}
        shared = [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in messages]
        lines.append(json.dumps({"conversations": shared} if sharegpt else {"messages": messages}))
    path.write_text("\n".join(lines))
    return path


class Chat:
    """A model, data and a training run on conversations: read only."""

    def __init__(self, folder: Path) -> None:
        self.model = make_chat_llama(folder / "llama", plain("chatml"))
        self.bare = make_chat_llama(folder / "bare", None)
        self.rows = write_chats(folder / "rows.jsonl", 60)
        self.run = folder / "run"
        assert self.train(self.run) == 0

    def train(self, out: Path, *flags: str, model: Path | None = None) -> int:
        data = [
            "--model",
            str(model or self.model),
            "--dataset",
            str(self.rows),
            "--task",
            "causal_lm",
        ]
        size = ["--max_steps", "5", "--lr", "1e-2", "--train_bsz", "8", "--lora_r", "4"]
        return main(["train", *data, *size, *CPU, "--out_dir", str(out), *flags])

    def eval(self, out: Path, *flags: str, model: Path | None = None) -> dict:
        data = ["--model", str(model or self.model), "--dataset", str(self.rows)]
        assert main(["eval", *data, *CPU, "--out_dir", str(out), *flags]) == 0
        return json.loads(next(out.glob("metrics_*.json")).read_text())


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat(tmp_path_factory.mktemp("chat"))


def test_eval_renders_as_train_did_even_with_another_tokenizers_template(chat, tmp_path, capsys) -> None:
    adapter = ["--adapter", str(chat.run / "adapter")]
    assert recorded_template(chat.run / "adapter") == ChatTemplate(plain("chatml"))
    trained = pd.read_csv(chat.run / "summary.csv")["eval_loss"].item()
    alike = chat.eval(tmp_path / "alike", *adapter)
    assert alike["loss"] == pytest.approx(trained, rel=1e-5)
    assert alike["chat_template"] == plain("chatml")
    # The record decides, not the tokenizer: this one has no template.
    assert chat.eval(tmp_path / "bare", *adapter, model=chat.bare)["loss"] == alike["loss"]
    assert "WARNING" not in capsys.readouterr().err
    other = chat.eval(tmp_path / "other", *adapter, "--chat_template", plain("llama3"))
    assert other["loss"] != pytest.approx(trained, rel=1e-3)  # the control: the template matters
    assert "which the adapter was trained with" in capsys.readouterr().err


def test_the_loss_of_eval_is_that_of_transformers_own_masks(chat, tmp_path) -> None:
    metrics = chat.eval(tmp_path / "eval", "--adapter", str(chat.run / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(chat.model)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat.model), chat.run / "adapter").eval()
    total, count = 0.0, 0
    for i, line in enumerate(chat.rows.read_text().splitlines()):
        if i % 5 != 4:
            continue
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], chat_template=with_blocks("chatml"), return_assistant_tokens_mask=True,
            return_dict=True,
        )  # fmt: skip
        ids, mask = torch.tensor([encoded["input_ids"]]), torch.tensor(encoded["assistant_masks"])
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), dim=1)
        losses = -scores[torch.arange(len(mask) - 1), ids[0, 1:]]
        total, count = total + float(losses[mask[1:] == 1].sum()), count + int(mask[1:].sum())
    assert metrics["tokens"] == count
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)


def test_generation_asks_through_the_recorded_template_and_ends_at_its_turn(chat, tmp_path, monkeypatch) -> None:
    """Also questions with answers that are no conversations."""
    import sparselora.evaluation.losses as losses

    asked: list[list[int]] = []
    ends: list[set[int]] = []

    def answer(model, tokenizer, ids, max_new_tokens, ends_):
        asked.extend(map(list, ids))
        ends.append(set(ends_))
        return ["It is 3"] * len(ids)

    monkeypatch.setattr(losses, "generate_tokens", answer)
    tokenizer = AutoTokenizer.from_pretrained(chat.model)
    plain_rows = tmp_path / "plain.jsonl"
    plain_rows.write_text("\n".join(json.dumps({"question": f"{i}?", "answer": f"{i}"}) for i in range(10)))
    flags = ["--adapter", str(chat.run / "adapter"), "--task", "gsm8k", "--eval_samples", "2", "--max_new_tokens", "8"]
    chat.eval(tmp_path / "chats", *flags, "--fewshot", "0")
    texts = [tokenizer.decode(ids) for ids in asked]
    opening = "<|im_start|>assistant\n"
    assert all(text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n") for text in texts)
    assert all(text.endswith(f"<|im_start|>user\nand 1<|im_end|>\n{opening}") for text in texts)
    assert all(text.count("<|im_start|>") == 5 for text in texts)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends[0]
    asked.clear()
    data = ["--model", str(chat.model), "--dataset", str(plain_rows), *CPU, "--out_dir", str(tmp_path / "rows")]
    assert main(["eval", *data, *flags, "--fewshot", "1"]) == 0
    for text in map(tokenizer.decode, asked):
        assert text.count("<|im_start|>user\n") == 2  # the worked example, and the question
        assert text.count("<|im_start|>assistant\n") == 2
        assert text.endswith(opening)
        assert "Question:" not in text  # lm-eval's wording is for models that were trained with none


def test_edit_sensitivity_and_profile_read_conversations(chat, tmp_path) -> None:
    data = ["--model", str(chat.model), "--dataset", str(chat.rows), *CPU]
    adapter = ["--adapter", str(chat.run / "adapter")]
    edit = ["--calib_samples", "6", "--target_modules", "all", "--report", "--draws", "2"]
    assert main(["edit", *data, *adapter, *edit, "--out_dir", str(tmp_path / "edit")]) == 0
    assert recorded_template(tmp_path / "edit") == ChatTemplate(plain("chatml"))
    report = pd.read_csv(tmp_path / "edit" / "report.csv")
    trained = pd.read_csv(chat.run / "summary.csv")["eval_loss"].item()
    assert report.loc[report["variant"] == "unedited", "loss"].item() == pytest.approx(trained, rel=1e-5)
    measure = [
        "--samples",
        "8",
        "--held_out",
        "8",
        "--ffn_levels",
        "0.5",
        "--attention_levels",
        "--task",
        "causal_lm",
        "--budget",
        "0.9",
    ]
    command = ["sensitivity", *data, *adapter, *measure, "--sparsity.mode", "oracle", "--out_dir", str(tmp_path / "s")]
    assert main(command) == 0
    profile = ["--rows", "4", "--calibration_rows", "8", "--ffn_levels", "0.5", "--attention_levels", "--svd_rank", "2"]
    assert main(["profile", *data, *profile, "--map_rank", "2", "--out_dir", str(tmp_path / "p")]) == 0


def test_a_template_in_a_file_is_the_same_run_as_its_text(chat, tmp_path, capsys) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(plain("llama3"))
    assert chat.train(tmp_path / "run", "--chat_template", str(file), model=chat.bare) == 0
    assert recorded_template(tmp_path / "run" / "adapter") == ChatTemplate(plain("llama3"))
    capsys.readouterr()
    assert chat.train(tmp_path / "run", "--chat_template", plain("llama3"), model=chat.bare) == 0
    assert "finished" in capsys.readouterr().out
    config = str(tmp_path / "run" / "config.yaml")  # the text is in it, whatever becomes of the file
    file.write_text(plain("chatml"))
    assert main(["train", config, "--out_dir", str(tmp_path / "run")]) == 0
    assert chat.train(tmp_path / "run", "--chat_template", str(file), model=chat.bare) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chat_template", "no.jinja"], "chat_template 'no.jinja' cannot be read"),
        ([], "the model's tokenizer has no chat template"),
        (["--template", "Q: {prompt}"], "rows holds conversations, which a chat template renders"),
        (["--template", "{prompt}", "--chat_template", "{{ x }}"], "template and chat_template are both given"),
        (["--chat_template", "{{ x }}", "--task", "classification"], "chat_template is for task causal_lm"),
        (["--chat_template", plain("mistral"), "--no-adapter_on_context"], "that writes nothing there"),
    ],
)
def test_what_does_not_go_together_is_one_line_and_writes_nothing(chat, tmp_path, capsys, flags, message) -> None:
    assert chat.train(tmp_path / "run", *flags, model=chat.bare) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not (tmp_path / "run").exists()


def test_an_activated_lora_begins_at_the_generation_prompt(chat, tmp_path) -> None:
    rows = tmp_path / "one.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "y"}]} for i in range(9)
    ]
    rows.write_text("\n".join(map(json.dumps, lines)))
    data = ["--model", str(chat.model), "--dataset", str(rows), "--task", "causal_lm", "--max_steps", "2", *CPU]
    assert main(["train", *data, "--no-adapter_on_context", "--out_dir", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(chat.model)
    assert tokenizer.decode(config["alora_invocation_tokens"]) == "<|im_start|>assistant\n"


def test_sharegpt_trains_the_same_adapter(chat, tmp_path) -> None:
    rows = write_chats(tmp_path / "rows.jsonl", 60, sharegpt=True)
    assert chat.train(tmp_path / "run", "--dataset", str(rows)) == 0
    for name in ("adapter/adapter_model.safetensors", "predictions.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (chat.run / name).read_bytes()


def test_the_last_turn_is_answered_and_the_template_goes_to_the_server(chat, tmp_path, capsys) -> None:
    """The prompt of a generation is what transformers renders of the messages before the last turn."""
    template = plain("chatml")
    flags = ["--chat_template", template, "--generations", "3", "--eval_samples", "3"]
    assert chat.train(tmp_path / "run", *flags, model=chat.bare) == 0
    file = tmp_path / "run" / "adapter" / "chat_template.jinja"
    assert f"--lora-modules adapter={tmp_path}/run/adapter --chat-template {file}" in capsys.readouterr().out
    assert file.read_text() == template
    table = pd.read_csv(tmp_path / "run" / "generations.csv", keep_default_na=False)
    tokenizer = AutoTokenizer.from_pretrained(chat.bare)
    lines = chat.rows.read_text().splitlines()
    for row in table.itertuples():
        messages = json.loads(lines[row.row])["messages"]
        asked = tokenizer.apply_chat_template(
            messages[:-1], chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert row.prompt == asked
        assert messages[2]["content"] in row.prompt  # the control: it is not the first turn
        assert row.completion == messages[-1]["content"]
    assert chat.train(tmp_path / "own", "--overwrite") == 0  # the tokenizer's own template: vLLM has it
    assert "--chat-template" not in capsys.readouterr().out
    assert not (tmp_path / "own" / "adapter" / "chat_template.jinja").exists()
