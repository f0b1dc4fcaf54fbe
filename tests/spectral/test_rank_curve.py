"""`reduce --eval`: losses against dense weights cut by numpy, verdicts against scipy, adapters of a planted rank."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from scipy import stats
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparselora.__main__ import main
from sparselora.data.instructions import DEFAULT_TEMPLATE, encode_instructions
from sparselora.models.adapter_files import read_adapter
from sparselora.spectral.factors import adapter_svd
from sparselora.spectral.rank_curve import GLOBAL, RANDOM, SVD, UNIFORM, halves, plan_candidates
from sparselora.spectral.weighted import weighted_basis
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

RANK, TARGETS = 8, ["q_proj", "down_proj"]
PLANTED = (3.0, 2.0, *[1e-3] * (RANK - 2))
FLAT = (1.5,) * RANK
PREFIX = "base_model.model."


class Reduce:
    """Calls the command on a tiny Llama, adapters of it with planted spectra, and files of instructions."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, make_tiny_llama(folder / "llama")
        model = AutoModelForCausalLM.from_pretrained(self.model)
        model.lm_head.weight.data *= 20  # so that the loss feels the adapter
        model.save_pretrained(self.model)
        self.rows, self.dev = (write_instructions(folder / f"{n}.jsonl", r, r) for n, r in (("rows", 40), ("dev", 30)))
        self.planted, self.flat = self.save("planted", PLANTED), self.save("flat", FLAT)

    def save(self, name: str, sigma: tuple[float, ...], alpha: int = 4) -> Path:
        settings = LoraConfig(r=len(sigma), lora_alpha=alpha, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(self.model), settings)
        torch.manual_seed(1)
        for layer in (module for module in model.modules() if hasattr(module, "lora_A")):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            U, V = (torch.linalg.qr(torch.randn(n, len(sigma)))[0] for n in (len(B), A.shape[1]))
            mix = torch.linalg.qr(torch.randn(len(sigma), len(sigma)))[0]
            B.data, A.data = U @ torch.diag(torch.tensor(sigma)) @ mix * len(sigma) / alpha, mix.T @ V.T
        model.save_pretrained(self.folder / name)
        return self.folder / name

    def __call__(self, out: str, adapter: Path, *more: str) -> int:
        data = ["--dataset", str(self.rows), "--eval_file", str(self.dev), "--prompt_field", "question",
                "--completion_field", "answer", "--calib_samples", "6", "--device", "cpu"]  # fmt: skip
        source = ["--adapter", str(adapter), "--eval", "--out_dir", str(self.folder / out)]
        return main(["reduce", *source, *data, *more])

    def table(self, out: str, name: str = "losses_by_rank") -> pd.DataFrame:
        return pd.read_csv(self.folder / out / f"{name}.csv", float_precision="round_trip", keep_default_na=True)

    def losses(self, updates: dict[str, np.ndarray], adapter: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return summed losses and labels by row of the base model with dense updates, or of PEFT's own adapter."""
        model = AutoModelForCausalLM.from_pretrained(self.model).double()
        for name, update in updates.items():
            model.get_submodule(name).weight.data += torch.tensor(update)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter).double()
        model.eval()
        frame = pd.read_json(self.dev, lines=True).rename(columns={"question": "prompt", "answer": "completion"})
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        sums, counts = [], []
        for example in encode_instructions(frame, tokenizer, 512, DEFAULT_TEMPLATE).examples:
            ids, labels = (torch.tensor(example[key])[None] for key in ("input_ids", "labels"))
            with torch.no_grad():
                logits = model(input_ids=ids).logits
            sums.append(float(F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")))
            counts.append(int((labels[0, 1:] != -100).sum()))
        return np.array(sums), np.array(counts)


@pytest.fixture(scope="module")
def reduce(tmp_path_factory: pytest.TempPathFactory) -> Reduce:
    call = Reduce(tmp_path_factory.mktemp("reduce"))
    assert call("curve", call.planted, "--margin", "1%") == 0
    return call


def updates(adapter: Path) -> dict[str, np.ndarray]:
    """Return the dense updates of an adapter, by numpy."""
    file = read_adapter(adapter)
    parts = {name: file.matrices(name) for name in file.entries}
    return {name: part.scaling * part.B.astype(np.float64) @ part.A for name, part in parts.items()}


def test_losses_are_those_of_dense_weights_cut_by_numpy(reduce):
    rows = reduce.table("curve", "losses_by_row")

    def cut(W: np.ndarray, k: int) -> np.ndarray:
        U, s, Vt = np.linalg.svd(W, full_matrices=False)
        return (U[:, :k] * s[:k]) @ Vt[:k]

    whole = updates(reduce.planted)
    for name, k in (("whole adapter", RANK), ("no LoRA", 0), ("svd, uniform 1", 1), ("svd, uniform 4", 4)):
        sums, counts = reduce.losses({module: cut(W, k) for module, W in whole.items()})
        part = rows[rows["candidate"] == name]
        assert part["loss"].to_numpy() == pytest.approx(sums, rel=1e-4, abs=1e-4), name
        assert part["tokens"].tolist() == counts.tolist()
    # The control: another rank has other losses.
    assert np.abs(reduce.losses({m: cut(W, 1) for m, W in whole.items()})[0] - sums).max() > 0.05


def test_the_verdicts_are_scipys_and_the_planted_rank_is_chosen(reduce):
    table, rows = reduce.table("curve"), reduce.table("curve", "losses_by_row")
    wide = rows.pivot(index="row", columns="candidate", values="loss")
    tokens = rows[rows["candidate"] == "no LoRA"].set_index("row")["tokens"].reindex(wide.index)
    whole = wide["whole adapter"]
    tested = table.iloc[2:]
    ps = []
    for row in tested.to_dict("records"):
        losses = wide[f"{row['method']}, {row['budget']} {row['level']:g}"]
        assert row["loss"] == pytest.approx(losses.sum() / tokens.sum())
        assert row["difference"] == pytest.approx((losses - whole).sum() / tokens.sum(), abs=1e-12)
        upper = stats.ttest_1samp(losses - 1.01 * whole, 0, alternative="less").pvalue
        lower = stats.ttest_1samp(losses - 0.99 * whole, 0, alternative="greater").pvalue
        ps.append(max(upper, lower))
        residual = (losses - whole) - row["difference"] * tokens
        error = residual.std(ddof=1) * np.sqrt(len(residual)) / tokens.sum()  # of a ratio of means
        assert row["ci_high"] - row["difference"] == pytest.approx(stats.t.ppf(0.975, 29) * error, rel=1e-2)
    assert tested["p"].to_numpy() == pytest.approx(ps, rel=1e-6)
    is_control = (tested["method"] == RANDOM).to_numpy()
    family = np.sort(np.array(ps)[~is_control])
    adjusted = np.minimum(1, np.maximum.accumulate(family * np.arange(len(family), 0, -1)))
    assert np.sort(tested["p_adjusted"][~is_control]) == pytest.approx(adjusted, rel=1e-6)
    assert tested["p_adjusted"][is_control].isna().all()
    verdicts = tested.set_index(["method", "budget", "level"])["verdict"]
    assert verdicts[SVD, UNIFORM, 2] == verdicts[SVD, UNIFORM, 4] == "equivalent"
    assert verdicts[SVD, UNIFORM, 1] == "undecided"
    folder = reduce.folder / "curve"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    # The control of the truncation: a random subspace of the same rank is far off.
    losses = tested.set_index(["method", "budget", "level"])["loss"]
    assert losses[RANDOM, UNIFORM, 2] > losses[SVD, UNIFORM, 2] + 0.02


def test_the_adapter_that_is_written_is_the_one_that_was_measured_and_that_of_rank(reduce, capsys):
    folder = reduce.folder / "curve"
    sums, counts = reduce.losses({}, folder)
    row = reduce.table("curve").query("method == 'svd' and budget == 'uniform' and level == 2").iloc[0]
    assert row["loss"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)
    plain = reduce.folder / "plain"
    assert main(["reduce", "--adapter", str(reduce.planted), "--rank", "2", "--out_dir", str(plain)]) == 0
    first, second = (load_file(path / "adapter_model.safetensors") for path in (folder, plain))
    assert all(torch.equal(first[key], second[key]) for key in second)
    assert reduce("curve", reduce.planted, "--margin", "1%") == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.usefixtures("blank_figures")
def test_fewer_training_rows_than_the_default_are_all_taken(reduce):
    files = ["--adapter", reduce.flat, "--dataset", reduce.rows, "--eval_file", reduce.dev]
    fields = ["--prompt_field", "question", "--completion_field", "answer", "--device", "cpu"]
    command = ["reduce", "--eval", *map(str, files), *fields]
    levels = ["--ranks", "1"]
    assert main([*command, *levels, "--out_dir", str(reduce.folder / "default")]) == 0  # there are 40
    assert main([*command, *levels, "--calib_samples", "40", "--out_dir", str(reduce.folder / "all")]) == 0
    assert reduce.table("default").equals(reduce.table("all"))


@pytest.mark.usefixtures("blank_figures")
def test_without_an_equivalent_rank_only_the_table_is_written(reduce, capsys):
    assert reduce("none", reduce.flat, "--margin", "0.1%", "--calib_samples", "0") == 0
    text = capsys.readouterr().out
    assert "no adapter is written" in text
    names = {path.name for path in (reduce.folder / "none").iterdir()} - {".lock"}
    assert names == {"run.json", "losses_by_rank.csv", "losses_by_rank.png", "losses_by_row.csv"}
    assert set(reduce.table("none")["method"].iloc[2:]) == {SVD, RANDOM}


@pytest.mark.usefixtures("blank_figures")
def test_a_margin_that_no_lora_keeps_too_is_said_to_say_nothing(reduce, capsys):
    tiny = reduce.save("tiny", (1e-3,) * 4)
    assert reduce("vacuous", tiny, "--ranks", "2", "1") == 0
    text = capsys.readouterr().out
    assert "warning: no LoRA at all is within 1 %" in text
    assert "vLLM needs --max-lora-rank 8" in text
    assert reduce("not_vacuous", reduce.planted, "--ranks", "2") == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.usefixtures("blank_figures")
def test_energies_take_the_least_rank_of_every_module(reduce):
    assert reduce("energies", reduce.planted, "--energies", "0.99", "0.5") == 0
    table = reduce.table("energies").iloc[2:]
    ranks = table[table["method"] == SVD].set_index("level")["rank"]
    assert ranks.to_dict() == {0.99: 2, 0.5: 1}
    assert set(table["budget"]) == {"energy"}


@pytest.mark.usefixtures("blank_figures")
def test_an_adalora_is_measured_as_what_it_computes(reduce):
    torch.manual_seed(0)
    settings = AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=8,
        tinit=1,
        tfinal=2,
        total_step=9,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(reduce.model), settings)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(reduce.folder / "adalora")
    assert reduce("adalora_curve", reduce.folder / "adalora", "--margin", "90%") == 0
    sums, counts = reduce.losses({}, reduce.folder / "adalora")
    assert reduce.table("adalora_curve")["loss"].iloc[0] == pytest.approx(sums.sum() / counts.sum(), rel=1e-4)


def test_budgets_have_equal_parameters_and_halves_end_at_one():
    assert halves(16) == (8, 4, 2, 1)
    assert halves(6) == (3, 1)
    rng = np.random.default_rng(0)
    shapes = {"a": (20, 12), "b": (9, 30), "c": (3, 8)}
    factors = {
        name: (torch.tensor(rng.standard_normal((6, m))), torch.tensor(rng.standard_normal((d, 6)) * rng.gamma(1, 3)))
        for name, (d, m) in shapes.items()
    }
    svds = {name: adapter_svd(A, B, 1.0) for name, (A, B) in factors.items()}
    weighted = {name: weighted_basis(A, B, 1.0, A @ A.T) for name, (A, B) in factors.items()}
    candidates = plan_candidates(svds, weighted, (3, 1), (), 0)
    size = {name: sum(shape) for name, shape in shapes.items()}
    by_name = {candidate.name: candidate for candidate in candidates}
    assert len(by_name) == len(candidates)
    for candidate in candidates:
        spent = sum(size[name] * rank for name, rank in candidate.ranks.items())
        assert spent <= sum(size[name] * min(candidate.level, 3) for name in size)
    # Inputs of every direction alike: the weighted budget is the plain one, of uneven ranks.
    assert by_name["svd, global 3"].ranks == by_name["activations, global 3"].ranks
    assert len(set(by_name["svd, global 3"].ranks.values())) > 1
    assert by_name["svd, uniform 3"].budget != GLOBAL


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ranks", "8"], "ranks must be from 1 to 7, below the 8 of adapter planted, got 8"),
        (["--ranks", "0"], "--ranks must be at least 1"),
        (["--energies", "1"], "--energies must be between 0 and 1"),
        (["--margin", "0.01"], "--margin must be a percentage between 0 and 100"),
        (["--margin", "0%"], "--margin must be a percentage between 0 and 100"),
        (["--model", "/no/such/base"], "/no/such/base"),
        (["--calib_samples", "999"], "more than the 40 training rows"),
        (["--completion_field", "no"], "no field 'no'"),
        (["--eval_samples", "1"], "a paired test needs 2 or more"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(reduce, capsys, more, message):
    assert reduce("bad", reduce.planted, *more) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not (reduce.folder / "bad" / "run.json").exists()


def test_settings_of_eval_are_refused_without_it(reduce, capsys):
    arguments = ["reduce", "--adapter", str(reduce.planted), "--rank", "2", "--out_dir", str(reduce.folder / "bad")]
    for flag, value in (("--margin", "2%"), ("--dataset", "x"), ("--seed", "1"), ("--ranks", "2")):
        assert main([*arguments, flag, value]) == 2
        assert f"{flag} is for --eval" in capsys.readouterr().err
    one = reduce.save("one", (1.0,))
    assert reduce("bad", one) == 2
    assert "no lower rank" in capsys.readouterr().err
    config = reduce.planted / "adapter_config.json"
    settings = json.loads(config.read_text())
    lost = reduce.save("lost", PLANTED)
    (lost / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    assert reduce("bad", lost) == 2
    assert "names no base model; give it by --model" in capsys.readouterr().err
