from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from sparselora.__main__ import main
from sparselora.inspection import rank
from sparselora.inspection.simulation import by_reconstruction
from sparselora.numerics import reconstruction as rec
from tests.helpers.adapters import read_factors
from tests.models.test_adapters import tensors
from tests.models.test_adapters import write as write_adapter


def run(*flags: str) -> int:
    try:
        return main(["rank", *flags])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A tiny BERT with weights of rank 5 and a little noise in the attention, saved as a checkpoint with a head."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=12, num_attention_heads=2, intermediate_size=36,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "attention" in name:
                d_out, d_in = weight.shape
                weight.copy_(torch.randn(d_out, 5) @ torch.randn(5, d_in) + 1e-3 * torch.randn(d_out, d_in))
    folder = tmp_path_factory.mktemp("model") / "bert"
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def ranked(bert, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rank") / "out"
    assert run("--model", str(bert), "--out_dir", str(folder)) == 0
    return folder


def test_ranks_of_a_model_equal_brute_force_by_reconstruction(bert, ranked):
    from safetensors.numpy import load_file

    weights = load_file(bert / "model.safetensors")
    table = pd.read_csv(ranked / "ranks.csv").set_index("name")
    assert len(table) == sum(value.ndim == 2 for value in weights.values())
    for name, row in table.iterrows():
        W = weights[f"{name}.weight"].astype(np.float64)
        for target in (0.01, 0.05, 0.1, 0.3):
            k = by_reconstruction(W, target)
            assert row[f"rank_error_{target:g}"] == k
            assert row[f"stored_error_{target:g}"] == pytest.approx(k * sum(W.shape) / W.size)
            assert row[f"saves_error_{target:g}"] == (k * sum(W.shape) < W.size)
    attention = table[table["kind"].str.startswith("attention")]
    assert set(attention["rank_error_0.01"]) == {5}
    assert (
        table.loc[table["kind"] == "intermediate.dense", "rank_error_0.01"] > 20
    ).all()  # the control: random weights
    assert not table.loc[table["kind"] == "intermediate.dense", "saves_error_0.01"].any()


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertModel"])
def test_the_targets_of_a_model_are_modules_that_peft_adapts(bert, ranked, head):
    import transformers
    from peft import LoraConfig, get_peft_model

    model = getattr(transformers, head)(transformers.AutoConfig.from_pretrained(bert))
    targets = pd.read_csv(ranked / "ranks.csv", keep_default_na=False).set_index("name")["lora_target"]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=[target for target in targets if target]))
    adapted = {name for name, module in wrapped.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 12 * 6  # layers 1 and 11 among them, whose names must not be mixed up
    assert {name if name.startswith("bert.") else f"bert.{name}" for name in adapted} == set(
        targets.index[targets != ""]
    )


def test_the_rank_of_frozen_weights_is_no_configuration_of_lora(bert, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--model", str(bert), "--target_error", "0.1", "--out_dir", str(out)) == 0
    text = capsys.readouterr().out
    assert "ranks of frozen weights" in text
    assert "rank --adapter" in text
    assert not list(out.glob("rank_pattern*"))
    # The control: the updates of an adapter get one.
    assert run("--adapter", str(write_adapter(tmp_path / "a")), "--target_error", "0.1", "--out_dir", f"{out}_a") == 0
    text = capsys.readouterr().out
    assert "ranks of frozen weights" not in text
    assert [path.name for path in Path(f"{out}_a").glob("rank_pattern*")] == ["rank_pattern_error_0.1.json"]


@pytest.mark.parametrize("flags", [("--criterion", "energy", "--target_energy", "0.99"), ("--criterion", "gap")])
def test_other_criteria(bert, tmp_path, flags):
    out = tmp_path / "out"
    assert run("--model", str(bert), "--target_modules", "query", *flags, "--out_dir", str(out)) == 0
    table = pd.read_csv(out / "ranks.csv")
    assert len(table) == 12
    label = "gap" if "gap" in flags else "energy_0.99"
    ranks = table[f"rank_{label}"]
    assert (ranks == 5).all() if label == "gap" else (ranks <= 5).all()


def test_an_adapter_is_ranked_in_factor_space_with_its_scalings(tmp_path):
    state = tensors()
    # The second module's update has rank 1 in a LoRA of rank 2.
    B = state["base_model.model.encoder.layer.10.query.lora_B.weight"]
    B[:, 1] = 2 * B[:, 0]
    folder = write_adapter(tmp_path / "a", state, use_rslora=True, task_type="SEQ_CLS")
    out = tmp_path / "out"
    assert run("--adapter", str(folder), "--target_error", "0.3", "1e-4", "--out_dir", str(out)) == 0
    table = pd.read_csv(out / "ranks.csv").set_index("name")
    for factor in read_factors(folder)[1]:
        delta = factor.scaling * factor.B.astype(np.float64) @ factor.A
        row = table.loc[factor.module]
        for target in (0.3, 1e-4):
            assert row[f"rank_error_{target:g}"] == by_reconstruction(delta, target)
        assert row["fro_norm"] == pytest.approx(np.linalg.norm(delta))
        assert row["spectral_norm"] == pytest.approx(np.linalg.norm(delta, 2))
    assert table["rank_error_0.0001"].tolist() == [3, 1]
    settings = json.loads((out / "rank_pattern_error_0.0001.json").read_text())
    assert settings["use_rslora"] is True
    for factor in read_factors(folder)[1]:
        r, alpha = settings["rank_pattern"][factor.module], settings["alpha_pattern"][factor.module]
        assert alpha / np.sqrt(r) == pytest.approx(factor.scaling)


def test_an_untrained_adapter_needs_no_rank_and_gets_no_lora(tmp_path):
    state = tensors()
    for key in state:
        if "lora_B" in key and "layer.0." in key:
            state[key][:] = 0
    out = tmp_path / "out"
    assert run("--adapter", str(write_adapter(tmp_path / "a", state)), "--out_dir", str(out)) == 0
    assert pd.read_csv(out / "ranks.csv").set_index("name").loc["encoder.layer.0.query", "rank_error_0.1"] == 0
    settings = json.loads((out / "rank_pattern_error_0.1.json").read_text())
    assert settings["target_modules"] == ["encoder.layer.10.query"]


def test_every_real_adapter_ranks_or_is_refused_in_one_line(shared, tmp_path, capsys):
    statuses = {}
    for folder in sorted((shared / "data" / "adapters").iterdir()):
        out = tmp_path / folder.name
        statuses[folder.name] = run("--adapter", str(folder), "--out_dir", str(out))
        captured = capsys.readouterr()
        if statuses[folder.name] == 0:
            table = pd.read_csv(out / "ranks.csv")
            assert (table["rank_error_0.01"] <= table["lora_r"]).all()
            assert (table["rank_error_0.3"] <= table["rank_error_0.01"]).all()
        else:
            assert statuses[folder.name] == 2
            assert captured.err.count("\n") == 1
            assert not out.exists()
    assert sum(status == 0 for status in statuses.values()) >= 9
    assert {name for name, status in statuses.items() if status} == {
        "bloom560m_qkv_merged_legacy", "broken_lfs_pointer", "configs_only"
    }  # fmt: skip


def test_simulated_matrices_side_by_side(tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--simulated", "--n", "60", "--m", "48", "--true_rank", "6"]
    assert run(*flags, "--out_dir", str(out)) == 0
    text = capsys.readouterr().out
    assert "values only" in text
    assert "no smaller" in text
    low, full = (row for _, row in pd.read_csv(out / "simulated.csv").iterrows())
    assert low["rank_error_0.01"] == 6
    assert low["saves_error_0.01"]
    assert full["rank_error_0.01"] > 40
    assert not full["saves_error_0.01"]
    times = pd.read_csv(out / "simulated_times.csv")
    assert times.groupby("matrix")["rank"].nunique().eq(1).all()  # both methods give the same rank
    assert (out / "simulated_ranks.png").stat().st_size > 0
    # Same seed, same bytes, timings aside; and the full run is not repeated.
    assert run(*flags, "--out_dir", str(tmp_path / "again")) == 0
    for name in ("simulated.csv", "simulated_ranks.csv"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert run(*flags, "--out_dir", str(out)) == 0
    assert "already finished" in capsys.readouterr().out


def test_minilm_streams_and_ranks(minilm, tmp_path):
    out = tmp_path / "out"
    assert run("--model", "minilm", "--target_modules", "query", "--target_error", "0.1", "--out_dir", str(out)) == 0
    table = pd.read_csv(out / "ranks.csv")
    assert len(table) == 6
    assert table["rank_error_0.1"].between(200, 300).all()
    assert not table["saves_error_0.1"].any()  # more than half of 384: factors would be bigger than the weight
    assert "/" not in json.dumps(json.loads((out / "run.json").read_text())["arguments"])


def test_module_keys_drop_a_common_prefix_only_where_a_name_is_left():
    assert rank.module_keys(["bert.encoder.layer.0.q", "bert.encoder.layer.1.q"]) == [
        "encoder.layer.0.q",
        "encoder.layer.1.q",
    ]
    assert rank.module_keys(["h.0.attn", "h.1.attn"]) == ["h.0.attn", "h.1.attn"]
    assert rank.module_keys(["encoder.layer.0.q", "decoder.layer.0.q"]) == ["encoder.layer.0.q", "decoder.layer.0.q"]
    assert rank.module_keys([]) == []


def test_lora_config_orders_longer_names_first():
    settings = rank.lora_config({"dense": (2, 2.0), "pooler.dense": (5, 5.0), "gone": (0, 0.0)}, {})
    assert list(settings["rank_pattern"]) == ["pooler.dense", "dense"]
    assert "gone" not in settings["target_modules"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of the arguments --model --adapter --simulated is required"),
        (["--simulated", "--model", "minilm"], "not allowed with"),
        (["--simulated", "--target_error", "0"], "must be between 0 and 1"),
        (["--simulated", "--target_error", "nan"], "must be a finite number"),
        (["--simulated", "--criterion", "energy", "--target_error", "0.1"], "--target_error belongs to"),
        (["--simulated", "--criterion", "size"], "invalid choice"),
        (["--simulated", "--true_rank", "0"], "--true_rank must be between"),
        (["--simulated", "--n", "0"], "must be at least 1"),
        (["--simulated", "--target_modules", "q"], "--target_modules needs"),
        (["--adapter", "nowhere"], "does not exist"),
        (["--model", "./nowhere"], "does not exist"),
        (["--model", "./nowhere", "--dry_run"], "does not exist"),
        (["--model", ""], "--model must not be empty"),
        (["--model", "minilm", "--true_rank", "8"], "--true_rank belongs to --simulated"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    assert run(*flags, "--out_dir", str(out)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_an_unmatched_target_module_lists_what_there_is(bert, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--model", str(bert), "--target_modules", "querry", "--out_dir", str(out)) == 2
    error = capsys.readouterr().err
    assert "attention.self.query" in error
    assert not out.exists()


def test_nan_in_the_weights_is_one_line_and_leaves_nothing(tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    save_file({"layer.0.q.weight": np.full((4, 4), np.nan, np.float32)}, str(model / "model.safetensors"))
    out = tmp_path / "out"
    assert run("--model", str(model), "--out_dir", str(out)) == 2
    assert "NaN" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("source", ["simulated", "model"])
def test_dry_run_lists_what_a_run_writes_and_writes_nothing(bert, tmp_path, capsys, source):
    flags = ["--simulated", "--n", "30", "--m", "20", "--true_rank", "4"]
    if source == "model":
        flags = ["--model", str(bert), "--criterion", "gap"]
    out = tmp_path / "out"
    assert run(*flags, "--dry_run", "--out_dir", str(out)) == 0
    planned = capsys.readouterr().out.split("would write:")[1].split()
    assert not out.exists()
    assert run(*flags, "--out_dir", str(out)) == 0
    assert sorted(planned) == sorted(str(path) for path in out.iterdir() if path.name != ".lock")


def test_describe_says_when_factors_would_be_bigger():
    s = np.ones(6)
    row = rank.describe("a.1.b", (6, 6), s, {"error_0.1": lambda s, shape: rec.optimal_rank(s, 0.1)})
    assert (row["rank_error_0.1"], row["stored_error_0.1"], row["saves_error_0.1"]) == (6, 2.0, False)
    assert row["largest_saving_rank"] == 2


# --- names on disk and names of modules ---------------------------------------------------------------------------

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 32,
}  # fmt: skip
RENAMED = {
    "llava": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, "image_token_index": 5},
    "mixtral": {**TEXT, "num_local_experts": 4},
    "qwen2_moe": {**TEXT, **MIXTURE, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**TEXT, **MIXTURE, "head_dim": 16},
    "granitemoe": {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Model types whose names on disk are not those of the modules, with small sizes."""


def make_model(kind: str, settings: dict[str, object], folder: Path) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**settings)
    auto = transformers.AutoModelForCausalLM if kind != "distilbert" else transformers.AutoModelForMaskedLM
    if "vision_config" in settings:
        auto = transformers.AutoModelForImageTextToText
    auto.from_config(config).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("kind", RENAMED)
def test_every_target_is_the_module_that_holds_the_measured_weight(kind, tmp_path, capsys):
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    folder, out = make_model(kind, RENAMED[kind], tmp_path / "model"), tmp_path / "out"
    assert run("--model", str(folder), "--target_error", "0.3", "--out_dir", str(out)) == 0
    text = capsys.readouterr().out
    table = pd.read_csv(out / "ranks.csv", keep_default_na=False).set_index("name")
    auto = transformers.AutoModelForImageTextToText if kind == "llava" else transformers.AutoModelForCausalLM
    names = [target for target in table["lora_target"] if target]
    wrapped = get_peft_model(auto.from_pretrained(folder), LoraConfig(r=2, target_modules=names))
    adapted = {name: module for name, module in wrapped.base_model.model.named_modules() if hasattr(module, "lora_A")}
    stored = load_file(folder / "model.safetensors")
    targets = table[table["lora_target"] != ""]
    assert len(targets) == len(adapted) > 0
    for name, row in targets.iterrows():
        (module,) = [m for found, m in adapted.items() if found == row["lora_target"] or
                     found.endswith("." + row["lora_target"])]  # fmt: skip
        assert torch.equal(module.base_layer.weight, stored[f"{name}.weight"])
    # Nothing is lost in silence: each other row says why it is no target, and so does the report.
    left_out = table.loc[table["lora_target"] == "", "left_out"]
    assert (left_out != "").all()
    assert (targets["left_out"] == "").all()
    if kind != "llava":
        assert any("Router" in reason for reason in left_out)
        assert "which is no linear layer" in text
    if kind in {"mixtral", "qwen2_moe", "qwen3_moe"}:
        experts = table[table.index.str.contains(r"experts\.\d")]
        assert len(experts) == 2 * 4 * 3
        assert experts["left_out"].str.startswith("joined with others").all()


def test_types_that_nobody_has_to_be_asked_about_are_named_on_disk_as_in_the_model(tmp_path):
    from sparselora.models.module_names import STORED_AS_LOADED, LoadedNames, _ask_transformers, loaded_names
    from sparselora.models.weights import list_tensors

    encoder = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
               "num_attention_heads": 4, "max_position_embeddings": 32}  # fmt: skip
    small = {
        "bert": encoder, "roberta": encoder, "xlm-roberta": encoder,
        "distilbert": {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
        "opt": {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                "max_position_embeddings": 32, "word_embed_proj_dim": 32},
    }  # fmt: skip
    for kind in sorted(STORED_AS_LOADED):
        folder = make_model(kind, small.get(kind, TEXT), tmp_path / kind)
        shapes = {info.name.removesuffix(".weight"): info.shape[::-1] if info.transposed else info.shape
                  for info in list_tensors(str(folder)).matrices}  # fmt: skip
        same = LoadedNames({name: name for name in shapes}, {})
        assert loaded_names(folder, kind, shapes) == same
        assert _ask_transformers(folder, shapes) == same, kind


@pytest.mark.parametrize("config", [None, {}, {"model_type": "no_such_type"}, {"model_type": "auto", "auto_map": {}}])
def test_where_nobody_knows_the_modules_the_names_are_those_of_the_files_and_that_is_said(tmp_path, capsys, config):
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    save_file({"net.layers.0.q.weight": np.eye(6, dtype=np.float32)}, str(model / "model.safetensors"))
    if config is not None:
        (model / "config.json").write_text(json.dumps(config))
    assert run("--model", str(model), "--out_dir", str(out)) == 0
    assert "may not be those of the modules" in capsys.readouterr().out
    assert pd.read_csv(out / "ranks.csv")["lora_target"].tolist() == ["layers.0.q"]


def test_known_types_are_ranked_without_torch(tmp_path):
    import subprocess
    import sys

    model = make_model("qwen2", TEXT, tmp_path / "model")
    arguments = ["rank", "--model", str(model), "--target_error", "0.3", "--out_dir", str(tmp_path / "out")]
    code = (
        f"import sys; from sparselora.__main__ import main; assert main({arguments!r}) == 0; "
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_shortened_name_never_fits_a_second_module():
    names = ["model.layers.0.q", "model.layers.1.q"]
    assert rank.module_keys(names, names) == ["layers.0.q", "layers.1.q"]
    assert rank.module_keys(names, [*names, "vision.layers.0.q"]) == names


# --- nothing to configure -----------------------------------------------------------------------------------------


def test_zero_updates_give_no_configuration(tmp_path, capsys):
    state = {key: value if "lora_A" in key else np.zeros_like(value) for key, value in tensors().items()}
    out = tmp_path / "adapter_out"
    assert run("--adapter", str(write_adapter(tmp_path / "a", state)), "--out_dir", str(out)) == 0
    assert "every update is zero" in capsys.readouterr().out
    assert not list(out.glob("rank_pattern*"))
    assert (pd.read_csv(out / "ranks.csv")["rank_error_0.1"] == 0).all()


def test_a_model_without_numbered_layers_has_no_targets_unless_modules_are_named(tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    save_file({"proj.weight": np.eye(6, dtype=np.float32)}, str(model / "model.safetensors"))
    assert run("--model", str(model), "--out_dir", str(tmp_path / "all")) == 0
    assert "outside the numbered layers: proj" in capsys.readouterr().out
    assert run("--model", str(model), "--target_modules", "proj", "--out_dir", str(tmp_path / "named")) == 0
    targets = {
        name: pd.read_csv(tmp_path / name / "ranks.csv", keep_default_na=False)["lora_target"].tolist()
        for name in ("all", "named")
    }
    assert targets == {"all": [""], "named": ["proj"]}


def test_what_is_not_ranked_is_listed(tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    weights = {
        "layers.0.q.weight": np.eye(6, dtype=np.float32),
        "layers.0.experts.up": np.ones((2, 3, 4), np.float32),
        "layers.0.k.weight": np.ones((0, 4), np.float32),
        "layers.0.norm.weight": np.ones(4, np.float32),
        "layers.0.\x1b[31m.weight": np.eye(3, dtype=np.float32),
    }
    save_file(weights, str(model / "model.safetensors"))
    assert run("--model", str(model), "--out_dir", str(out)) == 0
    text = capsys.readouterr().out
    assert "1 × 3 dimensions (experts or a convolution): layers.0.experts.up" in text
    assert "1 × empty: layers.0.k.weight" in text
    assert "\x1b" not in text
    table = pd.read_csv(out / "not_measured.csv").set_index("name")
    assert set(table.index) == {"layers.0.experts.up", "layers.0.k.weight", "layers.0.norm.weight"}
    assert table.loc["layers.0.experts.up", ["shape", "dtype", "numbers"]].tolist() == ["2x3x4", "float32", 24]


@pytest.mark.parametrize("flags", [["--n", "1" * 26], ["--m", "1" * 26], ["--noise", "1e308"]])
def test_sizes_that_no_memory_holds_are_refused(tmp_path, capsys, flags):
    assert run("--simulated", *flags, "--out_dir", str(tmp_path / "out")) == 2
    assert "must be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_refused_before_it_is_read(tmp_path, capsys, monkeypatch):
    hashed = []
    monkeypatch.setattr("sparselora.runs.provenance.content_hash", lambda path: hashed.append(path))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert run("--model", str(folder), "--out_dir", str(tmp_path / "out")) == 2
    assert "pickled" in capsys.readouterr().err
    assert not hashed
    # The control: a model is read for the record.
    save_file({"layers.0.q.weight": np.eye(6, dtype=np.float32)}, str(folder / "model.safetensors"))
    assert run("--model", str(folder), "--out_dir", str(tmp_path / "out")) == 0
    assert hashed


def test_progress_is_in_the_log_with_the_time_left(bert, tmp_path, capsys, monkeypatch):
    """With a line for every unit of work in place of one in 30 seconds; without, as here in seconds, there is none."""
    assert run("--simulated", "--n", "12", "--m", "9", "--true_rank", "2", "--out_dir", str(tmp_path / "silent")) == 0
    assert "left" not in capsys.readouterr().err
    monkeypatch.setattr("sparselora.runs.progress.LOG_EVERY_S", 0.0)
    assert run("--simulated", "--n", "12", "--m", "9", "--true_rank", "2", "--out_dir", str(tmp_path / "out")) == 0
    assert "rank: timed search 20 of 20, 0 s left" in capsys.readouterr().err.splitlines()
    assert run("--adapter", str(write_adapter(tmp_path / "a", tensors())), "--out_dir", str(tmp_path / "a_out")) == 0
    assert "spectra: module 2 of 2, 0 s left" in capsys.readouterr().err.splitlines()
    assert run("--model", str(bert), "--out_dir", str(tmp_path / "m_out")) == 0
    assert capsys.readouterr().err.count("left") > 100  # 77 matrices are checked, then decomposed
