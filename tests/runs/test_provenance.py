"""The identity of a run: its arguments, and the content of what it reads."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from sparselora.runs import provenance
from sparselora.runs.folder import RunFolder
from sparselora.runs.provenance import commit, content_hash, fingerprint, model_stem, portable
from sparselora.runs.user_files import read_json

# --- recorded paths -----------------------------------------------------------------------------------------------


def test_no_absolute_path_in_run_json(tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("a\n1\n")
    arguments = {
        "file": str(data),
        "path": data,
        "several": [str(data), "glue/sst2"],
        "gone": str(tmp_path / "nowhere" / "model"),
        "hub": "org/name",
    }
    run = RunFolder(tmp_path / "out", "study", arguments, inputs=tuple(arguments))
    with pytest.raises(FileNotFoundError), run:
        (tmp_path / "absent" / "weights.bin").read_bytes()
    text = (tmp_path / "out" / "run.json").read_text()
    assert str(tmp_path) not in text
    assert tmp_path.parent.name not in text
    record = json.loads(text)
    assert record["arguments"]["hub"] == "org/name"
    assert record["arguments"]["gone"] == "model"
    assert record["arguments"]["file"]["name"] == "data.csv"
    assert record["arguments"]["several"][1] == "glue/sst2"
    assert record["error"].endswith("'weights.bin'")


def test_error_texts_keep_what_only_looks_like_a_path(tmp_path):
    text = "read/write of loss a/b failed at https://example.org/x, wanted 1 / 2"
    with pytest.raises(ValueError, match="wanted"), RunFolder(tmp_path, "study", {}):
        raise ValueError(text)
    assert read_json(tmp_path / "run.json")["error"] == f"ValueError: {text}"


def _print(**arguments: object) -> str:
    return fingerprint("study", arguments, inputs=("data",))


@pytest.mark.parametrize(
    ("one", "two"),
    [("/a/{prompt}", "/b/{prompt}"), ("A//{prompt}", "A/{prompt}"), ("./x", "x"), ("/", "/tmp"), ("a/.", "a")],
)
def test_a_text_with_a_slash_is_a_text(one, two):
    assert _print(template=one) != _print(template=two)
    assert portable({"template": one}, ("data",)) == {"template": one}


def test_fingerprint_follows_content_not_place(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.csv").write_text("other" if name == "three" else "same")
    prints = [_print(data=str(tmp_path / name / "data.csv"), rank=8) for name in ("one", "two", "three")]
    assert prints[0] == prints[1] != prints[2]
    assert fingerprint("study", {"a": 1, "b": 2}) == fingerprint("study", {"b": 2, "a": 1})
    assert fingerprint("study", {"a": 1}) != fingerprint("other", {"a": 1})


def test_a_table_or_model_in_the_working_directory_is_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_text("same")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "gaussian").mkdir()
    for name in ("data.csv", "model"):
        assert _print(data=name) == _print(data=f"./{name}") == _print(data=str(tmp_path / name))
    before = _print(data="data.csv")
    (tmp_path / "data.csv").write_text("other")
    assert _print(data="data.csv") != before
    word = fingerprint("study", {"matrix": "gaussian"}, inputs=("data",))
    (tmp_path / "gaussian").rmdir()
    assert fingerprint("study", {"matrix": "gaussian"}, inputs=("data",)) == word


@pytest.mark.parametrize("at", [0, 20 << 20, (40 << 20) - 1])
@pytest.mark.parametrize("in_folder", [False, True])
def test_one_byte_anywhere_in_a_file_of_40_mb_makes_another_run(tmp_path, at, in_folder):
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(40 << 20)
    place = path.parent if in_folder else path
    before = _print(data=place)
    assert _print(data=place) == before
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"x")
    assert _print(data=place) != before


def test_a_hash_that_was_kept_is_not_that_of_a_changed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_CACHED", 1)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"a" * 100)
    first, times = content_hash(path), path.stat()
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert content_hash(path) != first


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A file that has not changed for long, a call that hashes it as a new process does, and what was read for it."""
    monkeypatch.setattr(provenance, "_CACHED", 1)
    monkeypatch.setenv("SPARSELORA_CACHE", str(tmp_path / "cache"))
    clock = provenance.time.time_ns
    monkeypatch.setattr(provenance.time, "time_ns", lambda: clock() + 60_000_000_000)
    path, opened, real = tmp_path / "weights.bin", [], provenance._sha256
    monkeypatch.setattr(provenance, "_sha256", lambda *args: (opened.append(1), real(*args))[1])
    path.write_bytes(b"a" * 100)

    def hashed():
        opened.clear()
        provenance._large_file_hash.cache_clear()
        return content_hash(path), len(opened)

    return path, hashed


