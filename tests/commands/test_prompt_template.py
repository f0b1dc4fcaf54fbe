"""A model is evaluated with the prompts that it was trained on, from a record next to its adapter; and from GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from peft import PeftModel

from sparselora.__main__ import main
from sparselora.config.train import TrainConfig
from sparselora.data.instructions import DEFAULT_TEMPLATE, used_template
from sparselora.data.load import load_data
from sparselora.errors import InputError
from sparselora.evaluation.gsm8k import TEMPLATE, load_questions
from sparselora.models.load import load_causal_lm
from sparselora.models.prompt_template import TEMPLATE_FILE, recorded_template
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

TRAINED = "w1 w2 {prompt} w3 "


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A tiny Llama, data, and the run of a training with its own template: read only."""
    folder = tmp_path_factory.mktemp("template")
    model, rows = make_tiny_llama(folder / "tiny"), write_instructions(folder / "rows.jsonl", 60)
    run = folder / "run"
    assert _train(model, rows, run, "--template", TRAINED) == 0
    return model, rows, run


def _train(model: Path, rows: Path, run: Path, *flags: str) -> int:
    size = [
        "--task",
        "causal_lm",
        "--max_steps",
        "6",
        "--lr",
        "1e-2",
        "--train_bsz",
        "8",
        "--max_length",
        "64",
        "--device",
        "cpu",
    ]
    return main(["train", "--model", str(model), "--dataset", str(rows), *size, *flags, "--out_dir", str(run)])


def _metrics(model: Path, rows: Path, out: Path, *flags: str) -> dict:
    data = ["--dataset", str(rows), "--max_length", "64", "--device", "cpu"]
    assert main(["eval", "--model", str(model), *data, *flags, "--out_dir", str(out)]) == 0
    return json.loads(next(out.glob("metrics_*.json")).read_text())


def test_eval_asks_as_train_did(trained, tmp_path, capsys):
    model, rows, run = trained
    adapter = ["--adapter", str(run / "adapter")]
    assert recorded_template(run / "adapter") == TRAINED
    trained_loss = pd.read_csv(run / "summary.csv")["eval_loss"].item()
    alike = _metrics(model, rows, tmp_path / "alike", *adapter)
    assert alike["loss"] == pytest.approx(trained_loss, rel=1e-5)
    assert alike["template"] == TRAINED
    assert "WARNING" not in capsys.readouterr().err
    given = _metrics(model, rows, tmp_path / "given", *adapter, "--template", TRAINED)
    assert given["loss"] == alike["loss"]
    assert "WARNING" not in capsys.readouterr().err
    other = _metrics(model, rows, tmp_path / "other", *adapter, "--template", DEFAULT_TEMPLATE)
    assert other["loss"] != pytest.approx(trained_loss, rel=1e-3)  # the control: prompts matter
    warnings = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert repr(TRAINED) in warnings[0]
    # Without an adapter there is nothing to go by.
    assert _metrics(model, rows, tmp_path / "bare")["template"] == DEFAULT_TEMPLATE


def test_edit_and_sensitivity_read_the_same_prompts(trained):
    model, rows, run = trained
    config = TrainConfig(model=str(model), dataset=str(rows), task="causal_lm")
    prompts = {
        name: load_data(config, adapter).train["prompt"].tolist()
        for name, adapter in (("adapter", str(run / "adapter")), ("none", None))
    }
    assert all(prompt.startswith("w1 w2 ") for prompt in prompts["adapter"])
    assert [f"w1 w2 {prompt[:-1]} w3 " for prompt in prompts["none"]] == prompts["adapter"]


def test_the_record_goes_with_the_adapter_and_peft_loads_it(trained, tmp_path):
    model, rows, run = trained
    base, _ = load_causal_lm(str(model))
    assert PeftModel.from_pretrained(base, run / "adapter").peft_config["default"].r == 16
    assert main(["reduce", "--adapter", str(run / "adapter"), "--rank", "2", "--out_dir", str(tmp_path / "r")]) == 0
    edit = ["--dataset", str(rows), "--model", str(model), "--calib_samples", "4", "--target_modules", "all"]
    flags = ["--adapter", str(run / "adapter"), "--device", "cpu", "--max_length", "64"]
    assert main(["edit", *flags, *edit, "--out_dir", str(tmp_path / "e")]) == 0
    for name in "re":
        assert recorded_template(tmp_path / name) == TRAINED
        # A second run finds nothing in the folder that it does not know.
        assert "adapter_config.json" in {path.name for path in (tmp_path / name).iterdir()}
    command = ["reduce", "--adapter", str(run / "adapter"), "--rank", "3", "--out_dir", str(tmp_path / "r")]
    assert main([*command, "--overwrite"]) == 0
    assert recorded_template(tmp_path / "r") == TRAINED


