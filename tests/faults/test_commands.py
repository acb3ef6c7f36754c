"""Mistakes at the command line and files that are not what they should be: one line that names them, exit status 2."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"

# Arguments, and what the message has to name. MODEL, QUANTIZED, TEXT and OUT stand for paths, T for a temporary folder.
MISTAKES: list[tuple[str, str]] = [
    ("inspect T/none", "T/none"),
    ("inspect MODEL", "not quantized"),
    ("inspect MODEL/config.json", "is a file"),
    ("inspect " + "n" * 300, "too long"),
    ("inspect QUANTIZED --plot T/none/plot.png", "--plot"),
    ("inspect QUANTIZED --plot T", "--plot"),
    ("inspect QUANTIZED --plot T/plot.xyz", "--plot"),
    ("predict MODEL --target-bits 3 --plot T/none/plot.png", "--plot"),
    ("predict MODEL --target-bits 9 --format hptq", "--target-bits"),
    ("predict MODEL --target-bits nan", "--target-bits"),
    ("eval MODEL", "--data"),
    ("eval MODEL --data TEXT --window 0", "--window"),
    ("eval MODEL --data TEXT --window -4", "--window"),
    ("eval MODEL --data TEXT --window 1", "--window"),
    ("eval MODEL --data TEXT --window 65", "64 positions"),
    ("eval MODEL --data TEXT --window 32 --samples -1", "--samples"),
    ("eval MODEL --data T/none.txt --window 32", "none.txt"),
    ("eval MODEL --data " + "n" * 300 + " --window 32", "too long"),
    ("eval MODEL --tasks arc_easy --task-folder T/none", "--task-folder"),
    ("eval MODEL --tasks arc_easy --limit 0", "--limit"),
    ("convert QUANTIZED OUT --to dense --dtype float8_e4m3fn", "--dtype"),
    ("convert QUANTIZED OUT --to dense --dtype int8", "--dtype"),
    ("convert QUANTIZED OUT --to dense --dtype nn", "--dtype"),
    ("convert MODEL OUT --to dense", "not quantized"),
    ("convert QUANTIZED OUT --to dense --clip", "--clip"),
    ("push MODEL org/name", "is not quantized"),
    ("eval QUANTIZED --card", "--data"),
    ("convert QUANTIZED /proc/out --to dense", "/proc"),  # where nothing can be written
    ("quantize MODEL /proc/out --calibration TEXT --samples 2 --sequence-length 32", "/proc"),
    ("quantize MODEL OUT --bits 6", "--bits"),
    ("quantize MODEL OUT --size 3XB", "--size"),
    ("quantize MODEL OUT --size 1KB", "--size 1KB"),
    ("quantize MODEL OUT --fit 1GiB --size 1GB", "give one of them"),
    ("quantize MODEL OUT --fit 1GiB", "--fit 1GiB"),
    ("quantize MODEL OUT --fit 24GiB --format hptq", "--fit"),
    ("quantize MODEL OUT --overflow nan", "--overflow"),
    ("quantize MODEL OUT --paths 0", "--paths"),
    ("quantize MODEL OUT --samples -1", "--samples"),
    ("quantize MODEL OUT --sequence-length -1", "--sequence-length"),
    ("quantize MODEL OUT --sequence-length 65 --calibration TEXT", "64 positions"),
    ("quantize MODEL OUT --damping -1", "--damping"),
    ("quantize MODEL OUT --seed 18446744073709551616", "--seed"),
    ("quantize MODEL OUT --seed -9223372036854775809", "--seed"),
    ("quantize MODEL OUT --dtype float8_e5m2", "--dtype"),
    ("quantize MODEL OUT --dtype float31", "--dtype"),
    ("quantize MODEL OUT --device tpu", "--device"),
    ("quantize MODEL OUT --device cpu:x", "--device"),
    ("quantize MODEL OUT --device cuda:x", "--device"),
    ("quantize MODEL OUT --ignore (", "--ignore"),
    ("quantize MODEL OUT --lm-head 6", "--lm-head"),
    ("quantize MODEL OUT --rate 3", "--rate"),
    ("quantize MODEL OUT --no-column-steps", "--no-column-steps"),
    ("quantize MODEL OUT --format hptq --bits 4", "--bits"),
    ("quantize MODEL OUT --format hptq --overflow 0.01", "--overflow"),
    ("quantize MODEL OUT --format hptq --target-bits 3", "--target-bits"),
    ("quantize MODEL OUT --format hptq --group-size 32", "--group-size"),
    ("quantize MODEL OUT --format trellis --target-bits 1", "--target-bits"),
    ("quantize MODEL OUT --format trellis --target-bits 3 --rate 3", "--rate"),
    ("quantize MODEL OUT --calibration T/none.jsonl", "none.jsonl"),
    ("quantize MODEL OUT --calibration MODEL/model.safetensors", ".jsonl"),
]


def note(figures: Any, kind: str, found: Any, named: str) -> None:
    """Count how a command ended, which has to be a refusal that names what is at fault."""
    ended = "refused by name" if named in found.error else "refused without a name"
    figures[kind, "traceback" if found.traceback else ended if found.refused else "silent"] += 1
    assert found.refused, found
    assert named in found.error


@pytest.mark.parametrize(("line", "named"), MISTAKES, ids=[line[:70] for line, _ in MISTAKES])
def test_mistakes(
    line: str, named: str, source: Path, ssqr: Path, text: Path, tmp_path: Path, babai: Any, figures: Any
) -> None:
    paths = {"MODEL": str(source), "QUANTIZED": str(ssqr), "TEXT": str(text), "OUT": str(tmp_path / "out")}
    for name, path in paths.items():
        line = line.replace(name, path)
    found = babai(*line.replace("T/", f"{tmp_path}/").replace("--plot T", f"--plot {tmp_path}").split())
    note(figures, "mistake at the command line", found, named.replace("T/", f"{tmp_path}/"))
    assert list(tmp_path.iterdir()) == []


TEXTS: list[tuple[str, bytes, str]] = [
    ("a.txt", "Gitter, Stützstellen, für".encode("latin-1"), "UTF-8"),
    ("a.txt", bytes(1000), "zero bytes"),
    ("a.txt", POINTER.encode(), "git lfs pull"),
    ("a.jsonl", '{"text": "für"}'.encode("latin-1"), "UTF-8"),
    ("a.jsonl", b"[1, 2]\n", "line 1 is no JSON object"),
    ("a.jsonl", b"3\n", "line 1 is no JSON object"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', "line 2 is not JSON"),
    ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    ("a.jsonl", b'{"text": "\\ud800"}', "not Unicode"),
    ("a.jsonl", b'{"messages": [1, 2]}', "tokens"),
    ("a.jsonl", b'{"messages": [{"content": 3}]}', "tokens"),
    ("a.parquet", b"PAR1 and no more", "parquet"),
    ("a.parquet", b"", "parquet"),
    ("a.parquet", POINTER.encode(), "git lfs pull"),
    ("a.txt", b"", "0 tokens"),
    ("a.jsonl", b"", "0 tokens"),
]


@pytest.mark.parametrize(("name", "content", "named"), TEXTS, ids=[f"{t[0]} {t[2]} {len(t[1])}" for t in TEXTS])
def test_texts(name: str, content: bytes, named: str, source: Path, tmp_path: Path, babai: Any, figures: Any) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for command in (
        ("eval", source, "--window", 32, "--data", path),
        ("quantize", source, "OUT", "--calibration", path),
    ):
        found = babai(*command)
        note(figures, "damaged text", found, named)
        assert name in found.error


FILES: list[tuple[str, bytes, str]] = [
    ("config.json", b"", "config.json"),
    ("config.json", b"[]", "config.json"),
    ("config.json", b"{", "config.json"),
    ("config.json", b"[" * 100_000, "config.json"),
    ("config.json", b"\xff\xfe", "config.json"),
    ("config.json", POINTER.encode(), "git lfs pull"),
    ("config.json", b'{"model_type": "unheard_of"}', "config.json"),
    ("config.json", b'{"model_type": "llama", "hidden_size": "wide"}', "config.json"),
    ("config.json", b'{"model_type": "llama", "num_hidden_layers": 1000000000}', "config.json"),
    (
        "config.json",
        b'{"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config"}}',
        "code of the model's own",
    ),
    ("config.json", b'{"model_type": "bert"}', "encoder"),
    ("config.json", b'{"model_type": "t5"}', "not a causal language model"),
    (
        "config.json",
        b'{"model_type": "llama", "num_hidden_layers": 2, "architectures": ["LlamaForSequenceClassification"]}',
        "no logits",
    ),
    ("tokenizer.json", b"{}", "tokenizer"),
    ("tokenizer.json", b"{", "tokenizer"),
    ("tokenizer.json", POINTER.encode(), "git lfs pull"),
    ("tokenizer_config.json", b"[]", "tokenizer"),
    ("model.safetensors", b"", "model.safetensors"),
    ("model.safetensors", POINTER.encode(), "git lfs pull"),
    ("model.safetensors", b"\xff" * 64, "model.safetensors"),
    ("model.safetensors", (8).to_bytes(8, "little") + b"not json", "model.safetensors"),
    (INDEX, b"{}", "weight_map"),
    (INDEX, b'{"weight_map": {"a": 3}}', "weight_map"),
    (INDEX, b'{"weight_map": {"a": "../model.safetensors"}}', "not in the folder"),
    (INDEX, b'{"weight_map": {"a": "/etc/passwd"}}', "not in the folder"),
    (INDEX, b'{"weight_map": {"a": "none.safetensors"}}', "none.safetensors"),
    (INDEX, b'{"weight_map": {"a": "model.safetensors"}}', "lacks a"),
    (INDEX, POINTER.encode(), "git lfs pull"),
]


@pytest.mark.parametrize(("name", "content", "named"), FILES, ids=[f"{f[0]} {f[1][:40]!r}" for f in FILES])
def test_model_files(
    name: str, content: bytes, named: str, source: Path, text: Path, tmp_path: Path, babai: Any, figures: Any
) -> None:
    folder = shutil.copytree(source, tmp_path / "model")
    (folder / name).write_bytes(content)
    found = babai("eval", folder, "--data", text, "--window", 32, "--samples", 1)
    note(figures, "damaged file of a model", found, named)


def test_an_index_with_links_as_in_the_hub_cache(source: Path, text: Path, tmp_path: Path, babai: Any) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    shutil.copytree(source, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    names = load_file(source / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (snapshot / INDEX).write_text(json.dumps(index))
    found = babai("eval", snapshot, "--data", text, "--window", 32, "--samples", 1)
    assert (found.status, found.traceback) == (0, None), found


def test_a_broken_report_is_named(ssqr: Path, tmp_path: Path, babai: Any) -> None:
    folder = shutil.copytree(ssqr, tmp_path / "model")
    for content in ("{", "[]", "{}", '{"layers": 3}', '{"layers": [{"name": "a", "relative_error": "small"}]}'):
        (folder / "babai_report.json").write_text(content)
        found = babai("inspect", folder)
        assert found.refused, found
        assert "babai_report.json" in found.error


def test_nan_in_a_dense_model_is_named(source: Path, text: Path, tmp_path: Path, babai: Any) -> None:
    folder = shutil.copytree(source, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = babai("eval", folder, "--data", text, "--window", 32)
    assert found.refused, found
    assert "model.norm.weight has NaN" in found.error


def test_a_perplexity_that_is_no_number_is_refused(source: Path, text: Path, tmp_path: Path, babai: Any) -> None:
    folder = shutil.copytree(source, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = babai("eval", folder, "--data", text, "--window", 32)
    assert found.refused, found
    assert str(folder) in found.error and "nats per token" in found.error