def test_another_process_reads_a_large_file_again_only_where_it_has_changed(cached):
    path, hashed = cached
    for content in (b"a" * 100, b"b" * 100, b"c" * 101):  # by hashlib alone
        if path.read_bytes() != content:
            times = path.stat()
            path.write_bytes(content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps its times
        expected = hashlib.sha256(content).hexdigest()
        assert hashed() == (expected, 1)
        assert hashed() == (expected, 0)
    other = path.with_name("other.bin")
    other.write_bytes(b"d" * 101)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)
    assert hashed() == (hashlib.sha256(b"d" * 101).hexdigest(), 1)


def test_the_hash_of_a_file_that_may_still_change_is_not_kept(cached, monkeypatch):
    path, hashed = cached
    monkeypatch.setattr(provenance.time, "time_ns", lambda: path.stat().st_mtime_ns + 1000)
    assert hashed()[1] == hashed()[1] == 1


@pytest.mark.parametrize("damage", [b"", b"f" * 63, b"\xff" * 64, b"F" * 64, b"f" * 64 + b"\n"])
def test_a_damaged_entry_of_the_cache_is_computed_again(cached, tmp_path, damage):
    _, hashed = cached
    expected = hashed()
    (entry,) = (tmp_path / "cache" / "hashes").iterdir()
    entry.write_bytes(damage)
    assert hashed() == expected
    assert entry.read_text() == expected[0]


def test_a_cache_that_cannot_be_written_is_done_without(cached, tmp_path):
    (tmp_path / "cache").write_text("a file")
    _, hashed = cached
    assert hashed() == hashed() == (hashlib.sha256(b"a" * 100).hexdigest(), 1)


def test_only_what_a_run_reads_of_a_folder_is_hashed(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors", "photo.jpg", "disk.img", "below/model.safetensors", "data/a.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "pipe.json")
    opened = []
    real = provenance._sha256
    monkeypatch.setattr(provenance, "_sha256", lambda path, size: (opened.append(path.name), real(path, size))[1])
    content_hash(tmp_path)
    assert opened == ["config.json", "model.safetensors"]
    opened.clear()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).unlink()
    content_hash(tmp_path)
    assert opened == ["a.csv"], "a folder of tables"
    opened.clear()
    for place in ("/dev/zero", "/dev/null", tmp_path / "pipe.json", "/proc", tmp_path / "nothing"):
        assert content_hash(Path(place)) is None
    assert opened == []


def test_a_model_is_named_by_its_folder_whichever_way_it_is_given(tmp_path, monkeypatch):
    (tmp_path / "minilm" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "minilm")
    for name in (".", "./", "../minilm", "below/..", str(tmp_path / "minilm")):
        assert model_stem(name) == "minilm"
    assert (model_stem("glue/sst2"), model_stem("data/train.csv.gz"), model_stem("/a/.hidden.csv")) == (
        "sst2", "train", "hidden",
    )  # fmt: skip


def test_the_commit_is_that_of_the_checkout():
    """By git itself, from the folder of the tests."""
    root = Path(__file__).resolve().parents[2]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    if head.returncode:
        assert commit() is None
    else:
        assert head.stdout.startswith(commit().rstrip("+"))
