"""Finding safetensors and reading them: every stored type, every layout, and every way a folder can be wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from sparselora.errors import InputError
from sparselora.weights import limit, list_matrices, load_matrix, refuse_damaged


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
