from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# The suite is offline; a test marked `network` unsets these itself.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models are tiny, and the workers of a parallel run share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def settled_imports() -> None:
    """Every training collects garbage, which walks all objects: those of imports and fixtures are here to stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Factors and statistics go to a folder of the test run, for subprocesses too: never to the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSELORA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models that stands beside a maintainer's checkout."""
    folder = ROOT.parent / "shared"
    if not (folder / "data" / "MANIFEST.md").exists():
        pytest.skip("needs ../shared, which only a maintainer has")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the pip-installed all-MiniLM-L6-v2."""
    from sparselora.errors import InputError
    from sparselora.models.packaged import resolve_alias

    try:
        return Path(resolve_alias("minilm"))
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT encoder of two layers with a word tokenizer, as a local model folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny_bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def word_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and evaluation tables for `tiny_bert`: the label says which half of the vocabulary prevails."""
    import numpy as np
    import pandas as pd

    folder = tmp_path_factory.mktemp("words")
    rng = np.random.default_rng(0)
    for name, rows in (("train", 96), ("dev", 40)):
        labels = rng.integers(0, 2, rows)
        words = [rng.integers(0, 40, rng.integers(3, 12)) + 20 * label for label in labels]
        texts = [" ".join(f"w{i}" for i in line) for line in words]
        pd.DataFrame({"sentence": texts, "label": labels}).to_csv(folder / f"{name}.csv", index=False)
    return folder / "train.csv", folder / "dev.csv"


@pytest.fixture(scope="session")
def trained_classifier(
    tiny_bert: Path, word_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a finished `train` of `tiny_bert` on `word_files`: read it, write nothing there."""
    from sparselora.__main__ import main

    folder = tmp_path_factory.mktemp("trained") / "classifier"
    data = ["--dataset", str(word_files[0]), "--eval_file", str(word_files[1]), "--task", "classification"]
    how = ["--epochs", "6", "--lr", "1e-2", "--lora_r", "8", "--device", "cpu"]
    assert main(["train", "--model", str(tiny_bert), *data, *how, "--out_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and written, but with nothing drawn: for runs whose figures another run of the file draws."""
    monkeypatch.setattr("sparselora.report.style.FigureCanvasAgg.draw", lambda canvas: canvas.get_renderer())
