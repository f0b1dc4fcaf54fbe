"""Evaluation: answers as numbers, prompts without the evaluated row, generation that stops, losses by brute force."""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
import types
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch.nn import functional as F
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from sparselora.data.batches import Collator
from sparselora.errors import InputError
from sparselora.evaluation.gsm8k import TEMPLATE
from sparselora.evaluation.losses import (
    NEXT_QUESTION,
    exact_match,
    few_shot_prompt,
    first_answer,
    gold_answers,
    held_out_losses,
    item_losses,
    lm_eval_command,
    mean_loss,
    parse_answer,
    plain_number,
    share,
    transformers_generator,
    vllm_generator,
    with_adapter,
    worked_examples,
)
from sparselora.models.labels import IGNORED
from tests.helpers.byte_llama import byte_llama, byte_tokenizer, save_adapter
from tests.helpers.contextual_models import tiny

# --- answers ------------------------------------------------------------------------------------------------------

CASES = [
    # As references and trained models write it.
    ("She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
    (" 2/2=<<2/2=1>>1 bolt\n2+1=<<2+1=3>>3\n#### 3\n\n", "3"),
    ("#### 18.", "18"),
    ("#### 18.00", "18"),
    ("#### $18", "18"),
    ("#### \\$18.50", "18.5"),
    ("#### 1,234", "1234"),
    ("#### 1,234,567.25 dollars", "1234567.25"),
    ("#### -3", "-3"),
    ("#### -$3", "-3"),
    ("#### $-3", "-3"),
    ("#### −3", "-3"),
    ("#### 5%", "5"),
    ("#### £40", "40"),
    ("####18", "18"),
    ("#### **18**", "18"),
    ("#### 0.5", "0.5"),
    ("#### .5", "0.5"),
    ("#### 3/4", "0.75"),
    ("#### 007", "7"),
    # The first answer counts, whatever follows it.
    ("#### 18\n\nQuestion: Tom has 5 cats and 2 dogs.\nAnswer: 5+2=7\n#### 7", "18"),
    ("#### 18\n#### 20", "18"),
    ("#### 18\nThis took 3 steps.", "18"),
    ("The answer is 18.\n\nQuestion: Tom has 5 cats.", "18"),
    ("The answer is 18. Question: Tom has 5 cats.", "18"),
    ("It is 18.\nQ: Tom has 5 cats.\nA: 5", "18"),
    ("It is 18.\n\nProblem 2: Tom has 5 cats.", "18"),
    ("It is 18.\n\nQuestion 2: Tom has 5 cats.", "18"),
    ("It is 18.\n\nQuestion: Tom has 5 cats.\n#### 5", "18"),
    # Without a mark, the last number.
    ("The answer is 18.", "18"),
    ("So he has 1,200 of them.", "1200"),
    ("Janet makes $18 every day, which is what was asked.", "18"),
    ("16-3-4 = 9 eggs, so 9*2=18", "18"),
    ("the difference is 9-3", "3"),
    ("the difference is (9)-3", "3"),
    ("so the balance is -3.", "-3"),
    ("it costs Rs.500", "500"),
    ("it costs US$18", "18"),
    ("\\boxed{18}", "18"),
    ("It covers 20 m^2 and gives 2 litres of H2O", "2"),
    ("The area is 20 m^2", "20"),
    ("The answer is 1, 2, 3", "3"),
    ("50% of 36 is 18", "18"),
    ("#### unknown, perhaps 4", "4"),
    ("#### The answer is 18 eggs", "18"),
    # No answer.
    ("", None),
    ("Once upon a time there was a little girl.", None),
    ("eighteen", None),
    ("Question: Tom has 5 cats.\nAnswer: 5\n#### 5", None),
    ("####", None),
    ("$", None),
    ("-", None),
]


@pytest.mark.parametrize(("text", "value"), CASES)
def test_an_answer_is_the_number_a_reader_would_name(text: str, value: str | None) -> None:
    assert parse_answer(text) == (None if value is None else Decimal(value))


def test_control_the_last_number_of_the_text_is_often_another() -> None:
    def last_number(text: str) -> Decimal | None:
        found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
        return Decimal(found[-1]) if found else None

    wrong = [text for text, value in CASES if last_number(text) != (None if value is None else Decimal(value))]
    assert len(wrong) >= 12
    assert "#### 18\n#### 20" in wrong
    assert "#### 18\nThis took 3 steps." in wrong


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=2))
def test_every_way_to_write_a_number_is_that_number(value: Decimal) -> None:
    for written in (f"{value}", f"{value:,}", f"{value}.", f"{value:f}0", f" {value} eggs"):
        assert parse_answer(f"some 7 words\n#### {written}") == value, written
        assert parse_answer(f"some 7 words, so {written}") == value, written
    assert Decimal(plain_number(value)) == value


