"""Finding safetensors and reading them: every stored type, every layout, and every way a folder can be wrong."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from sparselora.errors import InputError
from sparselora.models.model_files import check_model_folder, read_config
from sparselora.models.weights import (
    MatrixInfo,
    describe_unmeasured,
    file_matrices,
    limit,
    list_tensors,
    load_matrix,
    refuse_damaged,
)


def list_matrices(model: str) -> list[MatrixInfo]:
    return list_tensors(model).matrices


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """The format by hand, so that the reader is held against its description and not against a writer."""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def f32(W: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return "F32", W.shape, W.astype("<f4").tobytes()


@pytest.fixture
def W() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def test_every_type_is_decoded_exactly(tmp_path, W):
    bits = W.view(np.uint32)
    truncated = (bits >> 16).astype("<u2")
    # E4M3: 1.5 · 2^3; the smallest subnormal; −448, the largest. E5M2: 1.25 · 2; −2^−16.
    tensors = {
        "a64": ("F64", W.shape, (W.astype("<f8") / 3).tobytes()),
        "b32": f32(W),
        "c16": ("F16", W.shape, W.astype("<f2").tobytes()),
        "dbf": ("BF16", W.shape, truncated.tobytes()),
        "e43": ("F8_E4M3", (1, 3), bytes([0b0_1010_100, 0b0_0000_001, 0b1_1111_110])),
        "f52": ("F8_E5M2", (2, 1), bytes([0b0_10000_01, 0b1_00000_01])),
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    infos = {info.name: info for info in list_matrices(str(tmp_path))}
    assert [infos[name].dtype for name in tensors] == [
        "float64", "float32", "float16", "bfloat16", "float8_e4m3", "float8_e5m2",
    ]  # fmt: skip
    read = {name: load_matrix(info) for name, info in infos.items()}
    assert {name: M.dtype for name, M in read.items()} == {
        name: np.dtype("f8" if name == "a64" else "f4") for name in read
    }
    np.testing.assert_array_equal(read["a64"], W.astype(np.float64) / 3)
    np.testing.assert_array_equal(read["b32"], W)
    np.testing.assert_array_equal(read["c16"], W.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(read["dbf"], (bits & 0xFFFF0000).view(np.float32))
    np.testing.assert_array_equal(read["e43"], [[12.0, 2.0**-9, -448.0]])
    np.testing.assert_array_equal(read["f52"], [[2.5], [-(2.0**-16)]])


@pytest.mark.parametrize(
    ("code", "bits", "type_name"),
    [
        ("F16", 16, "float16"),
        ("BF16", 16, "bfloat16"),
        ("F8_E4M3", 8, "float8_e4m3fn"),
        ("F8_E5M2", 8, "float8_e5m2"),
    ],
)
def test_every_code_of_a_small_type_is_decoded_as_torch_does(tmp_path, code, bits, type_name):
    import torch

    raw = np.arange(2**bits, dtype=f"<u{bits // 8}")
    expected = torch.from_numpy(raw.copy()).view(getattr(torch, type_name)).float().numpy()
    raw, expected = raw[np.isfinite(expected)], expected[np.isfinite(expected)]
    assert raw.size > 0.9 * 2**bits
    write_safetensors(tmp_path / "model.safetensors", {"w": (code, (1, raw.size), raw.tobytes())})
    [info] = list_matrices(str(tmp_path))
    np.testing.assert_array_equal(load_matrix(info)[0].view(np.uint32), expected.view(np.uint32))  # -0.0 is not 0.0


def test_reads_what_the_safetensors_library_wrote(tmp_path, W):
    from safetensors.numpy import save_file

    save_file({"x.weight": W, "bias": W[0]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (info,) = list_matrices(str(tmp_path))
    np.testing.assert_array_equal(load_matrix(info), W)


def test_only_floating_matrices_in_natural_order(tmp_path, W):
    names = ["h.10.w", "h.2.w", "h.1.w", "a.w"]
    tensors = {name: f32(W) for name in names}
    tensors |= {
        "bias": f32(W[0]),
        "ids": ("I64", (1, 2), bytes(16)),
        "conv": f32(W.reshape(2, 3, 4)),
        "none": f32(W[:0]),
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert [info.name for info in list_matrices(str(tmp_path))] == ["a.w", "h.1.w", "h.2.w", "h.10.w"]


def test_shards_read_as_one_model(tmp_path, W):
    write_safetensors(tmp_path / "model-00001-of-00002.safetensors", {"b": f32(W)})
    write_safetensors(tmp_path / "model-00002-of-00002.safetensors", {"a": f32(2 * W)})
    shards = {"b": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    a, b = (load_matrix(info) for info in list_matrices(str(tmp_path)))
    np.testing.assert_array_equal(a, 2 * b)
    (tmp_path / shards["a"]).unlink()
    with pytest.raises(InputError, match="lacks 1 of 2 shards"):
        list_matrices(str(tmp_path))


def test_gpt2_conv1d_is_presented_as_linear(tmp_path, W):
    tensors = {"h.0.attn.c_attn.weight": f32(W), "wte.weight": f32(W)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    for kind, shape in (("gpt2", (4, 6)), ("bert", (6, 4))):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        conv, table = list_matrices(str(tmp_path))
        assert (conv.shape, table.shape) == (shape, (6, 4))
        np.testing.assert_array_equal(load_matrix(conv), W.T if kind == "gpt2" else W)


def test_minilm_has_its_thirty_six_layer_matrices(minilm):
    infos = list_matrices("minilm")
    layers = [info for info in infos if info.name.startswith("encoder.layer.")]
    assert len(infos) == 40
    assert {info.shape for info in layers} == {(384, 384), (1536, 384), (384, 1536)}
    assert len(layers) == 36


def test_bf16_shards_equal_the_safetensors_library(shared):
    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    for info in list_matrices(str(shared / "models" / "storyllama-20m"))[::9]:
        with safe_open(info.file, "pt") as file:
            reference = file.get_tensor(info.name).to(torch.float32).numpy()
        np.testing.assert_array_equal(load_matrix(info), reference)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_damaged_values_are_refused(tmp_path, W, bad):
    W[3, 1] = bad
    write_safetensors(tmp_path / "model.safetensors", {"w": f32(W)})
    with pytest.raises(
        InputError, match=r"w in model\.safetensors holds NaN or infinite values \(first: element 13 of 24"
    ):
        load_matrix(list_matrices(str(tmp_path))[0])
    with pytest.raises(InputError, match="element 13 of 24"):
        refuse_damaged(list_matrices(str(tmp_path))[0])


def test_damage_beyond_the_first_block_is_found(tmp_path):
    W = np.zeros((1100, 300), dtype=np.float16)
    W[1000, 7] = np.nan
    write_safetensors(tmp_path / "model.safetensors", {"w": ("F16", W.shape, W.tobytes())})
    with pytest.raises(InputError, match="element 300007 of 330000"):
        refuse_damaged(list_matrices(str(tmp_path))[0])


def test_huge_but_finite_values_are_not_damage(tmp_path, W):
    write_safetensors(tmp_path / "model.safetensors", {"w": f32(W * np.float32(1e30))})
    (info,) = list_matrices(str(tmp_path))
    refuse_damaged(info)
    assert np.isfinite(load_matrix(info)).all()


def test_every_truncation_is_one_line(tmp_path, W):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w": f32(W)})
    whole = path.read_bytes()
    for size in (0, 5, 8, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="truncated or corrupt") as caught:
            list_matrices(str(tmp_path))
        assert "\n" not in str(caught.value)
    path.write_bytes(whole + b"x")
    with pytest.raises(InputError, match="truncated or corrupt"):
        list_matrices(str(tmp_path))


@pytest.mark.parametrize(
    "header", [b"[]", b"{", b'{"w": 3}', b'{"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}}', b"\xff{}"]
)
def test_corrupt_headers_are_one_line(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(InputError, match="truncated or corrupt"):
        list_matrices(str(tmp_path))


def test_folders_without_readable_weights(tmp_path):
    with pytest.raises(InputError, match="holds no weights"):
        list_matrices(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        list_matrices(str(tmp_path))
    write_safetensors(tmp_path / "model.safetensors", {"ids": ("I8", (2, 2), bytes(4))})
    with pytest.raises(InputError, match="no 2-D floating-point weight"):
        list_matrices(str(tmp_path))


@pytest.mark.parametrize("name", ["nobody/nothing-of-this-name", "./not/here", "/not/here", ""])
def test_no_such_model(name):
    with pytest.raises(InputError, match="hub") as caught:
        list_matrices(name)
    assert "\n" not in str(caught.value)


def test_fp8_with_scales_and_duplicates_are_refused(tmp_path, W):
    tensors = {"w": ("F8_E4M3", (2, 2), bytes(4)), "w_scale_inv": f32(W[:1, :1])}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(InputError, match=r"1 of 2 tensors hold codes, the first w \(2x2 float8_e4m3\)"):
        list_matrices(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    for name in ("x.safetensors", "y.safetensors"):
        write_safetensors(tmp_path / name, {"w": f32(W)})
    with pytest.raises(InputError, match=r"both x\.safetensors and y\.safetensors"):
        list_matrices(str(tmp_path))


def test_limits_count_only_what_is_taken(tmp_path, W):
    sizes = {"a": W, "b": np.tile(W, (2, 1)), "c": W, "d": W}
    write_safetensors(tmp_path / "model.safetensors", {name: f32(M) for name, M in sizes.items()})
    infos = list_matrices(str(tmp_path))
    reasons = [reason for _, reason in limit(infos, 24, 2)]
    assert [bool(reason) for reason in reasons] == [False, True, False, True]
    assert not any(reason for _, reason in limit(infos, 0, 0))
    with pytest.raises(InputError, match="max_elems"):
        limit(infos, -1, 0)


def test_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(InputError, match="Git-LFS pointer, not the weights; run: git lfs pull"):
        list_matrices(str(tmp_path))


# --- what is not measured -----------------------------------------------------------------------------------------


def raw(dtype: str, *shape: int) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor of zeros of any type of the format."""
    bits = {"F4": 4, "BOOL": 8}.get(dtype) or int("".join(c for c in dtype.split("_")[0] if c.isdigit()))
    return dtype, shape, bytes(int(np.prod(shape)) * bits // 8)


def test_every_tensor_is_a_matrix_or_is_listed_with_the_reason(tmp_path, W):
    tensors = {
        "layers.0.q.weight": f32(W),
        "layers.0.q.bias": f32(W[0]),
        "layers.0.experts.gate_up_proj": f32(W.reshape(2, 3, 4)),
        "layers.0.experts.gate_up_proj_bias": f32(W),
        "layers.0.k.weight": f32(W[:0]),
        "layers.0.attn.bias": raw("U8", 1, 1, 8, 8),
        "layers.0.mask": raw("BOOL", 4, 4),
        "position_ids": raw("I64", 1, 6),
        "logit_scale": raw("F32"),
        "scale_shift_table": f32(W),
        "rotation": raw("C64", 2, 2),
        "relative_attention_bias.weight": f32(W),
        "multi_scale.proj.weight": f32(W),
        "layers.0.q.lora_A.default.weight": f32(W),
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    found = list_tensors(str(tmp_path))
    measured = {info.name for info in found.matrices}
    assert measured == {"layers.0.q.weight", "relative_attention_bias.weight", "multi_scale.proj.weight"}
    reasons = {tensor.name: tensor.reason for tensor in found.unmeasured}
    assert measured | reasons.keys() == tensors.keys()
    assert reasons["layers.0.experts.gate_up_proj"].startswith("3 dimensions")
    assert reasons["layers.0.k.weight"] == "empty"
    assert reasons["layers.0.q.bias"] == reasons["logit_scale"] == "vector or scalar"
    assert "uint8" in reasons["layers.0.attn.bias"]
    assert "int64" in reasons["position_ids"]
    assert "scale" in reasons["scale_shift_table"]
    shapes = {tensor.name: (tensor.shape, tensor.dtype) for tensor in found.unmeasured}
    assert shapes["layers.0.experts.gate_up_proj"] == ((2, 3, 4), "float32")
    line = describe_unmeasured(found.unmeasured)
    assert "1 × 3 dimensions (experts or a convolution): layers.0.experts.gate_up_proj" in line
    assert "2 × vector or scalar;" in line


CODES = {
    "gptq": {"q.qweight": raw("I32", 8, 8), "q.scales": raw("F16", 4, 8), "q.qzeros": raw("I32", 4, 1)},
    "bitsandbytes, 4 bits": {"q.weight": raw("U8", 32, 1), "q.weight.absmax": raw("F32", 4)},
    "bitsandbytes, 8 bits": {"q.weight": raw("I8", 8, 8), "q.SCB": raw("F32", 8)},
    "compressed tensors": {"q.weight_packed": raw("I32", 8, 1), "q.weight_scale": raw("F16", 8, 2)},
    "nvfp4": {"q.weight": raw("U8", 8, 4), "q.weight_scale": raw("F8_E4M3", 8, 2)},
    "4-bit floats": {"q.weight": raw("F4", 8, 8)},
    "mxfp4": {"experts.up_blocks": raw("U8", 2, 8, 2, 16), "experts.up_scales": raw("U8", 2, 8, 2)},
    "hqq": {"q.W_q": raw("U8", 8, 8), "q.scale": raw("F16", 8, 1)},
    "quip": {"q.Qidxs": raw("I64", 8, 8)},
    "mlx": {"q.weight": raw("U32", 8, 1), "q.scales": raw("F16", 8, 1), "q.biases": raw("F16", 8, 1)},
    "quanto": {"q.weight._data": raw("I8", 8, 8), "q.weight._scale": raw("F32", 8, 1)},
    "a name of its own": {"q.cells": raw("U8", 64, 64)},
    "fp8, weight_scale_inv": {"q.weight": raw("F8_E4M3", 8, 8), "q.weight_scale_inv": raw("F32", 2, 2)},
    "fp8, scale_weight": {"q.weight": raw("F8_E4M3", 8, 8), "q.scale_weight": raw("F32")},
    "fp8, weight.scale": {"q.weight": raw("F8_E5M2", 8, 8), "q.weight.scale": raw("F32", 8, 1)},
    "fp8, experts": {"experts.up": raw("F8_E4M3", 2, 8, 8), "experts.up_scale_inv": raw("F32", 2, 1, 1)},
    "fp8 of another kind": {"q.weight": raw("F8_E4M3FNUZ", 8, 8)},
}


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("split", [False, True])
def test_codes_and_their_scales_are_no_weights(tmp_path, W, kind, split):
    # Beside them, a layer that is not quantised: most checkpoints leave embeddings as they are.
    named = {"embed.weight": f32(W), **{f"layers.0.{name}": tensor for name, tensor in CODES[kind].items()}}
    parts = [{name: tensor} for name, tensor in named.items()] if split else [named]
    for i, part in enumerate(parts):
        write_safetensors(tmp_path / f"part{i}.safetensors", part)
    first = f"layers.0.{next(iter(CODES[kind]))}"
    with pytest.raises(InputError, match=rf"is quantised \(1 of {len(named)} tensors hold codes, the first {first} \("):
        list_tensors(str(tmp_path))


@pytest.mark.parametrize("where", ["quantization_config", "compression_config", "text_config"])
def test_a_configuration_that_says_quantised_is_believed(tmp_path, W, where):
    write_safetensors(tmp_path / "model.safetensors", {"w": f32(W)})
    method = {"quant_method": "awq"}
    config = {"text_config": {"quantization_config": method}} if where == "text_config" else {where: method}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="config awq"):
        list_tensors(str(tmp_path))
    for empty in (None, {}):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": empty}))
        assert len(list_matrices(str(tmp_path))) == 1


def test_scales_without_codes_are_no_matrices(tmp_path, W):
    names = [
        "q.weight_scale",
        "q.scales",
        "q.qzeros",
        "q.absmax",
        "q.weight.quant_map",
        "q.SCB",
        "q.up_blocks",
        "q.bias",
    ]
    write_safetensors(tmp_path / "model.safetensors", {name: f32(W) for name in [*names, "q.weight"]})
    found = list_tensors(str(tmp_path))
    assert [info.name for info in found.matrices] == ["q.weight"]
    assert {tensor.name for tensor in found.unmeasured} == set(names)


def test_fp8_without_scales_and_scales_of_something_else_are_read(tmp_path, W):
    tensors = {"q.weight": raw("F8_E4M3", 4, 4), "logit_scale": raw("F32"), "attn.k_scale": raw("F32"), "k": f32(W)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert [info.name for info in list_matrices(str(tmp_path))] == ["k", "q.weight"]


# --- adapters, shards, indexes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", ["nothing", "config.json", "adapter_config.json alone"])
def test_an_adapters_folder_is_no_model(tmp_path, W, beside):
    (tmp_path / "adapter_config.json").write_text("{}")
    if beside == "config.json":
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if beside != "adapter_config.json alone":
        write_safetensors(tmp_path / "adapter_model.safetensors", {"q.lora_A.weight": f32(W)})
    for check in (list_tensors, check_model_folder):
        with pytest.raises(InputError, match=r"is an adapter's folder \(adapter_config\.json\); use --adapter"):
            check(str(tmp_path))
    # The control: a model with an adapter in the same folder.
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write_safetensors(tmp_path / "model.safetensors", {"q.weight": f32(W)})
    check_model_folder(str(tmp_path))
    assert [info.name for info in list_matrices(str(tmp_path))] == ["q.weight"]


def test_a_file_of_nothing_but_lora_factors_is_no_model(tmp_path, W):
    tensors = {f"m.q.lora_{side}.weight": f32(W) for side in "AB"}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(InputError, match="holds the factors of an adapter"):
        list_tensors(str(tmp_path))
    write_safetensors(tmp_path / "model.safetensors", tensors | {"m.q.base_layer.weight": f32(W)})
    assert [info.name for info in list_matrices(str(tmp_path))] == ["m.q.base_layer.weight"]


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("numbers", [[1], [2], [1, 3], [1, 2, 3]])
def test_shards_are_read_only_if_all_are_there(tmp_path, W, numbers, index):
    names = {f"w{i}": f"model-0000{i}-of-00003.safetensors" for i in numbers}
    for name, file in names.items():
        write_safetensors(tmp_path / file, {name: f32(W)})
    if index:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    if len(numbers) == 3:
        check_model_folder(str(tmp_path))
        assert len(list_matrices(str(tmp_path))) == 3
        return
    missing = min({1, 2, 3} - set(numbers))
    for check in (list_tensors, check_model_folder):
        with pytest.raises(InputError, match=rf"{len(numbers)} of 3 shards \(not model-0000{missing}-of-00003"):
            check(str(tmp_path))


@pytest.mark.parametrize("outside", ["../other/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "c:\\x", ""])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_files_of_its_own_folder(tmp_path, W, outside, index):
    folder = tmp_path / "model"
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
        write_safetensors(tmp_path / name / "part.safetensors", {"w": f32(W)})
    (folder / index).write_text(json.dumps({"weight_map": {"w": outside}}))
    message = "outside the folder" if outside else "no file name"
    with pytest.raises(InputError, match=message):
        check_model_folder(str(folder))
    if "safetensors" in index:
        with pytest.raises(InputError, match=message):
            list_tensors(str(folder))


def test_an_index_may_name_links_and_not_tensors_that_are_not_there(tmp_path, W):
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshot"
    folder.mkdir()
    write_safetensors(tmp_path / "blobs" / "1", {"w": f32(W)})
    (folder / "a.safetensors").symlink_to(tmp_path / "blobs" / "1")  # as the hub's cache has them
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    assert len(list_matrices(str(folder))) == 1
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}}))
    with pytest.raises(InputError, match=r"names 1 tensors that its shards lack \(v\)"):
        list_matrices(str(folder))
    for wrong in ({}, [], {"weight_map": []}, {"weight_map": {"w": 3}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(InputError):
            check_model_folder(str(folder))


# --- hostile files ------------------------------------------------------------------------------------------------


def write_header(path: Path, header: object, size: int) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


def test_the_format_forbids_overlaps_and_gaps(tmp_path):
    path = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [1, 2]}
    for offsets in ([0, 8], [4, 12], [12, 20]):
        write_header(path, {"a": entry | {"data_offsets": [0, 8]}, "b": entry | {"data_offsets": offsets}}, offsets[1])
        with pytest.raises(
            InputError, match=f"b begins at byte {offsets[0]} of the data, where the one before ends at 8"
        ):
            file_matrices(path)
    write_header(path, {"b": entry | {"data_offsets": [8, 16]}, "a": entry | {"data_offsets": [0, 8]}}, 16)
    assert [info.name for info in file_matrices(path)] == ["b", "a"]


def test_many_overlapping_tensors_are_refused_in_a_moment(tmp_path):
    entry = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    write_header(tmp_path / "model.safetensors", {f"layers.{i}.weight": entry for i in range(200_000)}, 4)
    began = time.process_time()
    with pytest.raises(InputError, match="begins at byte 0 of the data"):
        list_tensors(str(tmp_path))
    assert time.process_time() - began < 10  # a look at every pair would take hours


def test_headers_are_accepted_exactly_where_the_library_accepts_them(tmp_path):
    from safetensors import SafetensorError, safe_open

    path, rng = tmp_path / "model.safetensors", random.Random(0)
    odd = [-1, -4, 1.0, 4.0, True, None, "4", [], {}, 10**20, 2**64, 0, 1, 2, 8]
    verdicts = []
    for _ in range(1500):
        header: dict[str, object] = {}
        end = 0
        for i in range(rng.randint(1, 4)):
            dtype, width = rng.choice([("F32", 4), ("F16", 2), ("I64", 8), ("U8", 1), ("BOOL", 1)])
            shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
            begin, end = end, end + width * int(np.prod(shape, dtype=int))
            header[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        entry = header["t0"]
        assert isinstance(entry, dict)
        field = rng.choice(["shape", "data_offsets", "dtype"])
        change = rng.randrange(6)
        if change == 0 and field != "dtype" and entry[field]:
            entry[field][rng.randrange(len(entry[field]))] = rng.choice(odd)
        elif change == 1:
            entry[field] = rng.choice(odd)
        elif change == 2:
            del entry[field]
        elif change == 3:
            header["__metadata__"] = rng.choice([{"a": "b"}, {"a": 1}, [], None])
        write_header(path, header, end + rng.choice([0, 0, 0, 1]))
        try:
            with safe_open(path, "numpy"):
                accepted = True
        except (SafetensorError, ValueError):
            accepted = False
        try:
            file_matrices(path)
            verdicts.append((accepted, True))
        except InputError:
            verdicts.append((accepted, False))
    assert set(verdicts) == {(True, True), (False, False)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested"),
        ('{"a":' * 100_000, "nested"),
        ('{"model_type": ["bert"]}', "model_type in config.json .* must be a text"),
        ('{"model_type": {}}', "must be a text"),
        ('{"num_hidden_layers": 1000000000}', "'num_hidden_layers' .* above the limit of 10,000"),
        ('{"text_config": {"n_layer": 100000000000000000000000000}}', "'n_layer'"),
        ('{"n_routed_experts": 1000000000}', "'n_routed_experts'"),
        ("[]", "JSON object"),
    ],
)
def test_hostile_configurations_are_one_line(tmp_path, W, text, message):
    write_safetensors(tmp_path / "model.safetensors", {"w": f32(W)})
    (tmp_path / "config.json").write_text(text)
    for check in (list_tensors, check_model_folder, lambda model: read_config(Path(model))):
        with pytest.raises(InputError, match=message) as caught:
            check(str(tmp_path))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_names_cannot_act_on_the_terminal_and_stay_different(tmp_path, W):
    names = ["a\x1b[31mred", "a\\x1b[31mred", "b\n\r", "c\u202e", "h." + "9" * 5000 + ".w", "h.².w", "é"]
    write_safetensors(tmp_path / "model.safetensors", {name: f32(W) for name in names})
    shown = [info.name for info in list_matrices(str(tmp_path))]
    assert len(set(shown)) == len(names)
    assert all(name.isprintable() for name in shown)
    assert r"a\x1b[31mred" in shown
    assert "é" in shown
    write_safetensors(tmp_path / "model.safetensors", {"a\x1b[2J": f32(W[:0])})
    with pytest.raises(InputError) as caught:
        list_tensors(str(tmp_path))
    assert str(caught.value).isprintable()


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_pipes_and_folders_in_place_of_files_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="is no file"):
        list_tensors(str(tmp_path))
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="no regular file"):
        list_tensors(str(tmp_path))
    with pytest.raises(InputError):
        list_tensors("x" * 5000 + "/y")


@pytest.mark.parametrize("script", ["prune", "train", "eval"])
def test_a_model_that_would_be_read_from_elsewhere_is_refused_before_a_folder_is_claimed(tmp_path, capsys, script):
    import prune_finetune_lora
    from sparselora.__main__ import main

    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "bert"}')
    index = {"weight_map": {"w": "../../secret.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "".join(f"word {i},{i % 2}\n" for i in range(40)))
    given = ["--dataset", str(data), "--out_dir", str(out)]
    status = {
        "prune": lambda: prune_finetune_lora.main(["--model", str(model), *given]),
        "train": lambda: main(["train", "--model", str(model), "--task", "classification", *given]),
        "eval": lambda: main(["eval", "--model", str(model), "--task", "classification", *given]),
    }[script]()
    assert status == 2
    error = capsys.readouterr().err
    assert "which is outside the folder" in error
    assert error.count("\n") == 1
    assert not out.exists()
