"""Phase C with a language model: losses in place of accuracies, and the squeeze among the methods."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

import prune_finetune_lora
from sparselora.__main__ import main
from sparselora.data.instructions import encode_instructions, load_instructions
from sparselora.evaluation.losses import held_out_losses
from sparselora.models.load import load_causal_lm
from sparselora.pruning.outputs import RESULT_COLUMNS
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions


class Script:
    """Calls the script on a tiny Llama and a file of instructions."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.model = make_tiny_llama(folder / "llama")
        self.train, self.dev = (write_instructions(folder / f"{n}.jsonl", r, r) for n, r in (("train", 40), ("dev", 9)))
        self.arguments = [
            "--task", "causal_lm", "--model", str(self.model), "--dataset", str(self.train), "--eval_file",
            str(self.dev), "--prompt_field", "question", "--completion_field", "answer", "--template", "{prompt} w1",
            "--train_samples", "0", "--eval_samples", "0", "--lora_r", "4", "--keep_ratio", "0.5", "--lr", "3e-2",
            "--train_bsz", "8", "--device", "cpu", "--out_dir", str(self.runs),
        ]  # fmt: skip

    def __call__(self, *arguments: str) -> int:
        return prune_finetune_lora.main([*self.arguments, *arguments])

    def row(self, **wanted: object) -> pd.Series:
        table = pd.read_csv(self.runs / "results.csv")
        for name, value in wanted.items():
            table = table[table[name] == value]
        assert len(table) == 1
        return table.iloc[0]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    built = Script(tmp_path_factory.mktemp("causal"))
    for method in ("svd", "squeeze", "gradient", "no_prune"):
        assert built("--method", method) == 0
    return built


def test_columns_are_those_of_classifiers_and_the_metric_is_the_loss(script: Script) -> None:
    table = pd.read_csv(script.runs / "results.csv")
    assert tuple(table.columns) == RESULT_COLUMNS
    assert (table["metric"] == "answer_loss").all()
    for moment in ("before", "right_after", "after"):
        assert (table[f"metric_{moment}"] == table[f"loss_{moment}"]).all()
        assert table[f"acc_{moment}"].between(0, 1).all()
    assert (table["head_params"] == 0).all()
    assert table["loss_before"].nunique() == 1  # one warm-up for all methods
    control = script.row(method="no_prune")
    assert control["loss_right_after"] == control["loss_before"]
    assert script.row(method="svd")["loss_right_after"] != control["loss_before"]


def test_losses_are_those_of_the_adapter_that_plain_peft_loads(script: Script) -> None:
    row = script.row(method="squeeze")
    folder = script.runs / row["run_dir"]
    base = AutoModelForCausalLM.from_pretrained(script.model)
    model = PeftModel.from_pretrained(base, folder / "adapter")
    assert {len(p) for name, p in model.named_parameters() if "lora_A" in name} == {2}
    tokenizer = load_causal_lm(str(script.model))[1]
    data = load_instructions(
        str(script.train), eval_file=str(script.dev), prompt_field="question", completion_field="answer",
        template="{prompt} w1",
    )  # fmt: skip
    examples = encode_instructions(data.eval, tokenizer, 128, data.template).examples
    rows = held_out_losses(model, examples, tokenizer, batch_size=4)
    predictions = pd.read_csv(folder / "predictions.csv")
    assert list(predictions) == ["row", "tokens", "before", "right_after", "after"]
    assert predictions["after"].tolist() == pytest.approx(rows["loss"].tolist(), rel=1e-4)
    assert predictions["tokens"].tolist() == rows["tokens"].tolist()
    assert row["loss_after"] == pytest.approx(rows["loss"].sum() / rows["tokens"].sum(), rel=1e-4)


def test_the_squeeze_and_the_svd_are_one_truncation_and_train_on_differently(script: Script) -> None:
    truncated, squeezed = script.row(method="svd"), script.row(method="squeeze")
    assert squeezed["loss_right_after"] == pytest.approx(truncated["loss_right_after"], rel=1e-5)
    assert squeezed["effective_r"] == truncated["effective_r"] == 2
    assert squeezed["loss_after"] != truncated["loss_after"]


def test_a_global_squeeze_may_leave_a_module_without_an_adapter(script: Script) -> None:
    assert script("--method", "squeeze", "--scope", "global", "--keep_ratio", "0.25") == 0
    row = script.row(method="squeeze", scope="global")
    assert row["effective_r"] == pytest.approx(1)
    assert script("--method", "svd", "--scope", "global", "--keep_ratio", "0.25") == 0
    assert row["loss_right_after"] == pytest.approx(
        script.row(method="svd", scope="global")["loss_right_after"], rel=1e-5
    )


def test_gates_by_token_work_on_a_language_model(script: Script) -> None:
    assert script("--method", "energy_gate") == 0
    row = script.row(method="energy_gate")
    assert 0 < row["active_r"] <= 4
    assert "static" in pd.read_csv(script.runs / row["run_dir"] / "predictions.csv")


def test_a_model_that_learned_nothing_is_said_so(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out_dir", str(script.folder / "untaught")]
    assert script("--method", "svd", "--lr", "1e-12", *out) == 0
    assert "is not below that without an adapter" in capsys.readouterr().err
    assert script("--method", "svd", *out) == 0  # the control
    assert "WARNING" not in capsys.readouterr().err


def test_compare_reads_the_losses(script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["compare", str(script.runs), "--out_dir", str(out)]) == 0
    table = pd.read_csv(out / "comparisons.csv").set_index(["method", "reference", "moment"])
    cut, whole = script.row(method="svd", scope="module"), script.row(method="no_prune")
    difference = table.loc[("svd", "no_prune", "right_after")]
    assert difference["difference"] == pytest.approx(cut["loss_right_after"] - whole["loss_right_after"])
    # On rows: losses are summed over labels, so that the mean over labels is that of the whole table.
    assert difference["sentence_difference"] == pytest.approx(difference["difference"], abs=1e-4)
    assert difference["n_sentences"] == 9
    assert not (out / "mcnemar.csv").exists()
    assert "lower is better" in (out / "compare.md").read_text(encoding="utf-8")


def test_compare_says_where_nothing_was_learned(script: Script, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for method in ("svd", "no_prune"):
        assert script("--method", method, "--lr", "1e-12", "--out_dir", str(runs)) == 0
    assert main(["compare", str(runs), "--out_dir", str(tmp_path / "out")]) == 0
    assert "**Nothing was learned** by 2 of 2 runs" in (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert main(["compare", str(script.runs), "--out_dir", str(tmp_path / "control")]) == 0
    assert "Nothing was learned" not in (tmp_path / "control" / "compare.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text_fields", "text"], "--text_fields is for --task classification"),
        (["--label_field", "kind"], "--label_field is for --task classification"),
        (["--task", "classification"], "--prompt_field is for --task causal_lm"),
        (["--template", "none"], "--template must have {prompt}"),
        (["--prompt_field", "quetsion"], "did you mean 'question'"),
        (["--method", "squeeze", "--mask"], "squeeze rotates them"),
        (["--model", "no-one/no-such-model"], "could not be loaded"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    script: Script, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script(*arguments, "--out_dir", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
