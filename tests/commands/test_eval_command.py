"""`eval`: from a model, an adapter and a file to metrics and items, and what it says of bad input."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
from pathlib import Path

import pandas as pd
import pytest

from sparselora.__main__ import main
from sparselora.commands import eval as command
from sparselora.errors import InputError
from sparselora.evaluation.request import EvalRequest
from tests.helpers.byte_llama import byte_tokenizer, save_adapter, save_answering


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that answers every question by 7."""
    return str(save_answering(tmp_path_factory.mktemp("models") / "answering", "#### 7"))


@pytest.fixture
def questions(tmp_path: Path) -> tuple[str, str]:
    """Training and evaluation rows; of the latter, every second answer is 7."""
    train = [{"question": f"{i} and {i + 1}?", "answer": "#### 7"} for i in range(4)]
    held_out = [{"question": f"{i} and {i}?", "answer": f"#### {7 if i % 2 else 3}.00"} for i in range(4)]
    paths = tmp_path / "gsm8k_train.jsonl.gz", tmp_path / "gsm8k_test.jsonl"
    paths[0].write_bytes(gzip.compress("\n".join(map(json.dumps, train)).encode()))
    paths[1].write_text("\n".join(map(json.dumps, held_out)))
    return str(paths[0]), str(paths[1])


def arguments(model: str, questions: tuple[str, str], *more: str) -> list[str]:
    data = ["--dataset", questions[0], "--eval_file", questions[1]]
    return ["eval", "--model", model, *data, "--device", "cpu", "--eval_bsz", "3", *more]


SHORT = ("--fewshot", "1", "--max_new_tokens", "20")