def test_equal_numbers_are_one_text() -> None:
    numbers = [Decimal(text) for text in ("18", "18.00", "18.0", "1.8E+1")]
    assert {plain_number(value) for value in numbers} == {"18"}
    assert plain_number(None) == ""
    assert plain_number(Decimal("-0.0")) == "0"
    assert plain_number(Decimal("1200")) == "1200"


def test_exact_match_compares_numbers_and_no_answer_is_wrong() -> None:
    gold = gold_answers(["#### 18", "so 3", "#### 1,000", "#### 4"])
    predicted = [parse_answer(text) for text in ("18.00", "4", "1000", "none")]
    assert exact_match(predicted, gold).tolist() == [True, False, True, False]
    with pytest.raises(InputError, match="answer 1 of the evaluated rows holds no number"):
        gold_answers(["#### 1", "blue"])


@pytest.mark.parametrize("name", ["gsm8k_train.jsonl.gz", "gsm8k_test.jsonl"])
def test_every_reference_solution_of_gsm8k_is_read(shared: Path, name: str) -> None:
    path = shared / "data" / "math" / name
    rows = [json.loads(line) for line in (gzip.open if name.endswith("gz") else open)(path, "rt", encoding="utf-8")]
    assert len(rows) > 1000
    for row in rows:
        assert parse_answer(row["answer"]) == Decimal(row["final_answer"])
        # Another question behind it changes nothing.
        assert parse_answer(f"{row['answer']}\n\nQuestion: {rows[0]['question']}\nAnswer: {rows[0]['answer']}") == (
            Decimal(row["final_answer"])
        )


# --- prompts ------------------------------------------------------------------------------------------------------


def questions(first: int, last: int) -> pd.DataFrame:
    return pd.DataFrame(
        {"prompt": [f"What is {i} + 1?" for i in range(first, last)],
         "completion": [f"It is {i + 1}.\n#### {i + 1}" for i in range(first, last)]}
    )  # fmt: skip


def test_worked_examples_depend_on_the_seed_and_are_never_evaluated() -> None:
    train = questions(0, 30)
    evaluated = ["what is  3 + 1?", *questions(10, 30)["prompt"]]  # most of them are among the training rows
    drawn = [worked_examples(train, evaluated, 5, seed) for seed in range(20)]
    assert drawn[0] == worked_examples(train, evaluated, 5, 0)
    assert len({tuple(examples) for examples in drawn}) > 10
    for examples in drawn:
        assert len({question for question, _ in examples}) == 5
        for question in evaluated:
            assert few_shot_prompt(examples, question).lower().count(question.lower()) == 1
    # The control: where nothing is held back, evaluated questions are drawn.
    free = worked_examples(train, [], 25, 0)
    assert {question for question, _ in free} & set(evaluated)


def test_too_few_other_questions_is_an_error() -> None:
    with pytest.raises(InputError, match="5 worked examples are wanted, the training rows have 4 questions"):
        worked_examples(questions(0, 10), questions(0, 6)["prompt"].tolist(), 5, 0)
    assert worked_examples(questions(0, 3), questions(0, 3)["prompt"].tolist(), 0, 0) == []


