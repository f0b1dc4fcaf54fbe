"""The files in examples/ run as they are, and show what they say they show."""

from __future__ import annotations

import importlib.util
import json
import types

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel

from sparselora.data.texts import harvest_docstrings
from sparselora.novelty.duplicates import near_duplicates
from tests.helpers.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def example(name: str):
    """The module of the example ``name``."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 120


def test_documentation_rows_are_sentences_of_the_documentation_in_two_parts(tmp_path):
    main = example("documentation_rows").main
    main([str(tmp_path / "rows.jsonl"), "--rows", "20"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 20
    sentences = set(harvest_docstrings().train["text"])
    for row in rows:
        assert " ".join((row["prompt"] + row["completion"]).split()) in sentences
        assert len(row["completion"].split()) == 4
        assert len(row["prompt"].split()) >= 12
    assert " ".join((rows[0]["prompt"] + rows[1]["completion"]).split()) not in sentences  # the control


def planted(folder, **more: int) -> list[dict]:
    rng = np.random.default_rng(3)
    texts = [" ".join(f"w{word}" for word in rng.integers(300, size=12)) for _ in range(70)]
    source = [{"question": text, "answer": f"a{i}"} for i, text in enumerate(texts)]
    (folder / "source.jsonl").write_text("".join(json.dumps(row) + "\n" for row in source), encoding="utf-8")
    flags = [f"--{name}={value}" for name, value in more.items()]
    fields = ["--prompt_field", "question", "--completion_field", "answer", "--batch", "4"]
    example("planted_rows").main([str(folder / "source.jsonl"), str(folder / "planted.jsonl"), *fields, *flags])
    return [json.loads(line) for line in (folder / "planted.jsonl").read_text(encoding="utf-8").splitlines()]


def test_planted_rows_are_batches_of_originals_and_of_near_duplicates(tmp_path):
    rows = planted(tmp_path, batches=16, copies=8)
    assert len(rows) == 2 * 16 * 4
    batches = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    assert [{row["planted"] for row in batch} for batch in batches] == [{0}] * 16 + [{1}] * 16
    originals = {row["completion"]: row["prompt"] for row in rows if not row["planted"]}
    assert len(originals) == 64
    for number, batch in enumerate(batches[16:]):
        assert [row["completion"] for row in batch] == [row["completion"] for row in batches[number // 8]]
        for row in batch:
            words, whole = row["prompt"].split(), originals[row["completion"]].split()
            assert any(words == whole[:i] + whole[i + 1 :] for i in range(1, 11))
    assert len({row["prompt"] for row in rows}) > 64 + 40  # the copies of a row differ from one another
    assert rows == planted(tmp_path, batches=16, copies=8)
    assert rows != planted(tmp_path, batches=16, copies=8, seed=1)
    assert len(planted(tmp_path)) == 2 * 17 * 4  # two rows of 70 are left
    rest = tmp_path / "rest.jsonl"
    fields = ["--prompt_field=question", "--completion_field=answer", "--batch=4", "--batches=16"]
    paths = [str(tmp_path / name) for name in ("source.jsonl", "planted.jsonl")]
    example("planted_rows").main([*paths, *fields, f"--held_out={rest}"])
    held_out = {json.loads(line)["completion"] for line in rest.read_text(encoding="utf-8").splitlines()}
    assert held_out == {f"a{i}" for i in range(70)} - originals.keys()


def test_deduplication_finds_the_planted_rows_and_no_others(tmp_path):
    rows = planted(tmp_path)
    ids = {word: i for i, word in enumerate(sorted({word for row in rows for word in row["prompt"].split()}))}
    tokens = [[ids[word] for word in row["prompt"].split()] for row in rows]
    left_out = near_duplicates(tokens, 0.6)["place"].tolist()
    assert left_out == [i for i, row in enumerate(rows) if row["planted"]]


@pytest.mark.parametrize(("name", "value"), [("batches", 18), ("copies", 0), ("batch", 100)])
def test_rows_that_do_not_suffice_for_planting_are_refused(tmp_path, capsys, name, value):
    with pytest.raises(SystemExit) as ended:
        planted(tmp_path, **{name: value})
    assert ended.value.code == 2
    assert not (tmp_path / "planted.jsonl").exists()
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["source.jsonl", "source.jsonl"], "must be different files"),
        (["source.jsonl", "out.jsonl", "--held_out=out.jsonl"], "must be different files"),
        (["source.jsonl", "."], ". is a folder"),
    ],
)
def test_planting_overwrites_neither_its_source_nor_its_own_rows(tmp_path, capsys, monkeypatch, names, reason):
    monkeypatch.chdir(tmp_path)
    rows = '{"prompt": "a b c", "completion": "d"}\n' * 3
    (tmp_path / "source.jsonl").write_text(rows)
    with pytest.raises(SystemExit) as ended:
        example("planted_rows").main([*names, "--batch=1", "--batches=2"])
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err
    assert (tmp_path / "source.jsonl").read_text() == rows
    assert [path.name for path in tmp_path.iterdir()] == ["source.jsonl"]


def test_a_sparse_step_trains_like_a_dense_one():
    results = example("sparse_step").main(["--steps", "80"])
    for before, after, _ in results.values():
        assert after < before - 0.15
    dense, sparse = (after for _, after, _ in results.values())
    assert dense != sparse  # the sparse run did not run dense


def test_an_unlabelled_row_trains_nothing():
    """Control: with the labels of `make_batch` gone, the loss that the others lower is not there."""
    module = example("sparse_step")
    batch = module.make_batch(0)
    assert (batch["labels"][:, : module.CONTEXT] == -100).all()
    assert (batch["labels"][:, module.CONTEXT :] == batch["input_ids"][:, : module.ANSWER]).all()


def test_the_trainer_lowers_the_loss_and_saves_a_plain_adapter(tmp_path):
    module = example("trainer")
    trainer = module.main(["--max_steps", "40", "--out_dir", str(tmp_path / "out")])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    model, _, _ = module.tiny_model()
    loaded = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    trained = trainer.model.eval()
    batch = module.collate(module.encode(module.sums(4), lambda text: list(text.encode()), 256))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss, trained(**batch).loss)


@pytest.mark.parametrize("name", ["trainer", pytest.param("trl_trainer", marks=needs_trl)])
def test_the_one_line_of_a_trainer_makes_it_sparse(name, tmp_path, monkeypatch):
    """Another loss than without the line, and than with a share of channels that is another."""
    losses = []
    for sparsity in ("0.9", "0.5", None):
        module = example(name)
        if sparsity is None:
            monkeypatch.setattr(module, "sparsify", lambda trainer, config: types.SimpleNamespace(remove=lambda: None))
        trainer = module.main(
            ["--max_steps", "4", "--ffn_sparsity", sparsity or "0.9", "--out_dir", str(tmp_path / "out")]
        )
        losses.append(trainer.state.log_history[-1]["train_loss"])
    assert len(set(losses)) == 3


@needs_trl
def test_the_trl_trainer_lowers_the_loss_and_saves_a_plain_adapter(tmp_path):
    module = example("trl_trainer")
    trainer = module.main(["--max_steps", "40", "--out_dir", str(tmp_path / "out")])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    model, tokenizer = module.tiny_model()
    loaded = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    ids = tokenizer("What is 2 plus 3?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_pruning_shrinks_the_adapter(tiny_bert, word_files, tmp_path, capsys):
    data = [
        "--model",
        str(tiny_bert),
        "--dataset",
        str(word_files[0]),
        "--train_samples",
        "0",
        "--epochs",
        "12",
        "--lr",
        "1e-2",
    ]
    results = example("pruning").main([*data, "--out_dir", str(tmp_path / "pruned")])
    assert results["before"] > 0.7  # of two classes
    assert PeftConfig.from_pretrained(tmp_path / "pruned").r == 2
    before, after = (int(n) for n in capsys.readouterr().out.split("LoRA parameters: ")[1].split("\n")[0].split(" -> "))
    assert 4 * after == before


def test_editing_an_adapter_reports_its_null(tmp_path, capsys):
    losses = example("edit_adapter").main(["--steps", "40", "--draws", "5", "--out_dir", str(tmp_path)])
    assert losses["edited"] != losses["unedited"]
    assert losses["mean of the draws"] != losses["unedited"]
    assert "rank p" in capsys.readouterr().out
    assert (tmp_path / "edited" / "adapter_model.safetensors").is_file()