def test_exact_match_end_to_end(answering, questions, tmp_path, capsys):
    out, copy = tmp_path / "out", tmp_path / "new" / "results.json"
    flags = ("--out_dir", str(out), "--out_json", str(copy))
    assert main(arguments(answering, questions, *SHORT, *flags)) == 0
    metrics = json.loads((out / "metrics_gsm8k.json").read_text())
    assert metrics["exact_match"] == 0.5
    assert metrics["answered"] == metrics["n"] == 4
    assert (metrics["task"], metrics["model"], metrics["adapter"]) == ("gsm8k", "answering", None)
    assert (metrics["dataset"], metrics["fewshot"], metrics["backend"]) == ("gsm8k_test.jsonl", 1, "transformers")
    assert metrics["ci_low"] < 0.5 < metrics["ci_high"]
    assert copy.read_text() == (out / "metrics_gsm8k.json").read_text()
    items = pd.read_csv(out / "items_gsm8k.csv")
    assert items.to_dict("list") == {
        "row": [0, 1, 2, 3], "gold": [3, 7, 3, 7], "predicted": [7] * 4, "correct": [0, 1, 0, 1]
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "exact match 0.5000" in printed
    assert "lm_eval --model hf" in printed
    assert "--num_fewshot 1" in printed
    # No text and no folder of this machine in what is written.
    written = (out / "run.json").read_text() + copy.read_text() + (out / "items_gsm8k.csv").read_text()
    assert str(tmp_path) not in written
    assert "and 1?" not in written
    generations = pd.read_csv(out / "generations_gsm8k.csv")  # texts have a file of their own
    assert generations["row"].tolist() == [0, 1, 2, 3]
    assert generations["generated"].str.contains("7").all()
    assert json.loads((out / "run.json").read_text())["status"] == "success"


def test_a_finished_run_is_not_repeated_and_another_is_refused(answering, questions, tmp_path, capsys):
    flags = arguments(answering, questions, *SHORT, "--out_json", str(tmp_path / "r.json"))
    assert main(flags) == 0
    assert (tmp_path / "r_eval" / "metrics_gsm8k.json").exists()  # the folder's name follows the copy's
    before = (tmp_path / "r.json").read_text()
    (tmp_path / "r.json").unlink()
    assert main(flags) == 0
    assert "already finished" in capsys.readouterr().out
    assert (tmp_path / "r.json").read_text() == before
    assert main([*flags, "--eval_samples", "2"]) == 2
    assert "--out_json" in capsys.readouterr().err
    assert main([*flags, "--eval_samples", "2", "--overwrite"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["n"] == 2


def test_an_adapter_makes_another_model_of_it(answering, questions, tmp_path):
    adapter = str(save_adapter(tmp_path / "adapter"))
    losses = []
    for name, more in (("base", ()), ("tuned", ("--adapter", adapter))):
        out = tmp_path / name
        assert main(arguments(answering, questions, "--task", "causal_lm", "--out_dir", str(out), *more)) == 0
        metrics = json.loads((out / "metrics_causal_lm.json").read_text())
        items = pd.read_csv(out / "items_causal_lm.csv")
        assert list(items) == ["row", "loss", "tokens"]
        assert metrics["loss"] == pytest.approx(items["loss"].sum() / items["tokens"].sum())
        assert metrics["tokens"] == items["tokens"].sum() == 4 * len("#### 7.00_")  # EOS is a label too
        losses.append(metrics["loss"])
    assert metrics["adapter"] == "adapter"
    assert abs(losses[1] - losses[0]) > 1e-3


def test_the_loss_does_not_depend_on_the_batch_size(answering, questions, tmp_path):
    tables = []
    for size in ("1", "4"):
        out = tmp_path / size
        flags = ("--task", "causal_lm", "--out_dir", str(out), "--eval_bsz", size)
        assert main(arguments(answering, questions, *flags)) == 0
        tables.append(pd.read_csv(out / "items_causal_lm.csv"))
    pd.testing.assert_frame_equal(tables[0], tables[1], rtol=1e-5)


def test_another_seed_draws_other_examples_for_the_same_rows(answering, questions, tmp_path, monkeypatch):
    from sparselora.evaluation import losses as evaluate

    asked: list[list[str]] = []
    monkeypatch.setattr(
        evaluate, "transformers_generator", lambda *_, **__: lambda prompts: asked.append(list(prompts)) or [""] * 4
    )
    for seed in ("0", "1", "0"):
        flags = (*SHORT, "--seed", seed, "--out_dir", str(tmp_path / seed), "--overwrite")
        assert main(arguments(answering, questions, *flags)) == 0
    assert asked[0] == asked[2] != asked[1]
    for prompts in asked:
        assert [prompt.rpartition("Question: ")[2] for prompt in prompts] == [
            f"{i} and {i}?\nAnswer:" for i in range(4)
        ]
        for i in range(4):  # an evaluated question stands in its own prompt alone
            assert [f"{i} and {i}?" in prompt for prompt in prompts] == [j == i for j in range(4)]
    assert pd.read_csv(tmp_path / "0" / "items_gsm8k.csv")["predicted"].isna().all()


def test_a_file_alone_is_evaluated_whole_without_examples(answering, questions, tmp_path, capsys):
    common = ["eval", "--model", answering, "--eval_file", questions[1], "--max_new_tokens", "20"]
    assert main([*common, "--fewshot", "0", "--out_dir", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "metrics_gsm8k.json").read_text())["n"] == 4
    assert main([*common, "--fewshot", "1", "--out_dir", str(tmp_path / "other")]) == 2
    assert "the training rows have 0 questions that are not evaluated" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_classifier_and_its_adapter(trained_classifier, tiny_bert, word_files, tmp_path, capsys):
    predictions = pd.read_csv(trained_classifier / "predictions.csv")
    flags = ["--dataset", str(word_files[0]), "--eval_file", str(word_files[1]), "--device", "cpu"]
    common = ["eval", "--model", str(tiny_bert), *flags]
    adapter = ["--adapter", str(trained_classifier / "adapter")]
    assert main([*common, *adapter, "--out_dir", str(tmp_path / "e")]) == 0  # the task is the adapter's
    metrics = json.loads((tmp_path / "e" / "metrics_classification.json").read_text())
    items = pd.read_csv(tmp_path / "e" / "items_classification.csv")
    assert items["predicted"].tolist() == predictions["predicted"].tolist()
    assert items["loss"].tolist() == pytest.approx(predictions["loss"].tolist(), rel=1e-4, abs=1e-6)
    assert metrics["accuracy"] == (items["label"] == items["predicted"]).mean() > 0.8
    assert metrics["loss"] == pytest.approx(items["loss"].mean())
    capsys.readouterr()
    # The base model alone has a fresh head: measured, and said.
    assert main([*common, "--task", "classification", "--out_dir", str(tmp_path / "b")]) == 0
    assert "no better than guessing" in capsys.readouterr().out


def test_a_dry_run_resolves_and_writes_nothing(answering, questions, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "--model", answering, "--dry_run", "--out_json", "r.json"]) == 0
    printed = capsys.readouterr().out
    for line in ("task: gsm8k", "dataset: openai/gsm8k:main", "fewshot: 5", "eval_samples: 0", "out_dir: r_eval"):
        assert line in printed.splitlines()
    assert str(Path("r_eval", "metrics_gsm8k.json")) in printed
    assert not Path("r_eval").exists()


def parsed(*flags: str) -> EvalRequest:
    from sparselora.cli import Parser

    parser = Parser()
    command.add_arguments(parser)
    return command.read_request(parser.parse_args(["--model", "M", *flags]))


@pytest.mark.parametrize(
    ("flags", "task", "dataset"),
    [
        ((), "gsm8k", "openai/gsm8k:main"),
        (("--dataset", "gsm8k"), "gsm8k", "openai/gsm8k:main"),
        (("--dataset", "gsm8k", "--task", "causal_lm"), "causal_lm", "openai/gsm8k:main"),
        (("--dataset", "openai/gsm8k:socratic"), "gsm8k", "openai/gsm8k:socratic"),
        (("--dataset", "data/GSM8K_train.jsonl.gz"), "gsm8k", "data/GSM8K_train.jsonl.gz"),
        (("--eval_file", "mawps.jsonl"), "causal_lm", "mawps.jsonl"),
        (("--dataset", "mawps.jsonl", "--task", "gsm8k"), "gsm8k", "mawps.jsonl"),
        (("--dataset", "glue/sst2"), "classification", "glue/sst2"),
        (("--dataset", "docstrings"), "classification", "docstrings"),
    ],
)
def test_the_task_follows_from_the_data(flags, task, dataset):
    request = parsed(*flags)
    assert (request.task, request.dataset) == (task, dataset)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--fewshot", "-1"), "--fewshot must be 0 or more, got -1"),
        (("--max_new_tokens", "0"), "--max_new_tokens must be 1 or more"),
        (("--eval_bsz", "0"), "--eval_bsz must be 1 or more"),
        (("--template", "{prompt}", "--dataset", "docstrings"), "--template is for task causal_lm and gsm8k, this is"),
        (("--text_fields", "a"), "--text_fields is for task classification"),
        (("--task", "classification"), "no data given"),
        (("--adapter", "nowhere", "--dataset", "x.jsonl"), "nowhere.*does not exist"),
    ],
)
def test_bad_flags_are_one_line(flags, message):
    with pytest.raises(InputError, match=message):
        parsed(*flags)


