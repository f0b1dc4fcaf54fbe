"""`edit` by calibration on every real adapter, with a base model of its architecture whose weights are random.

The bases have the widths that the adapter's tensors demand and as many layers as it needs; what no adapter touches (the
vocabulary, the inner width of an FFN) is small.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from sparselora.__main__ import main
from sparselora.models.adapter_files import AdapterFile, open_adapter
from sparselora.report import spectral
from sparselora.spectral.factors import adapter_svd
from sparselora.spectral.sensitivity import Sensitivity, to_frame
from tests.helpers.byte_llama import byte_tokenizer
from tests.models.test_spectral_adapter import REFUSED

VOCABULARY, INNER = 258, 24
BERT = {"vocab_size": VOCABULARY, "intermediate_size": INNER, "pad_token_id": 1}
GPT2 = {"vocab_size": VOCABULARY, "n_inner": INNER, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0}

BASES: dict[str, Callable[[], Any]] = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**BERT)),
    "roberta": lambda: tf.RobertaModel(tf.RobertaConfig(**BERT, num_hidden_layers=11)),
    "distilbert": lambda: tf.DistilBertModel(
        tf.DistilBertConfig(vocab_size=VOCABULARY, hidden_dim=INNER, pad_token_id=1)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(vocab_size=VOCABULARY, ffn_dim=INNER, bos_token_id=None, eos_token_id=0, pad_token_id=1)
    ),
    "segformer": lambda: tf.SegformerForSemanticSegmentation(tf.SegformerConfig(num_labels=150)),
}


class Real(NamedTuple):
    """What an adapter was trained on, its number of classes (0: a language model), and which modules to edit."""

    base: str
    labels: int
    flags: tuple[str, ...]


QUERIES, LATE = ("--target_modules", "query"), ("--target_modules", "all", "--layer_min", "9")
REAL = {
    "bert_r16_qv": Real("bert", 2, (*QUERIES, "--layer_min", "6")),
    "bert_r8_qv": Real("bert", 2, (*QUERIES, "--layer_min", "6")),
    "distilbert_sst2_r8": Real("distilbert", 2, ("--target_modules", "q_lin")),
    "gpt2_r8_cattn": Real("gpt2", 0, LATE),
    "gpt2_r8_cattn_cproj": Real("gpt2", 3, ("--target_modules", "attn.c_proj")),
    "gpt2_r8_cattn_great": Real("gpt2", 0, LATE),
    "opt125m_r16_bf16": Real("opt", 0, ("--target_modules", "q_proj", "--layer_min", "6")),
    "roberta_agnews_r36_step6750": Real("roberta", 4, QUERIES),
    "roberta_agnews_r36_step13500": Real("roberta", 4, QUERIES),
    "roberta_agnews_r36_step27000": Real("roberta", 4, QUERIES),
    "segformer_b0_r32_bias": Real("segformer", 2, QUERIES),
}
IMAGES = "segformer_b0_r32_bias"


class Bases:
    """Saved base models by name, each made once, and files of rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            torch.manual_seed(0)
            BASES[name]().save_pretrained(path)
            byte_tokenizer(longest=32).save_pretrained(path)
        return path

    def rows(self, labels: int) -> Path:
        path = self.folder / f"rows_{labels}.jsonl"
        texts = [f"{number} and {number * number}" for number in range(10)]
        rows = [{"sentence": x, "label": i % labels} if labels else {"question": x, "answer": x[::-1]}
                for i, x in enumerate(texts)]  # fmt: skip
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def loaded(self, real: Real, adapter: Path) -> PeftModel:
        """The adapter on its base, by plain PEFT."""
        path = self(real.base)
        if real.labels:
            model: Any = tf.AutoModelForSequenceClassification.from_pretrained(path, num_labels=real.labels)
        else:
            model = tf.AutoModelForCausalLM.from_pretrained(path)
        return PeftModel.from_pretrained(model, adapter)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty files in their places: drawing takes four fifths of the time, and other tests look at figures."""

    def draw(path: Path, *_: object) -> None:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        path.with_suffix(".csv").touch()

    for name in ("spectra", "sensitivity", "layers"):
        monkeypatch.setattr(spectral, name, draw)


def source(bases: Bases, name: str, adapter: Path) -> list[str]:
    """The flags of an edit by calibration."""
    real = REAL[name]
    flags = ["edit", "--model", str(bases(real.base)), "--adapter", str(adapter), "--device", "cpu"]
    # One adapter does not say what it was trained for.
    task = ["--task", "classification"] if real.labels else []
    return [*flags, *task, "--dataset", str(bases.rows(real.labels)), "--calib_samples", "2", *real.flags]


def made_up(adapter: AdapterFile, path: Path) -> Path:
    """A file of statistics that were not measured."""
    found = []
    for module in adapter.modules:
        sigma = adapter_svd(*adapter.factors(module)).sigma
        g = torch.arange(1.0, len(sigma) + 1, dtype=torch.float64)
        found.append(Sensitivity(module, sigma, g, g, g**2))
    to_frame(found).to_csv(path, index=False)
    return path


def expected_update(A: torch.Tensor, B: torch.Tensor, scaling: float, rows: pd.DataFrame) -> np.ndarray:
    """ΔW with its largest singular values times what their roles say, by numpy."""
    (Qa, Ra), (Qb, Rb) = (np.linalg.qr(X.double().numpy()) for X in (A.T, B))
    U, s, Vt = np.linalg.svd(scaling * Rb @ Ra.T)
    factor = rows["role"].map({"core": 1.25, "mid": 1.0, "noise": 0.8, "zero": 1.0}).to_numpy()
    return (Qb @ U * (s * factor)) @ Vt @ Qa.T


def skeleton(adapter: AdapterFile) -> nn.Module:
    """Modules of the names and shapes that the adapter was made for, which compute nothing."""
    model = nn.Module()

    def parent(path: str) -> tuple[nn.Module, str]:
        at, *names = model, *path.split(".")
        for name in names[:-1]:
            if not hasattr(at, name):
                at.add_module(name, nn.Module())
            at = getattr(at, name)
        return at, names[-1]

    for module in adapter.modules:
        A, B, _ = adapter.factors(module)
        at, name = parent(module)
        at.add_module(name, nn.Linear(A.shape[1], B.shape[0]))
    for key in adapter.carried:
        at, name = parent(key.removeprefix("base_model.model."))
        at.register_buffer(name, torch.zeros_like(adapter.tensors[key]))
    return model


def check(adapter: AdapterFile, out: Path, model: PeftModel) -> None:
    """The edited modules of ``model``, loaded from ``out``, have the expected ΔW; all else stays, bit for bit."""
    directions = dict(list(pd.read_csv(out / "edited.csv").groupby("module")))
    state, edited = get_peft_model_state_dict(model), open_adapter(out)
    touched = {key for module in directions for key in adapter.modules[module][:2]}
    assert edited.tensors.keys() == adapter.tensors.keys()
    for key in adapter.tensors.keys() - touched:
        assert edited.tensors[key].dtype == adapter.tensors[key].dtype
        assert torch.equal(edited.tensors[key], adapter.tensors[key])
        assert torch.equal(state[key].float(), adapter.tensors[key].float()), key
    assert adapter.modules.keys() - directions.keys(), "some module was not chosen"
    for module, rows in directions.items():
        A, B, scaling = adapter.factors(module)
        W = scaling * B.double() @ A.double()
        new_A, new_B = (state[key].double() for key in adapter.modules[module][:2])
        found, expected = (scaling * new_B @ new_A).numpy(), expected_update(A, B, scaling, rows)
        bound = 2e-3 if A.dtype == torch.bfloat16 else 1e-7
        assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected), module
        assert np.linalg.norm(found - W.numpy()) > max(1e-3, 2 * bound) * np.linalg.norm(expected), "the control"


def test_every_folder_is_tested(shared):
    folders = {path.name for path in (shared / "data" / "adapters").iterdir() if path.is_dir()}
    assert folders == REAL.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", sorted(REAL.keys() - {IMAGES}))
def test_a_real_adapter_is_calibrated_and_edited(shared, bases, tmp_path, name):
    folder = shared / "data" / "adapters" / name
    assert main([*source(bases, name, folder), "--out_dir", str(tmp_path / "out")]) == 0
    check(open_adapter(folder), tmp_path / "out", bases.loaded(REAL[name], tmp_path / "out"))


def test_an_image_model_is_not_calibrated_on_text_but_edited_by_given_statistics(shared, bases, tmp_path, capsys):
    folder, out = shared / "data" / "adapters" / IMAGES, tmp_path / "out"
    flags = source(bases, IMAGES, folder)
    capsys.readouterr()  # of the making of the base
    assert main([*flags, "--out_dir", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "could not be loaded" in said
    adapter = open_adapter(folder)
    statistics = made_up(adapter, tmp_path / "sensitivity.csv")
    flags = ["--adapter", str(folder), "--sensitivity", str(statistics), *REAL[IMAGES].flags]
    assert main(["edit", *flags, "--out_dir", str(out)]) == 0
    # transformers has since given the model's modules other names, so that the adapter fits none that it builds.
    check(adapter, out, PeftModel.from_pretrained(skeleton(adapter), out))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_no_lora_adapter_is_refused_with_the_reason(shared, tmp_path, capsys, name):
    flags = ["--adapter", str(shared / "data" / "adapters" / name), "--model", "none", "--dataset", "none.jsonl"]
    assert main(["edit", *flags, "--out_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert REFUSED[name] in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