def test_the_prompt_leaves_the_last_answer_open() -> None:
    earlier, question = (TEMPLATE.format(prompt=text) for text in ("a?", "c?"))
    prompt = "Question: a?\nAnswer: b #### 1\n\nQuestion: c?\nAnswer:"
    assert few_shot_prompt([(earlier, "b #### 1")], question, gap=" ") == prompt
    assert few_shot_prompt([(earlier, "b #### 1")], question) == prompt.replace("Answer: b", "Answer:b")
    assert few_shot_prompt([], question) == "Question: c?\nAnswer:"


def test_the_lm_eval_command_is_quoted_for_a_shell() -> None:
    common = {"dtype": "float32", "fewshot": 5, "batch_size": 4, "device": "cpu", "seed": 1}
    assert lm_eval_command("M", "my lora", **common) == (
        "lm_eval --model hf --model_args 'pretrained=M,peft=my lora,dtype=float32' --tasks gsm8k --num_fewshot 5 "
        "--batch_size 4 --device cpu --seed 1"
    )
    assert "peft" not in lm_eval_command("M", None, **common)


# --- generation ---------------------------------------------------------------------------------------------------


class Scripted:
    """Makes a model say given texts, one for each row of a batch, whatever it is asked."""

    def __init__(self, model: Any, tokenizer: Any, texts: list[str]) -> None:
        self.steps = 0
        self._ids = [tokenizer(text)["input_ids"] for text in texts]
        self._handle = model.register_forward_hook(self._hook)

    def _hook(self, module: Any, args: Any, output: Any) -> Any:
        logits = torch.zeros_like(output.logits)
        for row, ids in enumerate(self._ids):
            logits[row, -1, ids[self.steps] if self.steps < len(ids) else 0] = 1
        self.steps += 1
        output.logits = logits
        return output


def test_generation_stops_before_a_next_question() -> None:
    tokenizer, model = byte_tokenizer(), byte_llama()
    first = " 9*2=18\n#### 18\n\nQuestion: Tom has 5 cats. How many?\nAnswer: 5\n#### 5"
    second = " 3\n#### 3\n\nQuestion: And now?"
    script = Scripted(model, tokenizer, [first, second])
    generate = transformers_generator(model, tokenizer, max_new_tokens=100, batch_size=2)
    texts = generate(["Question: how many eggs?\nAnswer:", "Question: bolts?\nAnswer:"])
    assert texts == [" 9*2=18\n#### 18\n", " 3\n#### 3\n"]
    assert [parse_answer(text) for text in texts] == [18, 3]
    # It stopped at the colon of the longer one, not after 100 tokens, and not at the prompt's own "Question:".
    assert script.steps == first.index(NEXT_QUESTION) + len(NEXT_QUESTION)


def test_generation_ends_at_eos_and_at_the_limit() -> None:
    tokenizer, model = byte_tokenizer(), byte_llama()
    script = Scripted(model, tokenizer, [" 18"])
    generate = transformers_generator(model, tokenizer, max_new_tokens=50, batch_size=2)
    assert generate(["Answer:"]) == [" 18"]
    assert script.steps == 4
    model = byte_llama()
    script = Scripted(model, tokenizer, [" 12345678"])
    assert transformers_generator(model, tokenizer, max_new_tokens=4, batch_size=2)(["Answer:"]) == [" 123"]
    assert script.steps == 4