def test_bad_input_ends_with_one_line_and_leaves_nothing(answering, questions, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "words.jsonl").write_text('{"question": "how?", "answer": "well"}\n' * 6)
    broken = save_adapter(tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"x" * 50)
    out = tmp_path / "out"
    base = ["eval", "--model", answering, "--device", "cpu", "--out_dir", str(out)]
    data = ["--dataset", questions[0], "--eval_file", questions[1]]
    for flags, said in (
        (["--dataset", str(tmp_path / "none.jsonl")], "no file"),
        (["--dataset", str(tmp_path / "empty.jsonl")], "no rows"),
        (["--dataset", str(tmp_path / "words.jsonl"), "--task", "gsm8k"], "holds no number"),
        ([*data, "--fewshot", "5"], "5 worked examples are wanted, the training rows have 4"),
        ([*data, "--fewshot", "4", "--max_new_tokens", "200"], "exceed the 256 positions"),
        ([*data, *SHORT, "--adapter", str(broken)], "truncated or corrupt"),
        ([*data, *SHORT, "--adapter", str(tmp_path)], "has no adapter_config.json"),
        ([*data, *SHORT, "--backend", "vllm"], "needs the package vllm"),
        ([*data, *SHORT, "--device", "cuda:99"], "is not there"),
        ([*data, *SHORT, "--model", str(tmp_path / "no_model")], "does not exist"),
        ([*data, *SHORT, "--out_dir", str(tmp_path), "--adapter", str(broken)], "holds the input adapter"),
        ([], "could not be loaded from the hub"),
    ):
        assert main([*base, *flags]) == 2, flags
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not out.exists()