def test_the_default_is_recorded_too_and_a_classifier_has_no_record(trained, trained_classifier, tmp_path):
    model, rows, _ = trained
    assert _train(model, rows, tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "adapter" / TEMPLATE_FILE).read_text()) == {"template": DEFAULT_TEMPLATE}
    assert not (trained_classifier / "adapter" / TEMPLATE_FILE).exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"template": 3}', '{"template": "no place"}', '{"template": "{pro'])
def test_a_damaged_record_is_one_line(tmp_path, text):
    (tmp_path / TEMPLATE_FILE).write_text(text)
    with pytest.raises(InputError, match=TEMPLATE_FILE) as error:
        used_template(None, str(tmp_path))
    assert "\n" not in str(error.value)


def test_questions_of_gsm8k_are_put_as_in_training(tmp_path):
    rows = tmp_path / "gsm8k.jsonl"
    lines = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(10)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def prompt(template: str, fewshot: int) -> str:
        questions = load_questions(
            str(rows), eval_file=None, prompt_field="question", completion_field="answer", template=template,
            samples=1, fewshot=fewshot, seed=0,
        )  # fmt: skip
        return questions.prompts[0]

    bare = prompt("{prompt}", 0)
    assert bare.startswith("What is ")
    assert prompt(TEMPLATE, 0) == f"Question: {bare}\nAnswer:"
    assert "\nAnswer: It is " in prompt(TEMPLATE, 1)  # lm-eval's wording
    assert prompt("{prompt}\n=> ", 0) == f"{bare}\n=> "
    assert "?\n=> It is " in prompt("{prompt}\n=> ", 1)


def test_a_model_in_a_gguf_file_is_trained_and_evaluated_and_its_quantisation_is_named(tmp_path, capsys):
    pytest.importorskip("gguf", reason="GGUF files need the package gguf (extra llm)")
    from tests.helpers.tiny_gguf import write_gguf

    file = write_gguf(tmp_path / "tiny.gguf", kind="Q4_1", file_type=3)
    rows, run = write_instructions(tmp_path / "rows.jsonl", 40), tmp_path / "run"
    assert _train(file, rows, run, "--template", TRAINED, "--lora_r", "4") == 0
    assert "Converting" not in capsys.readouterr().err
    record = json.loads((run / "run.json").read_text())
    assert record["quantisation"] == "Q4_1"
    assert record["arguments"]["model"]["name"] == "tiny.gguf"
    assert len(record["arguments"]["model"]["sha256"]) == 16
    assert pd.read_csv(run / "summary.csv")["model"].item() == "tiny.gguf (Q4_1)"
    metrics = _metrics(file, rows, tmp_path / "eval", "--adapter", str(run / "adapter"))
    assert metrics["model"] == "tiny.gguf (Q4_1)"
    assert metrics["loss"] == pytest.approx(pd.read_csv(run / "summary.csv")["eval_loss"].item(), rel=1e-5)
    for command, table in (("inspect", "layer_reconstruction.csv"), ("rank", "ranks.csv")):
        out = tmp_path / command
        flags = ["--plots", "none", "--max_layers", "3"] if command == "inspect" else ["--target_modules", "q_proj"]
        assert main([command, "--model", str(file), *flags, "--out_dir", str(out)]) == 0
        assert json.loads((out / "run.json").read_text())["quantisation"] == "Q4_1"
        assert pd.read_csv(out / table).iloc[-1].astype(str).str.contains(r"model\.layers\.[01]").any()
        assert "tiny.gguf (Q4_1)" in capsys.readouterr().out
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:-50])
    for command in (["inspect"], ["rank"], ["train", "--dataset", str(rows)], ["eval", "--dataset", str(rows)]):
        assert main([*command, "--model", str(broken), "--out_dir", str(tmp_path / "no")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "no").exists()