def alone(model: LlamaForCausalLM, ids: list[int], count: int) -> list[int]:
    """Greedy generation without cache, batch or padding: the whole text anew for each token."""
    written: list[int] = []
    with torch.no_grad():
        while len(written) < count and 0 not in written:
            written.append(int(model(torch.tensor([[*ids, *written]])).logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batched_generation_equals_one_prompt_at_a_time(batch_size: int) -> None:
    tokenizer, model = byte_tokenizer(), byte_llama().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from ties
    prompts = ["a", "Question: how many?\nAnswer:", "some text", "x" * 60, "Answer: 7"]
    ids = tokenizer(prompts)["input_ids"]
    expected = [first_answer(tokenizer.decode(alone(model, row, 12), skip_special_tokens=True)) for row in ids]
    assert len(set(expected)) == 5
    # What a chat model's own settings ask for must not come in.
    model.generation_config.do_sample, model.generation_config.repetition_penalty = True, 5.0
    done: list[int] = []
    model.train()
    found = transformers_generator(model, tokenizer, max_new_tokens=12, batch_size=batch_size, on_done=done.append)(
        prompts
    )
    assert found == expected
    assert sum(done) == 5
    assert model.training


def test_a_prompt_without_room_for_an_answer_is_an_error() -> None:
    generate = transformers_generator(byte_llama(), byte_tokenizer(64), max_new_tokens=10, batch_size=2)
    with pytest.raises(InputError, match="a prompt of 55 tokens and 10 new ones exceed the 64 positions"):
        generate(["x" * 55, "x"])
    assert len(generate(["x" * 54])) == 1


class FakeLLM:
    """What `vllm_generator` asks of vLLM; vLLM itself is not part of the tests."""

    made: dict[str, Any]
    asked: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        FakeLLM.made = options

    def generate(self, prompts: list[str], sampling: Any, **options: Any) -> list[Any]:
        FakeLLM.asked = {"prompts": prompts, "sampling": sampling, **options}
        texts = [f" {i}\n#### {i}\n\nQ: more?\nA: 99" for i in range(len(prompts))]
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text)]) for text in texts]


def fake_vllm(patch: pytest.MonkeyPatch) -> None:
    package, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    package.LLM = FakeLLM  # type: ignore[attr-defined]
    package.SamplingParams = lambda **options: options  # type: ignore[attr-defined]
    request.LoRARequest = lambda *arguments: arguments  # type: ignore[attr-defined]
    for module in (package, lora, request):
        patch.setitem(sys.modules, module.__name__, module)


def test_vllm_is_given_the_adapter_the_rank_and_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm(monkeypatch)
    generate = vllm_generator("M", lora_dir="A", lora_rank=20, max_new_tokens=64, dtype="bfloat16", seed=3)
    assert FakeLLM.made == {"model": "M", "dtype": "bfloat16", "seed": 3, "enable_lora": True, "max_lora_rank": 32}
    assert generate(["a", "b"]) == [" 0\n#### 0\n", " 1\n#### 1\n"]
    assert FakeLLM.asked["prompts"] == ["a", "b"]
    assert FakeLLM.asked["sampling"] == {"temperature": 0.0, "max_tokens": 64, "stop": [NEXT_QUESTION]}
    assert FakeLLM.asked["lora_request"] == ("adapter", 1, "A")
    with pytest.raises(InputError, match="ranks up to 512, got 600"):
        vllm_generator("M", lora_dir="A", lora_rank=600, max_new_tokens=64)


def test_vllm_without_an_adapter_has_no_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm(monkeypatch)
    vllm_generator("M", max_new_tokens=8)(["a"])
    assert FakeLLM.made == {"model": "M", "dtype": "auto", "seed": 0}
    assert FakeLLM.asked["lora_request"] is None


# --- losses -------------------------------------------------------------------------------------------------------


def completions(vocabulary: int) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(0)
    examples = []
    for length, prompt in ((9, 4), (3, 1), (14, 13), (6, 2), (14, 1), (2, 1), (5, 5)):
        ids = rng.integers(0, vocabulary, length).tolist()
        examples.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return examples