def test_vllm_answers_through_the_same_command(answering, questions, tmp_path, monkeypatch):
    """vLLM is not here: a generator in its place shows what the command hands over."""
    from sparselora.evaluation import losses as evaluate

    given = {}

    def generator(base_model, **options):
        given.update(options, base_model=base_model)
        return lambda prompts: [" #### 3"] * len(prompts)

    monkeypatch.setattr(evaluate, "vllm_generator", generator)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    adapter = save_adapter(tmp_path / "adapter", r=4)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"q_proj": 12}}))
    flags = (*SHORT, "--backend", "vllm", "--adapter", str(adapter), "--out_dir", str(tmp_path / "out"), "--seed", "5")
    assert main(arguments(answering, questions, *flags)) == 0
    assert given == {
        "base_model": answering, "lora_dir": str(adapter), "lora_rank": 12, "max_new_tokens": 20, "dtype": "float32",
        "seed": 5,
    }  # fmt: skip
    metrics = json.loads((tmp_path / "out" / "metrics_gsm8k.json").read_text())
    assert (metrics["backend"], metrics["exact_match"]) == ("vllm", 0.5)


def test_on_the_real_model_and_data(shared, tmp_path):
    model, data = shared / "models" / "storyllama-20m", shared / "data" / "math"
    if not model.exists() or not data.exists():
        pytest.skip("needs ../shared/models/storyllama-20m and ../shared/data/math")
    files = str(data / "gsm8k_train.jsonl.gz"), str(data / "gsm8k_test.jsonl")
    out = tmp_path / "out"
    flags = ("--task", "causal_lm", "--eval_samples", "4", "--out_dir", str(out), "--dtype", "fp32")
    assert main(arguments(str(model), files, *flags)) == 0
    loss = json.loads((out / "metrics_causal_lm.json").read_text())["loss"]
    assert 5 < loss < math.log(8192)  # it writes stories: better than chance, far from good


def test_the_tokenizer_of_these_tests_is_exact():
    text = "Question: 5% of $1,200?\nAnswer:"
    assert byte_tokenizer().decode(byte_tokenizer()(text)["input_ids"]) == text


@pytest.mark.parametrize("pad", [None, 7], ids=["no pad id", "another pad id"])
def test_a_decoder_classifier_is_evaluated_as_it_was_by_train(tmp_path, word_files, pad):
    """The tokenizer pads; the model's configuration has no padding token, or another one."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.helpers.tiny_llama import make_tiny_llama

    folder = make_tiny_llama(tmp_path / "llama")
    torch.manual_seed(0)
    sizes = {"vocab_size": 43, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=pad)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    data = ["--dataset", str(word_files[0]), "--eval_file", str(word_files[1]), "--task", "classification"]
    how = ["--max_steps", "6", "--lr", "1e-2", "--lora_r", "4", "--device", "cpu", "--out_dir", str(tmp_path / "run")]
    assert main(["train", "--model", str(folder), *data, *how]) == 0
    trained = pd.read_csv(tmp_path / "run" / "predictions.csv")
    for size in ("1", "12"):
        out = tmp_path / f"eval{size}"
        adapter = ["--model", str(folder), "--adapter", str(tmp_path / "run" / "adapter")]
        assert main(["eval", *adapter, *data, "--eval_bsz", size, "--device", "cpu", "--out_dir", str(out)]) == 0
        items = pd.read_csv(out / "items_classification.csv")
        assert items["loss"].tolist() == pytest.approx(trained["loss"].tolist(), rel=1e-4)
        assert items["correct"].tolist() == trained["correct"].tolist()