def by_hand(model: Any, example: dict[str, list[int]]) -> tuple[float, int]:
    """One row alone, one label at a time: the label at position t from the logits at t − 1."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
    total, count = 0.0, 0
    for t, label in enumerate(example["labels"]):
        if t and label != IGNORED:
            total -= float(torch.log_softmax(logits[t - 1], dim=0)[label])
            count += 1
    return total, count


def collated(examples: list[Any], size: int, multiple: int) -> list[dict[str, torch.Tensor]]:
    collator = Collator(2, causal=True, multiple=multiple)
    return [collator.tensors(examples[i : i + size]) for i in range(0, len(examples), size)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("size", "multiple"), [(1, 1), (2, 1), (3, 16), (7, 8)])
def test_losses_are_those_of_one_row_at_a_time(name: str, size: int, multiple: int) -> None:
    model = tiny(name).double().eval()
    examples = completions(model.config.vocab_size)
    expected = [by_hand(model, example) for example in examples]
    found = item_losses(model.train(), collated(examples, size, multiple))
    assert found["tokens"].tolist() == [count for _, count in expected] == [5, 2, 1, 4, 13, 1, 0]
    assert found["loss"].tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-10, abs=1e-12)
    assert model.training
    # The control: labels that are not shifted give other losses.
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([examples[0]["input_ids"]])).logits[0]
    unshifted = F.cross_entropy(logits, torch.tensor(examples[0]["labels"]), reduction="sum")
    assert abs(float(unshifted) - expected[0][0]) > 1e-3


def test_losses_of_held_out_rows_come_in_their_order() -> None:
    model, tokenizer = byte_llama().eval(), byte_tokenizer()
    examples = completions(258)
    expected = [by_hand(model, example) for example in examples]
    done: list[int] = []
    found = held_out_losses(model, examples, tokenizer, batch_size=3, on_done=done.append)
    assert list(zip(found["loss"], found["tokens"])) == [(pytest.approx(loss, abs=1e-9), n) for loss, n in expected]
    assert done == [3, 3, 1]
    assert found.index.tolist() == list(range(7))
    with pytest.raises(InputError, match="no rows"):
        held_out_losses(model, [], tokenizer, batch_size=3)


def test_losses_of_half_precision_models_are_summed_in_full() -> None:
    model = byte_llama().eval()
    exact = item_losses(model, collated(completions(258), 2, 8))
    half = item_losses(model.to(torch.bfloat16), collated(completions(258), 2, 8))
    assert half["loss"].tolist() == pytest.approx(exact["loss"].tolist(), rel=2e-2)
    assert item_losses(model.float(), collated(completions(258), 2, 8), bf16=True)["loss"].tolist() == pytest.approx(
        exact["loss"].tolist(), rel=2e-2
    )


@pytest.mark.parametrize("size", [1, 2, 6])
def test_a_classifier_has_a_loss_and_a_class_for_each_row(size: int) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, num_labels=3
    )
    model = BertForSequenceClassification(config).double().eval()
    with torch.no_grad():
        model.classifier.weight.mul_(30)  # else every row is of one class
    rng = np.random.default_rng(1)
    examples = [{"input_ids": rng.integers(3, 30, n).tolist(), "labels": int(n % 3)} for n in (4, 9, 5, 12, 3, 7)]
    found = item_losses(model, collated(examples, size, 8))
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([example["input_ids"]])).logits[0] for example in examples]
    expected = [-float(torch.log_softmax(row, 0)[example["labels"]]) for row, example in zip(logits, examples)]
    assert found["loss"].tolist() == pytest.approx(expected, rel=1e-10)
    assert found["predicted"].tolist() == [int(row.argmax()) for row in logits]
    assert found["label"].tolist() == [example["labels"] for example in examples]
    assert found["correct"].tolist() == (found["label"] == found["predicted"]).astype(int).tolist()
    assert found["predicted"].nunique() > 1


# --- in numbers ---------------------------------------------------------------------------------------------------


def test_the_interval_of_a_share_is_wilsons() -> None:
    n, right, z = 20, 7, 1.959963984540054
    p, centre = right / n, (right / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert share([1] * right + [0] * (n - right)) == pytest.approx((p, centre - half, centre + half))
    rate, low, high = share([False] * 10)
    assert rate == low == 0
    assert 0 < high < 0.3


def test_the_mean_loss_is_over_labels_and_its_error_over_items() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 40, 500)
    sums = counts * rng.normal(2, 0.5, 500)
    mean, error = mean_loss(sums, counts)
    assert mean == pytest.approx(sums.sum() / counts.sum())
    draws = rng.integers(0, 500, (2000, 500))
    assert error == pytest.approx((sums[draws].sum(1) / counts[draws].sum(1)).std(), rel=0.1)
    assert mean_loss([4.0, 2.0], [1, 1]) == (3.0, pytest.approx(1.0))
    assert mean_loss([6.0], [3])[0] == 2
    assert math.isnan(mean_loss([6.0], [3])[1])
    assert all(math.isnan(value) for value in mean_loss([0.0], [0]))


# --- the adapter --------------------------------------------------------------------------------------------------


def test_an_adapter_is_loaded_and_changes_the_loss(tmp_path: Path) -> None:
    batches = collated(completions(258), 4, 8)
    plain = item_losses(byte_llama().float(), batches)["loss"]
    adapted = item_losses(with_adapter(byte_llama().float(), str(save_adapter(tmp_path / "a"))), batches)["loss"]
    assert (adapted - plain).abs().max() > 1e-3


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    deep = save_adapter(tmp_path / "deep", layers=3)  # PEFT alone would drop the third layer without a word
    with pytest.raises(InputError, match=r"weights for .*layers\.2.*, which the model lacks"):
        with_adapter(byte_llama(), str(deep))
    shallow = save_adapter(tmp_path / "shallow", layers=1)  # and leave the second as it was initialised
    with pytest.raises(InputError, match="lacks weights for modules of the model"):
        with_adapter(byte_llama(), str(shallow))
    with pytest.raises(InputError, match="cannot be loaded into the model"):
        with_adapter(tiny("gpt2"), str(deep))


def test_damaged_adapters_are_one_line(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = save_adapter(tmp_path / "a")
    path = whole / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: value * float("nan") for name, value in weights.items()}, path)
    with pytest.raises(InputError, match="NaN or infinite"):
        with_adapter(byte_llama(), str(whole))
    for damage in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 40):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=r"truncated or corrupt|Git-LFS pointer") as caught:
            with_adapter(byte_llama(), str(whole))
        assert "\n" not in str(caught.value)
    path.unlink()

    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("code ran",))

    torch.save({"x": Evil()}, whole / "adapter_model.bin")
    with pytest.raises(InputError, match="more than tensors"):
        with_adapter(byte_llama(), str(whole))
    with pytest.raises(InputError, match="does not exist"):
        with_adapter(byte_llama(), str(tmp_path / "nowhere"))


PROMPTS = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("size", [1, 4])
def test_virtual_tokens_do_not_shift_the_text(tmp_path: Path, name: str, size: int) -> None:
    """The losses are PEFT's own, and not those that the first positions of its logits give."""
    torch.manual_seed(3)
    model = get_peft_model(byte_llama().float(), PROMPTS[name])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "a")
    examples = completions(258)[:-1]
    adapted = with_adapter(byte_llama().float(), str(tmp_path / "a")).eval()
    table = held_out_losses(adapted, examples, byte_tokenizer(), batch_size=size)
    for i, example in enumerate(examples):
        row = {key: torch.tensor([example[key]]) for key in ("input_ids", "labels")}
        with torch.no_grad():
            output = adapted(**row)
        assert table["loss"][i] / table["tokens"][i] == pytest.approx(float(output.loss), rel=1e-5)
        length = row["labels"].shape[1]
        if output.logits.shape[1] > length:
            shifted = F.cross_entropy(output.logits[0, : length - 1], row["labels"][0, 1:])
            assert abs(float(shifted) - float(output.loss)) > 1e-3


def test_prompts_that_cannot_be_evaluated_are_refused(tmp_path: Path) -> None:
    tasks = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2)
    get_peft_model(byte_llama().float(), tasks).save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match="prompts of several tasks"):
        with_adapter(byte_llama().float(), str(tmp_path / "a"))
    classifier = LlamaForSequenceClassification(byte_llama().config)
    prompts = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    get_peft_model(classifier, prompts).save_pretrained(tmp_path / "b")
    with pytest.raises(InputError, match="virtual tokens before the text of a classifier that reads the last"):
        with_adapter(LlamaForSequenceClassification(byte_llama().config), str(tmp_path / "b"))
